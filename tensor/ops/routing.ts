// Checked routing on a device that does it without the host's help (`Device.routing`). See `RoutingKernels` in device.ts for the formulas.
// Letters: N tokens, D model width, E experts, K choices per token, S rows, R ranks, L seats, M rows received.

import { now } from "../../trace/mod.ts";
import type { Device } from "../device.ts";
import type { DType } from "../dtype.ts";
import type { RouteBackwardOptions, RouteOptions, RoutingKernels } from "../routing_kernels.ts";
import type { Tensor } from "../tensor.ts";
import { alive, disjoint, fail, isMatrix, lead, ran } from "./check.ts";

/** A tensor must be alive, on the device, of this dtype and shape. */
function shaped(
  op: string,
  name: string,
  x: Tensor,
  device: Device,
  dtype: DType,
  shape: readonly number[],
): void {
  alive(op, name, x, device, dtype);
  if (x.shape.length !== shape.length || shape.some((n, i) => x.shape[i] !== n)) {
    fail(op, `${name} must have shape [${shape}]`, `[${x.shape}]`);
  }
}

function kernelsOf(op: string, { device }: Tensor): RoutingKernels {
  if (!device.routing) fail(op, "the device must route by itself", device.name);
  return device.routing;
}

function checkOptions(op: string, options: RouteOptions): void {
  const { experts: E, choices: K, groups, groupLimit } = options;
  if (!(Number.isInteger(K) && K >= 1 && K <= E)) fail(op, `choices must be in 1..${E}`, K);
  if (!(Number.isInteger(groups) && groups >= 1 && E % groups === 0)) {
    fail(op, `groups must be a divisor of ${E}`, groups);
  }
  if (!(groupLimit >= 1 && groupLimit <= groups && groupLimit * (E / groups) >= K)) {
    fail(op, `groupLimit must be in 1..${groups} and reach ${K} experts`, groupLimit);
  }
}

/**
 * `logits = x gateᵀ`.
 *
 * @param x [N, D], f32 or bf16.
 * @param gate f32 [E, D].
 * @param logits f32 [N, E].
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function gate(x: Tensor, gate: Tensor, logits: Tensor): void {
  const op = "compute the gate", kernels = kernelsOf(op, x);
  lead(op, "x", x);
  isMatrix(op, "x", x);
  isMatrix(op, "gate", gate);
  const [N, D] = x.shape, E = gate.shape[0];
  shaped(op, "gate", gate, x.device, "f32", [E, D]);
  shaped(op, "logits", logits, x.device, "f32", [N, E]);
  disjoint(op, "x", logits, x);
  disjoint(op, "gate", logits, gate);
  const start = now();
  kernels.gate(x, gate, logits);
  ran("gate", "gemm", start);
}

/**
 * `dGate += dLogitsᵀ x`, the gradient of the gate's weights; {@linkcode combineRowsGate} makes that of its input.
 *
 * @param dLogits f32 [N, E].
 * @param x [N, D], f32 or bf16.
 * @param dGate f32 [E, D]; added to.
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function gateWeightGrad(dLogits: Tensor, x: Tensor, dGate: Tensor): void {
  const op = "take the gate's gradient", kernels = kernelsOf(op, x);
  lead(op, "x", x);
  isMatrix(op, "x", x);
  isMatrix(op, "dGate", dGate);
  const [N, D] = x.shape, E = dGate.shape[0];
  shaped(op, "dLogits", dLogits, x.device, "f32", [N, E]);
  shaped(op, "dGate", dGate, x.device, "f32", [E, D]);
  const start = now();
  kernels.gateWeightGrad(dLogits, x, dGate);
  ran("gateWeightGrad", "gemm", start);
}

/**
 * The gradient of a router's input in one pass: `out[n] = Σ_k y[slots[n,k]] + dLogits[n] gate + beta · out[n]`.
 *
 * @param y Rows [S, D], f32 or bf16.
 * @param slots i32 [N, K]; a negative one adds nothing.
 * @param dLogits f32 [N, E].
 * @param gate f32 [E, D].
 * @param out [N, D], like y.
 * @param options Factor of the old contents of out; 0 never reads them. @default {{beta: 0}}
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function combineRowsGate(
  y: Tensor,
  slots: Tensor,
  dLogits: Tensor,
  gate: Tensor,
  out: Tensor,
  options?: { readonly beta?: 0 | 1 },
): void {
  const op = "combine rows", kernels = kernelsOf(op, y);
  lead(op, "y", y);
  isMatrix(op, "y", y);
  isMatrix(op, "slots", slots);
  isMatrix(op, "gate", gate);
  const [N, K] = slots.shape, [E, D] = gate.shape;
  shaped(op, "y", y, y.device, y.dtype, [y.shape[0], D]);
  shaped(op, "slots", slots, y.device, "i32", [N, K]);
  shaped(op, "dLogits", dLogits, y.device, "f32", [N, E]);
  shaped(op, "gate", gate, y.device, "f32", [E, D]);
  shaped(op, "out", out, y.device, y.dtype, [N, D]);
  disjoint(op, "y", out, y);
  const start = now();
  kernels.combineRowsGate(y, slots, dLogits, gate, out, options);
  ran("combineRowsGate", "compute", start);
}

/**
 * Scores and chooses each token's experts.
 *
 * @param logits f32 [N, E].
 * @param bias Selection bias f32 [E] of a sigmoid router, or null.
 * @param options How.
 * @param out experts i32 [N, K], weights f32 [N, K], lse f32 [N], record f64 [3 E + 2].
 * @throws {RangeError} If shapes, options or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function route(
  logits: Tensor,
  bias: Tensor | null,
  options: RouteOptions,
  out: {
    readonly experts: Tensor;
    readonly weights: Tensor;
    readonly lse: Tensor;
    readonly record: Tensor;
  },
): void {
  const op = "route tokens", kernels = kernelsOf(op, logits), { device } = logits;
  const { experts: E, choices: K } = options, N = logits.shape[0];
  checkOptions(op, options);
  shaped(op, "logits", logits, device, "f32", [N, E]);
  if (bias) shaped(op, "bias", bias, device, "f32", [E]);
  shaped(op, "experts", out.experts, device, "i32", [N, K]);
  shaped(op, "weights", out.weights, device, "f32", [N, K]);
  shaped(op, "lse", out.lse, device, "f32", [N]);
  shaped(op, "record", out.record, device, "f64", [3 * E + 2]);
  const start = now();
  kernels.route(logits, bias, options, out);
  ran("route", "compute", start);
}

/**
 * Gradient of the weights and of the router's losses.
 *
 * @param dWeights f32 [N, K], or with slots f32 [S] by row.
 * @param saved logits f32 [N, E], lse f32 [N] and experts i32 [N, K] of {@linkcode route}; records f64 [R, ≥ 3 E + 2] that begin with those of all ranks; slots i32 [N, K] if
 * the weights' gradient is that of rows: a choice takes that of its slot, 0 for a negative one.
 * @param options As in the forward pass, with the losses' coefficients.
 * @param dLogits f32 [N, E].
 * @throws {RangeError} If shapes, options or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function routeBackward(
  dWeights: Tensor,
  saved: {
    readonly logits: Tensor;
    readonly lse: Tensor;
    readonly experts: Tensor;
    readonly records: Tensor;
    readonly slots?: Tensor;
  },
  options: RouteBackwardOptions,
  dLogits: Tensor,
): void {
  const op = "take the routing's gradient", kernels = kernelsOf(op, dLogits), { device } = dLogits;
  const { experts: E, choices: K } = options, N = dLogits.shape[0];
  checkOptions(op, options);
  shaped(op, "dLogits", dLogits, device, "f32", [N, E]);
  if (saved.slots) shaped(op, "slots", saved.slots, device, "i32", [N, K]);
  shaped(op, "dWeights", dWeights, device, "f32", saved.slots ? [dWeights.size] : [N, K]);
  shaped(op, "logits", saved.logits, device, "f32", [N, E]);
  shaped(op, "lse", saved.lse, device, "f32", [N]);
  shaped(op, "experts", saved.experts, device, "i32", [N, K]);
  isMatrix(op, "records", saved.records);
  const length = Math.max(3 * E + 2, saved.records.shape[1]);
  shaped(op, "records", saved.records, device, "f64", [options.ranks, length]);
  disjoint(op, "logits", dLogits, saved.logits);
  const start = now();
  kernels.routeBackward(dWeights, saved, options, dLogits);
  ran("routeBackward", "compute", start);
}

/**
 * Choices per expert in slices of the tokens, the c-th of which begins at token ⌊c N / C⌋.
 *
 * @param experts i32 [N, K]; −1 for none.
 * @param slices C.
 * @param counts f64 [n, E]: those of the first n slices.
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function countSlices(experts: Tensor, slices: number, counts: Tensor): void {
  const op = "count choices", kernels = kernelsOf(op, experts), { device } = experts;
  alive(op, "experts", experts, device, "i32");
  isMatrix(op, "experts", experts);
  isMatrix(op, "counts", counts);
  if (!(Number.isInteger(slices) && slices >= 1)) {
    fail(op, "the number of slices must be a whole number >= 1", slices);
  }
  const [counted, E] = counts.shape;
  shaped(op, "counts", counts, device, "f64", [Math.min(counted, slices), E]);
  const start = now();
  kernels.countSlices(experts, slices, counts);
  ran("countSlices", "compute", start);
}

/**
 * A stable counting sort of choices by expert.
 *
 * @param experts i32 [N, K]; −1 for none.
 * @param layout Number of experts E, where their rows start: null, i32 [E], or pieces i32 [P, 3], and weights of the choices, f32 [N, K].
 * @param out slots i32 [N, K], tokens i32 [S], offsets i32 [E + 1] or null, and where there are weights, their scales by row, f32 [S].
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function placeRows(
  experts: Tensor,
  layout: { readonly experts: number; readonly starts: Tensor | null; readonly weights?: Tensor },
  out: {
    readonly slots: Tensor;
    readonly tokens: Tensor;
    readonly offsets: Tensor | null;
    readonly scales?: Tensor;
  },
): void {
  const op = "place rows", kernels = kernelsOf(op, experts), { device } = experts;
  const { experts: E, starts } = layout;
  alive(op, "experts", experts, device, "i32");
  isMatrix(op, "experts", experts);
  shaped(op, "slots", out.slots, device, "i32", experts.shape);
  shaped(op, "tokens", out.tokens, device, "i32", [out.tokens.size]);
  if (out.tokens.size > experts.size) {
    fail(op, `tokens must have ${experts.size} elements at most`, out.tokens.size);
  }
  if (starts) {
    const pieces = starts.shape.length === 2;
    shaped(op, "starts", starts, device, "i32", pieces ? [starts.shape[0], 3] : [E]);
    if (out.offsets) fail(op, "offsets must be null where starts are given", "a tensor");
  }
  if (out.offsets) shaped(op, "offsets", out.offsets, device, "i32", [E + 1]);
  if (layout.weights) shaped(op, "weights", layout.weights, device, "f32", experts.shape);
  if (out.scales) {
    if (!layout.weights) fail(op, "weights must be given where scales are", "none");
    shaped(op, "scales", out.scales, device, "f32", out.tokens.shape);
  }
  const start = now();
  kernels.placeRows(experts, layout, out);
  ran("placeRows", "compute", start);
}

/**
 * `out[slots[n,k]] = x[n]`.
 *
 * @param x [N, D], f32 or bf16.
 * @param slots i32 [N, K], each below S; a negative one gets none. Every row of out is in one place.
 * @param out [S, D].
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function spreadRows(x: Tensor, slots: Tensor, out: Tensor): void {
  const op = "spread rows", kernels = kernelsOf(op, x);
  lead(op, "x", x);
  isMatrix(op, "x", x);
  isMatrix(op, "slots", slots);
  isMatrix(op, "out", out);
  shaped(op, "slots", slots, x.device, "i32", [x.shape[0], slots.shape[1]]);
  shaped(op, "out", out, x.device, x.dtype, [out.shape[0], x.shape[1]]);
  disjoint(op, "x", out, x);
  const start = now();
  kernels.spreadRows(x, slots, out);
  ran("spreadRows", "compute", start);
}

/**
 * Index arrays between rank-major and expert-major rows.
 *
 * @param counts i32 [R, L].
 * @param toExpertMajor i32 [M], M being the sum of the counts.
 * @param toRankMajor i32 [M].
 * @throws {RangeError} If shapes or devices do not fit.
 * @throws {TypeError} If dtypes do not fit.
 */
export function majorOrders(counts: Tensor, toExpertMajor: Tensor, toRankMajor: Tensor): void {
  const op = "order rows", kernels = kernelsOf(op, counts), { device } = counts;
  alive(op, "counts", counts, device, "i32");
  isMatrix(op, "counts", counts);
  shaped(op, "toExpertMajor", toExpertMajor, device, "i32", [toExpertMajor.size]);
  shaped(op, "toRankMajor", toRankMajor, device, "i32", [toExpertMajor.size]);
  const start = now();
  kernels.majorOrders(counts, toExpertMajor, toRankMajor);
  ran("majorOrders", "compute", start);
}
