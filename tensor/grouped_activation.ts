// Grouped products with an activation, for devices without a kernel of their own for them: the product, then the activation.

import type { Kernels } from "./device.ts";
import { empty } from "./tensor.ts";

/** The kernels that are called in turn. */
export type GroupedActivationParts = Pick<
  Kernels,
  "groupedGemm" | "activation" | "activationBackward"
>;

/** Grouped products with an activation. */
export type GroupedActivation = Pick<
  Kernels,
  "groupedGemmActivation" | "groupedGemmActivationBackward"
>;

/**
 * The grouped products with an activation as two kernels in turn.
 *
 * @param parts A device's kernels.
 * @returns The kernels; the backward one takes memory for the activation's gradient while it enqueues.
 */
export function groupedActivation(parts: GroupedActivationParts): GroupedActivation {
  return {
    groupedGemmActivation(x, weights, groups, kind, up, active, scales) {
      parts.groupedGemm(x, weights, groups, up);
      parts.activation(kind, up, active, scales);
    },
    groupedGemmActivationBackward(dY, weights, groups, kind, up, dUp, options) {
      const [R, H] = up.shape, F = kind === "swiglu" ? H / 2 : H;
      using dActive = empty(dY.device, [R, F], dY.dtype);
      parts.groupedGemm(dY, weights, groups, dActive, { transposeWeight: true });
      parts.activationBackward(kind, dActive, up, dUp, options);
    },
  };
}
