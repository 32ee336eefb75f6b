// A trainable tensor with its gradient and what the optimizer and the gradient reduction must know of it.

import type { DType } from "../tensor/dtype.ts";
import type { Device } from "../tensor/device.ts";
import { empty, fromArray, type Shape, sizeOf, type Tensor, zeros } from "../tensor/tensor.ts";
import { normal, random } from "./init.ts";

/** AdamW's two moments of a parameter; same shape as it. */
export interface Moments {
  /** Mean of the gradient. */
  readonly moment1: Tensor;
  /** Mean of the squared gradient. */
  readonly moment2: Tensor;
}

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
  /** The moments, where they move with the parameter, as an expert's do; those of others are the optimizer's. */
  readonly moments?: Moments;
}

/** What {@linkcode createParameter} makes. */
export interface ParameterOptions {
  /** Sizes of the dimensions. */
  readonly shape: Shape;
  /** Element type of weights and gradient. */
  readonly dtype: DType;
  /** Normal numbers of this standard deviation, seeded by the run's seed and the name; or one constant value. */
  readonly init: { readonly std: number; readonly seed: number } | { readonly value: number };
}

/**
 * Moments of zeros, as training begins.
 *
 * @param weights What they are the moments of.
 * @returns The moments, in f32 at least.
 */
export function createMoments({ device, shape, dtype }: Tensor): Moments {
  const wide = dtype === "f64" ? "f64" : "f32";
  return { moment1: zeros(device, shape, wide), moment2: zeros(device, shape, wide) };
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
  const { shape, dtype, init } = options;
  let value: Tensor;
  if ("std" in init) {
    const half = dtype === "f16" || dtype === "bf16";
    const numbers = normal(random(init.seed, name), sizeOf(shape), {
      std: init.std,
      dtype: half ? "f32" : dtype,
    });
    value = fromArray(device, numbers, shape);
    if (half) {
      using exact = value;
      value = empty(device, shape, dtype);
      device.kernels.copy(exact, value);
    }
  } else {
    value = empty(device, shape, dtype);
    device.kernels.fill(value, init.value);
  }
  const grad = zeros(device, shape, dtype);
  return { name, value, grad, group: "world", decay: shape.length > 1 };
}

/**
 * Parameters that are rows of one larger matrix, so that one GEMM computes all of them.
 *
 * @param device Where.
 * @param names Names of the parts, which all have the shape of `options`.
 * @param options Shape of one part, dtype and first values.
 * @returns The whole matrix as a parameter without a name of its own, and the parts, which look into it.
 */
export function createFusedParameters(
  device: Device,
  names: readonly string[],
  options: ParameterOptions & { readonly shape: readonly [number, number] },
): { readonly whole: Parameter; readonly parts: readonly Parameter[] } {
  const [rows, columns] = options.shape;
  const whole = createParameter(device, "", {
    ...options,
    shape: [rows * names.length, columns],
    init: { value: 0 },
  });
  const parts = names.map((name, i): Parameter => {
    const value = whole.value.rows(i * rows, (i + 1) * rows);
    const first = createParameter(device, name, options);
    device.kernels.copy(first.value, value);
    freeParameter(first);
    return { ...first, value, grad: whole.grad.rows(i * rows, (i + 1) * rows) };
  });
  return { whole, parts };
}

/**
 * Frees moments.
 *
 * @param moments The moments.
 */
export function freeMoments({ moment1, moment2 }: Moments): void {
  moment1[Symbol.dispose]();
  moment2[Symbol.dispose]();
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
