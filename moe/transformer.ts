// The language model as SPMD code: embedding, blocks, last norm and head, forward and backward. Every rank runs it on its own rows of the
// batch; only the MoE layers talk. Optimizer, data and the order of gradient reductions are not here.
// Shapes: N rows (tokens), D model width, V vocabulary.

import type { Device } from "../tensor/device.ts";
import { bytesOf } from "../tensor/dtype.ts";
import * as ops from "../tensor/ops.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";
import type { Rows } from "./attention.ts";
import { Block, type BlockSaved, type FeedForwardPart } from "./block.ts";
import type { ModelConfig } from "./config.ts";
import { FeedForward } from "./feed_forward.ts";
import type { GradientOutline, StepOutline } from "./graph.ts";
import { linear } from "./linear.ts";
import { headLoss } from "./loss.ts";
import { Norm } from "./norm.ts";
import { createParameter, freeParameter, type Parameter } from "./parameter.ts";
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

/** What a feed-forward part returns: a MoE layer adds its auxiliary loss and statistics. */
export interface FeedForwardResult {
  /** Output [N, D]. */
  readonly out_ND: Tensor;
  /** What its backward pass needs. */
  readonly saved: unknown;
}

/** How a {@linkcode Transformer} is made. */
export interface TransformerOptions<Result extends FeedForwardResult> {
  /** Where the weights live. */
  readonly device: Device;
  /** Sizes. */
  readonly config: ModelConfig;
  /** Seed of the weights. */
  readonly seed: number;
  /** Makes the MoE layer of a layer; asked for every layer that is not dense. */
  readonly mixture: (layer: number) => FeedForwardPart<Result>;
}

/** What a pass may do besides the forward half. */
export interface PassOptions {
  /** f64 [1], where the sum of this rank's losses is added, in nats. */
  readonly lossSum: Tensor;
  /** 1 / tokens of the global batch: runs the backward pass, too. */
  readonly gradScale?: number;
}

/** A decoder-only language model with Mixture-of-Experts layers. */
export class Transformer<Result extends FeedForwardResult> implements Disposable {
  /** Sizes. */
  readonly config: ModelConfig;
  /** The layers. */
  readonly blocks: readonly Block<Result>[];
  readonly #device: Device;
  readonly #embedding: Parameter;
  readonly #norm: Norm;
  readonly #head: Parameter;

  /**
   * @param options Sizes, device, seed, and what makes MoE layers.
   */
  constructor(options: TransformerOptions<Result>) {
    const { device, config, seed, mixture } = options;
    const { vocab, width, dtype, initStd } = config;
    const matrix = { shape: [vocab, width], dtype, init: { std: initStd, seed } };
    this.config = config;
    this.#device = device;
    this.#embedding = createParameter(device, "model.embed_tokens.weight", matrix);
    this.#norm = new Norm(device, "model.norm.weight", config);
    this.#head = config.tied ? this.#embedding : createParameter(device, "lm_head.weight", matrix);
    this.blocks = Array.from({ length: config.layers }, (_, layer) => {
      const dense = config.experts === 0 || layer < config.denseLayers;
      // A dense network has neither auxiliary loss nor statistics: the caller's `Result` has them optional.
      const feedForward = dense
        ? new FeedForward(device, layer, config, seed) as unknown as FeedForwardPart<Result>
        : mixture(layer);
      return new Block(device, layer, config, { feedForward, seed });
    });
  }

  /** Every parameter that this rank holds, each once. */
  get parameters(): readonly Parameter[] {
    return [
      this.#embedding,
      ...this.blocks.flatMap((b) => [...b.denseParameters, ...b.feedForward.parameters]),
      this.#norm.gain,
      ...(this.config.tied ? [] : [this.#head]),
    ];
  }

  /**
   * The model as a step graph's outline. It is alike on all ranks: the gradients of experts, which each rank holds others of, are not
   * in it, as their replicas reduce them among themselves.
   *
   * @param layout How many rows a rank has, and of how many ranks and choices per token an all-to-all is made.
   * @returns The outline.
   */
  outline(layout: { rows: number; ranks: number; topK: number }): StepOutline {
    const { rows, ranks, topK } = layout;
    const { config } = this;
    const away = rows * topK * (ranks - 1) / ranks;
    return {
      head: [...(config.tied ? [] : [this.#head]), this.#norm.gain].map(outlineOf),
      layers: this.blocks.map(({ feedForward, denseParameters }) => {
        const world = feedForward.parameters.filter(({ group }) => group === "world");
        const layer = {
          feedForward: world.map(outlineOf),
          attention: denseParameters.map(outlineOf),
        };
        if (feedForward instanceof FeedForward) return layer;
        const allToAllBytes = Math.round(away * config.width * bytesOf(config.dtype));
        return { ...layer, moe: { allToAllBytes, experts: [] } };
      }),
      embedding: [outlineOf(this.#embedding)],
    };
  }

  /**
   * Forward pass, loss and, when asked for, backward pass.
   *
   * @param batch This rank's rows.
   * @param step Told of boundaries and gradients.
   * @param options Where the loss goes, and the gradient's factor.
   * @returns What the feed-forward parts returned, per layer; their tensors are freed.
   */
  async pass(batch: Batch, step: Step, options: PassOptions): Promise<readonly Result[]> {
    using tokens = fromArray(this.#device, batch.tokens);
    using targets = fromArray(this.#device, batch.targets);
    using rows = rowsOf(this.#device, batch.offsets);
    const { x_ND, saved, results } = await this.#forward(tokens, rows, step);
    const last = this.#norm.forward(x_ND);
    const dLast = headLoss(last.out_ND, this.#head, { targets, ...options });
    if (dLast) {
      using dOut = dLast;
      if (!this.config.tied) step.gradientReady(this.#head.name);
      let dX = this.#norm.backward(dOut, x_ND, last.invRms_N, step);
      for (let layer = this.blocks.length - 1; layer >= 0; layer--) {
        dX = await this.blocks[layer].backward(dX, saved[layer]!, rows, step);
      }
      ops.scatterAddRows(dX, tokens, this.#embedding.grad);
      step.gradientReady(this.#embedding.name);
      dX[Symbol.dispose]();
    } else saved.forEach((s, layer) => s && this.blocks[layer].release(s));
    for (const tensor of [x_ND, last.out_ND, last.invRms_N]) tensor[Symbol.dispose]();
    return results;
  }

  /**
   * Logits of the token that follows each sequence.
   *
   * @param tokens Tokens of the sequences, i32 [N].
   * @param offsets First row of each sequence and, last, N.
   * @param step A step of inference.
   * @returns Logits [sequences, V].
   */
  async logits(tokens: Int32Array, offsets: Int32Array, step: Step): Promise<Tensor> {
    using ids = fromArray(this.#device, tokens);
    using rows = rowsOf(this.#device, offsets);
    const { x_ND, saved } = await this.#forward(ids, rows, step);
    saved.forEach((s, layer) => s && this.blocks[layer].release(s));
    using x = x_ND;
    using lastRows = fromArray(this.#device, offsets.slice(1).map((end) => end - 1));
    using ends = empty(this.#device, [offsets.length - 1, this.config.width], x.dtype);
    ops.gatherRows(x, lastRows, ends);
    const last = this.#norm.forward(ends);
    const logits = linear(last.out_ND, this.#head.value);
    last.out_ND[Symbol.dispose]();
    last.invRms_N[Symbol.dispose]();
    return logits;
  }

  async #forward(tokens: Tensor, rows: Rows, step: Step): Promise<Forward<Result>> {
    const saved: Forward<Result>["saved"] = [], results: Result[] = [];
    let x_ND = empty(this.#device, [tokens.size, this.config.width], this.config.dtype);
    ops.gatherRows(this.#embedding.value, tokens, x_ND);
    for (const block of this.blocks) {
      const { out_ND, saved: kept, result } = await block.forward(x_ND, rows, step);
      saved.push(kept);
      results.push(result);
      x_ND = out_ND;
    }
    return { x_ND, saved, results };
  }

  /** Frees the weights. */
  [Symbol.dispose](): void {
    freeParameter(this.#embedding);
    this.#norm[Symbol.dispose]();
    if (!this.config.tied) freeParameter(this.#head);
    for (const block of this.blocks) block[Symbol.dispose]();
  }
}

interface Forward<Result extends FeedForwardResult> {
  readonly x_ND: Tensor;
  readonly saved: (BlockSaved<Result["saved"]> | null)[];
  readonly results: Result[];
}

function outlineOf({ name, value, group }: Parameter): GradientOutline {
  return { name, elements: value.size, elementBytes: bytesOf(value.dtype), group };
}

/** Positions of the rows, each counted from the start of its sequence. */
function rowsOf(device: Device, offsets: Int32Array): Rows & Disposable {
  const positions = new Int32Array(offsets[offsets.length - 1]);
  for (let s = 0; s + 1 < offsets.length; s++) {
    for (let row = offsets[s]; row < offsets[s + 1]; row++) positions[row] = row - offsets[s];
  }
  const tensor = fromArray(device, positions);
  return { offsets, positions: tensor, [Symbol.dispose]: () => tensor[Symbol.dispose]() };
}
