// Grouped-query causal self-attention with rotary positions, forward and backward. Whole sequences only: the key/value cache of
// incremental decoding is another file's matter.
// Shapes: N rows (tokens of all sequences, one after another), D model width, H query heads, G key/value heads, C head width.

import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import type { ModelConfig } from "./config.ts";
import { linear, linearBackward } from "./linear.ts";
import { createParameter, freeParameter, type Parameter } from "./parameter.ts";
import type { Step } from "./step.ts";

/** Where the rows of a batch belong: lengths of its sequences and the position of each row in its own. */
export interface Rows {
  /** First row of each sequence and, last, the number of rows. */
  readonly offsets: Int32Array;
  /** Position of each row in its sequence, i32 [N]. */
  readonly positions: Tensor;
}

/** What the backward pass of attention needs. */
export interface AttentionSaved {
  /** The input; not owned. */
  readonly x_ND: Tensor;
  /** Queries after rotation [N, H·C]. */
  readonly q: Tensor;
  /** Keys after rotation [N, G·C]. */
  readonly k: Tensor;
  /** Values [N, G·C]. */
  readonly v: Tensor;
  /** What the heads gathered [N, H·C]. */
  readonly mixed: Tensor;
  /** Log-sum-exp of each head's scores [N, H]. */
  readonly lse: Tensor;
}

/** The attention of one layer. */
export class Attention implements Disposable {
  /** The four projections, in the order in which their gradients become ready: o, v, k, q. */
  readonly parameters: readonly Parameter[];
  readonly #config: ModelConfig;
  readonly #o: Parameter;
  readonly #v: Parameter;
  readonly #k: Parameter;
  readonly #q: Parameter;

  /**
   * Makes the projections.
   *
   * @param device Where the weights live.
   * @param layer Number of the layer.
   * @param config Sizes of the model.
   * @param seed Seed of the weights.
   */
  constructor(device: Device, layer: number, config: ModelConfig, seed: number) {
    const { width, heads, kvHeads, headDim, layers, initStd: std, dtype } = config;
    const make = (name: string, rows: number, columns: number, std: number) =>
      createParameter(device, `model.layers.${layer}.self_attn.${name}.weight`, {
        shape: [rows, columns],
        dtype,
        init: { std, seed },
      });
    this.#config = config;
    // What adds to the residual stream starts smaller, so that its variance does not grow with depth (GPT-2).
    this.#o = make("o_proj", width, heads * headDim, std / Math.sqrt(2 * layers));
    this.#v = make("v_proj", kvHeads * headDim, width, std);
    this.#k = make("k_proj", kvHeads * headDim, width, std);
    this.#q = make("q_proj", heads * headDim, width, std);
    this.parameters = [this.#o, this.#v, this.#k, this.#q];
  }

  /**
   * `out = attention(rope(x Wqᵀ), rope(x Wkᵀ), x Wvᵀ) Woᵀ`
   *
   * @param x_ND Input; it must live until the backward pass.
   * @param rows Sequences and positions.
   * @returns The output, and what the backward pass needs.
   */
  forward(x_ND: Tensor, rows: Rows): { out_ND: Tensor; saved: AttentionSaved } {
    const { headDim, heads, kvHeads, ropeTheta: theta } = this.#config;
    const q = linear(x_ND, this.#q.value);
    const k = linear(x_ND, this.#k.value);
    const v = linear(x_ND, this.#v.value);
    ops.rope(q, rows.positions, { headDim, theta });
    ops.rope(k, rows.positions, { headDim, theta });
    const mixed = empty(x_ND.device, q.shape, q.dtype);
    const lse = empty(x_ND.device, [x_ND.shape[0], heads], q.dtype === "f64" ? "f64" : "f32");
    ops.attention(q, k, v, mixed, lse, { offsets: rows.offsets, heads, kvHeads, headDim });
    return { out_ND: linear(mixed, this.#o.value), saved: { x_ND, q, k, v, mixed, lse } };
  }

  /**
   * Gradient of {@linkcode Attention.forward}; adds to the parameters' gradients and frees what was saved.
   *
   * @param dOut_ND Gradient of the output.
   * @param saved From the forward pass.
   * @param rows Sequences and positions.
   * @param step Told of each gradient that is complete.
   * @returns Gradient of the input.
   */
  backward(dOut_ND: Tensor, saved: AttentionSaved, rows: Rows, step: Step): Tensor {
    const { headDim, heads, kvHeads, ropeTheta: theta } = this.#config;
    const { x_ND, q, k, v, mixed, lse } = saved;
    using dMixed = linearBackward(dOut_ND, mixed, this.#o);
    step.gradientReady(this.#o.name);
    using dQ = empty(q.device, q.shape, q.dtype);
    using dK = empty(k.device, k.shape, k.dtype);
    using dV = empty(v.device, v.shape, v.dtype);
    const shape = { offsets: rows.offsets, heads, kvHeads, headDim };
    ops.attentionBackward(dMixed, q, k, v, mixed, lse, shape, dQ, dK, dV);
    const dX_ND = linearBackward(dV, x_ND, this.#v);
    step.gradientReady(this.#v.name);
    ops.rope(dK, rows.positions, { headDim, theta, inverse: true });
    linearBackward(dK, x_ND, this.#k, dX_ND);
    step.gradientReady(this.#k.name);
    ops.rope(dQ, rows.positions, { headDim, theta, inverse: true });
    linearBackward(dQ, x_ND, this.#q, dX_ND);
    step.gradientReady(this.#q.name);
    this.release(saved);
    return dX_ND;
  }

  /**
   * Frees what a forward pass saved.
   *
   * @param saved From the forward pass.
   */
  release(saved: AttentionSaved): void {
    for (const tensor of [saved.q, saved.k, saved.v, saved.mixed, saved.lse]) {
      tensor[Symbol.dispose]();
    }
  }

  /** Frees the weights. */
  [Symbol.dispose](): void {
    this.parameters.forEach(freeParameter);
  }
}
