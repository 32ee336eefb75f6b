// RMSNorm with a learned gain, forward and backward: `rmsNorm(x) = x / rms(x) · g`.

import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
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

/** One norm of the model. */
export class Norm implements Disposable {
  /** The gain g [D]. */
  readonly gain: Parameter;
  readonly #eps: number;

  /**
   * Makes the gain, of ones.
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
    const out_ND = empty(x_ND.device, x_ND.shape, x_ND.dtype);
    const invRms_N = empty(x_ND.device, [x_ND.shape[0]], x_ND.dtype === "f64" ? "f64" : "f32");
    ops.rmsNorm(x_ND, this.gain.value, out_ND, invRms_N, this.#eps);
    return { out_ND, invRms_N };
  }

  /**
   * Gradient of {@linkcode Norm.forward}; adds to the gain's gradient.
   *
   * @param dOut_ND Gradient of the output.
   * @param x_ND The input.
   * @param invRms_N From the forward pass.
   * @param step Told that the gain's gradient is complete.
   * @returns Gradient of the input.
   */
  backward(dOut_ND: Tensor, x_ND: Tensor, invRms_N: Tensor, step: Step): Tensor {
    const dX_ND = empty(x_ND.device, x_ND.shape, x_ND.dtype);
    ops.rmsNormBackward(dOut_ND, x_ND, this.gain.value, invRms_N, dX_ND, this.gain.grad);
    step.gradientReady(this.gain.name);
    return dX_ND;
  }

  /** Frees the gain. */
  [Symbol.dispose](): void {
    freeParameter(this.gain);
  }
}
