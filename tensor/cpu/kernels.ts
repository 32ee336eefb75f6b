// `Kernels` on the CPU: hands each operation's addresses and sizes to the compiled code, and takes the rare conversions that
// are not compiled through JavaScript.

import { bytesOf } from "../dtype.ts";
import type {
  Activation,
  ActivationBackwardOptions,
  AdamWOptions,
  AdamWUpdate,
  Kernels,
} from "../device.ts";
import { empty, type Tensor } from "../tensor.ts";
import { attention, attentionBackward } from "./attention.ts";
import { groupedActivation } from "../grouped_activation.ts";
import { gemm, groupedGemm, groupedGemmWeightGrad, matrixProduct } from "./gemm.ts";
import * as reference from "./reference/elementwise.ts";
import { turns } from "./turns.ts";
import { floatView, hostView, indexView } from "./view.ts";
import { realKernels, wasmKernels } from "./wasm.ts";

function fill(x: Tensor, value: number): void {
  if (value === 0) {
    new Uint8Array(hostView(x).buffer, x.address, x.bytes).fill(0);
  } else if (x.dtype === "f32" || x.dtype === "f64") {
    realKernels(x.dtype).fill(x.address, value, x.size);
  } else reference.fill(x, value);
}

function copy(x: Tensor, out: Tensor): void {
  const { f32_to_f64, f64_to_f32, f32_to_bf16, bf16_to_f32 } = wasmKernels();
  const from = x.dtype, to = out.dtype;
  if (from === "f32" && to === "bf16") f32_to_bf16(x.address, out.address, x.size);
  else if (from === "bf16" && to === "f32") bf16_to_f32(x.address, out.address, x.size);
  else if (from === "f32" && to === "f64") f32_to_f64(x.address, out.address, x.size);
  else if (from === "f64" && to === "f32") f64_to_f32(x.address, out.address, x.size);
  else if (from === to || (from === "f32" && to === "f16") || (from === "f16" && to === "f32")) {
    (hostView(out) as Float32Array).set(hostView(x) as Float32Array); // V8 converts f16
  } else reference.copy(x, out);
}

/** Throws for the row number that made a kernel stop at `place`. */
function checkRows(op: string, place: number, rows: Tensor, limit: number): void {
  if (place >= 0) {
    throw new RangeError(
      `Cannot ${op} as every row number must be < ${limit}: current value is ${
        indexView(rows)[place]
      } at ${place}`,
    );
  }
}

function gatherRows(x: Tensor, rows: Tensor, out: Tensor): void {
  const n = rows.size, limit = x.shape[0];
  if (out.size === 0) return;
  const bytes = out.size / n * bytesOf(x.dtype);
  const place = wasmKernels().gather_rows(x.address, rows.address, out.address, n, bytes, limit);
  checkRows("gather rows", place, rows, limit);
}

function scatterAddRows(x: Tensor, rows: Tensor, out: Tensor): void {
  const n = rows.size, limit = out.shape[0];
  if (x.size === 0) return;
  const kernel = realKernels(x.dtype).scatter_add_rows;
  const place = kernel(x.address, rows.address, out.address, n, x.size / n, limit);
  checkRows("scatter rows", place, rows, limit);
}

function combineRows(
  y: Tensor,
  slots: Tensor,
  weights: Tensor | null,
  out: Tensor,
  residual?: Tensor,
): void {
  const [N, K] = slots.shape, [R, D] = y.shape;
  if (residual && residual.address !== out.address) copy(residual, out);
  // deno-fmt-ignore
  const place = realKernels(y.dtype).combine_rows(y.address, slots.address, weights?.address ?? 0, out.address, N, K, D, R,
    residual ? 1 : 0);
  checkRows("combine rows", place, slots, R);
}

function combineRowsBackward(
  dOut: Tensor,
  y: Tensor,
  slots: Tensor,
  weights: Tensor,
  dY: Tensor,
  dWeights: Tensor,
): void {
  const [N, K] = slots.shape, [R, D] = y.shape;
  // deno-fmt-ignore
  const place = realKernels(y.dtype).combine_rows_backward(dOut.address, y.address, slots.address, weights.address,
    dY.address, dWeights.address, N, K, D, R);
  checkRows("take the combination's gradient", place, slots, R);
}

function rmsNorm(x: Tensor, gain: Tensor, out: Tensor, invRms: Tensor, eps: number): void {
  const N = x.shape[0], D = x.shape[1], kernel = realKernels(x.dtype).rms_norm;
  kernel(x.address, gain.address, out.address, invRms.address, N, D, eps);
}

function addRmsNorm(
  x: Tensor,
  y: Tensor,
  gain: Tensor,
  sum: Tensor,
  out: Tensor,
  invRms: Tensor,
  eps: number,
): void {
  realKernels(x.dtype).add(x.address, y.address, sum.address, x.size);
  rmsNorm(sum, gain, out, invRms, eps);
}

function rmsNormBackward(
  dOut: Tensor,
  x: Tensor,
  gain: Tensor,
  invRms: Tensor,
  dX: Tensor,
  dGain: Tensor,
  residual?: Tensor,
): void {
  const N = x.shape[0], D = x.shape[1];
  if (residual && residual.address !== dX.address) copy(residual, dX);
  // deno-fmt-ignore
  realKernels(x.dtype).rms_norm_backward(dOut.address, x.address, gain.address, invRms.address, dX.address,
    dGain.address, N, D, residual ? 1 : 0);
}

function rope(
  x: Tensor,
  positions: Tensor,
  options: { readonly headDim: number; readonly theta: number; readonly inverse?: boolean },
): void {
  const N = x.shape[0], C = options.headDim;
  if (x.size === 0) return;
  const table = turns(x.dtype, C, options.theta, indexView(positions));
  const heads = x.shape[1] / C, direction = options.inverse ? -1 : 1;
  realKernels(x.dtype).rope(x.address, positions.address, table, N, heads, C, direction);
}

function splitQkv(
  qkv: Tensor,
  positions: Tensor,
  options: { readonly headDim: number; readonly theta: number },
  q: Tensor,
  k: Tensor,
  v: Tensor,
): void {
  const N = qkv.shape[0], C = options.headDim;
  if (qkv.size === 0) return;
  const table = turns(qkv.dtype, C, options.theta, indexView(positions));
  // deno-fmt-ignore
  realKernels(qkv.dtype).split_qkv(qkv.address, positions.address, table, q.address, k.address, v.address, N,
    q.shape[1] / C, k.shape[1] / C, C);
}

function joinQkv(
  dQ: Tensor,
  dK: Tensor,
  dV: Tensor,
  positions: Tensor,
  options: { readonly headDim: number; readonly theta: number },
  dQkv: Tensor,
): void {
  const N = dQkv.shape[0], C = options.headDim;
  if (dQkv.size === 0) return;
  const table = turns(dQkv.dtype, C, options.theta, indexView(positions));
  // deno-fmt-ignore
  realKernels(dQkv.dtype).join_qkv(dQ.address, dK.address, dV.address, positions.address, table, dQkv.address, N,
    dQ.shape[1] / C, dK.shape[1] / C, C);
}

/** `x[n] *= scales[n]` */
function scaleRows(x: Tensor, scales: Tensor): void {
  const factors = floatView(scales), { scale } = realKernels(x.dtype);
  if (x.size === 0) return;
  const F = x.size / factors.length, bytes = F * bytesOf(x.dtype);
  for (let n = 0; n < factors.length; n++) scale(x.address + n * bytes, factors[n], F);
}

/** `out[n] = x[n] · y[n]` */
function dotRows(x: Tensor, y: Tensor, out: Tensor): void {
  const N = out.size, F = N === 0 ? 0 : x.size / N, size = bytesOf(x.dtype);
  const product = matrixProduct(x.dtype);
  for (let n = 0; n < N; n++) {
    const row = n * F * size, to = out.address + n * size;
    product(false, true, 1, 1, F, 1, x.address + row, F, y.address + row, F, 0, to, 1);
  }
}

function activation(kind: Activation, x: Tensor, out: Tensor, scales?: Tensor): void {
  const kernels = realKernels(x.dtype);
  if (kind === "swiglu") {
    const F = out.shape[out.shape.length - 1];
    if (out.size > 0) kernels.swiglu(x.address, out.address, out.size / F, F);
  } else kernels[kind](x.address, out.address, x.size);
  if (scales) scaleRows(out, scales);
}

function activationBackward(
  kind: Activation,
  dOut: Tensor,
  x: Tensor,
  dX: Tensor,
  options?: ActivationBackwardOptions,
): void {
  const kernels = realKernels(x.dtype);
  if (kind === "swiglu") {
    const F = dOut.shape[dOut.shape.length - 1];
    if (x.size > 0) {
      kernels.swiglu_backward(dOut.address, x.address, dX.address, dOut.size / F, F);
    }
  } else kernels[`${kind}_backward`](dOut.address, x.address, dX.address, x.size);
  if (options?.scales) scaleRows(dX, options.scales);
  if (options?.dScales) {
    using active = empty(dOut.device, dOut.shape, dOut.dtype);
    activation(kind, x, active);
    dotRows(dOut, active, options.dScales);
  }
}

function crossEntropy(logits: Tensor, targets: Tensor, losses: Tensor, scale: number): void {
  const N = logits.shape[0], V = logits.shape[1], kernel = realKernels(logits.dtype).cross_entropy;
  const place = kernel(logits.address, targets.address, losses.address, N, V, scale);
  if (place >= 0) {
    throw new RangeError(
      `Cannot take the cross-entropy as every target must be < ${V}: current value is ${
        indexView(targets)[place]
      } at ${place}`,
    );
  }
}

function sumSquares(xs: readonly Tensor[], out: Tensor): void {
  for (const x of xs) realKernels(x.dtype).sum_squares(x.address, out.address, x.size);
}

function clipScale(squares: Tensor, limit: number, out: Tensor): void {
  floatView(out)[0] = reference.clipFactor(floatView(squares)[0], limit);
}

function adamW(updates: readonly AdamWUpdate[], options: AdamWOptions): void {
  const { lr, beta1, beta2, eps, step, zeroGradient } = options;
  const gradScale = floatView(options.gradScale)[0];
  const size = lr / (1 - beta1 ** step), root = 1 / Math.sqrt(1 - beta2 ** step);
  for (const { parameter, gradient, moment1, moment2, weightDecay } of updates) {
    if (Number.isFinite(gradScale)) {
      // deno-fmt-ignore
      realKernels(parameter.dtype).adamw(parameter.address, gradient.address, moment1.address, moment2.address,
        parameter.size, beta1, beta2, size, root, eps, lr * weightDecay, gradScale);
    }
    if (zeroGradient) fill(gradient, 0);
  }
}

/** The kernels of the CPU. They compute in f32 and f64; fill, copy and gatherRows take every dtype. */
export const cpuKernels: Kernels = {
  fill,
  normal: reference.normal,
  copy,
  add: (x, y, out) => realKernels(x.dtype).add(x.address, y.address, out.address, x.size),
  axpy: (alpha, x, y) => realKernels(x.dtype).axpy(alpha, x.address, y.address, x.size),
  scale: (x, alpha) => realKernels(x.dtype).scale(x.address, alpha, x.size),
  gemm,
  groupedGemm,
  groupedGemmWeightGrad,
  ...groupedActivation({ groupedGemm, activation, activationBackward }),
  gatherRows,
  scatterAddRows,
  combineRows,
  combineRowsBackward,
  rmsNorm,
  addRmsNorm,
  rmsNormBackward,
  rope,
  splitQkv,
  joinQkv,
  attention,
  attentionBackward,
  activation,
  activationBackward,
  softmax: (x, out) => realKernels(x.dtype).softmax(x.address, out.address, x.shape[0], x.shape[1]),
  softmaxBackward: (dY, y, dX) =>
    realKernels(y.dtype).softmax_backward(
      dY.address,
      y.address,
      dX.address,
      y.shape[0],
      y.shape[1],
    ),
  crossEntropy,
  sumSquares,
  sum: (x, out) => realKernels(x.dtype).sum(x.address, out.address, x.size),
  clipScale,
  adamW,
};
