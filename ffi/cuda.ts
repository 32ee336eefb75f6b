// The calls of the CUDA driver that the runtime does not offer: modules and kernels from compiled code, tensor maps, and
// virtual memory management. They work in the primary context that `cudaSetDevice` made current.

import { addressOf, readCString } from "./address.ts";
import { cudaCandidates, CudaError, type CudaHandle } from "./cuda_library.ts";
import type { CudaStreamHandle } from "./cudart.ts";
import { openFirst } from "./search.ts";

/** CUmodule */
export type CudaModuleHandle = CudaHandle<"CUmodule">;
/** CUfunction */
export type CudaFunctionHandle = CudaHandle<"CUfunction">;
/** CUmemGenericAllocationHandle */
export type CudaMemoryHandle = CudaHandle<"CUmemGenericAllocationHandle">;

const SYMBOLS = {
  // CUresult cuInit(unsigned int Flags);
  cuInit: { parameters: ["u32"], result: "i32" },
  // CUresult cuDeviceGetName(char *name, int len, CUdevice dev);
  cuDeviceGetName: { parameters: ["u64", "i32", "i32"], result: "i32" },
  // CUresult cuModuleLoadData(CUmodule *module, const void *image);
  cuModuleLoadData: { parameters: ["u64", "u64"], result: "i32" },
  // CUresult cuModuleGetFunction(CUfunction *hfunc, CUmodule hmod, const char *name);
  cuModuleGetFunction: { parameters: ["u64", "u64", "u64"], result: "i32" },
  // CUresult cuFuncSetAttribute(CUfunction hfunc, CUfunction_attribute attrib, int value);
  cuFuncSetAttribute: { parameters: ["u64", "i32", "i32"], result: "i32" },
  // CUresult cuLaunchKernel(CUfunction f, unsigned int gridDimX, unsigned int gridDimY, unsigned int gridDimZ,
  //   unsigned int blockDimX, unsigned int blockDimY, unsigned int blockDimZ, unsigned int sharedMemBytes, CUstream hStream,
  //   void **kernelParams, void **extra);
  cuLaunchKernel: {
    // deno-fmt-ignore
    parameters: ["u64", "u32", "u32", "u32", "u32", "u32", "u32", "u32", "u64", "u64", "u64"],
    result: "i32",
  },
  // CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **kernelParams, void **extra);
  cuLaunchKernelEx: { parameters: ["u64", "u64", "u64", "u64"], result: "i32" },
  // CUresult cuTensorMapEncodeTiled(CUtensorMap *tensorMap, CUtensorMapDataType tensorDataType, cuuint32_t tensorRank,
  //   void *globalAddress, const cuuint64_t *globalDim, const cuuint64_t *globalStrides, const cuuint32_t *boxDim,
  //   const cuuint32_t *elementStrides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
  //   CUtensorMapL2promotion l2Promotion, CUtensorMapFloatOOBfill oobFill);
  cuTensorMapEncodeTiled: {
    // deno-fmt-ignore
    parameters: ["u64", "i32", "u32", "u64", "u64", "u64", "u64", "u64", "i32", "i32", "i32", "i32"],
    result: "i32",
  },
  // CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop,
  //   CUmemAllocationGranularity_flags option);
  cuMemGetAllocationGranularity: { parameters: ["u64", "u64", "i32"], result: "i32" },
  // CUresult cuMemAddressReserve(CUdeviceptr *ptr, size_t size, size_t alignment, CUdeviceptr addr, unsigned long long flags);
  cuMemAddressReserve: { parameters: ["u64", "u64", "u64", "u64", "u64"], result: "i32" },
  // CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop,
  //   unsigned long long flags);
  cuMemCreate: { parameters: ["u64", "u64", "u64", "u64"], result: "i32" },
  // CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags);
  cuMemMap: { parameters: ["u64", "u64", "u64", "u64", "u64"], result: "i32" },
  // CUresult cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc *desc, size_t count);
  cuMemSetAccess: { parameters: ["u64", "u64", "u64", "u64"], result: "i32" },
  // CUresult cuMemUnmap(CUdeviceptr ptr, size_t size);
  cuMemUnmap: { parameters: ["u64", "u64"], result: "i32" },
  // CUresult cuMemRelease(CUmemGenericAllocationHandle handle);
  cuMemRelease: { parameters: ["u64"], result: "i32" },
  // CUresult cuGetErrorName(CUresult error, const char **pStr);
  cuGetErrorName: { parameters: ["i32", "u64"], result: "i32" },
  // CUresult cuGetErrorString(CUresult error, const char **pStr);
  cuGetErrorString: { parameters: ["i32", "u64"], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** The driver's calls, named and ordered as in its manual; addresses are bigints; each returns a status code. */
export interface CudaCalls {
  /** CUresult cuInit(unsigned int Flags) */
  cuInit(flags: number): number;
  /** CUresult cuDeviceGetName(char *name, int len, CUdevice dev) */
  cuDeviceGetName(name: bigint, length: number, device: number): number;
  /** CUresult cuModuleLoadData(CUmodule *module, const void *image) */
  cuModuleLoadData(module: bigint, image: bigint): number;
  /** CUresult cuModuleGetFunction(CUfunction *hfunc, CUmodule hmod, const char *name) */
  cuModuleGetFunction(out: bigint, module: CudaModuleHandle, name: bigint): number;
  /** CUresult cuFuncSetAttribute(CUfunction hfunc, CUfunction_attribute attrib, int value) */
  cuFuncSetAttribute(kernel: CudaFunctionHandle, attribute: number, value: number): number;
  /** CUresult cuLaunchKernel(CUfunction f, grid x, y, z, block x, y, z, shared bytes, CUstream, void **kernelParams, void **extra) */
  cuLaunchKernel(
    kernel: CudaFunctionHandle,
    gridX: number,
    gridY: number,
    gridZ: number,
    blockX: number,
    blockY: number,
    blockZ: number,
    shared_bytes: number,
    stream: CudaStreamHandle,
    parameters: bigint,
    extra: bigint,
  ): number;
  /** CUresult cuLaunchKernelEx(const CUlaunchConfig *, CUfunction, void **kernelParams, void **extra) */
  cuLaunchKernelEx(
    config: bigint,
    kernel: CudaFunctionHandle,
    parameters: bigint,
    extra: bigint,
  ): number;
  /** CUresult cuTensorMapEncodeTiled(CUtensorMap *, data type, rank, address, sizes, strides, box, element strides, interleave, …) */
  cuTensorMapEncodeTiled(
    map: bigint,
    dataType: number,
    rank: number,
    address: bigint,
    sizes: bigint,
    strides: bigint,
    box: bigint,
    elementStrides: bigint,
    interleave: number,
    swizzle: number,
    l2Promotion: number,
    outOfBoundsFill: number,
  ): number;
  /** CUresult cuMemGetAllocationGranularity(size_t *, const CUmemAllocationProp *, CUmemAllocationGranularity_flags) */
  cuMemGetAllocationGranularity(out: bigint, properties: bigint, option: number): number;
  /** CUresult cuMemAddressReserve(CUdeviceptr *ptr, size_t size, size_t alignment, CUdeviceptr addr, unsigned long long flags) */
  cuMemAddressReserve(
    out: bigint,
    bytes: bigint,
    alignment: bigint,
    address: bigint,
    flags: bigint,
  ): number;
  /** CUresult cuMemCreate(CUmemGenericAllocationHandle *, size_t size, const CUmemAllocationProp *, unsigned long long flags) */
  cuMemCreate(out: bigint, bytes: bigint, properties: bigint, flags: bigint): number;
  /** CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle, unsigned long long flags) */
  cuMemMap(
    address: bigint,
    bytes: bigint,
    offset: bigint,
    handle: CudaMemoryHandle,
    flags: bigint,
  ): number;
  /** CUresult cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc *desc, size_t count) */
  cuMemSetAccess(address: bigint, bytes: bigint, access: bigint, count: bigint): number;
  /** CUresult cuMemUnmap(CUdeviceptr ptr, size_t size) */
  cuMemUnmap(address: bigint, bytes: bigint): number;
  /** CUresult cuMemRelease(CUmemGenericAllocationHandle handle) */
  cuMemRelease(handle: CudaMemoryHandle): number;
  /** CUresult cuGetErrorName(CUresult error, const char **pStr) */
  cuGetErrorName(code: number, out: bigint): number;
  /** CUresult cuGetErrorString(CUresult error, const char **pStr) */
  cuGetErrorString(code: number, out: bigint): number;
}

/** Values of the driver's enumerations, from its header. */
export const CUDA = {
  errorOutOfMemory: 2,
  launchProgrammaticStreamSerialization: 6, // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
  functionMaxDynamicSharedBytes: 8, // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
  allocationPinned: 1, // CU_MEM_ALLOCATION_TYPE_PINNED
  locationDevice: 1, // CU_MEM_LOCATION_TYPE_DEVICE
  accessReadWrite: 3, // CU_MEM_ACCESS_FLAGS_PROT_READWRITE
  granularityRecommended: 1,
  tensorMapF32: 7,
  tensorMapBf16: 9,
  tensorMapL2Promotion256: 3,
} as const;

/** The library that was opened. */
export interface Cuda {
  /** Its calls. */
  readonly calls: CudaCalls;
  /** The path or name by which it was opened. */
  readonly path: string;
}

/** The driver comes with the system or is put into a container by its runtime, never with a toolkit; the toolkit's stub is no driver. */
const PLACES = [
  "/usr/lib/x86_64-linux-gnu/libcuda.so.1",
  "/usr/lib/aarch64-linux-gnu/libcuda.so.1",
  "/usr/lib64/libcuda.so.1",
  "/usr/local/nvidia/lib64/libcuda.so.1",
  "/usr/lib/wsl/lib/libcuda.so.1",
];

let loaded: Cuda | undefined;

/**
 * The CUDA driver of this process, loaded at the first call. `LINA_CUDA` may hold its absolute path.
 *
 * @returns The library; `cuInit` has not been called.
 * @throws {LibraryNotFoundError} If none can be loaded; the message lists the places tried.
 */
export function cuda(): Cuda {
  if (loaded) return loaded;
  const candidates = ["libcuda.so.1", ...PLACES, ...cudaCandidates(["libcuda.so.1"]).slice(0, -1)];
  const { symbols, path } = openFirst("the CUDA driver", candidates, SYMBOLS, { env: "LINA_CUDA" });
  return loaded = { calls: symbols as unknown as CudaCalls, path };
}

const text = new BigUint64Array(new ArrayBuffer(8));

/**
 * Turns a status code into an exception.
 *
 * @param code What the call returned.
 * @param call The C function.
 * @throws {CudaError} If the code is not CUDA_SUCCESS.
 */
export function checkCuda(code: number, call: string): void {
  if (code !== 0) throw cudaError(code, call);
}

/**
 * The exception that a status code of the driver becomes.
 *
 * @param code What the call returned.
 * @param call The C function.
 * @param detail What the caller knows besides.
 * @returns The exception, to be thrown.
 */
export function cudaError(code: number, call: string, detail = ""): CudaError {
  const { calls } = cuda();
  const read = (get: (code: number, out: bigint) => number) => {
    text[0] = 0n; // stays so for a code that the library does not know
    get(code, addressOf(text.buffer));
    return readCString(text[0]);
  };
  const name = read(calls.cuGetErrorName) || "unknown error";
  return new CudaError(call, code, name, (read(calls.cuGetErrorString) || "no message") + detail);
}
