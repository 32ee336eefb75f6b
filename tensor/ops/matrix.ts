// Checked matrix products and attention. See `Kernels` in device.ts for the formulas.

import { now } from "../../trace/mod.ts";
import type {
  Activation,
  ActivationBackwardOptions,
  AttentionShape,
  GemmOptions,
  RowGroups,
} from "../device.ts";
import type { Tensor } from "../tensor.ts";
import {
  ascending,
  disjoint,
  disjointScales,
  fail,
  isMatrix,
  lead,
  matrix,
  ran,
  rowGroups,
  rowScales,
  statistics,
  wideMatrix,
} from "./check.ts";

/**
 * `out = alpha · a b + beta · out`.
 *
 * @param a [M, K], or [K, M] with `transposeA`.
 * @param b [K, N], or [N, K] with `transposeB`.
 * @param out [M, N], in the dtype of a and b; in f32, too, if those are of 16 bits.
 * @param options Transposes and factors.
 * @throws {RangeError} If shapes or devices do not fit or out overlaps an input.
 * @throws {TypeError} If dtypes differ.
 */
export function gemm(a: Tensor, b: Tensor, out: Tensor, options?: GemmOptions): void {
  lead("multiply", "a", a);
  isMatrix("multiply", "a", a);
  isMatrix("multiply", "out", out);
  const [rows, columns] = a.shape;
  const M = options?.transposeA ? columns : rows, K = options?.transposeA ? rows : columns;
  const N = out.shape[1];
  if (options?.transposeB) matrix("multiply", "b", b, a, N, K);
  else matrix("multiply", "b", b, a, K, N);
  wideMatrix("multiply", "out", out, a, M, N);
  disjoint("multiply", "a", out, a);
  disjoint("multiply", "b", out, b);
  const start = now();
  a.device.kernels.gemm(a, b, out, options);
  ran("gemm", "gemm", start);
}

/**
 * One GEMM per group over uneven row groups: `out_g = x_g w_gᵀ`, or `x_g w_g` with `transposeWeight`. Rows outside the
 * groups are left as they are.
 *
 * @param x [R, in] ([R, out] with `transposeWeight`).
 * @param weights One [out, in] per group.
 * @param groups Where the rows of each group begin; groups may be empty.
 * @param out [R, out] ([R, in] with `transposeWeight`).
 * @param options Whether weights are taken transposed, and the factor of the old contents of out.
 * @throws {RangeError} If shapes, offsets or devices do not fit or out overlaps x.
 * @throws {TypeError} If dtypes differ.
 */
export function groupedGemm(
  x: Tensor,
  weights: readonly Tensor[],
  groups: RowGroups,
  out: Tensor,
  options?: { readonly transposeWeight?: boolean; readonly beta?: number },
): void {
  const op = "multiply groups";
  lead(op, "x", x);
  isMatrix(op, "x", x);
  isMatrix(op, "out", out);
  const [R, from] = x.shape, to = out.shape[1];
  matrix(op, "out", out, x, R, to);
  for (let g = 0; g < weights.length; g++) {
    if (options?.transposeWeight) matrix(op, "a weight", weights[g], x, from, to);
    else matrix(op, "a weight", weights[g], x, to, from);
  }
  rowGroups(op, groups, x, weights.length, R);
  disjoint(op, "x", out, x);
  const start = now();
  x.device.kernels.groupedGemm(x, weights, groups, out, options);
  ran("groupedGemm", "gemm", start);
}

/** Checks what both grouped products with an activation have: rows, weights, scales and the matrix before the activation. Returns F. */
function checkGroupedActivation(
  op: string,
  tensors: { readonly x: Tensor; readonly up: Tensor; readonly weights: readonly Tensor[] },
  groups: RowGroups,
  kind: Activation,
  back: boolean,
  scales: Tensor | undefined,
): number {
  const { x, up, weights } = tensors;
  isMatrix(op, "up", up);
  const [R, D] = x.shape, H = up.shape[1];
  matrix(op, "up", up, x, R, H);
  if (kind === "swiglu" && H % 2 !== 0) fail(op, "the columns of up must be gate and up", H);
  const F = kind === "swiglu" ? H / 2 : H;
  for (const weight of weights) {
    if (back) matrix(op, "a weight", weight, x, D, F);
    else matrix(op, "a weight", weight, x, H, D);
  }
  rowGroups(op, groups, x, weights.length, R);
  rowScales(op, "scales", scales, x, R);
  return F;
}

/**
 * `up_g = x_g w_gᵀ` and `active[r] = scales[r] · activation(kind, up[r])`: the experts' first layer. Rows outside the groups are unspecified in
 * active.
 *
 * @param x [R, D].
 * @param weights One [F, D] per group, [2F, D] for swiglu: the gate's rows first.
 * @param groups Where the rows of each group begin; groups may be empty.
 * @param kind Which activation.
 * @param up [R, F], [R, 2F] for swiglu.
 * @param active [R, F].
 * @param scales f32 [R] (f64 for f64). @default {ones}
 * @throws {RangeError} If shapes, offsets or devices do not fit or tensors overlap.
 * @throws {TypeError} If dtypes differ.
 */
export function groupedGemmActivation(
  x: Tensor,
  weights: readonly Tensor[],
  groups: RowGroups,
  kind: Activation,
  up: Tensor,
  active: Tensor,
  scales?: Tensor,
): void {
  const op = "multiply groups and activate";
  lead(op, "x", x);
  isMatrix(op, "x", x);
  const F = checkGroupedActivation(op, { x, up, weights }, groups, kind, false, scales);
  matrix(op, "active", active, x, x.shape[0], F);
  disjoint(op, "x", up, x);
  disjoint(op, "x", active, x);
  disjoint(op, "up", active, up);
  if (scales) {
    disjoint(op, "scales", up, scales);
    disjoint(op, "scales", active, scales);
  }
  const start = now();
  x.device.kernels.groupedGemmActivation(x, weights, groups, kind, up, active, scales);
  ran("groupedGemmActivation", "gemm", start);
}

/**
 * With `d = dY_g w_g`: `dUp[r] = scales[r] · activationBackward(kind, d[r], up[r])`, from the gradient of the experts' outputs to that before their
 * activation; and `dScales[r] = d[r] · activation(kind, up[r])`. Rows outside the groups are unspecified in dUp and dScales.
 *
 * @param dY [R, D].
 * @param weights The second layer's, one [D, F] per group.
 * @param groups Where the rows of each group begin; groups may be empty.
 * @param kind Which activation.
 * @param up What {@linkcode groupedGemmActivation} wrote, [R, F], [R, 2F] for swiglu.
 * @param dUp Like up.
 * @param options The scales of the forward pass, and where their gradient goes: f32 [R] (f64 for f64).
 * @throws {RangeError} If shapes, offsets or devices do not fit or a gradient overlaps another tensor.
 * @throws {TypeError} If dtypes differ.
 */
export function groupedGemmActivationBackward(
  dY: Tensor,
  weights: readonly Tensor[],
  groups: RowGroups,
  kind: Activation,
  up: Tensor,
  dUp: Tensor,
  options?: ActivationBackwardOptions,
): void {
  const op = "take the gradient before the activation";
  lead(op, "dY", dY);
  isMatrix(op, "dY", dY);
  checkGroupedActivation(op, { x: dY, up, weights }, groups, kind, true, options?.scales);
  rowScales(op, "dScales", options?.dScales, dY, dY.shape[0]);
  matrix(op, "dUp", dUp, dY, up.shape[0], up.shape[1]);
  disjoint(op, "dY", dUp, dY);
  disjoint(op, "up", dUp, up);
  disjointScales(op, options, dUp, dY, up);
  const start = now();
  dY.device.kernels.groupedGemmActivationBackward(dY, weights, groups, kind, up, dUp, options);
  ran("groupedGemmActivationBackward", "gemm", start);
}

/**
 * `grads[g] = dy_gᵀ x_g + beta · grads[g]`: the weights' gradients of {@linkcode groupedGemm}.
 *
 * @param dy [R, out].
 * @param x [R, in].
 * @param groups Where the rows of each group begin.
 * @param grads One [out, in] per group, in the dtype of x; in f32, too, if that has 16 bits.
 * @param options Factor of the old gradients; with 0, those of empty groups become 0. @default {{beta: 1}}
 * @throws {RangeError} If shapes, offsets or devices do not fit.
 * @throws {TypeError} If dtypes differ.
 */
export function groupedGemmWeightGrad(
  dy: Tensor,
  x: Tensor,
  groups: RowGroups,
  grads: readonly Tensor[],
  options?: { readonly beta?: number },
): void {
  const op = "take the weights' gradients";
  lead(op, "x", x);
  isMatrix(op, "x", x);
  isMatrix(op, "dy", dy);
  const [R, from] = x.shape, to = dy.shape[1];
  matrix(op, "dy", dy, x, R, to);
  for (let g = 0; g < grads.length; g++) {
    wideMatrix(op, "a gradient", grads[g], x, to, from);
    disjoint(op, "x", grads[g], x);
    disjoint(op, "dy", grads[g], dy);
    if (grads[g].dtype !== grads[0].dtype) {
      throw new TypeError(
        `Cannot ${op} as the dtype of all gradients must be ${grads[0].dtype}: current value is ${
          grads[g].dtype
        }`,
      );
    }
  }
  rowGroups(op, groups, x, grads.length, R);
  const start = now();
  x.device.kernels.groupedGemmWeightGrad(dy, x, groups, grads, options);
  ran("groupedGemmWeightGrad", "gemm", start);
}

function checkAttention(
  op: string,
  tensors: { q: Tensor; k: Tensor; v: Tensor; out: Tensor; lse: Tensor },
  shape: AttentionShape,
): void {
  const { q, k, v, out, lse } = tensors;
  const { heads: H, kvHeads: G, headDim: C, offsets } = shape;
  if (!(Number.isInteger(G) && G > 0 && Number.isInteger(H / G) && H > 0)) {
    fail(op, "heads must be a multiple of kvHeads", `${H} heads, ${G} kvHeads`);
  }
  if (!(Number.isInteger(C) && C > 0)) fail(op, "headDim must be a whole number > 0", C);
  lead(op, "q", q);
  isMatrix(op, "q", q);
  const N = q.shape[0];
  matrix(op, "q", q, q, N, H * C);
  matrix(op, "k", k, q, N, G * C);
  matrix(op, "v", v, q, N, G * C);
  matrix(op, "out", out, q, N, H * C);
  statistics(op, "lse", lse, q, N * H);
  if (offsets.length < 1) fail(op, "offsets must not be empty", offsets.length);
  ascending(op, offsets, offsets.length - 1, N);
  if (offsets[0] !== 0 || offsets.at(-1) !== N) {
    fail(op, `offsets must run from 0 to ${N}`, `[${offsets}]`);
  }
}

/**
 * Causal attention within each sequence, scale 1/√C; saves the log-sum-exp of each row for the gradient.
 *
 * @param q [N, H·C].
 * @param k [N, G·C].
 * @param v [N, G·C].
 * @param out [N, H·C].
 * @param lse [N, H], f32 (f64 for f64).
 * @param shape Heads, their width, and where each sequence begins.
 * @throws {RangeError} If shapes, offsets or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function attention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  out: Tensor,
  lse: Tensor,
  shape: AttentionShape,
): void {
  const op = "attend";
  checkAttention(op, { q, k, v, out, lse }, shape);
  disjoint(op, "q", out, q);
  disjoint(op, "k", out, k);
  disjoint(op, "v", out, v);
  const start = now();
  q.device.kernels.attention(q, k, v, out, lse, shape);
  ran("attention", "compute", start);
}

/**
 * Gradient of {@linkcode attention}.
 *
 * @param dOut [N, H·C].
 * @param q [N, H·C].
 * @param k [N, G·C].
 * @param v [N, G·C].
 * @param out What attention wrote.
 * @param lse What attention saved.
 * @param shape As in attention.
 * @param dQ Like q.
 * @param dK Like k.
 * @param dV Like v.
 * @throws {RangeError} If shapes, offsets or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function attentionBackward(
  dOut: Tensor,
  q: Tensor,
  k: Tensor,
  v: Tensor,
  out: Tensor,
  lse: Tensor,
  shape: AttentionShape,
  dQ: Tensor,
  dK: Tensor,
  dV: Tensor,
): void {
  const op = "take the attention's gradient";
  checkAttention(op, { q, k, v, out, lse }, shape);
  const N = q.shape[0], { heads: H, kvHeads: G, headDim: C } = shape;
  matrix(op, "dOut", dOut, q, N, H * C);
  matrix(op, "dQ", dQ, q, N, H * C);
  matrix(op, "dK", dK, q, N, G * C);
  matrix(op, "dV", dV, q, N, G * C);
  const start = now();
  q.device.kernels.attentionBackward(dOut, q, k, v, out, lse, shape, dQ, dK, dV);
  ran("attentionBackward", "compute", start);
}
