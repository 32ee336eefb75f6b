// The calls of the CUDA runtime that the device needs: memory, copies, streams and events. Not a binding of all of it: kernels
// are launched through the driver (cuda.ts). Addresses and handles are u64 as bigints, the fastest way through Deno's FFI.

import { addressOf, readCString } from "./address.ts";
import { CudaError, type CudaHandle, openCudaLibrary, preferCudaMajor } from "./cuda_library.ts";

/** cudaStream_t */
export type CudaStreamHandle = CudaHandle<"cudaStream_t">;
/** cudaEvent_t */
export type CudaEventHandle = CudaHandle<"cudaEvent_t">;

const SYMBOLS = {
  // cudaError_t cudaGetDeviceCount(int *count);
  cudaGetDeviceCount: { parameters: ["u64"], result: "i32" },
  // cudaError_t cudaSetDevice(int device);
  cudaSetDevice: { parameters: ["i32"], result: "i32" },
  // The same on another thread, where it makes the device's context without holding up this one.
  cudaSetDeviceElsewhere: {
    name: "cudaSetDevice",
    parameters: ["i32"],
    result: "i32",
    nonblocking: true,
  },
  // cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attr, int device);
  cudaDeviceGetAttribute: { parameters: ["u64", "i32", "i32"], result: "i32" },
  // cudaError_t cudaDeviceGetPCIBusId(char *pciBusId, int len, int device);
  cudaDeviceGetPCIBusId: { parameters: ["u64", "i32", "i32"], result: "i32", optional: true },
  // cudaError_t cudaRuntimeGetVersion(int *runtimeVersion);
  cudaRuntimeGetVersion: { parameters: ["u64"], result: "i32" },
  // cudaError_t cudaDriverGetVersion(int *driverVersion);
  cudaDriverGetVersion: { parameters: ["u64"], result: "i32" },
  // cudaError_t cudaMalloc(void **devPtr, size_t size);
  cudaMalloc: { parameters: ["u64", "u64"], result: "i32" },
  // cudaError_t cudaFree(void *devPtr);
  cudaFree: { parameters: ["u64"], result: "i32" },
  // cudaError_t cudaHostAlloc(void **pHost, size_t size, unsigned int flags);
  cudaHostAlloc: { parameters: ["u64", "u64", "u32"], result: "i32" },
  // cudaError_t cudaFreeHost(void *ptr);
  cudaFreeHost: { parameters: ["u64"], result: "i32" },
  // cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t count, enum cudaMemcpyKind kind, cudaStream_t stream);
  cudaMemcpyAsync: { parameters: ["u64", "u64", "u64", "i32", "u64"], result: "i32" },
  // cudaError_t cudaMemsetAsync(void *devPtr, int value, size_t count, cudaStream_t stream);
  cudaMemsetAsync: { parameters: ["u64", "i32", "u64", "u64"], result: "i32" },
  // cudaError_t cudaMemGetInfo(size_t *free, size_t *total);
  cudaMemGetInfo: { parameters: ["u64", "u64"], result: "i32" },
  // cudaError_t cudaStreamCreateWithPriority(cudaStream_t *pStream, unsigned int flags, int priority);
  cudaStreamCreateWithPriority: { parameters: ["u64", "u32", "i32"], result: "i32" },
  // cudaError_t cudaStreamDestroy(cudaStream_t stream);
  cudaStreamDestroy: { parameters: ["u64"], result: "i32" },
  // cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags);
  cudaStreamWaitEvent: { parameters: ["u64", "u64", "u32"], result: "i32" },
  // cudaError_t cudaStreamQuery(cudaStream_t stream);
  cudaStreamQuery: { parameters: ["u64"], result: "i32" },
  // cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags);
  cudaEventCreateWithFlags: { parameters: ["u64", "u32"], result: "i32" },
  // cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
  cudaEventRecord: { parameters: ["u64", "u64"], result: "i32" },
  // cudaError_t cudaEventQuery(cudaEvent_t event);
  cudaEventQuery: { parameters: ["u64"], result: "i32" },
  // cudaError_t cudaEventSynchronize(cudaEvent_t event); on another thread, as it waits
  cudaEventSynchronize: { parameters: ["u64"], result: "i32", nonblocking: true },
  // cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end);
  cudaEventElapsedTime: { parameters: ["u64", "u64", "u64"], result: "i32" },
  // const char *cudaGetErrorName(cudaError_t error);
  cudaGetErrorName: { parameters: ["i32"], result: "pointer" },
  // const char *cudaGetErrorString(cudaError_t error);
  cudaGetErrorString: { parameters: ["i32"], result: "pointer" },
  // cudaError_t cudaGetLastError(void);
  cudaGetLastError: { parameters: [], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** The runtime's calls, named and ordered as in its manual; addresses are bigints; each returns a status code. */
export interface CudartCalls {
  /** cudaError_t cudaGetDeviceCount(int *count) */
  cudaGetDeviceCount(count: bigint): number;
  /** cudaError_t cudaSetDevice(int device) */
  cudaSetDevice(device: number): number;
  /** The same on another thread; it is current there, and its context made for all. */
  cudaSetDeviceElsewhere(device: number): Promise<number>;
  /** cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attr, int device) */
  cudaDeviceGetAttribute(value: bigint, attribute: number, device: number): number;
  /** cudaError_t cudaDeviceGetPCIBusId(char *pciBusId, int len, int device) */
  readonly cudaDeviceGetPCIBusId: ((id: bigint, length: number, device: number) => number) | null;
  /** cudaError_t cudaRuntimeGetVersion(int *runtimeVersion) */
  cudaRuntimeGetVersion(version: bigint): number;
  /** cudaError_t cudaDriverGetVersion(int *driverVersion) */
  cudaDriverGetVersion(version: bigint): number;
  /** cudaError_t cudaMalloc(void **devPtr, size_t size) */
  cudaMalloc(address: bigint, bytes: bigint): number;
  /** cudaError_t cudaFree(void *devPtr) */
  cudaFree(address: bigint): number;
  /** cudaError_t cudaHostAlloc(void **pHost, size_t size, unsigned int flags) */
  cudaHostAlloc(address: bigint, bytes: bigint, flags: number): number;
  /** cudaError_t cudaFreeHost(void *ptr) */
  cudaFreeHost(address: bigint): number;
  /** cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t count, cudaMemcpyKind kind, cudaStream_t stream) */
  cudaMemcpyAsync(
    to: bigint,
    from: bigint,
    bytes: bigint,
    kind: number,
    stream: CudaStreamHandle,
  ): number;
  /** cudaError_t cudaMemsetAsync(void *devPtr, int value, size_t count, cudaStream_t stream) */
  cudaMemsetAsync(address: bigint, value: number, bytes: bigint, stream: CudaStreamHandle): number;
  /** cudaError_t cudaMemGetInfo(size_t *free, size_t *total) */
  cudaMemGetInfo(free: bigint, total: bigint): number;
  /** cudaError_t cudaStreamCreateWithPriority(cudaStream_t *pStream, unsigned int flags, int priority) */
  cudaStreamCreateWithPriority(stream: bigint, flags: number, priority: number): number;
  /** cudaError_t cudaStreamDestroy(cudaStream_t stream) */
  cudaStreamDestroy(stream: CudaStreamHandle): number;
  /** cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags) */
  cudaStreamWaitEvent(stream: CudaStreamHandle, event: CudaEventHandle, flags: number): number;
  /** cudaError_t cudaStreamQuery(cudaStream_t stream) */
  cudaStreamQuery(stream: CudaStreamHandle): number;
  /** cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags) */
  cudaEventCreateWithFlags(event: bigint, flags: number): number;
  /** cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) */
  cudaEventRecord(event: CudaEventHandle, stream: CudaStreamHandle): number;
  /** cudaError_t cudaEventQuery(cudaEvent_t event) */
  cudaEventQuery(event: CudaEventHandle): number;
  /** cudaError_t cudaEventSynchronize(cudaEvent_t event), on another thread: resolves once the event has passed. */
  cudaEventSynchronize(event: CudaEventHandle): Promise<number>;
  /** cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) */
  cudaEventElapsedTime(ms: bigint, start: CudaEventHandle, end: CudaEventHandle): number;
  /** const char *cudaGetErrorName(cudaError_t error) */
  cudaGetErrorName(code: number): Deno.PointerValue;
  /** const char *cudaGetErrorString(cudaError_t error) */
  cudaGetErrorString(code: number): Deno.PointerValue;
  /** cudaError_t cudaGetLastError(void) */
  cudaGetLastError(): number;
}

/** Values of the runtime's enumerations, from its header. */
export const CUDART = {
  success: 0,
  errorMemoryAllocation: 2,
  errorNotReady: 600,
  hostToDevice: 1,
  deviceToHost: 2,
  deviceToDevice: 3,
  streamNonBlocking: 1,
  eventDefault: 0,
  eventBlockingSync: 1,
  eventDisableTiming: 2,
  hostAllocPortable: 1,
  attributeMultiprocessors: 16,
  attributeL2Bytes: 38,
  attributeMajor: 75,
  attributeMinor: 76,
  attributeSharedMemory: 97, // cudaDevAttrMaxSharedMemoryPerBlockOptin
} as const;

/** The library that was opened. */
export interface Cudart {
  /** Its calls. */
  readonly calls: CudartCalls;
  /** The path or name by which it was opened. */
  readonly path: string;
}

let loaded: Cudart | undefined;

/**
 * The CUDA runtime of this process, loaded at the first call. `LINA_CUDART` may hold its absolute path.
 *
 * @param majors Major versions that may be opened, best first.
 * @returns The library; opening touches no device.
 * @throws {LibraryNotFoundError} If none can be loaded; the message lists the places tried.
 */
export function cudart(majors?: readonly number[]): Cudart {
  if (loaded && majors === undefined) return loaded;
  const { symbols, path } = openCudaLibrary(
    "the CUDA runtime",
    "libcudart.so",
    "LINA_CUDART",
    SYMBOLS,
    majors,
  );
  const major = /\.so\.(\d+)/.exec(path)?.[1];
  if (major !== undefined) preferCudaMajor(Number(major));
  return loaded = { calls: symbols as unknown as CudartCalls, path };
}

/**
 * Where a GPU sits in its machine, by which two processes can tell whether they use the same one.
 *
 * @param device Its number among those that this process sees.
 * @returns Domain, bus, device and function: `0000:1b:00.0`; the number where the library cannot tell.
 */
export function pciBusId(device: number): string {
  const text = new Uint8Array(new ArrayBuffer(64));
  const code = cudart().calls.cudaDeviceGetPCIBusId?.(addressOf(text.buffer), 64, device);
  if (code === undefined) return `${device}`;
  checkCudart(code, "cudaDeviceGetPCIBusId");
  return new TextDecoder().decode(text.subarray(0, text.indexOf(0)));
}

/**
 * Turns a status code into an exception.
 *
 * @param code What the call returned.
 * @param call The C function.
 * @throws {CudaError} If the code is not cudaSuccess.
 */
export function checkCudart(code: number, call: string): void {
  if (code !== 0) throw cudartError(code, call);
}

/**
 * The exception that a status code of the runtime becomes.
 *
 * @param code What the call returned.
 * @param call The C function.
 * @param detail What the caller knows besides.
 * @returns The exception, to be thrown.
 */
export function cudartError(code: number, call: string, detail = ""): CudaError {
  const { calls } = cudart();
  const name = readCString(calls.cudaGetErrorName(code));
  return new CudaError(call, code, name, readCString(calls.cudaGetErrorString(code)) + detail);
}
