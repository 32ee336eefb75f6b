// The language model's head: projection to the vocabulary and cross-entropy, in one pass forward and backward, so that the
// logits [N, V] live only here and are overwritten by their own gradient.

import * as ops from "../tensor/ops.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import { linear, linearBackward } from "./linear.ts";
import type { Parameter } from "./parameter.ts";
import type { Step } from "./step.ts";

/** What {@linkcode headLoss} may do besides the loss. */
export interface HeadLossOptions {
  /** Target tokens, i32 [N]; a negative one is ignored. */
  readonly targets: Tensor;
  /** f64 [1], where the sum of the losses is added. */
  readonly lossSum: Tensor;
  /** Factor of the gradient: 1 / tokens of the global batch. Absent: no gradient. */
  readonly gradScale?: number;
  /** The step. */
  readonly step: Step;
}

/**
 * `Σ −log softmax(x Wᵀ)[target]` and, when asked for, the gradients of `gradScale` times it.
 *
 * @param x_ND Output of the last norm.
 * @param weight The head [V, D], whose gradient is added to, or overwritten.
 * @param options Targets, where the loss goes, gradient's factor, step.
 * @returns Gradient of the input [N, D], or null.
 */
export function headLoss(
  x_ND: Tensor,
  weight: Parameter,
  options: HeadLossOptions,
): Tensor | null {
  const { targets, lossSum, gradScale, step } = options;
  using logits = linear(x_ND, weight.value);
  using losses = empty(x_ND.device, [x_ND.shape[0]], x_ND.dtype === "f64" ? "f64" : "f32");
  ops.crossEntropy(logits, targets, losses, gradScale ?? 0);
  ops.sum(losses, lossSum);
  return gradScale === undefined ? null : linearBackward(logits, x_ND, weight, { step });
}
