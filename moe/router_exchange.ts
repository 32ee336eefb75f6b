// Routes the tokens of a rank as part of the global batch: what the pure functions of the router need from other ranks is fetched here,
// by collectives that every rank calls in the same order, with or without tokens:
//   1. allGather of the token counts, if noise, expert choice or a replay asks for global token numbers;
//   2. allGatherV of the scores, for expert choice;
//   3. allGather of one record of sums: choices per expert, scores per expert, tokens, for counts, capacity and losses;
//   4. allGatherV of scores of experts over capacity, when there are any and drops go by probability.
// All numbers are f64 and are added in rank order, so every rank computes the same plan from the same bits.
//
// A rank whose tokens travel in slices shows its choices slice by slice. Capacity is that of the whole batch: where it drops, a slice counts
// as a rank of its own, whose tokens come behind those of the slice before.
//
// Shape letters: N tokens of this rank, E experts, K choices per token, R ranks, C slices, V = R C slices of all ranks, P places: K if drops go by
// position, else 1.

import type { Communicator } from "../collectives/types.ts";
import {
  chooseExperts,
  keptExperts,
  type Router,
  type Routing,
  scoreExperts,
  type Scores,
  weighExperts,
} from "./router.ts";
import {
  capacityOf,
  dropByPosition,
  dropByProbability,
  keptByPosition,
  scoresOverCapacity,
} from "./router_capacity.ts";
import { chooseByExpert, type ExpertChoices } from "./router_expert_choice.ts";
import { routerLosses, type RouterSums, sumNormalisedScores } from "./router_losses.ts";
import { sliceBounds } from "./slices.ts";

/** What {@linkcode routeGlobally} works with; all but the bias's memory is alike on all ranks. */
export interface RoutingContext {
  /** The ranks whose tokens make the global batch. */
  readonly comm: Communicator;
  /** The router. */
  readonly router: Router;
  /** Selection bias of a sigmoid router. */
  readonly bias_E: Float64Array;
  /** Whether there is noise, and experts have a capacity. */
  readonly training: boolean;
  /** What noise is seeded by. */
  readonly seeds: { readonly seed: number; readonly step: number; readonly layer: number };
  /** Experts that take the place of the router's choice, or null. */
  readonly replay: ((firstToken: number, tokens: number) => ExpertChoices) | null;
  /** C: slices that each rank's tokens travel in. @default {1} */
  readonly slices?: number;
}

/** How the tokens of this rank are routed, and what is known of the global batch. */
export interface GlobalRouting {
  /** This rank's routing before drops, all of whose choices were weighed. */
  readonly routing: Routing;
  /** This rank's experts [N, K] with −1 where a choice was not kept or dropped. */
  readonly kept_NK: Int32Array;
  /** Rows per (rank, expert) of each slice, after drops: C of [R, E]. */
  readonly counts_CRE: readonly Int32Array[];
  /** Choices per expert of the global batch that the router has kept, before drops for want of capacity. */
  readonly chosen_E: Float64Array;
  /** Choices of the global batch that were dropped. */
  readonly dropped: number;
  /** Sums over the global batch that the losses are made of. */
  readonly sums: RouterSums;
  /** Balance and z loss of the global batch, coefficients applied. */
  readonly losses: { readonly aux: number; readonly z: number };
}

/**
 * Routes this rank's tokens. All ranks call it together.
 *
 * @param context Router and ranks.
 * @param logits_NE This rank's logits; noise is added in place.
 * @returns The routing.
 * @throws {RangeError} If a logit is not finite.
 */
export async function routeGlobally(
  context: RoutingContext,
  logits_NE: Float64Array,
): Promise<GlobalRouting> {
  const { comm, router, slices = 1 } = context;
  const { experts } = router;
  const tokens = logits_NE.length / experts;
  const tokens_R = needsTokenNumbers(context) ? await gatherTokens(comm, tokens) : null;
  let firstToken = 0;
  for (let r = 0; tokens_R && r < comm.rank; r++) firstToken += tokens_R[r];
  const noise = context.training ? { ...context.seeds, firstToken } : null;
  const scores = scoreExperts(router, logits_NE, noise);
  const choice = context.replay
    ? checkReplay(context.replay(firstToken, tokens), tokens, experts)
    : router.kind === "expertChoice"
    ? await chooseTogether(context, scores, tokens_R!, firstToken)
    : chooseExperts(router, scores, context.bias_E);
  const routing = weighExperts(router, scores, choice);

  const drops = context.training && router.capacityFactor !== null &&
    router.kind !== "expertChoice";
  const places = drops && router.drop === "position" ? routing.choices : 1;
  let kept_NK = keptExperts(router, routing);
  const bounds = sliceBounds(tokens, slices);
  const all = await gatherRecords(
    comm,
    makeRecord(router, { ...routing, experts_NK: kept_NK }, places, bounds),
  );
  const { counts_VPE, sums } = readRecords(all, { ranks: comm.size, slices, places, experts });
  let counts_VE = sumPlaces(counts_VPE, places, experts);
  const chosen_E = sumRanks(counts_VE, experts);
  const losses = routerLosses(sums, router);
  if (drops) {
    const { choices } = routing;
    const capacity = capacityOf(router.capacityFactor!, { tokens: sums.tokens, choices, experts });
    /** The tokens of each slice, made anew by its number among those of all ranks. */
    const eachSlice = (drop: (own_NK: Int32Array, v: number, c: number) => Int32Array) => {
      const out_NK = new Int32Array(kept_NK.length);
      for (let c = 0; c < slices; c++) {
        const start = bounds[c] * choices, end = bounds[c + 1] * choices;
        out_NK.set(drop(kept_NK.subarray(start, end), comm.rank * slices + c, c), start);
      }
      return out_NK;
    };
    const over = Array.from(chosen_E.keys()).filter((e) => chosen_E[e] > capacity);
    if (over.length > 0 && router.drop === "position") {
      const size = { ranks: comm.size * slices, choices, experts };
      const kept_VKE = keptByPosition(counts_VPE, size, capacity);
      const length = choices * experts;
      kept_NK = eachSlice((own_NK, v) =>
        dropByPosition(own_NK, kept_VKE.subarray(v * length, (v + 1) * length), experts)
      );
      counts_VE = sumPlaces(kept_VKE, places, experts);
    } else if (over.length > 0) {
      const lengths = new Array<number>(comm.size).fill(0);
      for (let v = 0; v < comm.size * slices; v++) {
        for (const e of over) lengths[Math.floor(v / slices)] += counts_VE[v * experts + e];
      }
      const own = new Float64Array(lengths[comm.rank]);
      let at = 0;
      eachSlice((own_NK, _, c) => {
        const scores_NE = routing.scores_NE.subarray(bounds[c] * experts, bounds[c + 1] * experts);
        const scores = scoresOverCapacity(own_NK, scores_NE, over, { choices, experts });
        own.set(scores, at);
        at += scores.length;
        return own_NK;
      });
      const gathered = await gatherVaried(comm, own, lengths);
      const chosen_VE = counts_VE, options = { experts, capacity, over };
      kept_NK = eachSlice((own_NK, v) => {
        const kept = dropByProbability(own_NK, chosen_VE, gathered, { ...options, rank: v });
        counts_VE = kept.kept_RE; // for every slice the same
        return kept.experts_NK;
      });
    }
  }
  const kept_E = sumRanks(counts_VE, experts);
  let dropped = 0;
  for (let e = 0; e < experts; e++) dropped += chosen_E[e] - kept_E[e];
  const counts_CRE = countsOfSlices(counts_VE, slices, experts);
  return { routing, kept_NK, counts_CRE, chosen_E, dropped, sums, losses };
}

/** The same on all ranks: it decides on a collective. */
function needsTokenNumbers({ router, training, replay }: RoutingContext): boolean {
  const random = router.jitter > 0 || router.noise > 0 ||
    (router.kind === "gshard" && router.second !== "greedy");
  return replay !== null || router.kind === "expertChoice" || (training && random);
}

/** A replayed choice comes from outside: it must be one of these tokens and experts. */
function checkReplay(choice: ExpertChoices, tokens: number, experts: number): ExpertChoices {
  const { choices, experts_NK } = choice;
  if (experts_NK.length !== tokens * choices) {
    throw new RangeError(
      `Cannot replay a routing as it must be of ${tokens} tokens: current value is ${
        experts_NK.length / choices
      }`,
    );
  }
  const lastToken_E = new Int32Array(experts).fill(-1);
  for (const [i, e] of experts_NK.entries()) {
    if (e < -1 || e >= experts) {
      throw new RangeError(
        `Cannot replay a routing as its experts must be in 0..${
          experts - 1
        }, or -1 for none: current value is ${e}`,
      );
    }
    if (e < 0) continue;
    const token = Math.floor(i / choices);
    if (lastToken_E[e] === token) {
      throw new RangeError(
        `Cannot replay a routing as a token must have an expert once: current value is expert ${e} twice for token ${token}`,
      );
    }
    lastToken_E[e] = token;
  }
  return choice;
}

async function gatherTokens(comm: Communicator, tokens: number): Promise<Float64Array> {
  return await gatherRecords(comm, new Float64Array([tokens]));
}

/** Every rank's record, of equal lengths, in rank order. */
async function gatherRecords(comm: Communicator, own: Float64Array): Promise<Float64Array> {
  if (comm.size === 1) return own;
  const all = new Float64Array(own.length * comm.size);
  await comm.allGather(own, all);
  return all;
}

/** Every rank's numbers, of lengths that all know, in rank order. */
async function gatherVaried(
  comm: Communicator,
  own: Float64Array,
  lengths: readonly number[],
): Promise<Float64Array> {
  if (comm.size === 1) return own;
  const all = new Float64Array(lengths.reduce((a, b) => a + b, 0));
  await comm.allGatherV(own, all, lengths);
  return all;
}

async function chooseTogether(
  { comm, router }: RoutingContext,
  scores: Scores,
  tokens_R: Float64Array,
  firstToken: number,
): Promise<ExpertChoices> {
  const { experts } = router;
  const lengths = Array.from(tokens_R, (n) => n * experts);
  const scores_TE = await gatherVaried(comm, scores.scores_NE, lengths);
  const all = scores_TE.length / experts;
  return chooseByExpert(scores_TE, {
    experts,
    capacity: capacityOf(router.capacityFactor!, { tokens: all, choices: 1, experts }),
    firstToken,
    tokens: tokens_R[comm.rank],
  });
}

/**
 * Length of the record of sums that a rank shows the others in every forward pass, in f64 numbers: choices per (slice, place, expert), choices
 * and scores per expert for the balance loss, squared log-sum-exps, tokens.
 *
 * @param places C P.
 * @param experts E.
 * @returns (C P + 2) E + 2.
 */
export function recordLength(places: number, experts: number): number {
  return (places + 2) * experts + 2;
}

function makeRecord(
  router: Router,
  routing: Routing,
  places: number,
  bounds: readonly number[],
): Float64Array {
  const { experts } = router;
  const { choices, experts_NK, lse_N } = routing, slices = bounds.length - 1;
  const record = new Float64Array(recordLength(slices * places, experts));
  const balance = slices * places * experts, firstOnly = router.kind === "gshard";
  for (let c = 0; c < slices; c++) {
    for (let i = bounds[c] * choices; i < bounds[c + 1] * choices; i++) {
      const e = experts_NK[i];
      if (e < 0) continue;
      const place = i % choices;
      record[(c * places + (places > 1 ? place : 0)) * experts + e]++;
      if (place === 0 || !firstOnly) record[balance + e]++;
    }
  }
  if (router.auxLoss > 0) {
    const kind = router.kind === "sigmoid" ? "sigmoid" : "softmax";
    record.set(sumNormalisedScores(routing.scores_NE, experts, kind), balance + experts);
  }
  for (const lse of lse_N) record[record.length - 2] += lse * lse;
  record[record.length - 1] = routing.tokens;
  return record;
}

function readRecords(
  records: Float64Array,
  size: {
    readonly ranks: number;
    readonly slices: number;
    readonly places: number;
    readonly experts: number;
  },
): { readonly counts_VPE: Int32Array; readonly sums: RouterSums } {
  const { ranks, slices, places, experts } = size;
  const length = recordLength(slices * places, experts), counts = slices * places * experts;
  const counts_VPE = new Int32Array(ranks * counts);
  const total = new Float64Array(length);
  for (let r = 0; r < ranks; r++) {
    for (let i = 0; i < length; i++) total[i] += records[r * length + i];
    for (let i = 0; i < counts; i++) counts_VPE[r * counts + i] = records[r * length + i];
  }
  const sums = {
    choices_E: total.slice(counts, counts + experts),
    scores_E: total.slice(counts + experts, counts + 2 * experts),
    squaredLse: total[length - 2],
    tokens: total[length - 1],
  };
  return { counts_VPE, sums };
}

function sumPlaces(counts_VPE: Int32Array, places: number, experts: number): Int32Array {
  if (places === 1) return counts_VPE;
  const counts_VE = new Int32Array(counts_VPE.length / places);
  for (let i = 0; i < counts_VPE.length; i++) {
    const v = Math.floor(i / (places * experts));
    counts_VE[v * experts + i % experts] += counts_VPE[i];
  }
  return counts_VE;
}

/** Rows per (rank, expert) of each slice, from those of (rank, slice, expert). */
function countsOfSlices(counts_VE: Int32Array, slices: number, experts: number): Int32Array[] {
  if (slices === 1) return [counts_VE];
  const ranks = counts_VE.length / slices / experts;
  return Array.from({ length: slices }, (_, c) => {
    const counts_RE = new Int32Array(ranks * experts);
    for (let r = 0; r < ranks; r++) {
      const v = (r * slices + c) * experts;
      counts_RE.set(counts_VE.subarray(v, v + experts), r * experts);
    }
    return counts_RE;
  });
}

function sumRanks(counts_RE: Int32Array, experts: number): Float64Array {
  const sums_E = new Float64Array(experts);
  for (let i = 0; i < counts_RE.length; i++) sums_E[i % experts] += counts_RE[i];
  return sums_E;
}
