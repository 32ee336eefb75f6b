// Choosing the next token from a row of logits: greedy, by temperature, from the smallest set whose probability reaches p. Pure: the
// uniform number is an argument.

/** How to choose. */
export interface SamplingOptions {
  /** Divides the logits; 0 takes the likeliest token. @default {1} */
  readonly temperature?: number;
  /** Keeps the likeliest tokens until their probabilities add up to this. @default {1} */
  readonly topP?: number;
}

/**
 * Chooses a token.
 *
 * @param logits A score per token.
 * @param uniform A number in [0, 1).
 * @param options Temperature and top-p.
 * @returns The token's index; among equal scores of a greedy choice the first.
 * @throws {RangeError} If temperature < 0, p is not in (0, 1], or no score is finite.
 *
 * @example
 * ```ts
 * import { sampleToken } from "./sampling.ts";
 * import assert from "node:assert/strict";
 *
 * assert.equal(sampleToken([1, 3, 2], 0.5, { temperature: 0 }), 1);
 * ```
 */
export function sampleToken(
  logits: ArrayLike<number>,
  uniform: number,
  options: SamplingOptions = {},
): number {
  const { temperature = 1, topP = 1 } = options;
  if (!(temperature >= 0 && Number.isFinite(temperature))) {
    throw new RangeError(
      `Cannot sample as the temperature must be >= 0: current value is ${temperature}`,
    );
  }
  if (!(topP > 0 && topP <= 1)) {
    throw new RangeError(`Cannot sample as top-p must lie in (0, 1]: current value is ${topP}`);
  }
  let best = -1;
  for (let i = 0; i < logits.length; i++) {
    if (Number.isFinite(logits[i]) && (best < 0 || logits[i] > logits[best])) best = i;
  }
  if (best < 0) {
    throw new RangeError("Cannot sample as one score must be finite: current value has none");
  }
  if (temperature === 0) return best;

  const weights = Float64Array.from(
    logits,
    (score) => Number.isFinite(score) ? Math.exp((score - logits[best]) / temperature) : 0,
  );
  const order = Array.from(weights.keys());
  if (topP < 1) order.sort((a, b) => weights[b] - weights[a] || a - b);
  const total = weights.reduce((a, b) => a + b);
  let kept = order.length, mass = total;
  if (topP < 1) {
    for (kept = 0, mass = 0; kept < order.length && mass < topP * total; kept++) {
      mass += weights[order[kept]];
    }
  }
  let left = uniform * mass;
  for (let i = 0; i < kept; i++) {
    left -= weights[order[i]];
    if (left < 0) return order[i];
  }
  return best; // rounding left a trace of probability
}
