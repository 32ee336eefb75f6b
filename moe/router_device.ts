// Routing on a device that does it by itself (`Device.routing`): logits, choices, rows and gradients are made there, and the host neither sees
// nor waits for them. In a world of one it waits for nothing at all; among ranks it reads the ranks' records of sums, once per layer and
// pass, because it must know how many rows to send. What such a device does not do (noise, capacity, expert choice, replays) goes the host's
// way, router_host.ts.
//
// Shape letters: N tokens of this rank, D model width, E experts, K choices per token, R ranks, C slices, S rows sent.

import type { Device } from "../tensor/device.ts";
import * as routing from "../tensor/ops/routing.ts";
import { MOST_CHOICES, MOST_EXPERTS, type RouteOptions } from "../tensor/routing_kernels.ts";
import { empty, type Tensor, TensorScope } from "../tensor/tensor.ts";
import { placeAlone, type PlacedPlans, placeOutlines, sliceOf } from "./dispatch.ts";
import { outlinePlan, rowsPerRank } from "./plan.ts";
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
  const { slices } = context, options = routeOptionsOf(router), length = 3 * E + 2;
  // Behind its record a rank shows the choices of all its slices but the last, whose are the rest.
  const shownLength = comm.size === 1 ? length : length + (slices - 1) * E;
  using undo = new DisposableStack();
  const logits_NE = undo.use(empty(device, [N, E])), lse_N = undo.use(empty(device, [N]));
  const experts_NK = undo.use(empty(device, [N, K], "i32"));
  const weights_NK = undo.use(empty(device, [N, K]));
  const scales_S = context.hiddenWeights ? undo.use(empty(device, [N * K])) : null;
  const all = undo.use(empty(device, [comm.size, shownLength], "f64"));
  const out = { experts: experts_NK, weights: weights_NK, lse: lse_N };
  routing.gate(x_ND, gate.value, logits_NE);
  let placed: PlacedPlans, shown: Shown;
  const records = new Shared(all);
  if (comm.size === 1) {
    routing.route(logits_NE, bias_E, options, { ...out, record: all.reshape(length) });
    const factors = scales_S && { weights_NK, scales_S };
    placed = undo.use(placeAlone(experts_NK, E, { slices, factors }));
    // What is shown may be read before or after the backward pass, which needs the record, too.
    const release = records.own();
    shown = {
      records: all,
      release,
      finish(array) {
        release();
        const read = readRecords(array, router, 1, 1);
        if (step.training && !step.repeated) context.count(read.chosen_E);
        return { auxLoss: read.auxLoss, stats: statsOf(read.chosen_E, 0, Int32Array.of(N * K)) };
      },
    };
  } else {
    using record = empty(device, [shownLength], "f64");
    routing.route(logits_NE, bias_E, options, { ...out, record: record.rows(0, length) });
    if (slices > 1) {
      const counts_CE = record.rows(length, shownLength).reshape(slices - 1, E);
      routing.countSlices(experts_NK, slices, counts_CE);
    }
    await comm.allGather(record, all).wait(device.stream);
    const read = readRecords(await all.toArray() as Float64Array, router, comm.size, slices);
    const placement = await context.place(read.counts_RE, step);
    const ranks = { rank: comm.rank, ranks: comm.size, experts: E };
    const outlines = read.counts_CRE.map((counts_RE) =>
      outlinePlan({ ...ranks, counts_RE, placement })
    );
    placed = undo.use(placeOutlines(experts_NK, E, outlines));
    if (step.training && !step.repeated) context.count(read.chosen_E);
    shown = {
      auxLoss: read.auxLoss,
      stats: statsOf(read.chosen_E, 0, rowsPerRank(outlines)),
    } satisfies MoeShown;
  }
  if (tap?.record && !step.repeated) {
    const chosen = await experts_NK.toArray() as Int32Array;
    tap.record(layer, { choices: K, experts_NK: chosen });
  }
  const slots = scales_S ? placed.slices[0].slots_NK : undefined;
  const saved = { logits: logits_NE, lse: lse_N, experts: experts_NK, records: all, slots };
  const releaseRecords = records.own();
  undo.move();
  return {
    slices: placed.slices,
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
    tokensGradient(slice, dRows_SD, dLogits_NE, dX_ND, beta) {
      const own_NE = sliceOf(dLogits_NE, slice), own_ND = sliceOf(dX_ND, slice);
      routing.combineRowsGate(dRows_SD, slice.slots_NK, own_NE, gate.value, own_ND, { beta });
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

/** A selection bias on a device. */
export class PlacedBias implements Disposable {
  readonly #bias_E: Float64Array;
  readonly #tensor: Tensor;
  /** What was written last. */
  readonly #written: Float32Array;

  /**
   * @param device Where.
   * @param bias_E The bias, whose values change.
   */
  constructor(device: Device, bias_E: Float64Array) {
    this.#bias_E = bias_E;
    this.#tensor = empty(device, [bias_E.length]);
    this.#written = new Float32Array(bias_E.length).fill(NaN);
  }

  /** The bias as it is now, f32 [E]; its memory stays this object's. */
  get now(): Tensor {
    const written = this.#written, tensor = this.#tensor;
    if (this.#bias_E.some((b, e) => Math.fround(b) !== written[e])) {
      written.set(this.#bias_E);
      tensor.device.write(written, tensor);
    }
    return tensor;
  }

  /** Frees its memory. */
  [Symbol.dispose](): void {
    this.#tensor[Symbol.dispose]();
  }
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

/** What the ranks' records say of the global batch, and the choices of each slice. */
function readRecords(records: Float64Array, router: Router, ranks: number, slices: number): {
  readonly counts_RE: Int32Array;
  readonly counts_CRE: readonly Int32Array[];
  readonly chosen_E: Float64Array;
  readonly auxLoss: number;
} {
  const E = router.experts, length = 3 * E + 2, stride = length + (slices - 1) * E;
  const counts_RE = new Int32Array(ranks * E), total = new Float64Array(length);
  for (let r = 0; r < ranks; r++) {
    for (let i = 0; i < length; i++) total[i] += records[r * stride + i];
    for (let e = 0; e < E; e++) counts_RE[r * E + e] = records[r * stride + e];
  }
  const counts_CRE: Int32Array[] = [], rest_RE = slices === 1 ? counts_RE : counts_RE.slice();
  for (let c = 0; c < slices - 1; c++) {
    const own_RE = counts_RE.map((_, i) => {
      return records[Math.floor(i / E) * stride + length + c * E + i % E];
    });
    own_RE.forEach((n, i) => rest_RE[i] -= n);
    counts_CRE.push(own_RE);
  }
  counts_CRE.push(rest_RE);
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
  return { counts_RE, counts_CRE, chosen_E: total.slice(0, E), auxLoss: aux + z };
}
