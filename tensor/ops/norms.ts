// Checked operations over the columns of each row: normalisation, rotary positions, softmax and the loss.
// See `Kernels` in device.ts for the formulas.

import { now } from "../../trace/mod.ts";
import type { Tensor } from "../tensor.ts";
import {
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
  statistics,
  wide,
} from "./check.ts";

/**
 * `out = x / rms(x) · gain` by row, with `rms(x) = √(mean(x²) + eps)`.
 *
 * @param x [N, D].
 * @param gain [D].
 * @param out [N, D].
 * @param invRms [N], f32 (f64 for f64): 1 / rms, saved for the gradient.
 * @param eps Added to the mean square.
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function rmsNorm(x: Tensor, gain: Tensor, out: Tensor, invRms: Tensor, eps: number): void {
  const op = "normalise";
  lead(op, "x", x);
  isMatrix(op, "x", x);
  const [N, D] = x.shape;
  elements(op, "gain", gain, x, D);
  matrix(op, "out", out, x, N, D);
  statistics(op, "invRms", invRms, x, N);
  disjoint(op, "x", out, x);
  const start = now();
  x.device.kernels.rmsNorm(x, gain, out, invRms, eps);
  ran("rmsNorm", "compute", start);
}

/**
 * `sum = x + y`, `out = rmsNorm(sum)`: a residual connection and the norm behind it in one pass.
 *
 * @param x [N, D].
 * @param y [N, D].
 * @param gain [D].
 * @param sum [N, D]; may be x or y.
 * @param out [N, D].
 * @param invRms [N], f32 (f64 for f64): 1 / rms of the sum.
 * @param eps Added to the mean square.
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function addRmsNorm(
  x: Tensor,
  y: Tensor,
  gain: Tensor,
  sum: Tensor,
  out: Tensor,
  invRms: Tensor,
  eps: number,
): void {
  const op = "add and normalise";
  lead(op, "x", x);
  isMatrix(op, "x", x);
  const [N, D] = x.shape;
  matrix(op, "y", y, x, N, D);
  elements(op, "gain", gain, x, D);
  matrix(op, "sum", sum, x, N, D);
  matrix(op, "out", out, x, N, D);
  statistics(op, "invRms", invRms, x, N);
  disjointOrSame(op, "x", sum, x);
  disjointOrSame(op, "y", sum, y);
  disjoint(op, "x", out, x);
  disjoint(op, "y", out, y);
  disjoint(op, "sum", out, sum);
  const start = now();
  x.device.kernels.addRmsNorm(x, y, gain, sum, out, invRms, eps);
  ran("addRmsNorm", "compute", start);
}

/**
 * Gradient of {@linkcode rmsNorm}: writes dX, adds to dGain. With a residual, dX is the residual plus the gradient.
 *
 * @param dOut [N, D].
 * @param x [N, D].
 * @param gain [D].
 * @param invRms What rmsNorm saved.
 * @param dX [N, D].
 * @param dGain [D], in the dtype of the gain; in f32, too, if that has 16 bits; added to.
 * @param residual [N, D]; may be dX.
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function rmsNormBackward(
  dOut: Tensor,
  x: Tensor,
  gain: Tensor,
  invRms: Tensor,
  dX: Tensor,
  dGain: Tensor,
  residual?: Tensor,
): void {
  const op = "take the norm's gradient";
  lead(op, "x", x);
  isMatrix(op, "x", x);
  const [N, D] = x.shape;
  matrix(op, "dOut", dOut, x, N, D);
  elements(op, "gain", gain, x, D);
  statistics(op, "invRms", invRms, x, N);
  matrix(op, "dX", dX, x, N, D);
  wide(op, "dGain", dGain, x, D);
  disjoint(op, "x", dX, x);
  disjoint(op, "dOut", dX, dOut);
  if (residual) {
    matrix(op, "residual", residual, x, N, D);
    disjointOrSame(op, "residual", dX, residual);
  }
  const start = now();
  x.device.kernels.rmsNormBackward(dOut, x, gain, invRms, dX, dGain, residual);
  ran("rmsNormBackward", "compute", start);
}

/**
 * Rotary positions in place: the pair (i, i + C/2) of every head turns by `position · theta^(−2i/C)`.
 *
 * @param x [N, heads·C]; updated.
 * @param positions i32 [N].
 * @param options Width C of a head, the base theta, and whether to turn back, which is the gradient.
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function rope(
  x: Tensor,
  positions: Tensor,
  options: { readonly headDim: number; readonly theta: number; readonly inverse?: boolean },
): void {
  const op = "rotate", C = options.headDim;
  lead(op, "x", x);
  isMatrix(op, "x", x);
  if (!(Number.isInteger(C) && C > 0 && C % 2 === 0)) fail(op, "headDim must be even and > 0", C);
  if (x.shape[1] % C !== 0) {
    fail(op, `the columns of x must be a multiple of ${C}`, `[${x.shape}]`);
  }
  if (!(options.theta > 0)) fail(op, "theta must be > 0", options.theta);
  indices(op, "positions", positions, x, x.shape[0]);
  const start = now();
  x.device.kernels.rope(x, positions, options);
  ran("rope", "compute", start);
}

/** q, k, v and what joins them must be [N, H·C], [N, G·C], [N, G·C] and [N, (H + 2G)·C]. */
function checkQkv(
  op: string,
  tensors: {
    readonly joined: Tensor;
    readonly names: readonly [joined: string, q: string, k: string, v: string];
    readonly q: Tensor;
    readonly k: Tensor;
    readonly v: Tensor;
  },
  positions: Tensor,
  options: { readonly headDim: number; readonly theta: number },
): void {
  const { joined, names, q, k, v } = tensors, C = options.headDim;
  if (!(Number.isInteger(C) && C > 0 && C % 2 === 0)) fail(op, "headDim must be even and > 0", C);
  if (!(options.theta > 0)) fail(op, "theta must be > 0", options.theta);
  lead(op, names[0], joined);
  isMatrix(op, names[0], joined);
  isMatrix(op, names[1], q);
  isMatrix(op, names[2], k);
  const [N, columns] = joined.shape, H = q.shape[1], G = k.shape[1];
  matrix(op, names[1], q, joined, N, H);
  matrix(op, names[2], k, joined, N, G);
  matrix(op, names[3], v, joined, N, G);
  if (H % C !== 0 || G % C !== 0) {
    fail(op, `the columns of ${names[1]} and ${names[2]} must be multiples of ${C}`, `${H}, ${G}`);
  }
  if (columns !== H + 2 * G) {
    fail(op, `${names[0]} must have ${H + 2 * G} columns`, `[${joined.shape}]`);
  }
  indices(op, "positions", positions, joined, N);
  for (const [i, part] of [q, k, v].entries()) disjoint(op, names[i + 1], joined, part);
}

/**
 * The columns of a fused projection apart, queries and keys turned as by {@linkcode rope}.
 *
 * @param qkv [N, (H + 2G)·C]: queries, keys, values.
 * @param positions i32 [N].
 * @param options Width C of a head and the base theta.
 * @param q [N, H·C].
 * @param k [N, G·C].
 * @param v [N, G·C].
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function splitQkv(
  qkv: Tensor,
  positions: Tensor,
  options: { readonly headDim: number; readonly theta: number },
  q: Tensor,
  k: Tensor,
  v: Tensor,
): void {
  const names = ["qkv", "q", "k", "v"] as const;
  checkQkv("split a projection", { joined: qkv, names, q, k, v }, positions, options);
  const start = now();
  qkv.device.kernels.splitQkv(qkv, positions, options, q, k, v);
  ran("splitQkv", "compute", start);
}

/**
 * Gradient of {@linkcode splitQkv}.
 *
 * @param dQ [N, H·C].
 * @param dK [N, G·C].
 * @param dV [N, G·C].
 * @param positions i32 [N].
 * @param options As in splitQkv.
 * @param dQkv [N, (H + 2G)·C].
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function joinQkv(
  dQ: Tensor,
  dK: Tensor,
  dV: Tensor,
  positions: Tensor,
  options: { readonly headDim: number; readonly theta: number },
  dQkv: Tensor,
): void {
  const names = ["dQkv", "dQ", "dK", "dV"] as const;
  checkQkv("join gradients", { joined: dQkv, names, q: dQ, k: dK, v: dV }, positions, options);
  const start = now();
  dQkv.device.kernels.joinQkv(dQ, dK, dV, positions, options, dQkv);
  ran("joinQkv", "compute", start);
}

/**
 * Row-wise softmax; out may be x.
 *
 * @param x [N, V].
 * @param out [N, V].
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes differ.
 */
export function softmax(x: Tensor, out: Tensor): void {
  const op = "take the softmax";
  lead(op, "x", x);
  isMatrix(op, "x", x);
  matrix(op, "out", out, x, x.shape[0], rowWidth(op, "x", x));
  disjointOrSame(op, "x", out, x);
  const start = now();
  x.device.kernels.softmax(x, out);
  ran("softmax", "compute", start);
}

/**
 * `dX = y ⊙ (dY − (y · dY))` by row, for y = softmax(x); dX may be dY.
 *
 * @param dY [N, V].
 * @param y [N, V].
 * @param dX [N, V].
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes differ.
 */
export function softmaxBackward(dY: Tensor, y: Tensor, dX: Tensor): void {
  const op = "take the softmax's gradient";
  lead(op, "y", y);
  isMatrix(op, "y", y);
  const [N, V] = y.shape;
  matrix(op, "dY", dY, y, N, V);
  matrix(op, "dX", dX, y, N, V);
  disjointOrSame(op, "dY", dX, dY);
  disjoint(op, "y", dX, y);
  const start = now();
  y.device.kernels.softmaxBackward(dY, y, dX);
  ran("softmaxBackward", "compute", start);
}

/**
 * Softmax cross-entropy, forward and gradient at once. A negative target is ignored: loss 0, gradient 0.
 *
 * @param logits [N, V]; replaced by `scale · d loss / d logits`.
 * @param targets i32 [N], each below V.
 * @param losses [N], f32 (f64 for f64), in nats.
 * @param scale Factor of the gradient.
 * @throws {RangeError} If shapes, targets or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function crossEntropy(logits: Tensor, targets: Tensor, losses: Tensor, scale: number): void {
  const op = "take the cross-entropy";
  lead(op, "logits", logits);
  isMatrix(op, "logits", logits);
  const N = logits.shape[0];
  indices(op, "targets", targets, logits, N);
  statistics(op, "losses", losses, logits, N);
  const start = now();
  logits.device.kernels.crossEntropy(logits, targets, losses, scale);
  ran("crossEntropy", "compute", start);
}
