// Capacity: the most rows that an expert takes from the global batch, and which choices are dropped beyond it. Both rules look at the
// batch of all ranks, so what is dropped does not depend on how many ranks there are.
//   position:    first choices before second ones, and so on; within a choice, tokens in the order of the global batch.
//   probability: larger scores first; of equal ones the token that comes first in the global batch.
// A dropped choice adds nothing to the token's output and gets no gradient; the weights of the token's other experts stay as they are.
//
// Shape letters: N tokens of this rank, E experts, K choices per token, R ranks.

/**
 * Rows that an expert takes: `⌈factor · tokens · K / E⌉`, at least 1.
 *
 * @param factor Capacity factor; 1 suffices exactly when load is balanced.
 * @param size Tokens of the global batch, choices K, experts E.
 * @returns The capacity.
 */
export function capacityOf(
  factor: number,
  size: { readonly tokens: number; readonly choices: number; readonly experts: number },
): number {
  // A product such as 1.1 · 10 is a little more than 11: the last bits must not make a row.
  return Math.max(1, Math.ceil(factor * size.tokens * size.choices / size.experts - 1e-9));
}

/**
 * Choices kept by position.
 *
 * @param counts_RKE Choices per (rank, place of the choice, expert), of all ranks.
 * @param size R, K, E.
 * @param capacity Rows that an expert takes.
 * @returns Choices kept, [R, K, E].
 */
export function keptByPosition(
  counts_RKE: Int32Array,
  size: { readonly ranks: number; readonly choices: number; readonly experts: number },
  capacity: number,
): Int32Array {
  const { ranks, choices, experts } = size;
  const kept_RKE = new Int32Array(counts_RKE.length);
  const room_E = new Float64Array(experts).fill(capacity);
  for (let k = 0; k < choices; k++) {
    for (let r = 0; r < ranks; r++) {
      for (let e = 0; e < experts; e++) {
        const i = (r * choices + k) * experts + e;
        kept_RKE[i] = Math.min(counts_RKE[i], room_E[e]);
        room_E[e] -= kept_RKE[i];
      }
    }
  }
  return kept_RKE;
}

/**
 * Drops this rank's choices by position.
 *
 * @param experts_NK Chosen experts; −1 for none.
 * @param kept_KE How many of this rank's choices are kept, per (place, expert).
 * @param experts E.
 * @returns The experts with −1 where a choice was dropped.
 */
export function dropByPosition(
  experts_NK: Int32Array,
  kept_KE: Int32Array,
  experts: number,
): Int32Array {
  const choices = kept_KE.length / experts;
  const left_KE = kept_KE.slice();
  const out_NK = new Int32Array(experts_NK.length).fill(-1);
  for (let i = 0; i < experts_NK.length; i++) {
    const e = experts_NK[i];
    if (e >= 0 && left_KE[i % choices * experts + e]-- > 0) out_NK[i] = e;
  }
  return out_NK;
}

/**
 * Scores of this rank's choices of the experts that are over capacity, by expert, then in order of the tokens: what ranks must show
 * each other to drop by probability.
 *
 * @param experts_NK Chosen experts; −1 for none.
 * @param scores_NE Scores.
 * @param over Experts over capacity, ascending.
 * @param size K and E.
 * @returns The scores.
 */
export function scoresOverCapacity(
  experts_NK: Int32Array,
  scores_NE: Float64Array,
  over: readonly number[],
  size: { readonly choices: number; readonly experts: number },
): Float64Array {
  const { choices, experts } = size;
  const start_E = new Int32Array(experts).fill(-1);
  const count_E = new Int32Array(experts);
  for (const e of experts_NK) if (e >= 0) count_E[e]++;
  let total = 0;
  for (const e of over) {
    start_E[e] = total;
    total += count_E[e];
  }
  const scores = new Float64Array(total);
  for (let i = 0; i < experts_NK.length; i++) {
    const e = experts_NK[i];
    if (e >= 0 && start_E[e] >= 0) {
      scores[start_E[e]++] = scores_NE[Math.floor(i / choices) * experts + e];
    }
  }
  return scores;
}

/** What {@linkcode dropByProbability} gives. */
export interface ProbabilityDrop {
  /** This rank's experts with −1 where a choice was dropped. */
  readonly experts_NK: Int32Array;
  /** Choices kept per (rank, expert). */
  readonly kept_RE: Int32Array;
}

/**
 * Drops choices by probability.
 *
 * @param experts_NK This rank's chosen experts; −1 for none.
 * @param counts_RE Choices per (rank, expert).
 * @param gathered What {@linkcode scoresOverCapacity} gave on each rank, one after another.
 * @param options E, this rank, the capacity, and the experts over it in ascending order.
 * @returns What is kept.
 */
export function dropByProbability(
  experts_NK: Int32Array,
  counts_RE: Int32Array,
  gathered: Float64Array,
  options: {
    readonly experts: number;
    readonly rank: number;
    readonly capacity: number;
    readonly over: readonly number[];
  },
): ProbabilityDrop {
  const { experts, rank, capacity, over } = options;
  const ranks = counts_RE.length / experts;
  const kept_RE = counts_RE.slice();
  // Where the scores of each rank for the present expert begin.
  const at_R = new Int32Array(ranks);
  for (let r = 1; r < ranks; r++) {
    at_R[r] = at_R[r - 1];
    for (const e of over) at_R[r] += counts_RE[(r - 1) * experts + e];
  }
  const keep: (Uint8Array | undefined)[] = new Array(experts);
  for (const e of over) {
    let total = 0;
    for (let r = 0; r < ranks; r++) total += counts_RE[r * experts + e];
    const scores = new Float64Array(total), source = new Int32Array(total);
    for (let r = 0, i = 0; r < ranks; r++) {
      const count = counts_RE[r * experts + e];
      scores.set(gathered.subarray(at_R[r], at_R[r] + count), i);
      source.fill(r, i, i + count);
      i += count;
      at_R[r] += count;
    }
    const order = new Uint32Array(total);
    for (let i = 0; i < total; i++) order[i] = i;
    order.sort((a, b) => scores[b] - scores[a] || a - b);
    const first = source.indexOf(rank); // this rank's rows lie together
    const mine = keep[e] = new Uint8Array(counts_RE[rank * experts + e]);
    for (let r = 0; r < ranks; r++) kept_RE[r * experts + e] = 0;
    for (let i = 0; i < Math.min(capacity, total); i++) {
      const r = source[order[i]];
      kept_RE[r * experts + e]++;
      if (r === rank) mine[order[i] - first] = 1;
    }
  }
  const next_E = new Int32Array(experts);
  const out_NK = new Int32Array(experts_NK.length);
  for (let i = 0; i < experts_NK.length; i++) {
    const e = experts_NK[i];
    out_NK[i] = e >= 0 && keep[e]?.[next_E[e]++] === 0 ? -1 : e;
  }
  return { experts_NK: out_NK, kept_RE };
}
