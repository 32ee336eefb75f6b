// A trainable tensor with its gradient and what the optimizer and the gradient reduction must know of it.

import type { Tensor } from "../tensor/tensor.ts";

/** A trainable tensor. */
export interface Parameter {
  /** Name in checkpoints, as Hugging Face's Mixtral layout has it. */
  readonly name: string;
  /** The weights the kernels read. */
  readonly value: Tensor;
  /** Sum of the gradients since the last step; same shape. */
  readonly grad: Tensor;
  /** Over which ranks the gradient is reduced: all (replicated weights), or the ranks that hold a replica of this expert. */
  readonly group: "world" | "replicas";
  /** Which expert it belongs to, for group `replicas`. */
  readonly expert?: { readonly layer: number; readonly id: number };
  /** Whether weight decay applies (matrices yes, gains no). */
  readonly decay: boolean;
}
