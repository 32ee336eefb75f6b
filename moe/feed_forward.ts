// The dense feed-forward network: SwiGLU as in Llama and Mistral, or two matrices with ReLU or GELU between. In a dense layer it is what a
// mixture of experts replaces; beside a mixture it is the experts that every token meets. Replicated on every rank, so nothing travels.
// Shapes: N rows, D model width, F hidden width.

import type { Activation, Device } from "../tensor/device.ts";
import type { DType } from "../tensor/dtype.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor, TensorScope } from "../tensor/tensor.ts";
import { linear, linearBackward } from "./linear.ts";
import {
  createFusedParameters,
  createParameter,
  freeParameter,
  type Parameter,
} from "./parameter.ts";
import type { Step } from "./step.ts";

/** How a {@linkcode FeedForward} is made. */
export interface FeedForwardOptions {
  /** Where the weights live. */
  readonly device: Device;
  /** Begin of the weights' names in checkpoints: `model.layers.0.mlp.` */
  readonly prefix: string;
  /** D. */
  readonly width: number;
  /** F. */
  readonly hidden: number;
  /** Between the two layers. */
  readonly activation: Activation;
  /** Element type. */
  readonly dtype: DType;
  /** Element type of the gradients: see `gradientDtype` of parameter.ts. @default {that of the weights; f32 where it has 16 bits} */
  readonly gradientDtype?: DType;
  /** Whether the activation is computed again in the backward pass instead of kept. @default {false} */
  readonly recompute?: boolean;
  /** The run's seed. */
  readonly seed: number;
  /** Standard deviation of the first weights. */
  readonly initStd: number;
  /** Standard deviation of the first weights back to the model width. */
  readonly downStd: number;
}

/** What the backward pass of a dense network needs. */
export interface FeedForwardSaved {
  /** The input; not owned. */
  readonly x_ND: Tensor;
  /** Before the activation, [N, F], or [N, 2F] for SwiGLU: gate, then up. */
  readonly hidden: Tensor;
  /** After the activation; null where it is computed again. */
  readonly active_NF: Tensor | null;
}

/** A dense feed-forward network. */
export class FeedForward implements Disposable {
  /** The projections, in the order in which their gradients become ready. */
  readonly parameters: readonly Parameter[];
  readonly #options: FeedForwardOptions;
  /** Gate and up, or up alone. */
  readonly #in: Parameter;
  readonly #down: Parameter;

  /**
   * Draws the first weights.
   *
   * @param options Sizes, names and seed.
   */
  constructor(options: FeedForwardOptions) {
    const { device, prefix, width, hidden, activation, seed, initStd, downStd } = options;
    const { dtype, gradientDtype } = options;
    this.#options = options;
    using scope = new TensorScope();
    this.#down = createParameter(device, `${prefix}down_proj.weight`, {
      shape: [width, hidden],
      dtype,
      gradientDtype,
      init: { std: downStd, seed },
      overwrites: true,
    });
    const names = activation === "swiglu" ? ["gate_proj", "up_proj"] : ["up_proj"];
    const { whole, parts } = createFusedParameters(
      device,
      names.map((name) => ({ name: `${prefix}${name}.weight`, rows: hidden })),
      { columns: width, dtype, gradientDtype, init: { std: initStd, seed }, overwrites: true },
    );
    this.#in = whole;
    this.parameters = [this.#down, ...parts];
    scope.keep(this);
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
  ): { readonly out_ND: Tensor; readonly saved: FeedForwardSaved } {
    const { recompute = false } = this.#options;
    using scope = new TensorScope();
    const hidden = linear(x_ND, this.#in.value);
    const active_NF = this.#activate(hidden);
    const out_ND = linear(active_NF, this.#down.value);
    if (residual_ND) ops.add(residual_ND, out_ND, out_ND);
    if (recompute) active_NF[Symbol.dispose]();
    const saved = { x_ND, hidden, active_NF: recompute ? null : active_NF };
    return scope.keep({ out_ND, saved });
  }

  #activate(hidden: Tensor): Tensor {
    const { activation, hidden: F } = this.#options;
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
   * @returns Gradient of the input by way of the network, a new tensor.
   */
  backward(
    dOut_ND: Tensor,
    saved: FeedForwardSaved,
    step: Pick<Step, "firstPass" | "gradientReady">,
  ): Tensor {
    const { x_ND, hidden } = saved;
    using active_NF = saved.active_NF ?? this.#activate(hidden);
    using dActive_NF = linearBackward(dOut_ND, active_NF, this.#down, { step });
    step.gradientReady(this.#down.name);
    using dHidden = empty(hidden.device, hidden.shape, hidden.dtype);
    ops.activationBackward(this.#options.activation, dActive_NF, hidden, dHidden);
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
