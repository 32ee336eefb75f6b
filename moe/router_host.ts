// Routing on the host: logits come to it, the pure functions of the router decide, and index arrays go back to the device. Every router and
// every option works so, on the CPU without a detour. The device's way is router_device.ts; both give the layer the same.
//
// Shape letters: N tokens of this rank, D model width, E experts, K choices per token, R ranks, C slices, S rows sent.

import type { Communicator } from "../collectives/types.ts";
import { type DType, type TypedArray, wideDtype } from "../tensor/dtype.ts";
import * as ops from "../tensor/ops.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";
import { type PlacedPlan, placePlans, sliceOf } from "./dispatch.ts";
import type { PlacementPlan } from "./hooks.ts";
import { linear } from "./linear.ts";
import type { RoutingTap } from "./moe_types.ts";
import type { Parameter } from "./parameter.ts";
import { makePlan, rowsPerRank } from "./plan.ts";
import { routeBackward, type Router } from "./router.ts";
import { routeGlobally } from "./router_exchange.ts";
import { type Shown, statsOf } from "./shown.ts";
import { sliceBounds } from "./slices.ts";
import type { Step } from "./step.ts";

/** What routing works with; alike on all ranks but for the weights' memory. */
export interface RouterContext {
  /** The ranks whose tokens make the global batch. */
  readonly comm: Communicator;
  /** Number of the layer. */
  readonly layer: number;
  /** The router. */
  readonly router: Router;
  /** The gate's weights [E, D]. */
  readonly gate: Parameter;
  /** Selection bias of a sigmoid router. */
  readonly bias_E: Float64Array;
  /** The run's seed. */
  readonly seed: number;
  /** Records or replays choices. */
  readonly tap: RoutingTap | null;
  /** Slices that each rank's tokens travel in; alike on all ranks. */
  readonly slices: number;
  /** Whether the weights meet the experts' hidden rows instead of their outputs; never so among ranks, nor in slices. */
  readonly hiddenWeights: boolean;
  /** The placement for rows per (rank, expert) [R, E]; experts sit so when it resolves. */
  place(counts_RE: Int32Array, step: Step): Promise<PlacementPlan>;
  /** Is told the choices per expert of every training pass, for the selection bias. */
  count(chosen_E: Float64Array): void;
}

/** Where the tokens of a pass go, and the way back to the gate. */
export interface Routed {
  /** Where every row goes, by slice; owned. */
  readonly slices: readonly PlacedPlan[];
  /** Weights of the choices [N, K]; owned. */
  readonly weights_NK: Tensor;
  /**
   * The weights as factors of rows in the send order [S], where they meet the experts' hidden rows instead of their outputs; else null. Owned.
   */
  readonly scales_S: Tensor | null;
  /** Losses and load. */
  readonly shown: Shown;
  /**
   * Gradient of the logits [N, E], a new tensor, from the weights' [N, K], or from that of `scales_S` [S] where there are any; `scale` is the factor of
   * the losses. Adds to the gate's gradient.
   */
  backward(dWeights: Tensor, scale: number): Promise<Tensor>;
  /**
   * The gradient of a slice's tokens, from that of their rows in the send order and, of all tokens, through the gate:
   * `dX[n] = Σ_k dRows[slots[n,k]] + dLogits[n] gate + beta · dX[n]`; the others of dX stay as they are.
   */
  tokensGradient(
    placed: PlacedPlan,
    dRows_SD: Tensor,
    dLogits_NE: Tensor,
    dX_ND: Tensor,
    beta: 0 | 1,
  ): void;
  /** Frees what is owned. */
  release(): void;
}

/**
 * Routes this rank's tokens on the host. All ranks call it together.
 *
 * @param context Router, ranks, gate.
 * @param x_ND Tokens.
 * @param step The step.
 * @returns Where rows go, and their weights.
 * @throws {RangeError} If a logit is not finite.
 */
export async function routeOnHost(
  context: RouterContext,
  x_ND: Tensor,
  step: Step,
): Promise<Routed> {
  const { comm, router, gate, layer, tap } = context;
  const { device } = x_ND, { dtype } = gate.value;
  const host = await logitsOf(x_ND, gate);
  const global = await routeGlobally({
    comm,
    router,
    bias_E: context.bias_E,
    training: step.training,
    seeds: { seed: context.seed, step: step.number, layer },
    replay: tap?.replay ? (first, tokens) => tap.replay!(layer, first, tokens) : null,
    slices: context.slices,
  }, host);
  const { routing, kept_NK, counts_CRE } = global, { choices } = routing;
  if (!step.repeated) {
    tap?.record?.(layer, routing);
    if (step.training) context.count(global.chosen_E);
  }
  const placement = await context.place(sumOf(counts_CRE), step);
  const bounds = sliceBounds(x_ND.shape[0], context.slices);
  const plans = counts_CRE.map((counts_RE, c) =>
    makePlan({
      rank: comm.rank,
      ranks: comm.size,
      experts: router.experts,
      choices,
      experts_NK: kept_NK.subarray(bounds[c] * choices, bounds[c + 1] * choices),
      counts_RE,
      placement,
    })
  );
  using undo = new DisposableStack();
  const placed = undo.use(placePlans(device, plans));
  const { weights_NK: weights } = routing, wide = wideDtype(x_ND.dtype);
  const weights_NK = undo.use(toDevice(x_ND, weights, [x_ND.shape[0], choices], wide));
  const [plan] = plans; // of all tokens, where weights meet hidden rows
  let scales_S: Tensor | null = null;
  if (context.hiddenWeights) {
    const ofRows = new Float64Array(plan.tokens_S.length);
    plan.slots_NK.forEach((slot, i) => slot >= 0 && (ofRows[slot] = weights[i]));
    scales_S = undo.use(toDevice(x_ND, ofRows, [ofRows.length], wide));
  }
  undo.move();
  return {
    slices: placed.slices,
    weights_NK,
    scales_S,
    shown: {
      auxLoss: global.losses.aux + global.losses.z,
      stats: statsOf(global.chosen_E, global.dropped, rowsPerRank(plans)),
    },
    async backward(dWeights, scale) {
      const given = await hostNumbers(dWeights);
      const dWeights_NK = scales_S
        ? Float64Array.from(plan.slots_NK, (slot) => slot < 0 ? 0 : given[slot])
        : given;
      const dLogits = routeBackward(router, routing, dWeights_NK, {
        sums: global.sums,
        scale,
      });
      using undo = new DisposableStack();
      const shape = [x_ND.shape[0], router.experts];
      const dLogits_NE = undo.use(toDevice(x_ND, dLogits, shape, dtype));
      using x = widened(x_ND, dtype);
      ops.gemm(dLogits_NE, x.tensor, gate.grad, { transposeA: true, beta: 1 });
      undo.move();
      return dLogits_NE;
    },
    tokensGradient(slice, dRows_SD, dLogits_NE, dX_ND, beta) {
      const own_ND = sliceOf(dX_ND, slice);
      ops.combineRows(dRows_SD, slice.slots_NK, null, own_ND, beta === 1 ? own_ND : undefined);
      using dX = widened(own_ND, dtype);
      ops.gemm(sliceOf(dLogits_NE, slice), gate.value, dX.tensor, { beta: 1 });
      if (dX.tensor !== own_ND) ops.copy(dX.tensor, own_ND);
    },
    release() {
      placed[Symbol.dispose]();
      weights_NK[Symbol.dispose]();
      scales_S?.[Symbol.dispose]();
    },
  };
}

/** Rows per (rank, expert) of all slices. */
function sumOf(counts_CRE: readonly Int32Array[]): Int32Array {
  if (counts_CRE.length === 1) return counts_CRE[0];
  return counts_CRE[0].map((_, i) => counts_CRE.reduce((sum, counts_RE) => sum + counts_RE[i], 0));
}

async function logitsOf(x_ND: Tensor, gate: Parameter): Promise<Float64Array> {
  using x = widened(x_ND, gate.value.dtype);
  using logits_NE = linear(x.tensor, gate.value);
  return await hostNumbers(logits_NE);
}

/** A tensor's numbers on the host, in f64. */
async function hostNumbers(x: Tensor): Promise<Float64Array> {
  using wide = widened(x, wideDtype(x.dtype));
  return new Float64Array(await wide.tensor.toArray() as Float32Array);
}

/** A tensor in another dtype: itself, or a copy that is freed with the handle. */
function widened(x: Tensor, dtype: DType): { readonly tensor: Tensor } & Disposable {
  if (x.dtype === dtype) return { tensor: x, [Symbol.dispose]: () => {} };
  const tensor = empty(x.device, x.shape, dtype);
  ops.copy(x, tensor);
  return { tensor, [Symbol.dispose]: () => tensor[Symbol.dispose]() };
}

/** Host numbers as a tensor of a floating type. */
function toDevice(
  { device }: Tensor,
  numbers: Float64Array,
  shape: readonly number[],
  dtype: DType,
): Tensor {
  const array: TypedArray = dtype === "f64" ? numbers : new Float32Array(numbers);
  const exact = fromArray(device, array, shape);
  if (exact.dtype === dtype) return exact;
  using wide = exact;
  const out = empty(device, shape, dtype);
  ops.copy(wide, out);
  return out;
}
