// Checked element-wise operations and sums. See `Kernels` in device.ts for the formulas; shapes may be anything as long as
// they agree.

import { now } from "../../trace/mod.ts";
import type {
  Activation,
  ActivationBackwardOptions,
  AdamWOptions,
  AdamWUpdate,
} from "../device.ts";
import type { Tensor } from "../tensor.ts";
import {
  alive,
  disjoint,
  disjointOrSame,
  disjointScales,
  elements,
  fail,
  isMatrix,
  lead,
  ran,
  rowScales,
  statistics,
  wide,
} from "./check.ts";

/**
 * `x = value`, for every dtype.
 *
 * @param x Any tensor.
 * @param value What every element becomes.
 * @throws {RangeError} If x is disposed.
 */
export function fill(x: Tensor, value: number): void {
  alive("fill", "x", x, x.device, x.dtype);
  const start = now();
  x.device.kernels.fill(x, value);
  ran("fill", "compute", start);
}

/**
 * `out = x`, converting the dtype if they differ (to nearest, ties to even; to an integer: toward zero).
 *
 * @param x Any tensor.
 * @param out As many elements, of any dtype.
 * @throws {RangeError} If sizes or devices differ or memory overlaps.
 */
export function copy(x: Tensor, out: Tensor): void {
  alive("copy", "x", x, out.device, x.dtype);
  alive("copy", "out", out, out.device, out.dtype);
  if (x.size !== out.size) fail("copy", `out must have ${x.size} elements`, `[${out.shape}]`);
  disjoint("copy", "x", out, x);
  const start = now();
  x.device.kernels.copy(x, out);
  ran("copy", "compute", start);
}

/**
 * `out = x + y`; out may be x or y.
 *
 * @param x Floats.
 * @param y As many of the same dtype.
 * @param out As many of the same dtype.
 * @throws {RangeError} If sizes or devices differ.
 * @throws {TypeError} If dtypes differ.
 */
export function add(x: Tensor, y: Tensor, out: Tensor): void {
  lead("add", "x", x);
  elements("add", "y", y, x, x.size);
  elements("add", "out", out, x, x.size);
  disjointOrSame("add", "x", out, x);
  disjointOrSame("add", "y", out, y);
  const start = now();
  x.device.kernels.add(x, y, out);
  ran("add", "compute", start);
}

/**
 * `y += alpha · x`
 *
 * @param alpha The factor.
 * @param x Floats.
 * @param y As many of the same dtype.
 * @throws {RangeError} If sizes or devices differ.
 * @throws {TypeError} If dtypes differ.
 */
export function axpy(alpha: number, x: Tensor, y: Tensor): void {
  lead("axpy", "x", x);
  elements("axpy", "y", y, x, x.size);
  disjointOrSame("axpy", "x", y, x);
  const start = now();
  x.device.kernels.axpy(alpha, x, y);
  ran("axpy", "compute", start);
}

/**
 * `x *= alpha`
 *
 * @param x Floats.
 * @param alpha The factor.
 * @throws {TypeError} If x is not floating.
 */
export function scale(x: Tensor, alpha: number): void {
  lead("scale", "x", x);
  const start = now();
  x.device.kernels.scale(x, alpha);
  ran("scale", "compute", start);
}

/** The last dimension of an activation's input per output column. */
function checkActivation(op: string, kind: Activation, x: Tensor, out: Tensor): void {
  const columns = x.shape.at(-1) ?? 1;
  if (kind !== "swiglu") {
    if (out.size !== x.size) fail(op, `the output must have shape [${x.shape}]`, `[${out.shape}]`);
  } else if (
    x.shape.length !== out.shape.length || x.size !== 2 * out.size ||
    columns !== 2 * (out.shape.at(-1) ?? 0)
  ) {
    fail(op, "the columns of x must be gate and up, twice those of the output", `[${x.shape}]`);
  }
}

/**
 * `relu(x)`, tanh-approximated `gelu(x)`, or `silu(x[:, :F]) · x[:, F:]` for swiglu; row n times `scales[n]`, where there are any.
 *
 * @param kind Which activation.
 * @param x [N, F], or [N, 2F] for swiglu.
 * @param out [N, F].
 * @param scales f32 [N] (f64 for f64). @default {ones}
 * @throws {RangeError} If shapes or devices do not fit or out overlaps an input.
 * @throws {TypeError} If dtypes differ.
 */
export function activation(kind: Activation, x: Tensor, out: Tensor, scales?: Tensor): void {
  const op = "activate";
  lead(op, "x", x);
  alive(op, "out", out, x.device, x.dtype);
  checkActivation(op, kind, x, out);
  if (scales) isMatrix(op, "x", x);
  rowScales(op, "scales", scales, x, x.shape[0]);
  disjoint(op, "x", out, x);
  if (scales) disjoint(op, "scales", out, scales);
  const start = now();
  x.device.kernels.activation(kind, x, out, scales);
  ran("activation", "compute", start);
}

/**
 * Gradient of {@linkcode activation}: `dX[n] = scales[n] · activationBackward(kind, dOut[n], x[n])`, `dScales[n] = dOut[n] · activation(kind, x[n])`.
 *
 * @param kind Which activation.
 * @param dOut [N, F].
 * @param x The input, [N, F] or [N, 2F].
 * @param dX Like x.
 * @param options The scales, and where their gradient goes: f32 [N] (f64 for f64).
 * @throws {RangeError} If shapes or devices do not fit or a gradient overlaps another tensor.
 * @throws {TypeError} If dtypes differ.
 */
export function activationBackward(
  kind: Activation,
  dOut: Tensor,
  x: Tensor,
  dX: Tensor,
  options?: ActivationBackwardOptions,
): void {
  const op = "take the activation's gradient";
  lead(op, "x", x);
  alive(op, "dOut", dOut, x.device, x.dtype);
  checkActivation(op, kind, x, dOut);
  elements(op, "dX", dX, x, x.size);
  if (options?.scales || options?.dScales) isMatrix(op, "x", x);
  rowScales(op, "scales", options?.scales, x, x.shape[0]);
  rowScales(op, "dScales", options?.dScales, x, x.shape[0]);
  disjoint(op, "x", dX, x);
  disjoint(op, "dOut", dX, dOut);
  disjointScales(op, options, dX, dOut, x);
  const start = now();
  x.device.kernels.activationBackward(kind, dOut, x, dX, options);
  ran("activationBackward", "compute", start);
}

/** The place of a sum: one f64. */
function checkSum(op: string, x: Tensor, out: Tensor): void {
  lead(op, "x", x);
  one(op, "out", out, x, "f64");
}

/** A tensor must be alive, on the device of another, and one number. */
function one(op: string, name: string, x: Tensor, like: Tensor, dtype: "f32" | "f64"): void {
  alive(op, name, x, like.device, dtype);
  if (x.size !== 1) fail(op, `${name} must have one element`, `[${x.shape}]`);
}

/**
 * `out[0] += Σ x²` over all elements of all xs, added in f64 in a fixed order.
 *
 * @param xs Floats, which may differ in dtype.
 * @param out f64 [1].
 * @throws {TypeError} If out is not f64.
 */
export function sumSquares(xs: readonly Tensor[], out: Tensor): void {
  for (let i = 0; i < xs.length; i++) checkSum("sum squares", xs[i], out);
  if (xs.length === 0) return;
  const start = now();
  out.device.kernels.sumSquares(xs, out);
  ran("sumSquares", "compute", start);
}

/**
 * `out[0] += Σ x`, added in f64 in a fixed order.
 *
 * @param x Floats.
 * @param out f64 [1].
 * @throws {TypeError} If out is not f64.
 */
export function sum(x: Tensor, out: Tensor): void {
  checkSum("sum", x, out);
  const start = now();
  x.device.kernels.sum(x, out);
  ran("sum", "compute", start);
}

/**
 * The factor that brings a gradient down to a norm: `out[0] = min(1, limit / √squares[0])`, NaN if the square sum is not finite.
 *
 * @param squares f64 [1]: square of the norm.
 * @param limit Largest norm; 0 is no limit.
 * @param out f32 [1].
 * @throws {RangeError} If the limit is negative or devices differ.
 * @throws {TypeError} If dtypes do not fit.
 */
export function clipScale(squares: Tensor, limit: number, out: Tensor): void {
  const op = "clip";
  one(op, "squares", squares, squares, "f64");
  one(op, "out", out, squares, "f32");
  if (!(limit >= 0)) fail(op, "limit must be >= 0", limit);
  const start = now();
  squares.device.kernels.clipScale(squares, limit, out);
  ran("clipScale", "compute", start);
}

/**
 * One AdamW step of many parameters in place with decoupled decay (Loshchilov and Hutter).
 *
 * @param updates Parameters with their gradients, moments and residuals.
 * @param options Constants of this step; `step` counts from 1. With a `gradScale` that is not finite nothing is updated.
 * @throws {RangeError} If sizes or devices differ, or the step is below 1.
 * @throws {TypeError} If dtypes do not fit.
 */
export function adamW(updates: readonly AdamWUpdate[], options: AdamWOptions): void {
  const op = "take an AdamW step", { gradScale, step } = options;
  if (!(step >= 1)) fail(op, "step must be >= 1", step);
  one(op, "gradScale", gradScale, gradScale, "f32");
  for (let i = 0; i < updates.length; i++) {
    const { parameter, gradient, moment1, moment2, residual } = updates[i];
    const { size, dtype } = parameter;
    lead(op, "parameter", parameter);
    alive(op, "parameter", parameter, gradScale.device, dtype);
    wide(op, "gradient", gradient, parameter, size);
    statistics(op, "moment1", moment1, parameter, size);
    statistics(op, "moment2", moment2, parameter, size);
    if ((residual !== null) !== (dtype === "bf16")) {
      fail(op, "residual must be that of a bf16 parameter, else null", `a ${dtype} parameter`);
    }
    if (residual) {
      alive(op, "residual", residual, parameter.device, "i16");
      if (residual.size !== size) fail(op, `residual must have ${size} elements`, residual.size);
    }
  }
  if (updates.length === 0) return;
  const start = now();
  gradScale.device.kernels.adamW(updates, options);
  ran("adamW", "compute", start);
}
