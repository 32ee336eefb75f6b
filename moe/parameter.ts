// A trainable tensor with its gradient and what the optimizer and the gradient reduction must know of it.

import { type DType, wideDtype } from "../tensor/dtype.ts";
import type { Device } from "../tensor/device.ts";
import { empty, type Shape, type Tensor, zeros } from "../tensor/tensor.ts";
import type { ExpertMemory } from "./expert_memory.ts";
import { normalKey } from "./init.ts";

/** What AdamW keeps of a parameter between steps; same shape as it. */
export interface Moments {
  /** Mean of the gradient. */
  readonly moment1: Tensor;
  /** Mean of the squared gradient. */
  readonly moment2: Tensor;
  /** What a bf16 weight lacks of its f32 master weight, i16: see `AdamWUpdate` of tensor/device.ts. Null for f32 and f64 weights. */
  readonly residual: Tensor | null;
}

/** A trainable tensor. */
export interface Parameter {
  /** Name in checkpoints, as Hugging Face's Mixtral layout has it. */
  readonly name: string;
  /** The weights the kernels read. */
  readonly value: Tensor;
  /** Sum of the gradients of a step's passes; same shape, in a dtype of {@linkcode gradientDtype}. */
  readonly grad: Tensor;
  /**
   * Whether the backward pass overwrites the gradient in the first pass of a step (see `Step.firstPass`); else it only adds, and the
   * optimizer leaves zeros behind.
   */
  readonly overwrites: boolean;
  /** Over which ranks the gradient is reduced: all (replicated weights), or the ranks that hold a replica of this expert. */
  readonly group: "world" | "replicas";
  /** Which expert it belongs to, for group `replicas`. */
  readonly expert?: { readonly layer: number; readonly id: number };
  /** Whether weight decay applies (matrices yes, gains no). */
  readonly decay: boolean;
  /** The moments, where they move with the parameter, as an expert's do; those of others are the optimizer's. */
  readonly moments?: Moments;
  /** Where the moments are instead, if they stay in host memory: elements `start` to `end` of an expert's. */
  readonly offloaded?: {
    /** The expert's memory, its moments among it. */
    readonly memory: ExpertMemory;
    /** First element. */
    readonly start: number;
    /** Element after the last. */
    readonly end: number;
  };
}

/** What {@linkcode createParameter} makes. */
export interface ParameterOptions {
  /** Sizes of the dimensions. */
  readonly shape: Shape;
  /** Element type of the weights. */
  readonly dtype: DType;
  /** Element type of the gradient: see {@linkcode gradientDtype}. @default {that of the weights; f32 where it has 16 bits} */
  readonly gradientDtype?: DType;
  /** Normal numbers of this standard deviation, seeded by the run's seed and the name; or one constant value. */
  readonly init: { readonly std: number; readonly seed: number } | { readonly value: number };
  /** Whether the first pass of a step overwrites the gradient. @default {false} */
  readonly overwrites?: boolean;
}

/**
 * Element type of a gradient: in memory, between the ranks that reduce it, and as the optimizer reads it.
 *
 * Weights of 16 bits have a choice. In f32, the default, sums over passes and ranks lose nothing. In the weights' own type a gradient takes
 * half the memory, and half the bytes of writing, reducing and reading; products are still summed in f32 and rounded once per pass, but
 * a second pass is added to what was rounded, and so is another rank's part; each of these sums is rounded again.
 *
 * Gradients are those of the mean over the global batch from the start (`PassOptions.gradScale`), so no sum is divided afterwards, and in
 * bf16, whose range is that of f32, none can underflow sooner.
 *
 * @param dtype Element type of the weights.
 * @param chosen The choice: f32 (f64 for f64), or that of the weights. @default {that of the weights; f32 where it has 16 bits}
 * @returns The element type of the gradient.
 * @throws {RangeError} If the weights cannot have it.
 *
 * @example
 * ```ts
 * import { gradientDtype } from "./parameter.ts";
 * import assert from "node:assert/strict";
 *
 * assert.equal(gradientDtype("bf16"), "f32");
 * assert.equal(gradientDtype("bf16", "bf16"), "bf16");
 * assert.throws(() => gradientDtype("f32", "bf16"), RangeError);
 * ```
 */
export function gradientDtype(dtype: DType, chosen?: DType): DType {
  const wide = wideDtype(dtype);
  if (chosen === undefined || chosen === wide) return wide;
  if (chosen === dtype) return dtype;
  throw new RangeError(
    `Cannot make parameters as "gradientDtype" must be ${
      dtype === wide ? wide : `${wide} or ${dtype}`
    } for ${dtype} weights: current value is ${chosen}`,
  );
}

/**
 * Moments of zeros, as training begins.
 *
 * @param weights What they are the moments of.
 * @returns The moments, in f32 at least.
 */
export function createMoments({ device, shape, dtype }: Tensor): Moments {
  const wide = wideDtype(dtype);
  return {
    moment1: zeros(device, shape, wide),
    moment2: zeros(device, shape, wide),
    residual: dtype === "bf16" ? zeros(device, shape, "i16") : null,
  };
}

/**
 * A replicated parameter (group `world`); matrices decay, vectors do not. Its values depend on seed and name only.
 *
 * @param device Where.
 * @param name Its name in checkpoints.
 * @param options Shape, dtype and first values.
 * @returns The parameter; free it with {@linkcode freeParameter}.
 */
export function createParameter(
  device: Device,
  name: string,
  options: ParameterOptions,
): Parameter {
  const { shape, dtype, init, overwrites = false } = options;
  const value = empty(device, shape, dtype);
  initialise(name, value, init);
  const grad = zeros(device, shape, gradientDtype(dtype, options.gradientDtype));
  return { name, value, grad, overwrites, group: "world", decay: shape.length > 1 };
}

/** Gives weights their first values; numbers of 16 bits are rounded. */
function initialise(name: string, value: Tensor, init: ParameterOptions["init"]): void {
  const { device } = value;
  if (!("std" in init)) {
    device.kernels.fill(value, init.value);
    return;
  }
  device.kernels.normal(value, normalKey(init.seed, name), init.std);
}

/** A part of a fused parameter. */
export interface FusedPart {
  /** Its name in checkpoints. */
  readonly name: string;
  /** Its rows in the whole matrix. */
  readonly rows: number;
}

/**
 * Parameters that are rows of one larger matrix, so that one GEMM computes all of them.
 *
 * @param device Where.
 * @param parts Names and rows of the parts, in their order in the matrix.
 * @param options Columns of all parts, dtype and first values.
 * @returns The whole matrix as a parameter without a name of its own, and the parts, which look into it.
 */
export function createFusedParameters(
  device: Device,
  parts: readonly FusedPart[],
  options: Omit<ParameterOptions, "shape"> & { readonly columns: number },
): { readonly whole: Parameter; readonly parts: readonly Parameter[] } {
  const { columns, ...rest } = options;
  const all = parts.reduce((sum, { rows }) => sum + rows, 0);
  const whole = createParameter(device, "", { ...rest, shape: [all, columns], init: { value: 0 } });
  let start = 0;
  const made = parts.map(({ name, rows }): Parameter => {
    const end = start + rows;
    const value = whole.value.rows(start, end), grad = whole.grad.rows(start, end);
    start = end;
    initialise(name, value, options.init);
    return { ...whole, name, value, grad };
  });
  return { whole, parts: made };
}

/**
 * Frees moments.
 *
 * @param moments The moments.
 */
export function freeMoments({ moment1, moment2, residual }: Moments): void {
  moment1[Symbol.dispose]();
  moment2[Symbol.dispose]();
  residual?.[Symbol.dispose]();
}

/**
 * Frees the memory of a parameter.
 *
 * @param parameter The parameter.
 */
export function freeParameter(parameter: Parameter): void {
  parameter.value[Symbol.dispose]();
  parameter.grad[Symbol.dispose]();
}
