// DeepSeek-V3's router: sigmoid scores, a selection bias that balances load without an auxiliary loss, and experts in groups of which a
// token may reach only a few (a group sits on one node, so fewer nodes are talked to). Forward and gradient beside each other.
//
// Shape letters: N tokens of this rank, E experts, K choices per token, G groups of experts.

import { topK } from "./router_softmax.ts";

/** Keeps the sum of scores that weights are divided by off 0. */
const TINY = 1e-20;

/**
 * `scores = 1 / (1 + exp(−logits))`
 *
 * @param logits_NE Logits.
 * @param experts E.
 * @returns Scores [N, E].
 * @throws {RangeError} If a logit is not finite.
 */
export function sigmoidScores(logits_NE: Float64Array, experts: number): Float64Array {
  const scores_NE = new Float64Array(logits_NE.length);
  for (let i = 0; i < logits_NE.length; i++) {
    if (!Number.isFinite(logits_NE[i])) {
      throw new RangeError(
        `Cannot route token ${
          Math.floor(i / experts)
        } as its logits must be finite: current value is ${logits_NE[i]}`,
      );
    }
    scores_NE[i] = 1 / (1 + Math.exp(-logits_NE[i]));
  }
  return scores_NE;
}

/**
 * The K experts with the largest `score + bias` among the groups that a token may reach: the `groupLimit` groups whose two best
 * experts have the largest sum. Of equal ones the lower expert, or group, comes first.
 *
 * @param scores_NE Scores.
 * @param bias_E Selection bias; it is in no weight and has no gradient.
 * @param options E, K, number of groups G (divides E), groups a token may reach.
 * @returns The experts [N, K].
 */
export function groupLimitedTopK(
  scores_NE: Float64Array,
  bias_E: Float64Array,
  options: {
    readonly experts: number;
    readonly choices: number;
    readonly groups: number;
    readonly groupLimit: number;
  },
): Int32Array {
  const { experts, choices, groups, groupLimit } = options;
  const biased_NE = new Float64Array(scores_NE.length);
  for (let i = 0; i < biased_NE.length;) {
    for (let e = 0; e < experts; e++, i++) biased_NE[i] = scores_NE[i] + bias_E[e];
  }
  if (groupLimit < groups) {
    const tokens = scores_NE.length / experts, perGroup = experts / groups;
    const sums_NG = new Float64Array(tokens * groups);
    for (let g = 0; g < sums_NG.length; g++) {
      let first = -Infinity, second = -Infinity;
      for (let i = g * perGroup; i < (g + 1) * perGroup; i++) {
        const value = biased_NE[i];
        if (value > first) {
          second = first;
          first = value;
        } else if (value > second) second = value;
      }
      sums_NG[g] = perGroup > 1 ? first + second : first;
    }
    const reached = topK(sums_NG, groups, groupLimit);
    const open = new Uint8Array(sums_NG.length);
    for (let i = 0; i < reached.length; i++) {
      open[Math.floor(i / groupLimit) * groups + reached[i]] = 1;
    }
    for (let g = 0; g < open.length; g++) {
      if (!open[g]) biased_NE.fill(-Infinity, g * perGroup, (g + 1) * perGroup);
    }
  }
  return topK(biased_NE, experts, choices);
}

/** What {@linkcode sigmoidWeights} and its gradient are given. */
export interface SigmoidChoice {
  /** Chosen experts [N, K]; −1 for none. */
  readonly experts_NK: Int32Array;
  /** E. */
  readonly experts: number;
  /** K. */
  readonly choices: number;
  /** Whether a token's weights are divided by their sum. */
  readonly renormalise: boolean;
  /** Factor of the weights (`routed_scaling_factor`). */
  readonly scale: number;
}

/**
 * Weights of the chosen experts: `w_k = scale · s_k`, or renormalised `w_k = scale · s_k / (Σ_j s_j + 1e-20)`.
 *
 * @param scores_NE Scores s, without the bias.
 * @param choice The chosen experts.
 * @returns Weights [N, K]; 0 where no expert was chosen.
 */
export function sigmoidWeights(scores_NE: Float64Array, choice: SigmoidChoice): Float64Array {
  const { experts_NK, choices } = choice;
  const weights_NK = new Float64Array(experts_NK.length);
  for (let i = 0; i < experts_NK.length; i += choices) {
    const factor = choice.scale / (choice.renormalise ? sumOfChosen(scores_NE, choice, i) : 1);
    for (let j = i; j < i + choices; j++) {
      const e = experts_NK[j];
      if (e >= 0) weights_NK[j] = factor * scores_NE[i / choices * choice.experts + e];
    }
  }
  return weights_NK;
}

/**
 * Gradient of {@linkcode sigmoidWeights}: `ds_k = scale/S · (dw_k − Σ_j dw_j s_j / S)` with S the sum of the chosen scores, or
 * `ds_k = scale · dw_k`; then `dl = ds · s (1 − s)`.
 *
 * @param dWeights_NK Gradient of the weights.
 * @param scores_NE The scores.
 * @param choice The chosen experts.
 * @param dLogits_NE Where the logits' gradient is added.
 */
export function sigmoidWeightsBackward(
  dWeights_NK: Float64Array,
  scores_NE: Float64Array,
  choice: SigmoidChoice,
  dLogits_NE: Float64Array,
): void {
  const { experts_NK, experts, choices, scale } = choice;
  for (let i = 0; i < experts_NK.length; i += choices) {
    const row = i / choices * experts;
    const sum = choice.renormalise ? sumOfChosen(scores_NE, choice, i) : 1;
    let dot = 0;
    if (choice.renormalise) {
      for (let j = i; j < i + choices; j++) {
        const e = experts_NK[j];
        if (e >= 0) dot += dWeights_NK[j] * scores_NE[row + e];
      }
    }
    for (let j = i; j < i + choices; j++) {
      const e = experts_NK[j];
      if (e < 0) continue;
      const s = scores_NE[row + e];
      dLogits_NE[row + e] += scale / sum * (dWeights_NK[j] - dot / sum) * s * (1 - s);
    }
  }
}

function sumOfChosen(scores_NE: Float64Array, choice: SigmoidChoice, at: number): number {
  const row = at / choice.choices * choice.experts;
  let sum = TINY;
  for (let j = at; j < at + choice.choices; j++) {
    const e = choice.experts_NK[j];
    if (e >= 0) sum += scores_NE[row + e];
  }
  return sum;
}

/**
 * Moves the selection bias against the load of the global batch: `bias_e += rate · sign(mean − count_e)`.
 *
 * @param bias_E The bias, changed in place.
 * @param counts_E Choices per expert in the global batch, since the last update.
 * @param rate Step γ.
 */
export function updateBias(bias_E: Float64Array, counts_E: Float64Array, rate: number): void {
  let sum = 0;
  for (let e = 0; e < counts_E.length; e++) sum += counts_E[e];
  const mean = sum / counts_E.length;
  for (let e = 0; e < bias_E.length; e++) bias_E[e] += rate * Math.sign(mean - counts_E[e]);
}
