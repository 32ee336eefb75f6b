// A Mixture-of-Experts layer as SPMD code. Forward, on every rank at once:
//
//   gate → router (with the ranks' sums) → routing plan → permute → all-to-all → experts → all-to-all → weigh and add → + shared experts
//
// In a world of one on a GPU, where hidden rows are narrow, the weights meet those, and the end of it is a plain sum.
//
// A step may have a rank's tokens travel in slices (`Step.chunks`): the router runs once for all, then experts work on one slice while others
// travel (pipeline.ts).
//
// Backward is the mirror image. The router is router*.ts, the plan plan.ts, the movements dispatch.ts, the experts experts.ts and
// expert_store.ts: this file puts them in order and owns nothing but the gate and the shared experts.
//
// Gradients are those of the sum over the global batch of whatever the caller scales dOut by. An expert's gradient is whole where it sits
// (and summed among replicas by `reduceReplicas`); those of the gate and the shared experts are this rank's part and are summed over
// the world by the caller. So no gradient depends on the number of ranks.
//
// Shape letters: N tokens of this rank, D model width, F hidden width, E experts, K choices per token, S rows sent, M rows received.

import * as ops from "../tensor/ops.ts";
import { empty, type Tensor, TensorScope } from "../tensor/tensor.ts";
import { permute, type PlacedPlan, sliceOf } from "./dispatch.ts";
import {
  type ExpertGradients,
  type ExpertGroups,
  expertsBackward,
  expertsForward,
  type ExpertsSaved,
  releaseExperts,
  type RowsBackward,
  rowsBackward,
} from "./experts.ts";
import { ExpertStore } from "./expert_store.ts";
import { FeedForward } from "./feed_forward.ts";
import type { ExpertPlacement, PlacementPlan } from "./hooks.ts";
import { layerOptions } from "./layer_options.ts";
import { createParameter, freeParameter, type Parameter } from "./parameter.ts";
import type { MoeLayerOptions, MoeResult, MoeSaved, RoutingTap, RowExchange } from "./moe_types.ts";
import { dropAll, type HalfPass, sendSlices, workOnSlices } from "./pipeline.ts";
import { dropShown } from "./shown.ts";
import { createRouter, type Router } from "./router.ts";
import { isPlain, PlacedBias, routeOnDevice } from "./router_device.ts";
import { type Routed, routeOnHost, type RouterContext } from "./router_host.ts";
import { updateBias } from "./router_sigmoid.ts";
import type { Step } from "./step.ts";

export type {
  MoeLayerOptions,
  MoeResult,
  MoeSaved,
  MoeStats,
  RoutingTap,
  RowExchange,
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
  /** Where experts sit; may be changed between steps, alike on all ranks: in training what it plans must be how they sit. */
  placement: ExpertPlacement;
  /** Carries rows in place of the communicator's own all-to-all, or null; may be changed between passes, alike on all ranks. */
  exchange: RowExchange | null;
  /** Whether, in slices, the gradients of the experts' weights are made when those of rows are on their way; alike on all ranks. */
  weightGradientsBehind = false;
  readonly #options: Required<MoeLayerOptions>;
  /** The experts that every token meets (DeepSeek-MoE), as one network of as many times the hidden width. */
  readonly #shared: FeedForward | null;
  /** The parameters, and the experts' among them. */
  #parameters: {
    readonly experts: readonly Parameter[] | null;
    readonly all: readonly Parameter[];
  } = { experts: null, all: [] };
  /** Choices per expert since the bias was moved. */
  readonly #counts: Float64Array;
  /** The selection bias of a sigmoid router where the device routes. */
  #placedBias: PlacedBias | null = null;

  /**
   * Makes the gate, the experts that sit on this rank, and the shared experts.
   *
   * @param options Sizes, router, ranks.
   * @throws {RangeError} If a size is impossible: more ranks than experts, more choices than experts, …
   */
  constructor(options: MoeLayerOptions) {
    const all = layerOptions(options);
    const { device, comm, layer, width, experts, placement, seed, dtype, initStd } = all;
    using scope = new TensorScope();
    this.#options = all;
    this.layer = layer;
    this.router = createRouter(all.router, experts);
    this.placement = placement;
    this.exchange = all.exchange;
    const { seats } = placement.plan({ layer, experts, ranks: comm.size, counts: null });
    this.store = new ExpertStore({ ...all, seats });
    this.gate = createParameter(device, `model.layers.${layer}.block_sparse_moe.gate.weight`, {
      shape: [experts, width],
      dtype: dtype === "f64" ? "f64" : "f32",
      init: { std: initStd, seed },
    });
    this.bias = new Float64Array(experts);
    this.#counts = new Float64Array(experts);
    this.#shared = all.sharedExperts === 0 ? null : new FeedForward({
      ...all,
      prefix: `model.layers.${layer}.mlp.shared_experts.`,
      hidden: all.hidden * all.sharedExperts,
    });
    scope.keep(this);
  }

  /**
   * The rank's parameters, in the order in which their gradients become ready: its experts, shared experts, gate; the same object until experts
   * move.
   */
  get parameters(): readonly Parameter[] {
    const experts = this.store.parameters;
    if (experts !== this.#parameters.experts) {
      const all = [...experts, ...(this.#shared?.parameters ?? []), this.gate];
      this.#parameters = { experts, all };
    }
    return this.#parameters.all;
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
    this.#checkInput(x_ND);
    using undo = new DisposableStack();
    const routed = await this.#route(x_ND, step);
    const { weights_NK, scales_S, shown } = routed;
    undo.defer(() => dropShown([shown]));
    undo.defer(() => routed.release());
    const half = this.#half(step, "forward", routed);
    const experts: ExpertsSaved[] = [], outputs: Tensor[] = [];
    undo.defer(() => experts.forEach(releaseExperts));
    undo.defer(() => outputs.forEach((y_SD) => y_SD[Symbol.dispose]()));
    const arriving = await sendSlices(half, (slice) => permute(sliceOf(x_ND, slice), slice));
    undo.defer(() => dropAll(arriving));
    const shared = this.#shared?.forward(x_ND, step) ?? null; // while the rows travel
    if (shared) {
      undo.use(shared.out_ND);
      undo.defer(() => this.#shared!.release(shared.saved));
    }
    const work = (x_MD: Tensor, slice: PlacedPlan) => {
      const { y_MD, saved } = expertsForward(x_MD, this.#groups(slice), scales_S);
      experts.push(saved);
      return y_MD;
    };
    let out_ND!: Tensor; // made once rows are back: there is a slice at least
    const outs = { residual_ND, shared_ND: shared?.out_ND };
    await workOnSlices(half, arriving, work, (y_SD, slice, chunk) => {
      outputs.push(y_SD);
      if (chunk === 0) out_ND = undo.use(empty(x_ND.device, x_ND.shape, x_ND.dtype));
      const weights = scales_S ? null : sliceOf(weights_NK, slice);
      combineOnto(y_SD, slice, weights, { ...outs, out_ND });
      if (scales_S) outputs.pop()![Symbol.dispose]();
    });
    shared?.out_ND[Symbol.dispose]();
    const saved = { x_ND, routed, experts, outputs, shared: shared?.saved ?? null };
    if (!step.training) this.release(saved);
    undo.move();
    return { out_ND, saved, shown };
  }

  /**
   * Gradient of {@linkcode MoeLayer.forward}: adds to the parameters' gradients, or overwrites them, those of the auxiliary losses included, and
   * frees what was saved. If it throws, that is still to be given to {@linkcode MoeLayer.release}.
   *
   * @param dOut_ND Gradient of the output.
   * @param saved From the forward pass.
   * @param step Told of boundaries, all-to-alls and complete gradients.
   * @returns Gradient of the input; the caller's.
   */
  async backward(dOut_ND: Tensor, saved: MoeSaved, step: Step): Promise<Tensor> {
    const { x_ND, routed } = saved, { weights_NK, scales_S, slices } = routed;
    const { gradients, parameters } = this.store;
    step.combineBackwardStarts(this.layer);
    using undo = new DisposableStack();
    using dWeights_NK = scales_S ? null : empty(x_ND.device, weights_NK.shape, weights_NK.dtype);
    const half = this.#half(step, "backward", routed);
    const arriving = await sendSlices(half, (_, chunk) => {
      return outputsGradient(dOut_ND, saved, chunk, dWeights_NK);
    });
    undo.defer(() => dropAll(arriving));
    // While the rows travel: shared experts, and the router where the weights' gradient is known.
    const later = { firstPass: step.firstPass, gradientReady: () => {} }; // behind the all-to-alls
    const dShared_ND = saved.shared && this.#shared!.backward(dOut_ND, saved.shared, later);
    if (dShared_ND) undo.use(dShared_ND);
    using logits = new DisposableStack();
    let dLogits_NE!: Tensor;
    const routeBackward = async (dWeights: Tensor) => {
      dLogits_NE = logits.use(await routed.backward(dWeights, this.auxScale));
    };
    if (dWeights_NK) await routeBackward(dWeights_NK);
    const weightsOf = (chunk: number): ExpertGradients => {
      return { grads: gradients, beta: step.firstPass && chunk === 0 ? 0 : 1 };
    };
    const complete = (chunk: number) => {
      if (chunk < slices.length - 1) return;
      for (const { name } of parameters) step.gradientReady(name);
    };
    const work = async (dY_MD: Tensor, slice: PlacedPlan, chunk: number) => {
      using _ = dY_MD;
      const groups = this.#groups(slice), kept = saved.experts[chunk];
      const { dX_MD, dScales_M } = expertsBackward(dY_MD, kept, groups, weightsOf(chunk));
      using rows = new DisposableStack();
      rows.use(dX_MD);
      using dScales_S = dScales_M; // of the one slice
      complete(chunk);
      if (dScales_S) await routeBackward(dScales_S);
      rows.move();
      return dX_MD;
    };
    // Weights' gradients behind those of rows: then the last of these travels beside computation, too.
    let due: RowsBackward | null = null;
    undo.defer(() => due?.[Symbol.dispose]());
    const rowsFirst = (dY_MD: Tensor, slice: PlacedPlan, chunk: number) => {
      due = rowsBackward(dY_MD, saved.experts[chunk], this.#groups(slice));
      return due.dX_MD;
    };
    const weightsLast = (_: PlacedPlan, chunk: number) => {
      due!.weightGradients(weightsOf(chunk));
      complete(chunk);
    };
    let dX_ND!: Tensor;
    const beta = dShared_ND ? 1 : 0;
    const take = (rows_SD: Tensor, slice: PlacedPlan, chunk: number) => {
      using dX_SD = rows_SD;
      if (chunk === 0) dX_ND = dShared_ND ?? undo.use(empty(x_ND.device, x_ND.shape, x_ND.dtype));
      routed.tokensGradient(slice, dX_SD, dLogits_NE, dX_ND, beta);
    };
    if (this.weightGradientsBehind && slices.length > 1) {
      await workOnSlices(half, arriving, rowsFirst, take, weightsLast);
    } else await workOnSlices(half, arriving, work, take);
    for (const { name } of this.#shared?.parameters ?? []) step.gradientReady(name);
    step.gradientReady(this.gate.name);
    this.release(saved);
    step.layerBackwardEnds(this.layer);
    undo.move();
    return dX_ND;
  }

  /**
   * Sums the gradients of expert replicas among the ranks that hold them: once per step, after the last backward pass. Without replicas
   * it does nothing.
   */
  async reduceReplicas(): Promise<void> {
    await this.store.reduceReplicas();
  }

  /**
   * Seats the experts as another placement has them, and uses it from now on. All ranks call it together, between steps; `parameters` changes.
   *
   * @param placement Where experts sit from now on.
   * @throws {RangeError} If its seats are not valid; nothing has changed then.
   */
  async moveExperts(placement: ExpertPlacement): Promise<void> {
    const { comm, experts } = this.#options;
    const plan = placement.plan({ layer: this.layer, experts, ranks: comm.size, counts: null });
    if (!sameSeats(plan.seats, this.store.seats)) await this.store.moveTo(plan.seats);
    this.placement = placement;
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
    saved.routed.release();
    for (const y_SD of saved.outputs) y_SD[Symbol.dispose]();
    saved.experts.forEach(releaseExperts);
    if (saved.shared) this.#shared!.release(saved.shared);
  }

  /** Frees the weights. */
  [Symbol.dispose](): void {
    this.store[Symbol.dispose]();
    this.#shared?.[Symbol.dispose]();
    this.#placedBias?.[Symbol.dispose]();
    freeParameter(this.gate);
  }

  /**
   * Whether weights meet the hidden rows, and so no output of an expert is kept: on one GPU, where that is faster, as hidden rows are not (much) wider
   * than the model's. Figures are in bench/NOTES.md, "Where weights meet rows".
   */
  #hiddenWeights(slices: number): boolean {
    const { device, comm, hidden, width, activation } = this.#options;
    if (!device.routing || comm.size > 1 || slices > 1) return false;
    return hidden <= (activation === "swiglu" ? 4 : 1) * width;
  }

  /** On the device where it can and the router is plain there; else on the host. Alike on all ranks. */
  #route(x_ND: Tensor, step: Step): Promise<Routed> {
    const { device, comm, seed } = this.#options;
    const { layer, router, gate, tap } = this, slices = this.#slicesOf(step);
    const context: RouterContext = {
      comm,
      layer,
      router,
      gate,
      bias_E: this.bias,
      seed,
      tap,
      slices,
      hiddenWeights: this.#hiddenWeights(slices),
      place: (counts, step) => this.#place(counts, step),
      count: (chosen_E) => {
        for (let e = 0; e < this.#counts.length; e++) this.#counts[e] += chosen_E[e];
      },
    };
    const onDevice = device.routing && gate.value.dtype === "f32" && !tap?.replay &&
      isPlain(router, step.training);
    if (!onDevice) return routeOnHost(context, x_ND, step);
    if (router.kind === "sigmoid") this.#placedBias ??= new PlacedBias(device, this.bias);
    return routeOnDevice(context, x_ND, step, this.#placedBias?.now ?? null);
  }

  /** The placement for these counts. In inference experts move to it; in training they must sit so already. */
  async #place(counts: Int32Array, step: Step): Promise<PlacementPlan> {
    const { comm, experts } = this.#options, { placement } = this;
    const plan = placement.plan({ layer: this.layer, experts, ranks: comm.size, counts });
    if (sameSeats(plan.seats, this.store.seats)) return plan;
    if (step.training) {
      throw new Error(
        `Cannot train layer ${this.layer} as experts must stay in their seats within a step: ` +
          `current value is a plan of other seats by "${placement.name}"; call store.moveTo between steps`,
      );
    }
    await this.store.moveTo(plan.seats);
    return plan;
  }

  #groups({ groups }: PlacedPlan): ExpertGroups {
    const { activation, recompute } = this.#options;
    return { weights: this.store.matrices, rows: groups, activation, recompute };
  }

  #half(step: Step, phase: HalfPass["phase"], { slices }: Routed): HalfPass {
    const { layer, exchange } = this;
    return { comm: this.#options.comm, exchange, step, layer, phase, slices };
  }

  /** How many slices the tokens travel in. */
  #slicesOf(step: Step): number {
    const slices = step.chunks(this.layer);
    if (Number.isSafeInteger(slices) && slices >= 1) return slices;
    throw new RangeError(
      `Cannot run layer ${this.layer} in chunks as their number must be a whole number >= 1: current value is ${slices}`,
    );
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

/** `out = experts + shared experts + residual` of a slice: in one pass where two of them are, else in two. */
function combineOnto(
  y_SD: Tensor,
  slice: PlacedPlan,
  weights_NK: Tensor | null,
  outs: {
    readonly out_ND: Tensor;
    readonly shared_ND: Tensor | undefined;
    readonly residual_ND: Tensor | undefined;
  },
): void {
  const of = (x: Tensor | undefined) => x && sliceOf(x, slice);
  const out = sliceOf(outs.out_ND, slice), shared = of(outs.shared_ND);
  const residual = of(outs.residual_ND);
  if (shared && residual) ops.add(residual, shared, out);
  const onto = shared && residual ? out : shared ?? residual;
  ops.combineRows(y_SD, slice.slots_NK, weights_NK, out, onto);
}

/** Gradient of the experts' outputs of a slice in the send order, and of the weights if they met those; frees the outputs. */
function outputsGradient(
  dOut_ND: Tensor,
  { routed: { slices, weights_NK }, outputs }: MoeSaved,
  chunk: number,
  dWeights_NK: Tensor | null,
): Tensor {
  const slice = slices[chunk], dOut = sliceOf(dOut_ND, slice), y_SD = outputs[chunk];
  if (!dWeights_NK) return permute(dOut, slice);
  using scope = new TensorScope();
  const dY_SD = empty(y_SD.device, y_SD.shape, y_SD.dtype);
  const weights = sliceOf(weights_NK, slice), dWeights = sliceOf(dWeights_NK, slice);
  ops.combineRowsBackward(dOut, y_SD, slice.slots_NK, weights, dY_SD, dWeights);
  y_SD[Symbol.dispose]();
  return scope.keep(dY_SD);
}

function sameSeats(a: PlacementPlan["seats"], b: PlacementPlan["seats"]): boolean {
  return a === b || a.every((held, rank) => {
    return held.length === b[rank].length && held.every((e, i) => e === b[rank][i]);
  });
}
