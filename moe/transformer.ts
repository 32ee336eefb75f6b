// The language model as SPMD code: embedding, blocks, last norm and head, forward and backward. Every rank runs it on its own rows of the
// batch; only the MoE layers talk. Optimizer, data and the order of gradient reductions are not here.
// Shapes: N rows (tokens), D model width, V vocabulary.

import type { Communicator } from "../collectives/types.ts";
import type { Device } from "../tensor/device.ts";
import { wideDtype } from "../tensor/dtype.ts";
import * as ops from "../tensor/ops.ts";
import { empty, fromArray, type Tensor, TensorScope } from "../tensor/tensor.ts";
import { Block, type BlockSaved, type Recompute } from "./block.ts";
import type { CheckpointTensor } from "./checkpoint.ts";
import { type ModelConfig, modelDescription } from "./config.ts";
import { ExpertStore } from "./expert_store.ts";
import { FeedForward } from "./feed_forward.ts";
import type { StepOutline } from "./graph.ts";
import type { ExpertPlacement } from "./hooks.ts";
import { linear } from "./linear.ts";
import { headLoss } from "./loss.ts";
import { MoeLayer, type RowExchange } from "./moe_layer.ts";
import { freeNormed, Norm } from "./norm.ts";
import { expertsOutline, gradientOutline } from "./outline.ts";
import { createParameter, freeParameter, type Parameter } from "./parameter.ts";
import { staticPlacement } from "./placement.ts";
import { type Rows, RowsOfShapes } from "./rows.ts";
import { dropShown, type MoeShown, type Shown } from "./shown.ts";
import type { Step } from "./step.ts";

/** Rows of one rank: sequences one after another. */
export interface Batch {
  /** Tokens, i32 [N]. */
  readonly tokens: Int32Array;
  /** The token that follows each, i32 [N]; a negative one is not asked for. */
  readonly targets: Int32Array;
  /** First row of each sequence and, last, N. */
  readonly offsets: Int32Array;
}

/** How a {@linkcode Transformer} is made; all but the device is alike on all ranks. */
export interface TransformerOptions {
  /** Where the weights live. */
  readonly device: Device;
  /** The ranks that hold the experts and whose rows make the global batch. */
  readonly comm: Communicator;
  /** Sizes. */
  readonly config: ModelConfig;
  /** Seed of the weights and of the routers' noise. */
  readonly seed: number;
  /** Where experts sit. @default {staticPlacement()} */
  readonly placement?: ExpertPlacement;
  /** Carries rows between ranks in place of the communicator's own all-to-all. @default {null} */
  readonly exchange?: RowExchange | null;
  /** What is not kept for the backward pass but computed again. @default {"none"} */
  readonly recompute?: Recompute;
}

/** What a pass may do besides the forward half. */
export interface PassOptions {
  /** f64 [1], where the sum of this rank's losses is added, in nats. */
  readonly lossSum: Tensor;
  /** 1 / tokens of the global batch: runs the backward pass, too. */
  readonly gradScale?: number;
  /** Factor of the gradient of the routers' losses: 1 / passes of a step. @default {1} */
  readonly auxScale?: number;
}

/** What the MoE layers have shown in a pass, alike on all ranks: see {@linkcode summaryOf}. */
export interface PassSummary {
  /** Sum of the routers' losses, coefficients applied. */
  readonly auxLoss: number;
  /** Choices of the most loaded expert / mean choices; mean over the MoE layers, 1 without any. */
  readonly imbalance: number;
}

const RECOMPUTES: readonly Recompute[] = ["none", "activation", "block"];

/** A decoder-only language model with Mixture-of-Experts layers. */
export class Transformer implements Disposable {
  /** Sizes. */
  readonly config: ModelConfig;
  /** The layers. */
  readonly blocks: readonly Block[];
  /** The MoE layers among them. */
  readonly moeLayers: readonly MoeLayer[];
  readonly #device: Device;
  readonly #rows: RowsOfShapes;
  /** The parameters, and those of the feed-forward parts that they were gathered from. */
  #parameters: {
    readonly parts: readonly (readonly Parameter[])[];
    readonly all: readonly Parameter[];
  } = { parts: [], all: [] };
  readonly #embedding: Parameter;
  readonly #norm: Norm;
  readonly #head: Parameter;

  /**
   * Makes the model; its first weights depend on the seed only.
   *
   * @param options Sizes, device, ranks, seed.
   * @throws {RangeError} If experts do not fit on the ranks, or the device does not compute in the dtype.
   */
  constructor(options: TransformerOptions) {
    const { device, config, seed, recompute = "none" } = options;
    if (!RECOMPUTES.includes(recompute)) {
      throw new RangeError(
        `Cannot make a model as "recompute" must be ${
          RECOMPUTES.join(", ")
        }: current value is ${recompute}`,
      );
    }
    const { vocab, width, dtype, gradientDtype, initStd } = config;
    const dtypes = device.kind === "cuda" ? ["f32", "bf16"] : ["f32", "f64"];
    if (!dtypes.includes(dtype)) {
      throw new RangeError(
        `Cannot make a model as its dtype must be ${
          dtypes.join(" or ")
        } on ${device.name}: current value is ${dtype}`,
      );
    }
    const init = { std: initStd, seed };
    const matrix = { shape: [vocab, width], dtype, gradientDtype, init };
    using scope = new TensorScope();
    this.config = config;
    this.#device = device;
    this.#rows = new RowsOfShapes(device);
    // The embedding's backward pass adds rows; a head's writes every element, and a tied one comes first.
    const overwriting = { ...matrix, overwrites: true };
    this.#embedding = createParameter(device, "model.embed_tokens.weight", {
      ...matrix,
      overwrites: config.tied,
    });
    this.#norm = new Norm(device, "model.norm.weight", config);
    this.#head = config.tied
      ? this.#embedding
      : createParameter(device, "lm_head.weight", overwriting);
    this.blocks = Array.from({ length: config.layers }, (_, layer) => {
      const dense = config.experts === 0 || layer < config.denseLayers;
      const feedForward = dense ? network(options, layer) : mixture(options, layer);
      const runsAgain = recompute === "block";
      return new Block(device, layer, config, { feedForward, seed, runsAgain });
    });
    this.moeLayers = this.blocks.map(({ feedForward }) => feedForward)
      .filter((part) => part instanceof MoeLayer);
    scope.keep(this);
  }

  /** Every parameter that this rank holds, each once; the same object until experts move. */
  get parameters(): readonly Parameter[] {
    const { parts, all } = this.#parameters;
    const same = all.length > 0 && this.blocks.every(({ feedForward }, i) => {
      return feedForward.parameters === parts[i];
    });
    if (!same) {
      const parts = this.blocks.map(({ feedForward }) => feedForward.parameters);
      this.#parameters = { parts, all: this.#list() };
    }
    return this.#parameters.all;
  }

  #list(): Parameter[] {
    return [
      this.#embedding,
      ...this.blocks.flatMap((b) => [...b.denseParameters, ...b.feedForward.parameters]),
      this.#norm.gain,
      ...(this.config.tied ? [] : [this.#head]),
    ];
  }

  /** What checkpoints hold besides parameters: the selection biases of sigmoid routers. */
  get buffers(): readonly CheckpointTensor[] {
    return this.moeLayers.filter(({ biasName }) => biasName !== null).map((layer) => ({
      name: layer.biasName!,
      owner: 0,
      dtype: "f64",
      shape: [layer.bias.length],
      read: () => layer.bias,
      write: (array) => layer.bias.set(array as Float64Array),
    }));
  }

  /** Sizes that a checkpoint must agree with. */
  get description(): object {
    return modelDescription(this.config);
  }

  /**
   * The rank that speaks for a parameter where only one may: in norms and checkpoints.
   *
   * @param parameter One of the model's.
   * @returns The first rank that holds it.
   */
  ownerOf({ expert }: Parameter): number {
    if (!expert) return 0;
    const part = this.blocks[expert.layer].feedForward as MoeLayer;
    return part.store.holders(expert.id)[0];
  }

  /**
   * The model as a step graph's outline. It is alike on all ranks: of the gradients of experts, which each rank holds others of, it has those
   * of seats, and only where experts sit in the regular way (see `regularReplicas` of plan.ts); else replicas reduce them among themselves.
   *
   * @param rows Rows of a rank in a pass, on average; alike on all ranks.
   * @param ranks Number of ranks.
   * @returns The outline.
   */
  outline(rows: number, ranks: number): StepOutline {
    const { config } = this;
    return {
      head: [...(config.tied ? [] : [this.#head]), this.#norm.gain].map(gradientOutline),
      layers: this.blocks.map(({ feedForward, denseParameters }) => {
        const world = feedForward.parameters.filter(({ group }) => group === "world");
        const layer = {
          feedForward: world.map(gradientOutline),
          attention: denseParameters.map(gradientOutline),
        };
        if (!(feedForward instanceof MoeLayer)) return layer;
        return { ...layer, moe: expertsOutline(feedForward, config, { rows, ranks }) };
      }),
      embedding: [gradientOutline(this.#embedding)],
    };
  }

  /**
   * Seats the experts of all layers as another placement has them, and uses it from now on. All ranks call it together, between steps; `parameters`
   * changes.
   *
   * All layers' experts go by one exchange; if one rank has no memory for them, all ranks throw, and nothing has moved.
   *
   * @param placement Where experts sit from now on.
   * @param options `offload`: how many experts of each layer of a rank, those of the last seats, have their moments in host memory from then on.
   * @default {{offload: as before}}
   * @returns Bytes that this rank has sent.
   * @throws {RangeError} If its seats are not valid.
   * @throws {OutOfMemoryError} On all ranks, if the memory of one does not suffice.
   */
  async moveExperts(
    placement: ExpertPlacement,
    options: { readonly offload?: number } = {},
  ): Promise<number> {
    const { experts } = this.config;
    const moves = this.moeLayers.map(({ layer, store }) => {
      const context = { layer, experts, ranks: store.seats.length, counts: null };
      return { store, seats: placement.plan(context).seats, offload: options.offload };
    });
    const bytes = await ExpertStore.moveAll(moves);
    for (const layer of this.moeLayers) layer.placement = placement;
    return bytes;
  }

  /**
   * Forward pass, loss and, when asked for, backward pass.
   *
   * @param batch This rank's rows.
   * @param step Told of boundaries and gradients.
   * @param options Where the loss goes, and the gradient's factor.
   * @returns What the MoE layers have shown, a GPU's still on the device: give it to `readShown` or to `dropShown` of shown.ts. No GPU is
   * waited for here, but for the counts of an all-to-all.
   */
  async pass(batch: Batch, step: Step, options: PassOptions): Promise<readonly Shown[]> {
    using tokens = fromArray(this.#device, batch.tokens);
    using targets = fromArray(this.#device, batch.targets);
    using rows = this.#rows.take(batch.offsets);
    for (const layer of this.moeLayers) layer.auxScale = options.auxScale ?? 1;
    const { x_ND, saved, shown } = await this.#forward(tokens, rows, step);
    using undo = new DisposableStack();
    undo.defer(() => dropShown(shown));
    using held = new DisposableStack();
    held.use(x_ND);
    held.defer(() => this.#release(saved));
    // The residual stream's gradient: one tensor for all blocks.
    const dX = this.#headPass(x_ND, targets, step, options);
    if (dX) {
      held.use(dX);
      x_ND[Symbol.dispose]();
      for (let layer = this.blocks.length - 1; layer >= 0; layer--) {
        await this.blocks[layer].backward(dX, saved[layer]!, rows, step);
      }
      ops.scatterAddRows(dX, tokens, this.#embedding.grad);
      step.gradientReady(this.#embedding.name);
    }
    undo.move();
    return shown;
  }

  /** The last norm, the head and the loss; the gradient of the input, if it is asked for. */
  #headPass(x_ND: Tensor, targets: Tensor, step: Step, options: PassOptions): Tensor | null {
    using held = new DisposableStack();
    const last = held.adopt(this.#norm.forward(x_ND), freeNormed);
    const dLast = headLoss(last.out_ND, this.#head, { targets, step, ...options });
    if (!dLast) return null;
    held.use(dLast);
    if (!this.config.tied) step.gradientReady(this.#head.name);
    return this.#norm.backward(dLast, x_ND, last.invRms_N, { step });
  }

  /** Frees what the blocks' forward passes have saved and no backward pass has freed. */
  #release(saved: Forward["saved"]): void {
    saved.forEach((one, layer) => one && this.blocks[layer].release(one));
  }

  /**
   * Logits of the token that follows each sequence.
   *
   * @param tokens Tokens of the sequences, i32 [N].
   * @param offsets First row of each sequence and, last, N.
   * @param step A step of inference.
   * @returns Logits [sequences, V], in f32 at least.
   */
  async logits(tokens: Int32Array, offsets: Int32Array, step: Step): Promise<Tensor> {
    using ids = fromArray(this.#device, tokens);
    using rows = this.#rows.take(offsets);
    const { x_ND, saved, shown } = await this.#forward(ids, rows, step);
    dropShown(shown);
    this.#release(saved);
    using x = x_ND;
    using lastRows = fromArray(this.#device, offsets.slice(1).map((end) => end - 1));
    using ends = empty(this.#device, [offsets.length - 1, this.config.width], x.dtype);
    ops.gatherRows(x, lastRows, ends);
    using held = new DisposableStack();
    const last = held.adopt(this.#norm.forward(ends), freeNormed);
    return linear(last.out_ND, this.#head.value, wideDtype(x.dtype));
  }

  /**
   * Sums the gradients of expert replicas among the ranks that hold them: once per step, after its last pass. All ranks call it.
   */
  async reduceReplicas(): Promise<void> {
    for (const layer of this.moeLayers) await layer.reduceReplicas();
  }

  /** Ends a step: routers that balance load by a bias move it. */
  endStep(): void {
    for (const layer of this.moeLayers) layer.endStep();
  }

  async #forward(tokens: Tensor, rows: Rows, step: Step): Promise<Forward> {
    const saved: Forward["saved"] = [];
    const shown: Shown[] = [];
    using undo = new DisposableStack();
    let x_ND = empty(this.#device, [tokens.size, this.config.width], this.config.dtype);
    undo.defer(() => {
      x_ND[Symbol.dispose]();
      this.#release(saved);
      dropShown(shown);
    });
    ops.gatherRows(this.#embedding.value, tokens, x_ND);
    for (const block of this.blocks) {
      const { out_ND, saved: kept, output } = await block.forward(x_ND, rows, step);
      saved.push(kept);
      x_ND = out_ND;
      if (output.shown) shown.push(output.shown);
    }
    undo.move();
    return { x_ND, saved, shown };
  }

  /** Frees the weights. */
  [Symbol.dispose](): void {
    this.#rows[Symbol.dispose]();
    freeParameter(this.#embedding);
    this.#norm[Symbol.dispose]();
    if (!this.config.tied) freeParameter(this.#head);
    for (const block of this.blocks) block[Symbol.dispose]();
  }
}

interface Forward {
  readonly x_ND: Tensor;
  readonly saved: (BlockSaved | null)[];
  readonly shown: readonly Shown[];
}

/**
 * Losses and load of a pass.
 *
 * @param shown What the layers have shown, read.
 * @returns Their sum and mean.
 */
export function summaryOf(shown: readonly MoeShown[]): PassSummary {
  if (shown.length === 0) return { auxLoss: 0, imbalance: 1 };
  let auxLoss = 0, imbalance = 0;
  for (const layer of shown) {
    auxLoss += layer.auxLoss;
    imbalance += imbalanceOf(layer.stats.counts) / shown.length;
  }
  return { auxLoss, imbalance };
}

/** What dense networks and mixtures have in common. */
function partOptions({ device, config, seed, recompute }: TransformerOptions) {
  const { width, hidden, activation, layers, initStd, dtype, gradientDtype } = config;
  // What adds to the residual stream starts smaller, so that its variance does not grow with depth (GPT-2).
  const downStd = initStd / Math.sqrt(2 * layers), again = recompute === "activation";
  const types = { dtype, gradientDtype };
  return { device, width, hidden, activation, ...types, seed, initStd, downStd, recompute: again };
}

function network(options: TransformerOptions, layer: number): FeedForward {
  return new FeedForward({ ...partOptions(options), prefix: `model.layers.${layer}.mlp.` });
}

function mixture(options: TransformerOptions, layer: number): MoeLayer {
  const { comm, config: { experts, router, sharedExperts }, placement, exchange } = options;
  return new MoeLayer({
    ...partOptions(options),
    comm,
    layer,
    experts,
    router,
    sharedExperts,
    placement: placement ?? staticPlacement(),
    exchange: exchange ?? null,
  });
}

/** The largest count / the mean. */
function imbalanceOf(counts: Float64Array): number {
  const sum = counts.reduce((a, b) => a + b, 0);
  return sum > 0 ? Math.max(...counts) * counts.length / sum : 1;
}
