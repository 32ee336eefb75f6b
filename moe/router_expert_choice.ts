// Expert choice (Zhou et al. 2022): every expert takes the tokens of the global batch that score highest with it, so load is balanced
// by construction and a token gets as many experts as want it. A token's experts depend on other tokens, later ones too: fit for
// encoders, not for causal text generation.
//
// Shape letters: N tokens of this rank, T tokens of the global batch, E experts, K choices per token (here: the most that any of
// this rank's tokens has).

/** What the experts have chosen. */
export interface ExpertChoices {
  /** K: the most experts that a token of this rank has, at least 1. */
  readonly choices: number;
  /** Experts of this rank's tokens [N, K], in ascending order; −1 for none. */
  readonly experts_NK: Int32Array;
}

/**
 * Every expert takes its `capacity` best tokens; of equal scores the token that comes first in the global batch.
 *
 * @param scores_TE Softmax scores of the global batch, ranks one after another.
 * @param options E, tokens that an expert takes, and which tokens are this rank's.
 * @returns This rank's part of the choices. The rows of one expert over all ranks are min(capacity, T).
 */
export function chooseByExpert(
  scores_TE: Float64Array,
  options: {
    readonly experts: number;
    readonly capacity: number;
    readonly firstToken: number;
    readonly tokens: number;
  },
): ExpertChoices {
  const { experts, firstToken, tokens } = options;
  const all = scores_TE.length / experts;
  const taken_N = new Int32Array(tokens);
  const taken_NE = new Uint8Array(tokens * experts);
  const order_T = new Uint32Array(all);
  for (let e = 0; e < experts; e++) {
    for (let t = 0; t < all; t++) order_T[t] = t;
    order_T.sort((a, b) => scores_TE[b * experts + e] - scores_TE[a * experts + e] || a - b);
    for (let i = 0; i < Math.min(options.capacity, all); i++) {
      const n = order_T[i] - firstToken;
      if (n < 0 || n >= tokens) continue;
      taken_N[n]++;
      taken_NE[n * experts + e] = 1;
    }
  }
  let choices = 1;
  for (let n = 0; n < tokens; n++) choices = Math.max(choices, taken_N[n]);
  const experts_NK = new Int32Array(tokens * choices).fill(-1);
  for (let n = 0; n < tokens; n++) {
    let at = n * choices;
    for (let e = 0; e < experts; e++) if (taken_NE[n * experts + e]) experts_NK[at++] = e;
  }
  return { choices, experts_NK };
}
