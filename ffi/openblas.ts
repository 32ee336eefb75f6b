// The two matrix products of CBLAS, from OpenBLAS or, on macOS, Accelerate. Not a BLAS binding: the rest of the kernels are
// ours, and a process without such a library multiplies by them too.

import { LibraryNotFoundError, openFirst } from "./search.ts";

const CANDIDATES = Deno.build.os === "darwin"
  ? [
    "/System/Library/Frameworks/Accelerate.framework/Accelerate",
    "/opt/homebrew/opt/openblas/lib/libopenblas.dylib",
    "/usr/local/opt/openblas/lib/libopenblas.dylib",
  ]
  : Deno.build.os === "windows"
  ? ["libopenblas.dll", "openblas.dll"]
  : ["libopenblas.so.0", "libopenblas.so"];

/** CblasRowMajor. */
const ROW_MAJOR = 101;
const NO_TRANSPOSE = 111, TRANSPOSE = 112;

const SYMBOLS = {
  // void cblas_sgemm(CBLAS_ORDER order, CBLAS_TRANSPOSE transA, CBLAS_TRANSPOSE transB, blasint M, blasint N, blasint K,
  //   float alpha, const float *A, blasint lda, const float *B, blasint ldb, float beta, float *C, blasint ldc);
  cblas_sgemm: {
    // deno-fmt-ignore
    parameters: ["i32", "i32", "i32", "i32", "i32", "i32", "f32", "u64", "i32", "u64", "i32", "f32", "u64", "i32"],
    result: "void",
  },
  // void cblas_dgemm(… double alpha, const double *A, …);
  cblas_dgemm: {
    // deno-fmt-ignore
    parameters: ["i32", "i32", "i32", "i32", "i32", "i32", "f64", "u64", "i32", "u64", "i32", "f64", "u64", "i32"],
    result: "void",
  },
  // void openblas_set_num_threads(int num_threads);
  openblas_set_num_threads: { parameters: ["i32"], result: "void", optional: true },
} as const satisfies Deno.ForeignLibraryInterface;

/** A matrix product on machine addresses: `C = alpha · op(A) op(B) + beta · C`, row-major, leading dimensions in elements. */
export type BlasGemm = (
  transposeA: boolean,
  transposeB: boolean,
  m: number,
  n: number,
  k: number,
  alpha: number,
  a: bigint,
  lda: number,
  b: bigint,
  ldb: number,
  beta: number,
  c: bigint,
  ldc: number,
) => void;

/** The library that was found. */
export interface Blas {
  /** The path or name by which it was opened. */
  readonly path: string;
  /** The product in f32. */
  readonly sgemm: BlasGemm;
  /** The product in f64. */
  readonly dgemm: BlasGemm;
}

let found: Blas | null | undefined;

/**
 * The system's BLAS, opened at the first call. It computes on one thread, because every rank is a process of its own;
 * `OPENBLAS_NUM_THREADS` says otherwise. `LINA_OPENBLAS_LIB` names another library by absolute path, `LINA_BLAS=off` none.
 *
 * @returns The library, or null if none is installed or it is switched off.
 * @throws {LibraryNotFoundError} If `LINA_OPENBLAS_LIB` is set and cannot be opened.
 * @throws {RangeError} If `LINA_BLAS` is neither unset, `on` nor `off`.
 */
export function openBlas(): Blas | null {
  if (found !== undefined) return found;
  const wish = Deno.env.get("LINA_BLAS") ?? "on";
  if (wish !== "on" && wish !== "off") {
    throw new RangeError(
      `Cannot choose a BLAS as LINA_BLAS must be "on" or "off": current value is "${wish}"`,
    );
  }
  return found = wish === "off" ? null : open();
}

function open(): Blas | null {
  try {
    const { symbols, path } = openFirst("OpenBLAS", CANDIDATES, SYMBOLS, {
      env: "LINA_OPENBLAS_LIB",
    });
    if (!Deno.env.get("OPENBLAS_NUM_THREADS")) symbols.openblas_set_num_threads?.(1);
    // deno-fmt-ignore
    return {
      path,
      sgemm: (transposeA, transposeB, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc) =>
        symbols.cblas_sgemm(ROW_MAJOR, transposeA ? TRANSPOSE : NO_TRANSPOSE, transposeB ? TRANSPOSE : NO_TRANSPOSE,
          m, n, k, alpha, a, lda, b, ldb, beta, c, ldc),
      dgemm: (transposeA, transposeB, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc) =>
        symbols.cblas_dgemm(ROW_MAJOR, transposeA ? TRANSPOSE : NO_TRANSPOSE, transposeB ? TRANSPOSE : NO_TRANSPOSE,
          m, n, k, alpha, a, lda, b, ldb, beta, c, ldc),
    };
  } catch (error) {
    if (error instanceof LibraryNotFoundError && !Deno.env.get("LINA_OPENBLAS_LIB")) return null;
    throw error;
  }
}
