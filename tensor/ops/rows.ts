// Checked operations that move or combine rows, which is what routing tokens to experts is made of.
// See `Kernels` in device.ts for the formulas.

import { now } from "../../trace/mod.ts";
import type { Tensor } from "../tensor.ts";
import {
  alive,
  disjoint,
  disjointOrSame,
  elements,
  fail,
  indices,
  isMatrix,
  lead,
  matrix,
  ran,
  rowWidth,
  wide,
  wideMatrix,
} from "./check.ts";

/**
 * `out[i] = x[rows[i]]`, for every dtype; a negative index writes zeros.
 *
 * @param x [*, D].
 * @param rows i32 [R], each below the rows of x.
 * @param out [R, D].
 * @throws {RangeError} If shapes, indices or devices do not fit.
 * @throws {TypeError} If dtypes differ.
 */
export function gatherRows(x: Tensor, rows: Tensor, out: Tensor): void {
  const op = "gather rows", D = rowWidth(op, "x", x), R = rows.size;
  alive(op, "x", x, out.device, out.dtype);
  alive(op, "out", out, x.device, x.dtype);
  if (out.size !== R * D) fail(op, `out must have shape [${R},${D}]`, `[${out.shape}]`);
  indices(op, "rows", rows, x, R);
  disjoint(op, "x", out, x);
  const start = now();
  x.device.kernels.gatherRows(x, rows, out);
  ran("gatherRows", "compute", start);
}

/**
 * `out[rows[i]] += x[i]`, in the order of i; a negative index is skipped.
 *
 * @param x [R, D].
 * @param rows i32 [R], each below the rows of out.
 * @param out [*, D], in the dtype of x; in f32, too, if that has 16 bits; added to.
 * @throws {RangeError} If shapes, indices or devices do not fit.
 * @throws {TypeError} If dtypes differ.
 */
export function scatterAddRows(x: Tensor, rows: Tensor, out: Tensor): void {
  const op = "scatter rows", D = rowWidth(op, "out", out), R = rows.size;
  lead(op, "x", x);
  elements(op, "x", x, x, R * D);
  wide(op, "out", out, x, out.size);
  indices(op, "rows", rows, x, R);
  disjoint(op, "x", out, x);
  const start = now();
  x.device.kernels.scatterAddRows(x, rows, out);
  ran("scatterAddRows", "compute", start);
}

/**
 * `out[n] = residual[n] + Σ_k weights[n,k] · y[slots[n,k]]`; a negative slot adds nothing.
 *
 * @param y [R, D].
 * @param slots i32 [N, K], each below R.
 * @param weights [N, K], in the dtype of y; in f32, too, if that has 16 bits; null for ones.
 * @param out [N, D].
 * @param residual [N, D]; may be out. @default {zeros}
 * @throws {RangeError} If shapes, slots or devices do not fit.
 * @throws {TypeError} If dtypes differ.
 */
export function combineRows(
  y: Tensor,
  slots: Tensor,
  weights: Tensor | null,
  out: Tensor,
  residual?: Tensor,
): void {
  const op = "combine rows";
  lead(op, "y", y);
  isMatrix(op, "y", y);
  isMatrix(op, "slots", slots);
  const [N, K] = slots.shape, D = y.shape[1];
  indices(op, "slots", slots, y, N * K);
  if (weights) wideMatrix(op, "weights", weights, y, N, K);
  matrix(op, "out", out, y, N, D);
  disjoint(op, "y", out, y);
  if (residual) {
    matrix(op, "residual", residual, y, N, D);
    disjointOrSame(op, "residual", out, residual);
  }
  const start = now();
  y.device.kernels.combineRows(y, slots, weights, out, residual);
  ran("combineRows", "compute", start);
}

/**
 * Gradient of {@linkcode combineRows}. Rows of y that no slot names get a zero gradient.
 *
 * @param dOut [N, D].
 * @param y [R, D].
 * @param slots i32 [N, K]; every row of y in at most one place, in exactly one where there are as many rows as places.
 * @param weights [N, K], in the dtype of y; in f32, too, if that has 16 bits.
 * @param dY [R, D].
 * @param dWeights [N, K], in the dtype of the weights.
 * @throws {RangeError} If shapes, slots or devices do not fit.
 * @throws {TypeError} If dtypes differ.
 */
export function combineRowsBackward(
  dOut: Tensor,
  y: Tensor,
  slots: Tensor,
  weights: Tensor,
  dY: Tensor,
  dWeights: Tensor,
): void {
  const op = "take the combination's gradient";
  lead(op, "y", y);
  isMatrix(op, "y", y);
  isMatrix(op, "slots", slots);
  const [N, K] = slots.shape, [R, D] = y.shape;
  indices(op, "slots", slots, y, N * K);
  wideMatrix(op, "weights", weights, y, N, K);
  matrix(op, "dOut", dOut, y, N, D);
  matrix(op, "dY", dY, y, R, D);
  matrix(op, "dWeights", dWeights, weights, N, K);
  disjoint(op, "dOut", dY, dOut);
  disjoint(op, "y", dY, y);
  const start = now();
  y.device.kernels.combineRowsBackward(dOut, y, slots, weights, dY, dWeights);
  ran("combineRowsBackward", "compute", start);
}
