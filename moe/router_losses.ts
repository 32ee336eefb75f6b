// The two losses of a router, over the global batch, each beside its gradient:
//   balance (Switch, GShard):  aux · E · Σ_e f_e P_e,  f_e = share of the choices that fell on expert e, P_e = mean score of e;
//   z (ST-MoE):                z · mean_n lse(logits_n)².
// Perfect balance makes the first `aux`. f and P are those of all ranks' tokens, so neither loss depends on how many ranks there are.
// f counts choices before any is dropped and has no gradient.
//
// Shape letters: N tokens of this rank, E experts.

/** Sums over tokens that the losses are made of; sums of ranks are added. */
export interface RouterSums {
  /** Choices per expert that f is made of. */
  readonly choices_E: Float64Array;
  /** Sum of normalised scores per expert. */
  readonly scores_E: Float64Array;
  /** Sum of squared log-sum-exps. */
  readonly squaredLse: number;
  /** Number of tokens. */
  readonly tokens: number;
}

/** Coefficients of the losses. */
export interface LossCoefficients {
  /** Of the balance loss. */
  readonly auxLoss: number;
  /** Of the z loss. */
  readonly zLoss: number;
}

/**
 * The losses of the global batch.
 *
 * @param sums Sums over the global batch.
 * @param coefficients Their coefficients.
 * @returns The balance and z losses, coefficients applied; 0 for an empty batch.
 */
export function routerLosses(
  sums: RouterSums,
  coefficients: LossCoefficients,
): { readonly aux: number; readonly z: number } {
  if (sums.tokens === 0) return { aux: 0, z: 0 };
  const slope_E = balanceSlope(sums, coefficients.auxLoss);
  let aux = 0;
  for (let e = 0; e < slope_E.length; e++) aux += slope_E[e] * sums.scores_E[e];
  return { aux, z: coefficients.zLoss * sums.squaredLse / sums.tokens };
}

/**
 * Gradient of the balance loss with respect to one token's normalised score of each expert: `aux · E · f_e / tokens`, alike for
 * every token.
 *
 * @param sums Sums over the global batch.
 * @param auxLoss The coefficient.
 * @returns One number per expert.
 */
export function balanceSlope(sums: RouterSums, auxLoss: number): Float64Array {
  const experts = sums.choices_E.length;
  let choices = 0;
  for (let e = 0; e < experts; e++) choices += sums.choices_E[e];
  const factor = choices > 0 ? auxLoss * experts / (choices * sums.tokens) : 0;
  return sums.choices_E.map((count) => factor * count);
}

/**
 * Adds up one rank's normalised scores per expert: softmax scores as they are, sigmoid scores as `s_ne / Σ_j s_nj`.
 *
 * @param scores_NE Scores.
 * @param experts E.
 * @param kind How scores were made of logits.
 * @returns Sum over tokens, per expert.
 */
export function sumNormalisedScores(
  scores_NE: Float64Array,
  experts: number,
  kind: "softmax" | "sigmoid",
): Float64Array {
  const sums_E = new Float64Array(experts);
  for (let row = 0; row < scores_NE.length; row += experts) {
    const factor = kind === "softmax" ? 1 : 1 / sumOfRow(scores_NE, row, experts);
    for (let e = 0; e < experts; e++) sums_E[e] += factor * scores_NE[row + e];
  }
  return sums_E;
}

/**
 * Gradient of the balance loss. For softmax scores p: `dl_e = p_e (c_e − Σ_j c_j p_j)`, with the slope c. For sigmoid scores s with
 * row sum S and P = s/S: `ds_e = (c_e − Σ_j c_j P_j) / S` and `dl = ds · s (1 − s)`.
 *
 * @param scores_NE Scores.
 * @param slope_E The slope c of {@linkcode balanceSlope}.
 * @param kind How scores were made of logits.
 * @param dLogits_NE Where the logits' gradient is added.
 */
export function balanceLossBackward(
  scores_NE: Float64Array,
  slope_E: Float64Array,
  kind: "softmax" | "sigmoid",
  dLogits_NE: Float64Array,
): void {
  const experts = slope_E.length;
  for (let row = 0; row < scores_NE.length; row += experts) {
    const factor = kind === "softmax" ? 1 : 1 / sumOfRow(scores_NE, row, experts);
    let mean = 0;
    for (let e = 0; e < experts; e++) mean += factor * slope_E[e] * scores_NE[row + e];
    for (let e = 0; e < experts; e++) {
      const s = scores_NE[row + e];
      const slope = kind === "softmax" ? s : s * (1 - s);
      dLogits_NE[row + e] += factor * slope * (slope_E[e] - mean);
    }
  }
}

/**
 * Gradient of the z loss: `dl_e = factor · 2 · lse · softmax(logits)_e` with factor = coefficient / tokens of the global batch.
 *
 * @param logits_NE Logits.
 * @param lse_N Their log-sum-exps.
 * @param factor The factor.
 * @param dLogits_NE Where the logits' gradient is added.
 */
export function zLossBackward(
  logits_NE: Float64Array,
  lse_N: Float64Array,
  factor: number,
  dLogits_NE: Float64Array,
): void {
  const experts = logits_NE.length / lse_N.length;
  for (let n = 0, i = 0; n < lse_N.length; n++) {
    const lse = lse_N[n];
    for (let e = 0; e < experts; e++, i++) {
      dLogits_NE[i] += factor * 2 * lse * Math.exp(logits_NE[i] - lse);
    }
  }
}

/** Sum of a row's sigmoid scores, off 0 where all of them underflow. */
function sumOfRow(values: Float64Array, row: number, length: number): number {
  let sum = 1e-20;
  for (let i = row; i < row + length; i++) sum += values[i];
  return sum;
}
