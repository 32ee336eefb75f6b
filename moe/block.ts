// One layer of the model: `x1 = x + attention(norm(x))`, `out = x1 + feedForward(norm(x1))`, where the feed-forward part is a mixture of
// experts or a dense network. Shapes: N rows, D model width.

import type { Device } from "../tensor/device.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { Attention, type AttentionSaved } from "./attention.ts";
import type { ModelConfig } from "./config.ts";
import { freeNormed, Norm, type Normed } from "./norm.ts";
import type { Parameter } from "./parameter.ts";
import type { Rows } from "./rows.ts";
import { dropShown, type Shown } from "./shown.ts";
import { repeatedStep, type Step } from "./step.ts";

/** What a feed-forward part returns; a MoE layer has more to tell. */
export interface FeedForwardOutput {
  /** Output [N, D], a new tensor; the residual stream is in it. */
  readonly out_ND: Tensor;
  /** What its backward pass needs. */
  readonly saved: unknown;
  /** What a MoE layer has shown. */
  readonly shown?: Shown;
}

/** What a block asks of its feed-forward part. */
export interface FeedForwardPart extends Disposable {
  /** The rank's parameters. */
  readonly parameters: readonly Parameter[];
  /** `residual + f(x)` for an input that lives until the backward pass; the residual stays the caller's. */
  forward(
    x_ND: Tensor,
    step: Step,
    residual_ND: Tensor,
  ): FeedForwardOutput | Promise<FeedForwardOutput>;
  /** Gradient of the input by way of f; adds to the parameters' gradients and frees what was saved. */
  backward(dOut_ND: Tensor, saved: unknown, step: Step): Tensor | Promise<Tensor>;
  /** Frees what a forward pass saved. */
  release(saved: unknown): void;
}

/**
 * What is not kept for the backward pass but computed again there, to save memory: nothing; the outputs of activations, which are cheap; or
 * whole blocks, of which only the input stays, at the price of a second forward pass.
 */
export type Recompute = "none" | "activation" | "block";

/** What the backward pass of a block needs; all of it is owned. */
export interface BlockSaved {
  /** The input. */
  readonly x_ND: Tensor;
  /** The rest; null where the block runs again. */
  readonly inner: BlockInner | null;
}

/** What a block computes on the way. */
export interface BlockInner {
  /** The input, normed. */
  readonly norm1: Normed;
  /** From attention. */
  readonly attention: AttentionSaved;
  /** After attention. */
  readonly x1_ND: Tensor;
  /** After attention, normed. */
  readonly norm2: Normed;
  /** From the feed-forward part. */
  readonly feedForward: unknown;
}

/** One layer. */
export class Block implements Disposable {
  /** The feed-forward part. */
  readonly feedForward: FeedForwardPart;
  /** The attention. */
  readonly attention: Attention;
  /** The norm before attention, and the one before the feed-forward part. */
  readonly norms: readonly [Norm, Norm];
  readonly #runsAgain: boolean;

  /**
   * Makes attention and norms around a feed-forward part.
   *
   * @param device Where the weights live.
   * @param layer Number of the layer.
   * @param config Sizes of the model.
   * @param options The feed-forward part, which the block then owns, the seed of the weights, and whether the block runs again in the
   * backward pass.
   */
  constructor(
    device: Device,
    layer: number,
    config: ModelConfig,
    options: {
      readonly feedForward: FeedForwardPart;
      readonly seed: number;
      readonly runsAgain?: boolean;
    },
  ) {
    const prefix = `model.layers.${layer}.`;
    this.feedForward = options.feedForward;
    this.#runsAgain = options.runsAgain ?? false;
    this.attention = new Attention(device, layer, config, options.seed);
    this.norms = [
      new Norm(device, `${prefix}input_layernorm.weight`, config),
      new Norm(device, `${prefix}post_attention_layernorm.weight`, config),
    ];
  }

  /** The rank's parameters outside the feed-forward part, in the order in which their gradients become ready. */
  get denseParameters(): readonly Parameter[] {
    return [this.norms[1].gain, ...this.attention.parameters, this.norms[0].gain];
  }

  /**
   * Runs the layer.
   *
   * @param x_ND Input, which the block frees: at once in inference, else in the backward pass; never if it throws.
   * @param rows Sequences and positions.
   * @param step The step.
   * @returns What the feed-forward part returned, with `out_ND` the output of the block and `saved` what the backward pass
   * needs: null in inference.
   */
  async forward(
    x_ND: Tensor,
    rows: Rows,
    step: Step,
  ): Promise<{ out_ND: Tensor; saved: BlockSaved | null; output: FeedForwardOutput }> {
    const { inner, output } = await this.#run(x_ND, rows, step);
    const { out_ND } = output;
    const saved = { x_ND, inner };
    if (!step.training) {
      this.release(saved);
      return { out_ND, saved: null, output };
    }
    if (!this.#runsAgain) return { out_ND, saved, output };
    this.#releaseInner(inner);
    return { out_ND, saved: { x_ND, inner: null }, output };
  }

  async #run(
    x_ND: Tensor,
    rows: Rows,
    step: Step,
  ): Promise<{ inner: BlockInner; output: FeedForwardOutput }> {
    using undo = new DisposableStack();
    const norm1 = undo.adopt(this.norms[0].forward(x_ND), freeNormed);
    const { out_ND: x1_ND, saved: attention } = this.attention.forward(norm1.out_ND, rows);
    undo.use(x1_ND);
    undo.defer(() => this.attention.release(attention));
    const norm2 = undo.adopt(this.norms[1].addForward(x_ND, x1_ND), freeNormed);
    const output = await this.feedForward.forward(norm2.out_ND, step, x1_ND);
    undo.move();
    return { inner: { norm1, attention, x1_ND, norm2, feedForward: output.saved }, output };
  }

  /** The forward pass again: the same kernels on the same numbers, so the same bits and the same routing. */
  async #again(x_ND: Tensor, rows: Rows, step: Step): Promise<BlockInner> {
    const { inner, output } = await this.#run(x_ND, rows, repeatedStep(step));
    output.out_ND[Symbol.dispose]();
    if (output.shown) dropShown([output.shown]);
    return inner;
  }

  /**
   * Gradient of {@linkcode Block.forward}; adds to the parameters' gradients, or overwrites them, and frees what was saved. If it throws, that
   * is still to be given to {@linkcode Block.release}.
   *
   * @param dOut_ND Gradient of the output; becomes that of the input, as the residual stream's gradient is one tensor all the way.
   * @param saved From the forward pass.
   * @param rows Sequences and positions.
   * @param step Told of boundaries and gradients.
   * @returns `dOut_ND`, now the gradient of the input.
   */
  async backward(
    dOut_ND: Tensor,
    saved: BlockSaved,
    rows: Rows,
    step: Step,
  ): Promise<Tensor> {
    const [first, second] = this.norms, { x_ND } = saved;
    const inner = saved.inner ?? await this.#again(x_ND, rows, step);
    using held = new DisposableStack();
    held.defer(() => this.#releaseInner(inner));
    const { x1_ND, norm1, norm2 } = inner;
    const residual = { step, residual_ND: dOut_ND };
    {
      using dNorm2 = await this.feedForward.backward(dOut_ND, inner.feedForward, step);
      second.backward(dNorm2, x1_ND, norm2.invRms_N, residual);
    }
    using dNorm1 = this.attention.backward(dOut_ND, inner.attention, rows, step);
    first.backward(dNorm1, x_ND, norm1.invRms_N, residual);
    x_ND[Symbol.dispose]();
    return dOut_ND;
  }

  /**
   * Frees what a forward pass saved.
   *
   * @param saved From the forward pass.
   */
  release({ x_ND, inner }: BlockSaved): void {
    x_ND[Symbol.dispose]();
    if (inner) this.#releaseInner(inner);
  }

  #releaseInner({ norm1, attention, x1_ND, norm2, feedForward }: BlockInner): void {
    this.feedForward.release(feedForward);
    this.attention.release(attention);
    x1_ND[Symbol.dispose]();
    freeNormed(norm1);
    freeNormed(norm2);
  }

  /** Frees the weights. */
  [Symbol.dispose](): void {
    this.feedForward[Symbol.dispose]();
    this.attention[Symbol.dispose]();
    for (const norm of this.norms) norm[Symbol.dispose]();
  }
}
