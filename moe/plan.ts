// The routing plan: which row goes where, as plain data. Made alike on every rank from counts that all have, so no rank asks another.
//
// Rows travel so. The sender lays its rows out by destination rank, and within it by the destination's seats, and within a seat by
// token: the *send order*. All-to-all-v brings them to the receiver in *rank-major* order (source rank, then seat, then token).
// Experts want *expert-major* order (seat, then source rank, then token): one contiguous group of rows per expert. Within an
// expert the rows are in the order of the global batch, however many ranks there are.
//
// Shape letters: N tokens of this rank, E experts, K choices per token, R ranks, S rows that this rank sends, M rows that it receives,
// L seats (local experts) of this rank.

import type { PlacementPlan } from "./hooks.ts";
import { holdersOf } from "./placement.ts";

/** What a plan is made of. */
export interface PlanInput {
  /** This rank. */
  readonly rank: number;
  /** R. */
  readonly ranks: number;
  /** E. */
  readonly experts: number;
  /** K. */
  readonly choices: number;
  /** Experts of this rank's tokens [N, K]; −1 where there is none or the choice was dropped. */
  readonly experts_NK: Int32Array;
  /** Rows per (source rank, expert), of all ranks: [R, E]. */
  readonly counts_RE: Int32Array;
  /** Where experts sit and how rows are split over replicas. */
  readonly placement: PlacementPlan;
}

/** What of a plan follows from counts and placement alone; all counts are rows. */
export interface PlanOutline {
  /** Rows to each rank [R]. */
  readonly sendCounts: Int32Array;
  /** Rows from each rank [R]. */
  readonly recvCounts: Int32Array;
  /** First expert-major row of each seat and, last, M: [L + 1]. */
  readonly offsets: Int32Array;
  /** Rows from each (rank, seat): [R, L]. */
  readonly rows_RL: Int32Array;
  /** Rows from each rank to each, [R, R]; alike on all ranks. */
  readonly rows_RR: Int32Array;
  /**
   * Where this rank's choices of each expert lie in the send order, [P, 3]: from its choice `first` on they take the rows from `row` on,
   * (expert, first, row), by expert, then choice; one piece per replica of each expert.
   */
  readonly pieces: Int32Array;
}

/** Where every row goes. All counts are rows. */
export interface RoutingPlan extends PlanOutline {
  /** N. */
  readonly tokens: number;
  /** K. */
  readonly choices: number;
  /** Row of each (token, choice) in the send order [N, K]; −1 where nothing is sent. */
  readonly slots_NK: Int32Array;
  /** Token of each row in the send order [S]. */
  readonly tokens_S: Int32Array;
  /** Expert-major row i is rank-major row `toExpertMajor[i]` [M]; null where both orders are the same. */
  readonly toExpertMajor: Int32Array | null;
  /** Rank-major row i is expert-major row `toRankMajor[i]` [M]; null where both orders are the same. */
  readonly toRankMajor: Int32Array | null;
}

/**
 * Makes the routing plan of one layer and batch.
 *
 * @param input Choices, counts and placement.
 * @returns The plan.
 * @throws {RangeError} If the counts are not those of the choices, or the placement is not valid.
 *
 * @example Two ranks, four experts; rank 1's receiver reorders rank-major rows of counts [2, 3 | 1, 4].
 * ```ts
 * import { makePlan } from "./plan.ts";
 * import { staticPlacement } from "./placement.ts";
 * import assert from "node:assert/strict";
 *
 * const plan = makePlan({
 *   rank: 1,
 *   ranks: 2,
 *   experts: 4,
 *   choices: 1,
 *   experts_NK: new Int32Array([3, 2, 3, 3, 3]),
 *   counts_RE: new Int32Array([0, 0, 2, 3, 0, 0, 1, 4]),
 *   placement: staticPlacement().plan({ layer: 0, experts: 4, ranks: 2, counts: null }),
 * });
 * assert.deepEqual([...plan.tokens_S], [1, 0, 2, 3, 4]);
 * assert.deepEqual([...plan.offsets], [0, 3, 10]);
 * assert.deepEqual([...plan.toExpertMajor!], [0, 1, 5, 2, 3, 4, 6, 7, 8, 9]);
 * ```
 */
export function makePlan(input: PlanInput): RoutingPlan {
  const { rank, ranks, choices, experts_NK, counts_RE, experts } = input;
  const outline = outlinePlan(input);
  const { pieces, rows_RL, offsets } = outline;
  const sent = outline.sendCounts.reduce((a, b) => a + b, 0);

  // Every (token, choice) takes the next row of its expert; where a piece ends, the next one begins.
  const slots_NK = new Int32Array(experts_NK.length).fill(-1);
  const tokens_S = new Int32Array(sent);
  const piece_E = new Int32Array(experts), taken_E = new Int32Array(experts);
  for (let p = pieces.length - 3; p >= 0; p -= 3) piece_E[pieces[p]] = p;
  for (let i = 0; i < experts_NK.length; i++) {
    const e = experts_NK[i];
    if (e < 0) continue;
    const n = taken_E[e]++;
    if (n >= counts_RE[rank * experts + e]) throw miscounted(input);
    let p = piece_E[e];
    while (pieces[p + 3] === e && pieces[p + 4] <= n) p += 3;
    piece_E[e] = p;
    const slot = pieces[p + 2] + n - pieces[p + 1];
    slots_NK[i] = slot;
    tokens_S[slot] = Math.floor(i / choices);
  }
  if (taken_E.reduce((a, b) => a + b, 0) !== sent) throw miscounted(input);

  const toExpertMajor = sameOrder(outline) ? null : expertMajor(rows_RL, ranks, offsets);
  return {
    ...outline,
    tokens: experts_NK.length / choices,
    choices,
    slots_NK,
    tokens_S,
    toExpertMajor,
    toRankMajor: toExpertMajor && invert(toExpertMajor),
  };
}

/**
 * Whether rank-major and expert-major order are the same on this rank: there is one rank, or one seat at most.
 *
 * @param outline The outline.
 * @returns True if no row is reordered.
 */
export function sameOrder({ offsets, sendCounts }: PlanOutline): boolean {
  return sendCounts.length === 1 || offsets.length <= 2;
}

/**
 * What of a routing plan follows from counts and placement: in O(R E), whatever the number of tokens.
 *
 * @param input Counts and placement.
 * @returns The outline.
 * @throws {RangeError} If the placement is not valid.
 */
export function outlinePlan(
  input: Pick<PlanInput, "rank" | "ranks" | "experts" | "counts_RE" | "placement">,
): PlanOutline {
  const { rank, ranks, experts, counts_RE } = input;
  const { seats } = input.placement;
  const holders = holdersOf(seats, experts);
  const rows = new ReplicaRows(input, holders);

  // Sender: the first row of each (expert, replica) in the send order.
  const sendCounts = new Int32Array(ranks);
  const start_E: number[][] = holders.map((ranks) => new Array(ranks.length).fill(0));
  let sent = 0;
  for (let r = 0; r < ranks; r++) {
    const before = sent;
    for (const e of seats[r]) {
      start_E[e][holders[e].indexOf(r)] = sent;
      sent += rows.of(rank, e, r);
    }
    sendCounts[r] = sent - before;
  }
  const pieces: number[] = [];
  for (let e = 0; e < experts; e++) {
    let first = 0;
    holders[e].forEach((holder, i) => {
      pieces.push(e, first, start_E[e][i]);
      first += rows.of(rank, e, holder);
    });
  }

  // Receiver.
  const held = seats[rank], local = held.length;
  const recvCounts = new Int32Array(ranks), offsets = new Int32Array(local + 1);
  const rows_RL = new Int32Array(ranks * local);
  for (let r = 0; r < ranks; r++) {
    for (let l = 0; l < local; l++) {
      const count = rows_RL[r * local + l] = rows.of(r, held[l], rank);
      recvCounts[r] += count;
      offsets[l + 1] += count;
    }
  }
  for (let l = 0; l < local; l++) offsets[l + 1] += offsets[l];
  const rows_RR = new Int32Array(ranks * ranks);
  for (let r = 0; r < ranks; r++) {
    for (let e = 0; e < experts; e++) {
      if (counts_RE[r * experts + e] === 0) continue;
      for (const holder of holders[e]) rows_RR[r * ranks + holder] += rows.of(r, e, holder);
    }
  }
  return {
    sendCounts,
    recvCounts,
    offsets,
    rows_RL,
    rows_RR,
    pieces: Int32Array.from(pieces),
  };
}

/**
 * Rows that each rank computes.
 *
 * @param outlines Outlines of the slices of a batch.
 * @returns Their sums over source ranks and slices [R].
 */
export function rowsPerRank(outlines: readonly Pick<PlanOutline, "rows_RR">[]): Int32Array {
  const ranks = Math.sqrt(outlines[0].rows_RR.length), sums = new Int32Array(ranks);
  for (const { rows_RR } of outlines) rows_RR.forEach((n, i) => sums[i % ranks] += n);
  return sums;
}

/**
 * Copies of each expert where experts sit in the regular way, as `replicatedPlacement` has them: the ranks form groups of neighbours, each
 * group holds every expert once, all ranks hold as many, and rank r of each group holds the same experts in the same order.
 *
 * @param seats Experts of each rank; a valid placement.
 * @param experts E.
 * @returns The number of groups k; 0 where experts sit in any other way.
 *
 * @example
 * ```ts
 * import { regularReplicas } from "./plan.ts";
 * import assert from "node:assert/strict";
 *
 * assert.equal(regularReplicas([[0, 1], [2, 3], [0, 1], [2, 3]], 4), 2);
 * assert.equal(regularReplicas([[0], [1], [2], [3]], 4), 1);
 * assert.equal(regularReplicas([[0, 1, 2], [3], [0, 1, 2], [3]], 4), 0);
 * ```
 */
export function regularReplicas(seats: PlacementPlan["seats"], experts: number): number {
  const perRank = seats[0].length, group = experts / perRank, replicas = seats.length / group;
  if (!Number.isInteger(group) || !Number.isInteger(replicas)) return 0;
  const regular = seats.every((held, rank) =>
    held.length === perRank && held.every((e, seat) => e === seats[rank % group][seat])
  );
  return regular ? replicas : 0;
}

/** Rows per (source, expert, holder): all of the source's rows where there is one holder, else as the placement splits them. */
class ReplicaRows {
  readonly #input: Pick<PlanInput, "experts" | "counts_RE" | "placement">;
  readonly #holders: readonly (readonly number[])[];
  readonly #splits = new Map<number, readonly number[]>();

  constructor(
    input: Pick<PlanInput, "experts" | "counts_RE" | "placement">,
    holders: readonly (readonly number[])[],
  ) {
    this.#input = input;
    this.#holders = holders;
  }

  of(source: number, expert: number, holder: number): number {
    const i = source * this.#input.experts + expert;
    const count = this.#input.counts_RE[i];
    const holders = this.#holders[expert];
    if (holders.length === 1 || count === 0) return count;
    let split = this.#splits.get(i);
    if (!split) {
      split = this.#input.placement.split(source, expert, count);
      const sum = split.reduce((a, b) => a + b, 0);
      if (
        split.length !== holders.length || sum !== count ||
        !split.every((n) => Number.isInteger(n) && n >= 0)
      ) {
        throw new RangeError(
          `Cannot plan as ${count} rows of expert ${expert} must be split over ${holders.length} replicas: current value is [${split}]`,
        );
      }
      this.#splits.set(i, split);
    }
    return split[holders.indexOf(holder)];
  }
}

/** Rank-major row of each expert-major one. */
function expertMajor(rows_RL: Int32Array, ranks: number, offsets: Int32Array): Int32Array {
  const local = offsets.length - 1;
  const order = new Int32Array(offsets[local]);
  const next_L = offsets.slice(0, local);
  let from = 0;
  for (let r = 0; r < ranks; r++) {
    for (let l = 0; l < local; l++) {
      for (let i = rows_RL[r * local + l]; i > 0; i--) order[next_L[l]++] = from++;
    }
  }
  return order;
}

function invert(order: Int32Array): Int32Array {
  const inverse = new Int32Array(order.length);
  for (let i = 0; i < order.length; i++) inverse[order[i]] = i;
  return inverse;
}

function miscounted({ rank, experts, experts_NK, counts_RE }: PlanInput): RangeError {
  const counted = new Int32Array(experts);
  for (const e of experts_NK) if (e >= 0) counted[e]++;
  return new RangeError(
    `Cannot plan on rank ${rank} as its counts must be those of its tokens, [${counted}]: current value is [${
      counts_RE.subarray(rank * experts, (rank + 1) * experts)
    }]`,
  );
}
