// Experts that every token meets, beside those that the router chooses (DeepSeek-MoE): one network of as many times the hidden width,
// replicated on every rank, so nothing travels. Names are DeepSeek's: `model.layers.{layer}.mlp.shared_experts.gate_proj.weight`.
//
// Shape letters: N tokens of this rank, D model width, F hidden width of all shared experts together.

import type { Activation, Device } from "../tensor/device.ts";
import type { DType } from "../tensor/dtype.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor, TensorScope } from "../tensor/tensor.ts";
import type { ExpertsSaved } from "./experts.ts";
import { linear, linearBackward } from "./linear.ts";
import {
  createFusedParameters,
  createParameter,
  freeParameter,
  type Parameter,
} from "./parameter.ts";
import type { Step } from "./step.ts";

/** How {@linkcode SharedExperts} are made. */
export interface SharedExpertsOptions {
  /** Where the weights live. */
  readonly device: Device;
  /** Number of the layer. */
  readonly layer: number;
  /** D. */
  readonly width: number;
  /** Hidden width of one expert. */
  readonly hidden: number;
  /** How many. */
  readonly sharedExperts: number;
  /** Between the two layers. */
  readonly activation: Activation;
  /** Element type. */
  readonly dtype: DType;
  /** Whether the activation is computed again in the backward pass instead of kept. @default {false} */
  readonly recompute?: boolean;
  /** The run's seed. */
  readonly seed: number;
  /** Standard deviation of the first weights. */
  readonly initStd: number;
  /** Standard deviation of the first weights back to the model width. */
  readonly downStd: number;
}

/** The shared experts of a layer. */
export class SharedExperts implements Disposable {
  /** Their parameters, in the order in which their gradients become ready. */
  readonly parameters: readonly Parameter[];
  readonly #activation: Activation;
  readonly #recompute: boolean;
  readonly #up: Parameter;
  readonly #down: Parameter;

  /**
   * Draws the first weights.
   *
   * @param options Sizes and seed.
   */
  constructor(options: SharedExpertsOptions) {
    const { device, layer, width, activation, dtype, seed } = options;
    const hidden = options.hidden * options.sharedExperts;
    const prefix = `model.layers.${layer}.mlp.shared_experts.`;
    const names = activation === "swiglu" ? ["gate_proj", "up_proj"] : ["up_proj"];
    const { whole, parts } = createFusedParameters(
      device,
      names.map((name) => ({ name: `${prefix}${name}.weight`, rows: hidden })),
      { columns: width, dtype, init: { std: options.initStd, seed }, overwrites: true },
    );
    this.#activation = activation;
    this.#recompute = options.recompute ?? false;
    this.#up = whole;
    this.#down = createParameter(device, `${prefix}down_proj.weight`, {
      shape: [width, hidden],
      dtype,
      init: { std: options.downStd, seed },
      overwrites: true,
    });
    this.parameters = [this.#down, ...parts];
  }

  /**
   * Runs the network on every token.
   *
   * @param x_ND Tokens; they must live until the backward pass.
   * @returns The output [N, D], and what the backward pass needs.
   */
  forward(x_ND: Tensor): { readonly y_ND: Tensor; readonly saved: ExpertsSaved } {
    using scope = new TensorScope();
    const up_MH = linear(x_ND, this.#up.value);
    const active_MF = this.#activate(up_MH);
    const y_ND = linear(active_MF, this.#down.value);
    if (this.#recompute) active_MF[Symbol.dispose]();
    const saved = { x_MD: x_ND, up_MH, active_MF: this.#recompute ? null : active_MF };
    return scope.keep({ y_ND, saved });
  }

  #activate(up_MH: Tensor): Tensor {
    const { device, dtype, shape } = up_MH;
    const active_MF = empty(device, [shape[0], this.#down.value.shape[1]], dtype);
    ops.activation(this.#activation, up_MH, active_MF);
    return active_MF;
  }

  /**
   * Gradient of {@linkcode SharedExperts.forward}; adds to the parameters' gradients.
   *
   * @param dY_ND Gradient of the output.
   * @param saved From the forward pass; stays the caller's.
   * @param step The step, whose first pass overwrites the gradients.
   * @returns Gradient of the tokens.
   */
  backward(dY_ND: Tensor, saved: ExpertsSaved, step: Step): Tensor {
    const { x_MD, up_MH } = saved;
    using again = saved.active_MF ? null : this.#activate(up_MH);
    const active_MF = (saved.active_MF ?? again)!;
    using dActive = linearBackward(dY_ND, active_MF, this.#down, { step });
    using dUp = empty(up_MH.device, up_MH.shape, up_MH.dtype);
    ops.activationBackward(this.#activation, dActive, up_MH, dUp);
    return linearBackward(dUp, x_MD, this.#up, { step });
  }

  /** Frees the weights. */
  [Symbol.dispose](): void {
    freeParameter(this.#up);
    freeParameter(this.#down);
  }
}
