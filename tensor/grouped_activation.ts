// Grouped products with an activation, for devices without a kernel of their own for them: the product, then the activation.

import type { Activation, Kernels, RowGroups } from "./device.ts";
import { empty, type Tensor } from "./tensor.ts";

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
    groupedGemmActivation(
      x: Tensor,
      weights: readonly Tensor[],
      groups: RowGroups,
      kind: Activation,
      up: Tensor,
      active: Tensor,
    ): void {
      parts.groupedGemm(x, weights, groups, up);
      parts.activation(kind, up, active);
    },
    groupedGemmActivationBackward(
      dY: Tensor,
      weights: readonly Tensor[],
      groups: RowGroups,
      kind: Activation,
      up: Tensor,
      dUp: Tensor,
    ): void {
      const F = kind === "swiglu" ? up.shape[1] / 2 : up.shape[1];
      using dActive = empty(dY.device, [dY.shape[0], F], dY.dtype);
      parts.groupedGemm(dY, weights, groups, dActive, { transposeWeight: true });
      parts.activationBackward(kind, dActive, up, dUp);
    },
  };
}
