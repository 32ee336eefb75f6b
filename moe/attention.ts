// Grouped-query causal self-attention with rotary positions, forward and backward. Whole sequences only: the key/value cache of
// incremental decoding is another file's matter.
// Shapes: N rows (tokens of all sequences, one after another), D model width, H query heads, G key/value heads, C head width.

import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor, TensorScope } from "../tensor/tensor.ts";
import type { ModelConfig } from "./config.ts";
import { linear, linearBackward } from "./linear.ts";
import {
  createFusedParameters,
  createParameter,
  freeParameter,
  type Parameter,
} from "./parameter.ts";
import type { Rows } from "./rows.ts";
import type { Step } from "./step.ts";

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
  /** The four projections, in the order in which their gradients become ready: o, then q, k and v at once. */
  readonly parameters: readonly Parameter[];
  readonly #config: ModelConfig;
  readonly #o: Parameter;
  /** Queries, keys and values as one matrix. */
  readonly #qkv: Parameter;
  readonly #qkvNames: readonly string[];

  /**
   * Makes the projections.
   *
   * @param device Where the weights live.
   * @param layer Number of the layer.
   * @param config Sizes of the model.
   * @param seed Seed of the weights.
   */
  constructor(device: Device, layer: number, config: ModelConfig, seed: number) {
    const { width, heads, kvHeads, headDim, layers, initStd: std, dtype, gradientDtype } = config;
    const nameOf = (part: string) => `model.layers.${layer}.self_attn.${part}_proj.weight`;
    this.#config = config;
    this.#o = createParameter(device, nameOf("o"), {
      shape: [width, heads * headDim],
      dtype,
      gradientDtype,
      // What adds to the residual stream starts smaller, so that its variance does not grow with depth (GPT-2).
      init: { std: std / Math.sqrt(2 * layers), seed },
      overwrites: true,
    });
    const { whole, parts } = createFusedParameters(
      device,
      [
        { name: nameOf("q"), rows: heads * headDim },
        { name: nameOf("k"), rows: kvHeads * headDim },
        { name: nameOf("v"), rows: kvHeads * headDim },
      ],
      { columns: width, dtype, gradientDtype, init: { std, seed }, overwrites: true },
    );
    this.#qkv = whole;
    this.#qkvNames = parts.map(({ name }) => name);
    this.parameters = [this.#o, ...parts];
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
    const { device, dtype } = x_ND, N = x_ND.shape[0];
    using scope = new TensorScope();
    const q = empty(device, [N, heads * headDim], dtype);
    const k = empty(device, [N, kvHeads * headDim], dtype);
    const v = empty(device, k.shape, dtype);
    {
      using qkv = linear(x_ND, this.#qkv.value);
      ops.splitQkv(qkv, rows.positions, { headDim, theta }, q, k, v);
    }
    const mixed = empty(device, q.shape, dtype);
    const lse = empty(device, [N, heads], dtype === "f64" ? "f64" : "f32");
    ops.attention(q, k, v, mixed, lse, { offsets: rows.offsets, heads, kvHeads, headDim });
    const out_ND = linear(mixed, this.#o.value);
    return scope.keep({ out_ND, saved: { x_ND, q, k, v, mixed, lse } });
  }

  /**
   * Gradient of {@linkcode Attention.forward}; adds to the parameters' gradients, or overwrites them, and frees what was saved.
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
    using dMixed = linearBackward(dOut_ND, mixed, this.#o, { step });
    step.gradientReady(this.#o.name);
    using dQkv = empty(q.device, [q.shape[0], q.shape[1] + 2 * k.shape[1]], q.dtype);
    {
      using dQ = empty(q.device, q.shape, q.dtype);
      using dK = empty(k.device, k.shape, k.dtype);
      using dV = empty(v.device, v.shape, v.dtype);
      const shape = { offsets: rows.offsets, heads, kvHeads, headDim };
      ops.attentionBackward(dMixed, q, k, v, mixed, lse, shape, dQ, dK, dV);
      ops.joinQkv(dQ, dK, dV, rows.positions, { headDim, theta }, dQkv);
    }
    const dX_ND = linearBackward(dQkv, x_ND, this.#qkv, { step });
    for (const name of this.#qkvNames) step.gradientReady(name);
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
    freeParameter(this.#o);
    freeParameter(this.#qkv);
  }
}
