// The experts of a rank as one batched network: a grouped GEMM in, an activation, a grouped GEMM out, over rows that lie together by
// expert; and the gradient below it. No routing and no communication here; experts that every token meets are feed_forward.ts.
//
// Shape letters: M rows, grouped by expert, D model width, F hidden width, H width before the activation (2F for SwiGLU, else F),
// L experts of this rank.

import type { Activation, RowGroups } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor, TensorScope } from "../tensor/tensor.ts";

/** Weights of one expert, or their gradients. */
export interface ExpertMatrices {
  /** Into the hidden width [H, D]. SwiGLU: the gate's F rows, then the F rows that it gates, so that one GEMM does both. */
  readonly up: Tensor;
  /** Back to the model width [D, F]. */
  readonly down: Tensor;
}

/**
 * The same of L experts, by seat. While the experts stay, the arrays are the same objects: a device may keep what it derives from them.
 */
export interface ExpertLists {
  /** Into the hidden width, [H, D] each. */
  readonly up: readonly Tensor[];
  /** Back to the model width, [D, F] each. */
  readonly down: readonly Tensor[];
}

/**
 * Lists of experts' matrices.
 *
 * @param experts The experts, by seat.
 * @returns New arrays: keep them.
 */
export function listsOf(experts: readonly ExpertMatrices[]): ExpertLists {
  return { up: experts.map(({ up }) => up), down: experts.map(({ down }) => down) };
}

/** What the backward pass of experts needs; owned but for the factors. */
export interface ExpertsSaved {
  /** The rows. */
  readonly x_MD: Tensor;
  /** Factors of the outputs [M], or null; not owned. */
  readonly scales_M: Tensor | null;
  /** Before the activation. */
  readonly up_MH: Tensor;
  /** After the activation, times the factors. Null where it is computed again. */
  readonly active_MF: Tensor | null;
}

/** Which experts meet which rows. */
export interface ExpertGroups {
  /** Weights of the experts, L of them. */
  readonly weights: ExpertLists;
  /** Rows of each expert. */
  readonly rows: RowGroups;
  /** Between the two layers. */
  readonly activation: Activation;
  /** Whether the activation is computed again in the backward pass instead of kept. @default {false} */
  readonly recompute?: boolean;
}

/**
 * `y = scales · act(x Wupᵀ) Wdownᵀ` per expert; SwiGLU: `y = scales · (silu(x W1ᵀ) ⊙ x W3ᵀ) W2ᵀ`. The factors meet the hidden
 * rows, so their gradient is made where that of the hidden rows is, and y need not be kept for it.
 *
 * @param x_MD Rows, grouped by expert; what is saved takes them over.
 * @param groups Which experts meet which rows.
 * @param scales_M Factors of the outputs, f32 [M]; they must live until the backward pass. Null for ones.
 * @returns The experts' outputs [M, D], and what the backward pass needs.
 */
export function expertsForward(
  x_MD: Tensor,
  groups: ExpertGroups,
  scales_M: Tensor | null = null,
): { readonly y_MD: Tensor; readonly saved: ExpertsSaved } {
  const { weights, rows, activation } = groups;
  const { device, dtype } = x_MD;
  const [M, width] = x_MD.shape;
  const hidden = weights.down.length > 0 ? weights.down[0].shape[1] : 0;
  using scope = new TensorScope();
  const up_MH = empty(device, [M, activation === "swiglu" ? 2 * hidden : hidden], dtype);
  const active_MF = empty(device, [M, hidden], dtype);
  if (M > 0) {
    const scales = scales_M ?? undefined;
    ops.groupedGemmActivation(x_MD, weights.up, rows, activation, up_MH, active_MF, scales);
  }
  const y_MD = empty(device, [M, width], dtype);
  if (M > 0) ops.groupedGemm(active_MF, weights.down, rows, y_MD);
  if (groups.recompute) active_MF[Symbol.dispose]();
  const saved = { x_MD, scales_M, up_MH, active_MF: groups.recompute ? null : active_MF };
  return scope.keep({ y_MD, saved });
}

/** Where the gradients of experts' weights go. */
export interface ExpertGradients {
  /** The gradients, L of them. */
  readonly grads: ExpertLists;
  /** Factor of their old contents: 1 adds, 0 overwrites. */
  readonly beta: 0 | 1;
}

/**
 * Gradient of {@linkcode expertsForward}. Frees what it is given as soon as nothing needs it.
 *
 * @param dY_MD Gradient of the outputs; freed. If this throws, it is still to be freed.
 * @param saved From the forward pass; freed. If this throws, what is left is still to be released.
 * @param groups As in the forward pass.
 * @param gradients Where the weights' gradients go.
 * @returns Gradients of the rows [M, D] and of the factors [M], where there are any.
 */
export function expertsBackward(
  dY_MD: Tensor,
  saved: ExpertsSaved,
  groups: ExpertGroups,
  gradients: ExpertGradients,
): { readonly dX_MD: Tensor; readonly dScales_M: Tensor | null } {
  const { weights, rows, activation } = groups;
  const { x_MD, scales_M, up_MH } = saved;
  const { grads, beta } = gradients;
  const { device, dtype } = x_MD, [M] = x_MD.shape;
  const scales = scales_M ?? undefined;
  using scope = new TensorScope();
  const dScales_M = scales_M && empty(device, [M], scales_M.dtype);
  if (M === 0) {
    if (beta === 0) { for (const grad of [...grads.up, ...grads.down]) ops.fill(grad, 0); }
    return scope.keep({ dX_MD: empty(device, x_MD.shape, dtype), dScales_M });
  }
  {
    using active = saved.active_MF ?? empty(device, [M, weights.down[0].shape[1]], dtype);
    if (!saved.active_MF) ops.activation(activation, up_MH, active, scales);
    ops.groupedGemmWeightGrad(dY_MD, active, rows, grads.down, { beta });
  }
  using dUp_MH = empty(device, up_MH.shape, dtype);
  ops.groupedGemmActivationBackward(dY_MD, weights.down, rows, activation, up_MH, dUp_MH, {
    scales,
    dScales: dScales_M ?? undefined,
  });
  dY_MD[Symbol.dispose]();
  up_MH[Symbol.dispose]();
  ops.groupedGemmWeightGrad(dUp_MH, x_MD, rows, grads.up, { beta });
  releaseExperts(saved);
  const dX_MD = empty(device, x_MD.shape, dtype);
  ops.groupedGemm(dUp_MH, weights.up, rows, dX_MD, { transposeWeight: true });
  return scope.keep({ dX_MD, dScales_M });
}

/** What {@linkcode rowsBackward} gives. */
export interface RowsBackward extends Disposable {
  /** Gradient of the rows [M, D]; the caller's. */
  readonly dX_MD: Tensor;
  /** Gradient of the factors [M], where there are any; the caller's. */
  readonly dScales_M: Tensor | null;
  /**
   * Makes the weights' gradients: to be called once, then all else is freed. What is disposed of instead makes none.
   *
   * @param gradients Where they go.
   */
  weightGradients(gradients: ExpertGradients): void;
}

/**
 * The same gradient as {@linkcode expertsBackward}'s in two parts: that of the rows now, which others wait for, those of the weights later. The same
 * kernels on the same numbers, in another order, so the same bits; the rows' gradient lives beside what the weights' still need.
 *
 * @param dY_MD Gradient of the outputs; freed with the rest. If this throws, it is still to be freed.
 * @param saved From the forward pass; freed with the rest. If this throws, still to be released.
 * @param groups As in the forward pass.
 * @returns The rows' gradient, and the other part.
 */
export function rowsBackward(
  dY_MD: Tensor,
  saved: ExpertsSaved,
  groups: ExpertGroups,
): RowsBackward {
  const { weights, rows, activation } = groups;
  const { x_MD, scales_M, up_MH } = saved;
  const { device, dtype } = x_MD, [M] = x_MD.shape;
  const scales = scales_M ?? undefined;
  using scope = new TensorScope();
  const dScales_M = scales_M && empty(device, [M], scales_M.dtype);
  const dX_MD = empty(device, x_MD.shape, dtype), dUp_MH = empty(device, up_MH.shape, dtype);
  if (M > 0) {
    ops.groupedGemmActivationBackward(dY_MD, weights.down, rows, activation, up_MH, dUp_MH, {
      scales,
      dScales: dScales_M ?? undefined,
    });
    ops.groupedGemm(dUp_MH, weights.up, rows, dX_MD, { transposeWeight: true });
  }
  const free = () => {
    dY_MD[Symbol.dispose]();
    dUp_MH[Symbol.dispose]();
    releaseExperts(saved);
  };
  return scope.keep({
    dX_MD,
    dScales_M,
    weightGradients({ grads, beta }) {
      using _ = { [Symbol.dispose]: free };
      if (M === 0) {
        if (beta === 0) { for (const grad of [...grads.up, ...grads.down]) ops.fill(grad, 0); }
        return;
      }
      ops.groupedGemmWeightGrad(dUp_MH, x_MD, rows, grads.up, { beta });
      dUp_MH[Symbol.dispose]();
      x_MD[Symbol.dispose]();
      using active = saved.active_MF ?? empty(device, [M, weights.down[0].shape[1]], dtype);
      if (!saved.active_MF) ops.activation(activation, up_MH, active, scales);
      ops.groupedGemmWeightGrad(dY_MD, active, rows, grads.down, { beta });
    },
    [Symbol.dispose]: free,
  });
}

/**
 * Frees what a forward pass saved.
 *
 * @param saved From {@linkcode expertsForward}.
 */
export function releaseExperts(saved: ExpertsSaved): void {
  saved.x_MD[Symbol.dispose]();
  saved.up_MH[Symbol.dispose]();
  saved.active_MF?.[Symbol.dispose]();
}
