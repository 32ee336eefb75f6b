// RMSNorm with a learned gain, forward and backward: `rmsNorm(x) = x / rms(x) · g`.

import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor, TensorScope } from "../tensor/tensor.ts";
import type { ModelConfig } from "./config.ts";
import { createParameter, freeParameter, type Parameter } from "./parameter.ts";
import type { Step } from "./step.ts";

/** A normed tensor, and the inverse root mean square of each row. */
export interface Normed {
  /** `x / rms(x) · g`, [N, D]. */
  readonly out_ND: Tensor;
  /** `1 / rms(x)`, [N]. */
  readonly invRms_N: Tensor;
}

/**
 * Frees a normed tensor.
 *
 * @param normed From {@linkcode Norm.forward} or {@linkcode Norm.addForward}.
 */
export function freeNormed({ out_ND, invRms_N }: Normed): void {
  out_ND[Symbol.dispose]();
  invRms_N[Symbol.dispose]();
}

/** One norm of the model. */
export class Norm implements Disposable {
  /** The gain g [D]. */
  readonly gain: Parameter;
  readonly #eps: number;

  /**
   * Makes the gain, of ones. Its gradient is f32 at least, whatever that of the matrices is: every row of a batch adds to it, and it is small.
   *
   * @param device Where the gain lives.
   * @param name Name of the gain in checkpoints.
   * @param config Sizes of the model.
   */
  constructor(device: Device, name: string, config: ModelConfig) {
    this.gain = createParameter(device, name, {
      shape: [config.width],
      dtype: config.dtype,
      init: { value: 1 },
    });
    this.#eps = config.normEps;
  }

  /**
   * Norms each row.
   *
   * @param x_ND Input; the backward pass asks for it again.
   * @returns New tensors.
   */
  forward(x_ND: Tensor): Normed {
    using scope = new TensorScope();
    const normed = this.#room(x_ND);
    ops.rmsNorm(x_ND, this.gain.value, normed.out_ND, normed.invRms_N, this.#eps);
    return scope.keep(normed);
  }

  /**
   * Adds a branch to the residual stream and norms each row: `y += x`, `out = rmsNorm(y)`.
   *
   * @param x_ND The stream; stays as it is.
   * @param y_ND The branch; becomes the sum, which the backward pass asks for again.
   * @returns New tensors.
   */
  addForward(x_ND: Tensor, y_ND: Tensor): Normed {
    using scope = new TensorScope();
    const normed = this.#room(x_ND);
    ops.addRmsNorm(x_ND, y_ND, this.gain.value, y_ND, normed.out_ND, normed.invRms_N, this.#eps);
    return scope.keep(normed);
  }

  /**
   * Gradient of {@linkcode Norm.forward}; adds to the gain's gradient.
   *
   * @param dOut_ND Gradient of the output.
   * @param x_ND The input.
   * @param invRms_N From the forward pass.
   * @param options The step, told that the gain's gradient is complete, and, at a residual connection, the gradient of the stream,
   * which becomes the sum.
   * @returns Gradient of the input: `residual_ND`, or a new tensor without it.
   */
  backward(
    dOut_ND: Tensor,
    x_ND: Tensor,
    invRms_N: Tensor,
    options: { readonly step: Step; readonly residual_ND?: Tensor },
  ): Tensor {
    const { step, residual_ND } = options;
    using scope = new TensorScope();
    const dX_ND = residual_ND ?? empty(x_ND.device, x_ND.shape, x_ND.dtype);
    const { value, grad, name } = this.gain;
    ops.rmsNormBackward(dOut_ND, x_ND, value, invRms_N, dX_ND, grad, residual_ND);
    step.gradientReady(name);
    return scope.keep(dX_ND);
  }

  #room({ device, shape, dtype }: Tensor): Normed {
    return {
      out_ND: empty(device, shape, dtype),
      invRms_N: empty(device, [shape[0]], dtype === "f64" ? "f64" : "f32"),
    };
  }

  /** Frees the gain. */
  [Symbol.dispose](): void {
    freeParameter(this.gain);
  }
}
