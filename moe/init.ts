// First values of parameters: numbers drawn from a generator that is seeded by the run's seed and the parameter's name. So a
// parameter begins alike on every rank, whichever rank holds it and however many ranks there are. Not for cryptography.

import type { DType } from "../tensor/dtype.ts";
import type { RandomKey } from "../tensor/random.ts";

/** Uniform numbers in [0, 1), the same for the same seed everywhere. */
export type Random = () => number;

/**
 * A generator of uniform numbers (sfc32, 128 bits of state).
 *
 * @param seed A whole number.
 * @param name What the numbers are for; other names give independent numbers.
 * @returns The generator.
 *
 * @example
 * ```ts
 * import { random } from "./init.ts";
 * import assert from "node:assert/strict";
 *
 * assert.equal(random(1, "a")(), random(1, "a")());
 * assert.notEqual(random(1, "a")(), random(1, "b")());
 * ```
 */
export function random(seed: number, name: string = ""): Random {
  let a = 0x9e3779b9 ^ (seed | 0), b = Math.floor(seed / 2 ** 32) | 0, c = 0x243f6a88, d = 1;
  const next = () => {
    const t = (a + b | 0) + d | 0;
    d = d + 1 | 0;
    a = b ^ (b >>> 9);
    b = c + (c << 3) | 0;
    c = (c << 21) | (c >>> 11);
    c = c + t | 0;
    return t >>> 0;
  };
  next(); // spreads the seed before the name's bits meet it: else seed 1 of "b" would be seed 2 of "a"
  next();
  for (let i = 0; i < name.length; i++) {
    a = Math.imul(a ^ name.charCodeAt(i), 0x01000193) + i | 0;
    next();
  }
  for (let i = 0; i < 12; i++) next();
  return () => next() / 4294967296;
}

/**
 * Normal numbers of mean 0 (Box and Muller).
 *
 * @param next Where uniform numbers come from.
 * @param size How many.
 * @param options Standard deviation, and the type of the array. @default {{std: 1, dtype: "f32"}}
 * @returns The numbers.
 */
export function normal(
  next: Random,
  size: number,
  options: { readonly std?: number; readonly dtype?: DType } = {},
): Float32Array | Float64Array {
  const std = options.std ?? 1;
  const out = options.dtype === "f64" ? new Float64Array(size) : new Float32Array(size);
  for (let i = 0; i < size; i += 2) {
    const radius = std * Math.sqrt(-2 * Math.log(1 - next()));
    const angle = 2 * Math.PI * next();
    out[i] = radius * Math.cos(angle);
    if (i + 1 < size) out[i + 1] = radius * Math.sin(angle);
  }
  return out;
}

/**
 * The key of a parameter's first values; numbers are drawn by `Kernels.normal`, on the device that holds the parameter.
 *
 * @param seed The run's seed.
 * @param name The parameter's name.
 * @returns The key.
 */
export function normalKey(seed: number, name: string): RandomKey {
  const next = random(seed, name);
  return [Math.floor(next() * 2 ** 32), Math.floor(next() * 2 ** 32)];
}
