// Matrix products on the CPU: by BLAS when the system has one, else by the compiled kernel, which also takes the products too
// small for a call into a library to pay. The choice depends on the shape alone, so equal products give equal bits.

import { openBlas } from "../../ffi/openblas.ts";
import type { GemmOptions, RowGroups } from "../device.ts";
import type { Tensor } from "../tensor.ts";
import { allocate, machineAddress } from "./memory.ts";
import { indexView } from "./view.ts";
import { type RealKernels, wasmKernels } from "./wasm.ts";

/** `out = alpha · op(a) op(b) + beta · out` on byte offsets; leading dimensions are the rows' strides in elements. */
export type MatrixProduct = (
  transposeA: boolean,
  transposeB: boolean,
  m: number,
  n: number,
  k: number,
  alpha: number,
  a: number,
  lda: number,
  b: number,
  ldb: number,
  beta: number,
  out: number,
  ldo: number,
) => void;

/** Products of fewer multiplications than this go to the compiled kernel even where there is a BLAS. */
const SMALL = 512;

let sgemm: MatrixProduct | undefined, dgemm: MatrixProduct | undefined;

/**
 * The matrix product of a dtype.
 *
 * @param dtype f32 or f64.
 * @returns The function.
 * @throws {TypeError} If the CPU does not compute in the dtype.
 */
export function matrixProduct(dtype: string): MatrixProduct {
  if (dtype === "f32") return sgemm ??= choose("f32");
  if (dtype === "f64") return dgemm ??= choose("f64");
  throw new TypeError(
    `Cannot multiply on the CPU as the dtype must be f32 or f64: current value is ${dtype}`,
  );
}

function choose(dtype: "f32" | "f64"): MatrixProduct {
  const wasm = wasmProduct(wasmKernels()[dtype], dtype === "f32" ? 4 : 8);
  const blas = openBlas();
  if (!blas) return wasm;
  const product = dtype === "f32" ? blas.sgemm : blas.dgemm;
  return (transposeA, transposeB, m, n, k, alpha, a, lda, b, ldb, beta, out, ldo) => {
    if (m * n * k < SMALL) {
      wasm(transposeA, transposeB, m, n, k, alpha, a, lda, b, ldb, beta, out, ldo);
    } else {
      // deno-fmt-ignore
      product(transposeA, transposeB, m, n, k, alpha, machineAddress(a), lda, machineAddress(b), ldb,
        beta, machineAddress(out), ldo);
    }
  };
}

/**
 * The compiled product, on scratch memory of its own.
 *
 * @param kernels Kernels of the dtype.
 * @param elementBytes Size of an element in bytes.
 * @returns The function.
 */
export function wasmProduct(kernels: RealKernels, elementBytes: number): MatrixProduct {
  const scratch = allocate(kernels.gemm_scratch() * elementBytes);
  const product = kernels.gemm;
  return (transposeA, transposeB, m, n, k, alpha, a, lda, b, ldb, beta, out, ldo) => {
    const aRow = transposeA ? 1 : lda, aColumn = transposeA ? lda : 1;
    const bRow = transposeB ? 1 : ldb, bColumn = transposeB ? ldb : 1;
    product(m, n, k, alpha, a, aRow, aColumn, b, bRow, bColumn, beta, out, ldo, scratch);
  };
}

/** `Kernels.gemm` on the CPU. */
export function gemm(a: Tensor, b: Tensor, out: Tensor, options?: GemmOptions): void {
  const transposeA = options?.transposeA ?? false, transposeB = options?.transposeB ?? false;
  const M = out.shape[0], N = out.shape[1], K = transposeA ? a.shape[0] : a.shape[1];
  const alpha = options?.alpha ?? 1, beta = options?.beta ?? 0;
  if (M === 0 || N === 0) return;
  // deno-fmt-ignore
  matrixProduct(a.dtype)(transposeA, transposeB, M, N, K, alpha, a.address, a.shape[1], b.address, b.shape[1],
    beta, out.address, N);
}

/** `Kernels.groupedGemm` on the CPU. */
export function groupedGemm(
  x: Tensor,
  weights: readonly Tensor[],
  groups: RowGroups,
  out: Tensor,
  options?: { readonly transposeWeight?: boolean; readonly beta?: number },
): void {
  const offsets = indexView(groups.offsets);
  const product = matrixProduct(x.dtype), bytes = x.dtype === "f32" ? 4 : 8;
  const transposeB = !options?.transposeWeight, beta = options?.beta ?? 0;
  const from = x.shape[1], to = out.shape[1];
  if (to === 0) return;
  for (let g = 0; g < weights.length; g++) {
    const start = offsets[g], rows = offsets[g + 1] - start;
    if (rows === 0) continue;
    // deno-fmt-ignore
    product(false, transposeB, rows, to, from, 1, x.address + start * from * bytes, from,
      weights[g].address, transposeB ? from : to, beta, out.address + start * to * bytes, to);
  }
}

/** `Kernels.groupedGemmWeightGrad` on the CPU. */
export function groupedGemmWeightGrad(
  dy: Tensor,
  x: Tensor,
  groups: RowGroups,
  grads: readonly Tensor[],
  options?: { readonly beta?: number },
): void {
  const product = matrixProduct(x.dtype), bytes = x.dtype === "f32" ? 4 : 8;
  const offsets = indexView(groups.offsets), beta = options?.beta ?? 1;
  const from = x.shape[1], to = dy.shape[1];
  if (from === 0 || to === 0) return;
  for (let g = 0; g < grads.length; g++) {
    const start = offsets[g], rows = offsets[g + 1] - start;
    if (rows === 0 && beta === 1) continue;
    // deno-fmt-ignore
    product(true, false, to, from, rows, 1, dy.address + start * to * bytes, to,
      x.address + start * from * bytes, from, beta, grads[g].address, from);
  }
}
