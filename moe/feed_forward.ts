// The dense feed-forward network of a layer: SwiGLU as in Llama and Mistral, or two matrices with ReLU or GELU between. What a MoE layer
// replaces. Shapes: N rows, D model width, F hidden width.

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
import type { Step } from "./step.ts";

/** What the backward pass of a dense network needs. */
export interface FeedForwardSaved {
  /** The input; not owned. */
  readonly x_ND: Tensor;
  /** Before the activation, [N, F], or [N, 2F] for SwiGLU: gate, then up. */
  readonly hidden: Tensor;
  /** After the activation; null where it is computed again. */
  readonly active_NF: Tensor | null;
}

/** The dense feed-forward network of one layer. */
export class FeedForward implements Disposable {
  /** The projections, in the order in which their gradients become ready. */
  readonly parameters: readonly Parameter[];
  readonly #config: ModelConfig;
  readonly #recompute: boolean;
  /** Gate and up, or up alone. */
  readonly #in: Parameter;
  readonly #down: Parameter;

  /**
   * Makes the projections.
   *
   * @param device Where the weights live.
   * @param layer Number of the layer.
   * @param config Sizes of the model.
   * @param options Seed of the weights, and whether the activation is computed again in the backward pass. @default {{recompute: false}}
   */
  constructor(
    device: Device,
    layer: number,
    config: ModelConfig,
    options: { readonly seed: number; readonly recompute?: boolean },
  ) {
    const { seed } = options;
    const { width, hidden, activation, layers, initStd: std, dtype } = config;
    const prefix = `model.layers.${layer}.mlp.`;
    this.#config = config;
    this.#recompute = options.recompute ?? false;
    this.#down = createParameter(device, `${prefix}down_proj.weight`, {
      shape: [width, hidden],
      dtype,
      init: { std: std / Math.sqrt(2 * layers), seed },
      overwrites: true,
    });
    const names = activation === "swiglu" ? ["gate_proj", "up_proj"] : ["up_proj"];
    const { whole, parts } = createFusedParameters(
      device,
      names.map((name) => ({ name: `${prefix}${name}.weight`, rows: hidden })),
      { columns: width, dtype, init: { std, seed }, overwrites: true },
    );
    this.#in = whole;
    this.parameters = [this.#down, ...parts];
  }

  /**
   * `out = (silu(x Wgateᵀ) ⊙ x Wupᵀ) Wdownᵀ`, or `act(x Wupᵀ) Wdownᵀ`
   *
   * @param x_ND Input; it must live until the backward pass.
   * @param _step The step; of no interest here.
   * @param residual_ND What the output is added to; stays the caller's. @default {zeros}
   * @returns The output, and what the backward pass needs.
   */
  forward(
    x_ND: Tensor,
    _step: Step,
    residual_ND?: Tensor,
  ): { out_ND: Tensor; saved: FeedForwardSaved } {
    using scope = new TensorScope();
    const hidden = linear(x_ND, this.#in.value);
    const active_NF = this.#activate(hidden);
    const out_ND = linear(active_NF, this.#down.value);
    if (residual_ND) ops.add(residual_ND, out_ND, out_ND);
    if (this.#recompute) active_NF[Symbol.dispose]();
    const saved = { x_ND, hidden, active_NF: this.#recompute ? null : active_NF };
    return scope.keep({ out_ND, saved });
  }

  #activate(hidden: Tensor): Tensor {
    const { activation, hidden: F } = this.#config;
    const active_NF = empty(hidden.device, [hidden.shape[0], F], hidden.dtype);
    ops.activation(activation, hidden, active_NF);
    return active_NF;
  }

  /**
   * Gradient of {@linkcode FeedForward.forward}; adds to the parameters' gradients, or overwrites them, and frees what was saved.
   *
   * @param dOut_ND Gradient of the output.
   * @param saved From the forward pass.
   * @param step Told of each gradient that is complete.
   * @returns Gradient of the input.
   */
  backward(dOut_ND: Tensor, saved: FeedForwardSaved, step: Step): Tensor {
    const { x_ND, hidden } = saved;
    using active_NF = saved.active_NF ?? this.#activate(hidden);
    using dActive_NF = linearBackward(dOut_ND, active_NF, this.#down, { step });
    step.gradientReady(this.#down.name);
    using dHidden = empty(hidden.device, hidden.shape, hidden.dtype);
    ops.activationBackward(this.#config.activation, dActive_NF, hidden, dHidden);
    const dX_ND = linearBackward(dHidden, x_ND, this.#in, { step });
    for (const { name } of this.parameters.slice(1)) step.gradientReady(name);
    this.release(saved);
    return dX_ND;
  }

  /**
   * Frees what a forward pass saved.
   *
   * @param saved From the forward pass.
   */
  release(saved: FeedForwardSaved): void {
    saved.hidden[Symbol.dispose]();
    saved.active_NF?.[Symbol.dispose]();
  }

  /** Frees the weights. */
  [Symbol.dispose](): void {
    freeParameter(this.#in);
    freeParameter(this.#down);
  }
}
