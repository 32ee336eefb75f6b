// Routing on a device that does it by itself (`Device.routing`): logits, choices, rows and gradients are made there, and the host neither sees
// nor waits for them. In a world of one it waits for nothing at all; among ranks it reads the ranks' records of sums, once per layer and
// pass, because it must know how many rows to send. What such a device does not do (noise, capacity, expert choice, replays) goes the host's
// way, router_host.ts.
//
// Shape letters: N tokens of this rank, D model width, E experts, K choices per token, R ranks, S rows sent, M rows received.

import * as routing from "../tensor/ops/routing.ts";
import { MOST_CHOICES, MOST_EXPERTS, type RouteOptions } from "../tensor/routing_kernels.ts";
import { empty, type Tensor, TensorScope } from "../tensor/tensor.ts";
import { placeAlone, type PlacedPlan, placeOutline } from "./dispatch.ts";
import { outlinePlan } from "./plan.ts";
import type { Router } from "./router.ts";
import type { Routed, RouterContext } from "./router_host.ts";
import { routerLosses, type RouterSums } from "./router_losses.ts";
import { type MoeShown, type Shown, statsOf } from "./shown.ts";
import type { Step } from "./step.ts";

/**
 * Whether a device that routes by itself can run a router in a pass; alike on all ranks.
 *
 * @param router The router.
 * @param training Whether noise is on, and experts have a capacity.
 * @returns True if it can.
 */
export function isPlain(router: Router, training: boolean): boolean {
  if (router.kind === "expertChoice") return false;
  if (router.experts > MOST_EXPERTS || router.topK > MOST_CHOICES) return false;
  if (!training) return true;
  return router.jitter === 0 && router.noise === 0 && router.capacityFactor === null &&
    (router.kind !== "gshard" || router.second === "greedy");
}

/**
 * A router as the kernels take it.
 *
 * @param router The router.
 * @returns The options.
 */
export function routeOptionsOf(router: Router): RouteOptions {
  return {
    experts: router.experts,
    choices: router.topK,
    scores: router.kind === "sigmoid" ? "sigmoid" : "softmax",
    renormalise: router.renormalise,
    scale: router.scale,
    groups: router.kind === "sigmoid" ? router.groups : 1,
    groupLimit: router.kind === "sigmoid" ? router.groupLimit : 1,
    firstOnly: router.kind === "gshard",
  };
}

/**
 * Routes this rank's tokens on the device. All ranks call it together.
 *
 * @param context Router, ranks, gate.
 * @param x_ND Tokens.
 * @param step The step.
 * @param bias_E Selection bias f32 [E] on the device, or null.
 * @returns Where rows go, and their weights.
 */
export async function routeOnDevice(
  context: RouterContext,
  x_ND: Tensor,
  step: Step,
  bias_E: Tensor | null,
): Promise<Routed> {
  const { comm, router, gate, layer, tap } = context;
  const { device } = x_ND, N = x_ND.shape[0], E = router.experts, K = router.topK;
  const options = routeOptionsOf(router), length = 3 * E + 2;
  using undo = new DisposableStack();
  const logits_NE = undo.use(empty(device, [N, E])), lse_N = undo.use(empty(device, [N]));
  const experts_NK = undo.use(empty(device, [N, K], "i32"));
  const weights_NK = undo.use(empty(device, [N, K]));
  const scales_S = context.hiddenWeights ? undo.use(empty(device, [N * K])) : null;
  const all = undo.use(empty(device, [comm.size, length], "f64"));
  const out = { experts: experts_NK, weights: weights_NK, lse: lse_N };
  routing.gate(x_ND, gate.value, logits_NE);
  let placed: PlacedPlan, shown: Shown;
  const records = new Shared(all);
  if (comm.size === 1) {
    routing.route(logits_NE, bias_E, options, { ...out, record: all.reshape(length) });
    placed = undo.use(placeAlone(experts_NK, E, scales_S && { weights_NK, scales_S }));
    // What is shown may be read before or after the backward pass, which needs the record, too.
    const release = records.own();
    shown = {
      records: all,
      release,
      finish(array) {
        release();
        const read = readRecords(array, router, 1);
        if (step.training && !step.repeated) context.count(read.chosen_E);
        return { auxLoss: read.auxLoss, stats: statsOf(read.chosen_E, 0, Int32Array.of(N * K)) };
      },
    };
  } else {
    using record = empty(device, [length], "f64");
    routing.route(logits_NE, bias_E, options, { ...out, record });
    await comm.allGather(record, all).wait(device.stream);
    const read = readRecords(await all.toArray() as Float64Array, router, comm.size);
    const placement = await context.place(read.counts_RE, step);
    const ranks = { rank: comm.rank, ranks: comm.size, experts: E };
    const outline = outlinePlan({ ...ranks, counts_RE: read.counts_RE, placement });
    placed = undo.use(placeOutline(experts_NK, E, outline));
    if (step.training && !step.repeated) context.count(read.chosen_E);
    shown = {
      auxLoss: read.auxLoss,
      stats: statsOf(read.chosen_E, 0, outline.rowsPerRank),
    } satisfies MoeShown;
  }
  if (tap?.record && !step.repeated) {
    const chosen = await experts_NK.toArray() as Int32Array;
    tap.record(layer, { choices: K, experts_NK: chosen });
  }
  const slots = scales_S ? placed.slots_NK : undefined;
  const saved = { logits: logits_NE, lse: lse_N, experts: experts_NK, records: all, slots };
  const releaseRecords = records.own();
  undo.move();
  return {
    placed,
    weights_NK,
    scales_S,
    shown,
    backward(dWeights, scale) {
      using scope = new TensorScope();
      const dLogits_NE = empty(device, [N, E]);
      routing.routeBackward(dWeights, saved, {
        ...options,
        auxLoss: router.auxLoss * scale,
        zLoss: router.zLoss * scale,
        ranks: comm.size,
      }, dLogits_NE);
      routing.gateWeightGrad(dLogits_NE, x_ND, gate.grad);
      return Promise.resolve(scope.keep(dLogits_NE));
    },
    tokensGradient(dRows_SD, dLogits_NE, dX_ND, beta) {
      const { slots_NK } = placed;
      routing.combineRowsGate(dRows_SD, slots_NK, dLogits_NE, gate.value, dX_ND, { beta });
    },
    release() {
      placed[Symbol.dispose]();
      for (const tensor of [logits_NE, lse_N, experts_NK, weights_NK, scales_S]) {
        tensor?.[Symbol.dispose]();
      }
      releaseRecords();
    },
  };
}

/** A tensor with several owners: the last one that lets go of it frees it. */
class Shared {
  readonly #tensor: Tensor;
  readonly #owners = new Set<symbol>();

  constructor(tensor: Tensor) {
    this.#tensor = tensor;
  }

  /** Makes one more owner; what it returns lets go, however often it is called. */
  own(): () => void {
    const owner = Symbol();
    this.#owners.add(owner);
    return () => {
      if (this.#owners.delete(owner) && this.#owners.size === 0) this.#tensor[Symbol.dispose]();
    };
  }
}

/** What the ranks' records say of the global batch. */
function readRecords(records: Float64Array, router: Router, ranks: number): {
  readonly counts_RE: Int32Array;
  readonly chosen_E: Float64Array;
  readonly auxLoss: number;
} {
  const E = router.experts, length = 3 * E + 2;
  const counts_RE = new Int32Array(ranks * E), total = new Float64Array(length);
  for (let r = 0; r < ranks; r++) {
    for (let i = 0; i < length; i++) total[i] += records[r * length + i];
    for (let e = 0; e < E; e++) counts_RE[r * E + e] = records[r * length + e];
  }
  const sums: RouterSums = {
    choices_E: total.slice(E, 2 * E),
    scores_E: total.slice(2 * E, 3 * E),
    squaredLse: total[3 * E],
    tokens: total[3 * E + 1],
  };
  if (!Number.isFinite(sums.squaredLse)) {
    throw new RangeError(
      `Cannot route tokens as their logits must be finite: current value is ${sums.squaredLse} as the sum of their squared log-sum-exps`,
    );
  }
  const { aux, z } = routerLosses(sums, router);
  return { counts_RE, chosen_E: total.slice(0, E), auxLoss: aux + z };
}
