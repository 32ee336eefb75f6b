// Noise on a router's logits: numbers that depend only on (seed, step, layer, global token, expert), never on how many ranks there
// are or in which order tokens are visited. A counter-based generator: every number is a hash of its place. Not for cryptography.
//
// Shape letters: N tokens of this rank, E experts.

/** What noise is drawn from. */
export interface NoiseKey {
  /** The run's seed. */
  readonly seed: number;
  /** Number of the step. */
  readonly step: number;
  /** Layer. */
  readonly layer: number;
  /** Number of this rank's first token in the global batch. */
  readonly firstToken: number;
}

/** Uniform numbers in (0, 1) by place. */
export type NoiseSource = (token: number, expert: number) => number;

/**
 * The noise of one layer in one step.
 *
 * @param key What it is drawn from.
 * @param stream Which of several independent noises. @default {0}
 * @returns A function of (token of this rank, expert).
 *
 * @example
 * ```ts
 * import { noiseSource } from "./router_noise.ts";
 * import assert from "node:assert/strict";
 *
 * const all = noiseSource({ seed: 1, step: 2, layer: 3, firstToken: 0 });
 * const second = noiseSource({ seed: 1, step: 2, layer: 3, firstToken: 100 });
 * assert.equal(second(7, 4), all(107, 4));
 * ```
 */
export function noiseSource(key: NoiseKey, stream: number = 0): NoiseSource {
  let base = mix(key.seed ^ 0x9e3779b9);
  base = mix(base + Math.floor(key.seed / 2 ** 32));
  base = mix(base + key.step);
  base = mix(base + key.layer);
  base = mix(base + stream);
  const salt = mix(base ^ 0x85ebca6b);
  const { firstToken } = key;
  return (token, expert) => {
    const row = mix(base ^ (firstToken + token));
    const high = mix(row + Math.imul(expert + 1, 0x9e3779b1)), low = mix(high ^ salt);
    // 53 bits, moved off 0 so that its logarithm is finite.
    return ((high >>> 0) * 2097152 + (low >>> 11) + 0.5) / 2 ** 53;
  };
}

/** A bijection of 32 bits whose every output bit depends on every input bit (the finaliser of MurmurHash3). */
function mix(x: number): number {
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
  return x ^ (x >>> 16);
}

/**
 * Multiplies logits by uniform numbers in [1 − jitter, 1 + jitter]. Being a product with constants, it is its own gradient:
 * call it again on `dLogits` with the same key.
 *
 * @param x_NE Logits or their gradient, changed in place.
 * @param options Experts E, half the width of the interval, where the numbers come from.
 */
export function jitter(
  x_NE: Float64Array,
  options: { readonly experts: number; readonly jitter: number; readonly key: NoiseKey },
): void {
  const { experts } = options;
  const uniform = noiseSource(options.key, 1);
  for (let i = 0, n = 0; i < x_NE.length; n++) {
    for (let e = 0; e < experts; e++, i++) x_NE[i] *= 1 + options.jitter * (2 * uniform(n, e) - 1);
  }
}

/**
 * Adds normal numbers of mean 0 to logits (Shazeer et al. 2017, without the learned width). The gradient is unchanged.
 *
 * @param logits_NE Logits, changed in place.
 * @param options Experts E, standard deviation, where the numbers come from.
 */
export function addGaussian(
  logits_NE: Float64Array,
  options: { readonly experts: number; readonly std: number; readonly key: NoiseKey },
): void {
  const { experts, std } = options;
  const radius = noiseSource(options.key, 2), angle = noiseSource(options.key, 3);
  for (let i = 0, n = 0; i < logits_NE.length; n++) {
    for (let e = 0; e < experts; e++, i++) {
      logits_NE[i] += std * Math.sqrt(-2 * Math.log(radius(n, e))) *
        Math.cos(2 * Math.PI * angle(n, e));
    }
  }
}

/**
 * A Gumbel number from a uniform one: the largest of logit + Gumbel is a draw from the logits' softmax.
 *
 * @param uniform A number in (0, 1).
 * @returns −log(−log(uniform)).
 */
export function gumbel(uniform: number): number {
  return -Math.log(-Math.log(uniform));
}
