// Typed arrays over the elements of CPU tensors: no copy, valid as long as the tensor lives, since the linear memory never moves.

import { type TypedArray, viewAs } from "../dtype.ts";
import type { Tensor } from "../tensor.ts";
import { linearBuffer } from "./memory.ts";

/**
 * The elements of a CPU tensor as a typed array that shares its memory.
 *
 * @param tensor A tensor of the CPU device.
 * @returns A view of `tensor.size` elements; a change of either is seen by the other.
 * @throws {TypeError} If the tensor lives on another device or is disposed.
 *
 * @example
 * ```ts
 * import { cpuDevice, hostView } from "./device.ts";
 * import { zeros } from "../tensor.ts";
 * import assert from "node:assert/strict";
 *
 * using x = zeros(cpuDevice(), [2, 3]);
 * hostView(x)[4] = 7;
 * assert.deepEqual(await x.toArray(), new Float32Array([0, 0, 0, 0, 7, 0]));
 * ```
 */
export function hostView(tensor: Tensor): TypedArray {
  if (tensor.device.kind !== "cpu") {
    throw new TypeError(
      `Cannot view the tensor as its device must be the CPU: current value is ${tensor.device.name}`,
    );
  }
  if (tensor.disposed) {
    throw new TypeError(
      `Cannot view the tensor as it must be alive: current value is a disposed tensor [${tensor.shape}]`,
    );
  }
  return viewAs(tensor.dtype, linearBuffer(), tensor.address, tensor.size);
}

/**
 * The elements of a tensor of a type that JavaScript computes in.
 *
 * @param tensor A CPU tensor of f32 or f64.
 * @returns A view of its elements.
 * @throws {TypeError} If it has another dtype.
 */
export function floatView(tensor: Tensor): Float32Array | Float64Array {
  const buffer = linearBuffer();
  if (tensor.dtype === "f32") return new Float32Array(buffer, tensor.address, tensor.size);
  if (tensor.dtype === "f64") return new Float64Array(buffer, tensor.address, tensor.size);
  throw new TypeError(
    `Cannot compute on the CPU as the dtype must be f32 or f64: current value is ${tensor.dtype}`,
  );
}

/**
 * The elements of an i32 tensor.
 *
 * @param tensor A CPU tensor of i32.
 * @returns A view of its elements.
 */
export function indexView(tensor: Tensor): Int32Array {
  return new Int32Array(linearBuffer(), tensor.address, tensor.size);
}
