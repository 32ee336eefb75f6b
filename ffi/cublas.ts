// cuBLAS: the matrix product, on one handle per device. Column-major as the library is; tensor/cuda/gemm.ts turns it to row-major.

import { addressOf, readCString } from "./address.ts";
import { CudaError, type CudaHandle, openCudaLibrary } from "./cuda_library.ts";
import type { CudaStreamHandle } from "./cudart.ts";

/** cublasHandle_t */
export type CublasHandle = CudaHandle<"cublasHandle_t">;

const SYMBOLS = {
  // cublasStatus_t cublasCreate_v2(cublasHandle_t *handle);
  cublasCreate_v2: { parameters: ["u64"], result: "i32" },
  // cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t streamId);
  cublasSetStream_v2: { parameters: ["u64", "u64"], result: "i32" },
  // cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *workspace, size_t workspaceSizeInBytes);
  cublasSetWorkspace_v2: { parameters: ["u64", "u64", "u64"], result: "i32" },
  // cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode);
  cublasSetMathMode: { parameters: ["u64", "i32"], result: "i32" },
  // cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
  //   const void *alpha, const void *A, cudaDataType Atype, int lda, const void *B, cudaDataType Btype, int ldb,
  //   const void *beta, void *C, cudaDataType Ctype, int ldc, cublasComputeType_t computeType, cublasGemmAlgo_t algo);
  cublasGemmEx: {
    // deno-fmt-ignore
    parameters: ["u64", "i32", "i32", "i32", "i32", "i32", "u64", "u64", "i32", "i32", "u64", "i32", "i32", "u64", "u64",
      "i32", "i32", "i32", "i32"],
    result: "i32",
  },
  // const char *cublasGetStatusString(cublasStatus_t status);
  cublasGetStatusString: { parameters: ["i32"], result: "pointer" },
} as const satisfies Deno.ForeignLibraryInterface;

/** The library's calls, named and ordered as in its manual; addresses are bigints; each returns a status code. */
export interface CublasCalls {
  /** cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) */
  cublasCreate_v2(handle: bigint): number;
  /** cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t streamId) */
  cublasSetStream_v2(handle: CublasHandle, stream: CudaStreamHandle): number;
  /** cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *workspace, size_t bytes) */
  cublasSetWorkspace_v2(handle: CublasHandle, workspace: bigint, bytes: bigint): number;
  /** cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) */
  cublasSetMathMode(handle: CublasHandle, mode: number): number;
  /** cublasStatus_t cublasGemmEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, computeType, algo) */
  cublasGemmEx(
    handle: CublasHandle,
    transposeA: number,
    transposeB: number,
    m: number,
    n: number,
    k: number,
    alpha: bigint,
    a: bigint,
    typeA: number,
    lda: number,
    b: bigint,
    typeB: number,
    ldb: number,
    beta: bigint,
    c: bigint,
    typeC: number,
    ldc: number,
    computeType: number,
    algorithm: number,
  ): number;
}

/** Values of the library's enumerations, from its header. */
export const CUBLAS = {
  noTranspose: 0,
  transpose: 1,
  typeF32: 0, // CUDA_R_32F
  typeF64: 1,
  typeBf16: 14,
  computeF32: 68, // CUBLAS_COMPUTE_32F: no TF32
  computeF64: 70,
  algorithmDefault: -1,
  // CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: split sums of bf16 products stay in f32
  mathFullSums: 16,
} as const;

/** The library that was opened. */
export interface Cublas {
  /** Its calls. */
  readonly calls: CublasCalls;
  /** The path or name by which it was opened. */
  readonly path: string;
  /** The library's words for a status. */
  statusString(code: number): string;
}

let loaded: Cublas | undefined;

/**
 * The matrix library of this process, loaded at the first call. `LINA_CUBLAS` may hold its absolute path.
 *
 * @returns The library.
 * @throws {LibraryNotFoundError} If none can be loaded; the message lists the places tried.
 */
export function cublas(): Cublas {
  if (loaded) return loaded;
  const { symbols, path } = openCudaLibrary("cuBLAS", "libcublas.so", "LINA_CUBLAS", SYMBOLS);
  return loaded = {
    calls: symbols as unknown as CublasCalls,
    path,
    statusString: (code) => readCString(symbols.cublasGetStatusString(code)),
  };
}

/**
 * Turns a status code into an exception.
 *
 * @param code What the call returned.
 * @param call The C function.
 * @param detail What the caller knows besides.
 * @throws {CudaError} If the code is not CUBLAS_STATUS_SUCCESS.
 */
export function checkCublas(code: number, call: string, detail = ""): void {
  if (code === 0) return;
  const name = loaded?.statusString(code) || "unknown status";
  throw new CudaError(call, code, name, detail || "no message");
}

/**
 * Makes a handle for a stream of the current device.
 *
 * @param stream The stream that its products run on.
 * @param workspace Device address of its workspace, so that it never allocates.
 * @param workspace_bytes Its size.
 * @returns The handle.
 * @throws {CudaError} If the library cannot start.
 */
export function createCublas(
  stream: CudaStreamHandle,
  workspace: bigint,
  workspace_bytes: number,
): CublasHandle {
  const { calls } = cublas();
  const out = new BigUint64Array(new ArrayBuffer(8));
  checkCublas(calls.cublasCreate_v2(addressOf(out.buffer)), "cublasCreate_v2");
  const handle = out[0] as CublasHandle;
  checkCublas(calls.cublasSetStream_v2(handle, stream), "cublasSetStream_v2");
  // The stream comes first: setting it puts the default workspace back.
  checkCublas(
    calls.cublasSetWorkspace_v2(handle, workspace, BigInt(workspace_bytes)),
    "cublasSetWorkspace_v2",
  );
  checkCublas(calls.cublasSetMathMode(handle, CUBLAS.mathFullSums), "cublasSetMathMode");
  return handle;
}
