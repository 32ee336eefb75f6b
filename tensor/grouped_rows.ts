// Grouped products of rows that are taken by index, for devices or ways without a kernel of their own for them: the rows are copied to where they
// lie together, then multiplied.

import type { Kernels } from "./device.ts";
import { empty, type Tensor } from "./tensor.ts";

/** The grouped products. */
export type GroupedProducts = Pick<Kernels, "groupedGemm" | "groupedGemmWeightGrad">;

/** Rows that lie together; what was copied is freed with the handle, in the order of the stream. */
export interface TakenRows extends Disposable {
  /** The rows. */
  readonly x: Tensor;
}

/**
 * Rows by index as a matrix.
 *
 * @param kernels What copies rows.
 * @param x [*, D].
 * @param rows i32 [R], or none.
 * @returns A copy [R, D], or without `rows` the matrix itself; dispose of it once what reads it is enqueued.
 */
export function takeRows(
  kernels: Pick<Kernels, "gatherRows">,
  x: Tensor,
  rows: Tensor | undefined,
): TakenRows {
  if (!rows) return { x, [Symbol.dispose]: () => {} };
  const taken = empty(x.device, [rows.size, x.shape[1]], x.dtype);
  try {
    kernels.gatherRows(x, rows, taken);
  } catch (error) {
    taken[Symbol.dispose]();
    throw error;
  }
  return { x: taken, [Symbol.dispose]: () => taken[Symbol.dispose]() };
}

/**
 * Grouped products that copy rows which are taken by index.
 *
 * @param products The products of rows as they lie.
 * @param kernels What copies rows.
 * @returns The products; for rows by index they take memory while they enqueue.
 */
export function copyingProducts(
  products: GroupedProducts,
  kernels: Pick<Kernels, "gatherRows">,
): GroupedProducts {
  return {
    groupedGemm(x, weights, groups, out, options) {
      using taken = takeRows(kernels, x, options?.rows);
      products.groupedGemm(taken.x, weights, groups, out, { ...options, rows: undefined });
    },
    groupedGemmWeightGrad(dy, x, groups, grads, options) {
      using left = takeRows(kernels, dy, options?.dyRows);
      using right = takeRows(kernels, x, options?.xRows);
      products.groupedGemmWeightGrad(left.x, right.x, groups, grads, { beta: options?.beta });
    },
  };
}
