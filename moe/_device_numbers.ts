// For the tests of the GPU's routing kernels: operands, and how far a result may be from the host's.

import assert from "node:assert/strict";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import { normal, random } from "./init.ts";

/** Elements as f64. */
export async function read(x: Tensor): Promise<Float64Array> {
  if (x.dtype !== "bf16") return Float64Array.from(await x.toArray() as Float64Array);
  using wide = empty(x.device, x.shape, "f32");
  ops.copy(x, wide);
  return Float64Array.from(await wide.toArray() as Float32Array);
}

/** Equal to `bound` of the largest number that is wanted, or of `least` if that is larger. */
export function close(
  got: ArrayLike<number>,
  want: ArrayLike<number>,
  bound: number,
  what: string,
  least = 1e-30,
): void {
  assert.equal(got.length, want.length, what);
  let most = least;
  for (let i = 0; i < want.length; i++) most = Math.max(most, Math.abs(want[i]));
  for (let i = 0; i < want.length; i++) {
    assert.ok(
      Math.abs(got[i] - want[i]) <= bound * most,
      `${what}[${i}]: ${got[i]} instead of ${want[i]}, the largest is ${most}`,
    );
  }
}

/** bf16 bits of numbers, and what they stand for. */
export function rounded(x: Float32Array): { bits: Uint16Array; values: Float64Array } {
  const bits = Uint16Array.from(new Uint32Array(x.slice().buffer), (b) => {
    return (b + 0x7fff + (b >>> 16 & 1)) >>> 16;
  });
  return {
    bits,
    values: Float64Array.from(new Float32Array(Uint32Array.from(bits, (b) => b << 16).buffer)),
  };
}

/** Normally distributed numbers, the same for the same seed and name. */
export function numbers(seed: number, name: string, size: number): Float32Array<ArrayBuffer> {
  return normal(random(seed, name), size, { dtype: "f32" }) as Float32Array<ArrayBuffer>;
}
