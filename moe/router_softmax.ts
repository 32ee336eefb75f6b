// Softmax routers: Switch's top-1, GShard's top-2, Mixtral's top-k. Each forward function has its gradient below it. Pure functions
// on host arrays; capacity, losses and communication are elsewhere (router_capacity.ts, router_losses.ts, router_exchange.ts).
//
// Shape letters: N tokens of this rank, E experts, K choices per token.

import { gumbel, type NoiseSource } from "./router_noise.ts";

/** How GShard's second expert is chosen: the next best; drawn from the softmax of the rest; or the next best, kept with probability 2 · weight. */
export type SecondExpert = "greedy" | "sample" | "random";

/**
 * `scores = softmax(logits)` row by row.
 *
 * @param logits_NE Logits.
 * @param experts E.
 * @returns Scores, and the logarithm of each row's sum of exponentials.
 * @throws {RangeError} If a logit is not finite.
 */
export function softmaxScores(
  logits_NE: Float64Array,
  experts: number,
): { readonly scores_NE: Float64Array; readonly lse_N: Float64Array } {
  const tokens = logits_NE.length / experts;
  const scores_NE = new Float64Array(logits_NE.length), lse_N = new Float64Array(tokens);
  for (let n = 0; n < tokens; n++) {
    const row = n * experts;
    let max = -Infinity, sum = 0;
    for (let e = 0; e < experts; e++) if (logits_NE[row + e] > max) max = logits_NE[row + e];
    for (let e = 0; e < experts; e++) {
      sum += scores_NE[row + e] = Math.exp(logits_NE[row + e] - max);
    }
    lse_N[n] = max + Math.log(sum);
    if (!Number.isFinite(lse_N[n])) {
      throw new RangeError(
        `Cannot route token ${n} as its logits must be finite: current value is ${
          logits_NE.slice(row, row + experts)
        }`,
      );
    }
    const factor = 1 / sum;
    for (let e = 0; e < experts; e++) scores_NE[row + e] *= factor;
  }
  return { scores_NE, lse_N };
}

/**
 * The K largest of each row, in descending order; of equal ones the lower expert first.
 *
 * @param values_NE What is compared.
 * @param experts E.
 * @param choices K ≤ E.
 * @returns The experts [N, K].
 */
export function topK(values_NE: Float64Array, experts: number, choices: number): Int32Array {
  const tokens = values_NE.length / experts;
  const experts_NK = new Int32Array(tokens * choices);
  const best_K = new Float64Array(choices);
  for (let n = 0, i = 0; n < tokens; n++) {
    // The best so far, in order; a later one must be larger to pass an earlier one.
    const first = n * choices;
    for (let e = 0; e < experts; e++, i++) {
      const value = values_NE[i];
      if (e >= choices && value <= best_K[choices - 1]) continue;
      let k = e < choices ? e : choices - 1;
      for (; k > 0 && value > best_K[k - 1]; k--) {
        best_K[k] = best_K[k - 1];
        experts_NK[first + k] = experts_NK[first + k - 1];
      }
      best_K[k] = value;
      experts_NK[first + k] = e;
    }
  }
  return experts_NK;
}

/**
 * GShard's two experts: the best, and a second as `second` says.
 *
 * @param logits_NE Logits.
 * @param experts E ≥ 2.
 * @param second How the second is chosen.
 * @param uniform Random numbers; without them (no training) the second is the next best.
 * @returns The experts [N, 2]; {@linkcode keepSeconds} says which seconds are kept, once they have been weighed.
 */
export function topTwo(
  logits_NE: Float64Array,
  experts: number,
  second: SecondExpert,
  uniform: NoiseSource | null,
): Int32Array {
  const experts_N2 = topK(logits_NE, experts, 2);
  if (uniform === null || second !== "sample") return experts_N2;
  for (let n = 0; n < experts_N2.length / 2; n++) {
    const row = n * experts, first = experts_N2[2 * n];
    let best = -1, most = -Infinity;
    for (let e = 0; e < experts; e++) {
      const value = logits_NE[row + e] + gumbel(uniform(n, e));
      if (e !== first && value > most) {
        best = e;
        most = value;
      }
    }
    experts_N2[2 * n + 1] = best;
  }
  return experts_N2;
}

/**
 * GShard's random rule: a second expert is kept with probability 2 · weight. The first keeps the weight that it had beside the second.
 *
 * @param experts_N2 Chosen experts; −1 for none.
 * @param weights_N2 Their weights.
 * @param uniform Random numbers.
 * @returns The experts with −1 for a second that was not kept.
 */
export function keepSeconds(
  experts_N2: Int32Array,
  weights_N2: Float64Array,
  uniform: NoiseSource,
): Int32Array {
  const kept_N2 = experts_N2.slice();
  for (let n = 0; n < kept_N2.length / 2; n++) {
    if (uniform(n, 0) >= 2 * weights_N2[2 * n + 1]) kept_N2[2 * n + 1] = -1;
  }
  return kept_N2;
}

/** What {@linkcode softmaxWeights} and its gradient are given. */
export interface SoftmaxChoice {
  /** Chosen experts [N, K]; −1 for none. */
  readonly experts_NK: Int32Array;
  /** E. */
  readonly experts: number;
  /** K. */
  readonly choices: number;
  /** Whether the weights of a token's chosen experts sum to 1. */
  readonly renormalise: boolean;
}

/**
 * Weights of the chosen experts: `w_k = p_k`, or renormalised `w_k = p_k / Σ_j p_j`, which is the softmax of the chosen logits
 * alone and is computed so, because it cannot underflow.
 *
 * @param logits_NE Logits.
 * @param scores_NE Their softmax p.
 * @param choice The chosen experts.
 * @returns Weights [N, K]; 0 where no expert was chosen.
 */
export function softmaxWeights(
  logits_NE: Float64Array,
  scores_NE: Float64Array,
  choice: SoftmaxChoice,
): Float64Array {
  const { experts_NK, experts, choices } = choice;
  const weights_NK = new Float64Array(experts_NK.length);
  for (let i = 0; i < experts_NK.length; i += choices) {
    const row = i / choices * experts;
    let max = -Infinity, sum = 0;
    for (let j = i; j < i + choices; j++) {
      const e = experts_NK[j];
      if (e < 0) continue;
      weights_NK[j] = scores_NE[row + e];
      max = Math.max(max, logits_NE[row + e]);
    }
    if (!choice.renormalise) continue;
    for (let j = i; j < i + choices; j++) {
      const e = experts_NK[j];
      if (e >= 0) sum += weights_NK[j] = Math.exp(logits_NE[row + e] - max);
    }
    for (let j = i; j < i + choices; j++) if (experts_NK[j] >= 0) weights_NK[j] /= sum;
  }
  return weights_NK;
}

/**
 * Gradient of {@linkcode softmaxWeights}. Renormalised: `dl_k = w_k (dw_k − Σ_j dw_j w_j)`; else
 * `dl_e = p_e ([e chosen] dw_e − Σ_j dw_j p_j)`.
 *
 * @param dWeights_NK Gradient of the weights; not read where no expert was chosen.
 * @param weights_NK The weights.
 * @param scores_NE The scores.
 * @param choice The chosen experts.
 * @param dLogits_NE Where the logits' gradient is added.
 */
export function softmaxWeightsBackward(
  dWeights_NK: Float64Array,
  weights_NK: Float64Array,
  scores_NE: Float64Array,
  choice: SoftmaxChoice,
  dLogits_NE: Float64Array,
): void {
  const { experts_NK, experts, choices } = choice;
  for (let i = 0; i < experts_NK.length; i += choices) {
    const row = i / choices * experts;
    let dot = 0;
    for (let j = i; j < i + choices; j++) {
      if (experts_NK[j] >= 0) dot += dWeights_NK[j] * weights_NK[j];
    }
    for (let j = i; j < i + choices; j++) {
      const e = experts_NK[j];
      if (e < 0) continue;
      dLogits_NE[row + e] += weights_NK[j] * (dWeights_NK[j] - (choice.renormalise ? dot : 0));
    }
    if (choice.renormalise) continue;
    for (let e = 0; e < experts; e++) dLogits_NE[row + e] -= scores_NE[row + e] * dot;
  }
}
