// Normal numbers by index: number i of a key is a function of the key and i alone (a hash, then Box and Muller), so that any device can make any
// part of an array in any order and gets the same numbers to the rounding of one logarithm and one cosine. Not for cryptography.

/** Names one sequence of numbers: two unsigned 32-bit integers. */
export type RandomKey = readonly [number, number];

/** 32 well mixed bits of a counter and two key words; tensor/cuda/random.cu has the same steps. */
function mix(counter: number, a: number, b: number): number {
  let x = counter ^ a;
  x = Math.imul(x ^ (x >>> 16), 0x7feb352d);
  x = Math.imul(x ^ (x >>> 15), 0x846ca68b);
  x = (x ^ (x >>> 16)) + b | 0;
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
  return (x ^ (x >>> 16)) >>> 0;
}

/**
 * Fills an array with the first normal numbers of a key, of mean 0 and the given standard deviation.
 *
 * @param out f32 or f64; at most 2³³ elements.
 * @param key The sequence.
 * @param std Standard deviation.
 *
 * @example
 * ```ts
 * import { fillNormal } from "./random.ts";
 * import assert from "node:assert/strict";
 *
 * const long = new Float32Array(1000), short = new Float32Array(10);
 * fillNormal(long, [1, 2], 0.5);
 * fillNormal(short, [1, 2], 0.5);
 * assert.deepEqual(long.subarray(0, 10), short);
 * ```
 */
export function fillNormal(out: Float32Array | Float64Array, key: RandomKey, std: number): void {
  const [a, b] = key;
  for (let i = 0; i < out.length; i += 2) {
    // 23 bits and a half: never 0 or 1, and exact in f32.
    const u = ((mix(i / 2, a, b) >>> 9) + 0.5) * 2 ** -23;
    const v = ((mix(i / 2, b ^ 0x9e3779b9, a) >>> 9) + 0.5) * 2 ** -23;
    const radius = std * Math.sqrt(-2 * Math.log(u)), angle = 2 * Math.PI * v;
    out[i] = radius * Math.cos(angle);
    if (i + 1 < out.length) out[i + 1] = radius * Math.sin(angle);
  }
}
