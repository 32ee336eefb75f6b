// A Mixture-of-Experts layer as SPMD code. Forward, on every rank at once:
//
//   gate → router (with the ranks' sums) → routing plan → permute → all-to-all → experts → all-to-all → weigh and add → + shared experts
//
// Backward is the mirror image. The router is router*.ts, the plan plan.ts, the movements dispatch.ts, the experts experts.ts and
// expert_store.ts: this file puts them in order and owns nothing but the gate and the shared experts.
//
// Gradients are those of the sum over the global batch of whatever the caller scales dOut by. An expert's gradient is whole where it sits
// (and summed among replicas by `reduceReplicas`); those of the gate and the shared experts are this rank's part and are summed over
// the world by the caller. So no gradient depends on the number of ranks.
//
// Shape letters: N tokens of this rank, D model width, F hidden width, E experts, K choices per token, S rows sent, M rows received.

import type { Work } from "../collectives/types.ts";
import type { DType, TypedArray } from "../tensor/dtype.ts";
import * as ops from "../tensor/ops.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";
import { fromExperts, permute, placePlan, toExperts } from "./dispatch.ts";
import { type ExpertGroups, expertsBackward, expertsForward, releaseExperts } from "./experts.ts";
import { ExpertStore } from "./expert_store.ts";
import type { PlacementPlan } from "./hooks.ts";
import { linear, linearBackward } from "./linear.ts";
import { createParameter, freeParameter, type Parameter } from "./parameter.ts";
import type { MoeLayerOptions, MoeResult, MoeSaved, MoeStats, RoutingTap } from "./moe_types.ts";
import { staticPlacement } from "./placement.ts";
import { makePlan } from "./plan.ts";
import { createRouter, routeBackward, type Router } from "./router.ts";
import { type GlobalRouting, routeGlobally } from "./router_exchange.ts";
import { updateBias } from "./router_sigmoid.ts";
import { SharedExperts } from "./shared_experts.ts";
import type { Step } from "./step.ts";

export type {
  MoeLayerOptions,
  MoeResult,
  MoeSaved,
  MoeStats,
  RoutingTap,
  Shown,
} from "./moe_types.ts";

/** A Mixture-of-Experts layer. All ranks call its methods together. */
export class MoeLayer implements Disposable {
  /** Number of the layer. */
  readonly layer: number;
  /** The router, defaults filled in. */
  readonly router: Router;
  /** The experts that sit on this rank. */
  readonly store: ExpertStore;
  /** The gate's weights [E, D]. */
  readonly gate: Parameter;
  /** Selection bias of a sigmoid router: no parameter, but part of a checkpoint, as {@linkcode biasName}. */
  readonly bias: Float64Array;
  /** Factor of the gradient of balance and z loss: 1 / A where A passes make a step. */
  auxScale = 1;
  /** Records or replays choices; alike on all ranks in whether it replays. */
  tap: RoutingTap | null = null;
  readonly #options: Required<MoeLayerOptions>;
  readonly #shared: SharedExperts | null;
  /** Choices per expert since the bias was moved. */
  readonly #counts: Float64Array;

  /**
   * Makes the gate, the experts that sit on this rank, and the shared experts.
   *
   * @param options Sizes, router, ranks.
   * @throws {RangeError} If a size is impossible: more ranks than experts, more choices than experts, …
   */
  constructor(options: MoeLayerOptions) {
    const initStd = options.initStd ?? 0.02;
    const all: Required<MoeLayerOptions> = {
      activation: "swiglu",
      sharedExperts: 0,
      placement: staticPlacement(),
      seed: 0,
      downStd: initStd,
      dtype: "f32",
      ...options,
      initStd,
    };
    const { device, comm, layer, width, experts, placement, seed, dtype } = all;
    for (const name of ["width", "hidden", "experts"] as const) checkSize(name, all[name], 1);
    checkSize("sharedExperts", all.sharedExperts, 0);
    this.#options = all;
    this.layer = layer;
    this.router = createRouter(all.router, experts);
    const { seats } = placement.plan({ layer, experts, ranks: comm.size, counts: null });
    this.store = new ExpertStore({ ...all, seats });
    this.gate = createParameter(device, `model.layers.${layer}.block_sparse_moe.gate.weight`, {
      shape: [experts, width],
      dtype: dtype === "f64" ? "f64" : "f32",
      init: { std: initStd, seed },
    });
    this.bias = new Float64Array(experts);
    this.#counts = new Float64Array(experts);
    this.#shared = all.sharedExperts > 0 ? new SharedExperts(all) : null;
  }

  /** The rank's parameters, in the order in which their gradients become ready: its experts, shared experts, gate. */
  get parameters(): readonly Parameter[] {
    return [...this.store.parameters, ...(this.#shared?.parameters ?? []), this.gate];
  }

  /** Name of the selection bias in checkpoints; null where the router has none. */
  get biasName(): string | null {
    return this.router.kind === "sigmoid"
      ? `model.layers.${this.layer}.mlp.gate.e_score_correction_bias`
      : null;
  }

  /**
   * Runs the layer on this rank's tokens; ranks may have different numbers of them, or none.
   *
   * @param x_ND Input; it must live until the backward pass.
   * @param step The step.
   * @param residual_ND What the output is added to; stays the caller's. @default {zeros}
   * @returns Output, auxiliary loss and statistics. In inference, what was saved is freed already.
   * @throws {RangeError} If the input does not fit, or a logit is not finite.
   */
  async forward(x_ND: Tensor, step: Step, residual_ND?: Tensor): Promise<MoeResult> {
    const { device, comm } = this.#options;
    this.#checkInput(x_ND);
    const global = await this.#route(x_ND, step);
    const placement = await this.#place(global.counts_RE, step);
    const { routing, kept_NK, counts_RE } = global;
    const plan = makePlan({
      rank: comm.rank,
      ranks: comm.size,
      experts: this.#options.experts,
      choices: routing.choices,
      experts_NK: kept_NK,
      counts_RE,
      placement,
    });
    const placed = placePlan(device, plan);
    const weights_NK = this.#toDevice(routing.weights_NK, [plan.tokens, plan.choices], x_ND.dtype);

    const arriving = toExperts(
      permute(x_ND, placed),
      placed,
      comm,
      this.#transfer(step, "forward", "dispatch"),
    );
    const shared = this.#shared?.forward(x_ND) ?? null; // while the rows travel
    const x_MD = await arriving;
    const { y_MD, saved: experts } = expertsForward(x_MD, this.#groups(plan.offsets));
    const y_SD = await fromExperts(
      y_MD,
      placed,
      comm,
      this.#transfer(step, "forward", "combine"),
    );
    const out_ND = empty(device, x_ND.shape, x_ND.dtype);
    ops.combineRows(y_SD, placed.slots_NK, weights_NK, out_ND, residual_ND);
    if (shared) {
      using y_ND = shared.y_MD;
      ops.add(out_ND, y_ND, out_ND);
    }
    const saved: MoeSaved = {
      x_ND,
      global,
      placed,
      weights_NK,
      x_MD,
      experts,
      y_SD,
      shared: shared?.saved ?? null,
    };
    if (!step.training) this.release(saved);
    const auxLoss = global.losses.aux + global.losses.z;
    return { out_ND, saved, shown: { auxLoss, stats: statsOf(global, plan.rowsPerRank) } };
  }

  /**
   * Gradient of {@linkcode MoeLayer.forward}: adds to the parameters' gradients, those of the auxiliary losses included, and frees
   * what was saved.
   *
   * @param dOut_ND Gradient of the output.
   * @param saved From the forward pass.
   * @param step Told of boundaries, all-to-alls and complete gradients.
   * @returns Gradient of the input; the caller's.
   */
  async backward(dOut_ND: Tensor, saved: MoeSaved, step: Step): Promise<Tensor> {
    const { device, comm } = this.#options;
    const { x_ND, placed, weights_NK, y_SD } = saved;
    step.combineBackwardStarts(this.layer);
    const dY_SD = empty(device, y_SD.shape, y_SD.dtype);
    using dWeights_NK = empty(device, weights_NK.shape, weights_NK.dtype);
    ops.combineRowsBackward(dOut_ND, y_SD, placed.slots_NK, weights_NK, dY_SD, dWeights_NK);
    const arriving = toExperts(dY_SD, placed, comm, this.#transfer(step, "backward", "combine"));
    // While the rows travel: shared experts and the router.
    const dShared_ND = saved.shared && this.#shared!.backward(dOut_ND, saved.shared);
    const dLogits_NE = routeBackward(
      this.router,
      saved.global.routing,
      new Float64Array(await dWeights_NK.toArray() as Float32Array),
      { sums: saved.global.sums, scale: this.auxScale },
    );
    using dY_MD = await arriving;
    const { offsets } = placed.plan;
    const dX_MD = expertsBackward(
      dY_MD,
      saved.experts,
      this.#groups(offsets),
      this.store.gradients,
    );
    for (const { name } of this.store.parameters) step.gradientReady(name);
    using dX_SD = await fromExperts(
      dX_MD,
      placed,
      comm,
      this.#transfer(step, "backward", "dispatch"),
    );
    // The gradient of giving a token to its K experts is the sum over them.
    const dX_ND = empty(device, x_ND.shape, x_ND.dtype);
    using ones_NK = empty(device, weights_NK.shape, x_ND.dtype);
    ops.fill(ones_NK, 1);
    ops.combineRows(dX_SD, placed.slots_NK, ones_NK, dX_ND);
    this.#gateBackward(dLogits_NE, x_ND, dX_ND);
    if (dShared_ND) {
      using more_ND = dShared_ND;
      ops.add(dX_ND, more_ND, dX_ND);
    }
    for (const { name } of this.#shared?.parameters ?? []) step.gradientReady(name);
    step.gradientReady(this.gate.name);
    this.release(saved);
    step.layerBackwardEnds(this.layer);
    return dX_ND;
  }

  /**
   * Sums the gradients of expert replicas among the ranks that hold them: once per step, after the last backward pass. Without replicas
   * it does nothing.
   */
  async reduceReplicas(): Promise<void> {
    await this.store.reduceReplicas();
  }

  /** Ends a step: moves the selection bias of a sigmoid router against the load of all its passes. */
  endStep(): void {
    if (this.router.biasRate > 0) updateBias(this.bias, this.#counts, this.router.biasRate);
    this.#counts.fill(0);
  }

  /**
   * Frees what a forward pass saved, if no backward pass will.
   *
   * @param saved From the forward pass.
   */
  release(saved: MoeSaved): void {
    saved.placed[Symbol.dispose]();
    saved.weights_NK[Symbol.dispose]();
    saved.x_MD[Symbol.dispose]();
    saved.y_SD[Symbol.dispose]();
    releaseExperts(saved.experts);
    if (saved.shared) releaseExperts(saved.shared);
  }

  /** Frees the weights. */
  [Symbol.dispose](): void {
    this.store[Symbol.dispose]();
    this.#shared?.[Symbol.dispose]();
    freeParameter(this.gate);
  }

  async #route(x_ND: Tensor, step: Step): Promise<GlobalRouting> {
    const { comm, seed } = this.#options;
    const { layer, router, tap } = this;
    using x = this.#widened(x_ND);
    using logits_NE = linear(x.tensor, this.gate.value);
    const global = await routeGlobally({
      comm,
      router,
      bias_E: this.bias,
      training: step.training,
      seeds: { seed, step: step.number, layer },
      replay: tap?.replay ? (first, tokens) => tap.replay!(layer, first, tokens) : null,
    }, new Float64Array(await logits_NE.toArray() as Float32Array));
    if (step.repeated) return global;
    tap?.record?.(layer, global.routing);
    if (step.training) {
      for (let e = 0; e < this.#counts.length; e++) this.#counts[e] += global.chosen_E[e];
    }
    return global;
  }

  #gateBackward(dLogits_NE: Float64Array, x_ND: Tensor, dX_ND: Tensor): void {
    const { experts } = this.#options;
    const shape = [x_ND.shape[0], experts];
    using dLogits = this.#toDevice(dLogits_NE, shape, this.gate.value.dtype);
    using x = this.#widened(x_ND);
    if (x.tensor === x_ND) {
      linearBackward(dLogits, x_ND, this.gate, { dX_NI: dX_ND });
      return;
    }
    using dX = this.#widened(dX_ND);
    linearBackward(dLogits, x.tensor, this.gate, { dX_NI: dX.tensor });
    ops.copy(dX.tensor, dX_ND);
  }

  /** A tensor in the gate's dtype: itself, or a copy that is freed with the handle. */
  #widened(x: Tensor): { readonly tensor: Tensor } & Disposable {
    const { dtype } = this.gate.value;
    if (x.dtype === dtype) return { tensor: x, [Symbol.dispose]: () => {} };
    const tensor = empty(x.device, x.shape, dtype);
    ops.copy(x, tensor);
    return { tensor, [Symbol.dispose]: () => tensor[Symbol.dispose]() };
  }

  /** Host numbers as a tensor of a floating type. */
  #toDevice(numbers: Float64Array, shape: readonly number[], dtype: DType): Tensor {
    const { device } = this.#options;
    const array: TypedArray = dtype === "f64" ? numbers : new Float32Array(numbers);
    const exact = fromArray(device, array, shape);
    if (exact.dtype === dtype) return exact;
    using wide = exact;
    const out = empty(device, shape, dtype);
    ops.copy(wide, out);
    return out;
  }

  /** The placement for these counts. In inference experts move to it; in training they must sit so already. */
  async #place(counts: Int32Array, step: Step): Promise<PlacementPlan> {
    const { comm, experts, placement } = this.#options;
    const plan = placement.plan({ layer: this.layer, experts, ranks: comm.size, counts });
    if (sameSeats(plan.seats, this.store.seats)) return plan;
    if (step.training) {
      throw new Error(
        `Cannot train layer ${this.layer} as experts must stay in their seats within a step: current value is a plan of other seats by "${placement.name}"; call store.moveTo between steps`,
      );
    }
    await this.store.moveTo(plan.seats);
    return plan;
  }

  #groups(offsets: Int32Array): ExpertGroups {
    return { weights: this.store.matrices, offsets, activation: this.#options.activation };
  }

  #transfer(
    step: Step,
    phase: "forward" | "backward",
    role: "dispatch" | "combine",
  ): (start: () => Work) => Promise<void> {
    return (start) => step.allToAll({ layer: this.layer, phase, role }, start);
  }

  #checkInput(x_ND: Tensor): void {
    const { width, dtype } = this.#options;
    if (x_ND.shape.length !== 2 || x_ND.shape[1] !== width || x_ND.dtype !== dtype) {
      throw new RangeError(
        `Cannot run layer ${this.layer} as its input must be ${dtype} [N,${width}]: current value is ${x_ND.dtype} [${x_ND.shape}]`,
      );
    }
  }
}

function statsOf(global: GlobalRouting, rowsPerRank: Int32Array): MoeStats {
  let most = 0, sum = 0;
  for (const rows of rowsPerRank) {
    most = Math.max(most, rows);
    sum += rows;
  }
  return {
    counts: global.chosen_E,
    dropped: global.dropped,
    rowsPerRank,
    imbalance: sum > 0 ? most * rowsPerRank.length / sum : 1,
  };
}

function sameSeats(a: PlacementPlan["seats"], b: PlacementPlan["seats"]): boolean {
  return a === b || a.every((held, rank) => {
    return held.length === b[rank].length && held.every((e, i) => e === b[rank][i]);
  });
}

function checkSize(name: string, value: number, least: number): void {
  if (!Number.isSafeInteger(value) || value < least) {
    throw new RangeError(
      `Cannot make a MoE layer as ${name} must be a whole number >= ${least}: current value is ${value}`,
    );
  }
}
