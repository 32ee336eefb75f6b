// What a collective costs on a link: the α-β model (Hockney), fitted to measured times, and the bytes and messages that the usual algorithms
// send per rank. Plain arithmetic: measures nothing and sends nothing. All ranks have links alike, and no link is shared by two ranks.

import type { AllToAllNode } from "../../moe/hooks.ts";

/** A link as the α-β model has it: a message of `n` bytes takes `alpha_us + n / bytes_per_us`. */
export interface Link {
  /** Time of an empty message in µs. */
  readonly alpha_us: number;
  /** Rate each way in bytes per µs, which is MB/s; may be `Infinity`. */
  readonly bytes_per_us: number;
}

/** A measured time. */
export interface LinkSample {
  /** Bytes that were sent. */
  readonly bytes: number;
  /** Time in µs. */
  readonly time_us: number;
}

/** A link fitted to samples. */
export interface LinkFit extends Link {
  /** Root mean square of the relative errors, (model − measured) / measured. */
  readonly error: number;
}

/** What a rank does for one collective. */
export interface CollectiveCost {
  /** Time that passes without using the link: messages that wait for one another; µs. */
  readonly latency_us: number;
  /** Time that the link needs for the bytes when nothing else uses it; µs. */
  readonly link_us: number;
  /** Bytes that leave the rank, and as many arrive. */
  readonly bytes: number;
}

/** Costs of the collectives of a training step. */
export interface StepCosts {
  /**
   * Cost of a MoE layer's all-to-all.
   * @param bytes Bytes that a rank sends to others.
   * @param node Which, where one is known to differ from others of its size.
   */
  allToAll(bytes: number, node?: AllToAllNode): CollectiveCost;
  /**
   * Cost of a micro-op.
   * @param bytes Bytes of the array that is reduced.
   * @param group Over which ranks. @default {"world"}
   */
  reduction(bytes: number, group?: "world" | "replicas"): CollectiveCost;
}

/**
 * A collective, by the algorithm whose cost is taken for it, with `p` ranks and messages that follow one another:
 *
 * | collective | `bytes` means | bytes that leave a rank | messages |
 * |---|---|---|---|
 * | `allReduce` (ring) | the array | 2 (p − 1) / p · bytes | 2 (p − 1) |
 * | `reduceScatter`, `allGather` (ring) | the whole array | (p − 1) / p · bytes | p − 1 |
 * | `allToAll` (pairwise) | all that a rank gives, its own part included | (p − 1) / p · bytes | p − 1 |
 * | `allToAllV` (pairwise) | what goes to others | bytes | p − 1 |
 * | `broadcast`, `reduce` (pipelined chain) | the array | bytes | p − 1 |
 * | `send` | the message | bytes | 1 |
 */
export type CollectiveKind =
  | "allReduce"
  | "reduceScatter"
  | "allGather"
  | "allToAll"
  | "allToAllV"
  | "broadcast"
  | "reduce"
  | "send";

/** Share of `bytes` that leaves a rank, and messages one after another. */
function traffic(kind: CollectiveKind, ranks: number): { share: number; messages: number } {
  const others = ranks - 1;
  switch (kind) {
    case "allReduce":
      return { share: 2 * others / ranks, messages: 2 * others };
    case "reduceScatter":
    case "allGather":
    case "allToAll":
      return { share: others / ranks, messages: others };
    case "allToAllV":
    case "broadcast":
    case "reduce":
      return { share: 1, messages: others };
    case "send":
      return { share: 1, messages: 1 };
  }
}

function checkRanks(ranks: number): void {
  if (!(Number.isInteger(ranks) && ranks >= 1)) {
    throw new RangeError(
      `Cannot tell a collective's cost as its ranks must be a positive integer: current value is ${ranks}`,
    );
  }
}

/**
 * Fits a link to measured times: α and β of `time = α + bytes / β` with the least sum of squared *relative* errors, so that small messages
 * count as much as large ones. Neither is below 0: where the best line would have it so, the best line with α = 0 or with an infinite
 * rate is taken.
 *
 * @param samples Measured times, of two different sizes at least.
 * @returns The link and how well it fits.
 * @throws {RangeError} If a size is negative, a time is not positive, or there are fewer than two sizes.
 *
 * @example
 * ```ts
 * import { fitLink } from "./links.ts";
 * import assert from "node:assert/strict";
 *
 * const link = fitLink([{ bytes: 0, time_us: 50 }, { bytes: 1_250_000, time_us: 1050 }]);
 * assert.equal(Math.round(link.alpha_us), 50);
 * assert.equal(Math.round(link.bytes_per_us), 1250); // 10 Gbit/s
 * ```
 */
export function fitLink(samples: readonly LinkSample[]): LinkFit {
  for (const { bytes, time_us } of samples) {
    if (!(bytes >= 0 && bytes < Infinity)) {
      throw new RangeError(
        `Cannot fit a link as bytes must be at least 0 and finite: current value is ${bytes}`,
      );
    }
    if (!(time_us > 0 && time_us < Infinity)) {
      throw new RangeError(
        `Cannot fit a link as times must be positive and finite: current value is ${time_us}`,
      );
    }
  }
  const sizes = new Set(samples.map(({ bytes }) => bytes)).size;
  if (sizes < 2) {
    throw new RangeError(
      `Cannot fit a link as the samples must have two sizes at least: current value is ${sizes}`,
    );
  }
  // In units of the largest size and the shortest time, so that the sums are of one magnitude:
  // the errors are a · u + b · v − 1 with u = unit / time, v = size / time.
  const largest = samples.reduce((most, { bytes }) => Math.max(most, bytes), 0);
  const shortest = samples.reduce((least, { time_us }) => Math.min(least, time_us), Infinity);
  let uu = 0, uv = 0, vv = 0, u1 = 0, v1 = 0;
  for (const { bytes, time_us } of samples) {
    const u = shortest / time_us, v = u * (bytes / largest);
    uu += u * u;
    uv += u * v;
    vv += v * v;
    u1 += u;
    v1 += v;
  }
  const fit = (a: number, b: number): LinkFit => {
    const link = { alpha_us: a * shortest, bytes_per_us: largest / (b * shortest) };
    let squares = 0;
    for (const { bytes, time_us } of samples) {
      squares += ((link.alpha_us + bytes / link.bytes_per_us) / time_us - 1) ** 2;
    }
    return { ...link, error: Math.sqrt(squares / samples.length) };
  };
  const determinant = uu * vv - uv * uv;
  const a = (u1 * vv - v1 * uv) / determinant;
  const b = (v1 * uu - u1 * uv) / determinant;
  if (a >= 0 && b >= 0) return fit(a, b);
  // The sum of squares is convex: its least value over a, b ≥ 0 lies on an edge.
  const noLatency = fit(0, v1 / vv), noBytes = fit(u1 / uu, 0);
  return noLatency.error <= noBytes.error ? noLatency : noBytes;
}

/**
 * Fits a link to measured times of a collective.
 *
 * @param kind Which collective was measured.
 * @param ranks Ranks that took part, two at least.
 * @param samples Times, by bytes as {@linkcode CollectiveKind} counts them for this collective.
 * @returns The link whose {@linkcode collectiveCost} is nearest to what was measured.
 * @throws {RangeError} As {@linkcode fitLink}, or if fewer than two ranks took part.
 */
export function fitCollective(
  kind: CollectiveKind,
  ranks: number,
  samples: readonly LinkSample[],
): LinkFit {
  checkRanks(ranks);
  if (ranks < 2) {
    throw new RangeError(
      `Cannot fit a link as its ranks must be two at least: current value is ${ranks}`,
    );
  }
  const { share, messages } = traffic(kind, ranks);
  const fit = fitLink(samples.map(({ bytes, time_us }) => ({ bytes: share * bytes, time_us })));
  return { ...fit, alpha_us: fit.alpha_us / messages };
}

/**
 * What a collective costs each rank when nothing else uses the links.
 *
 * @param kind Which collective.
 * @param bytes Bytes, as {@linkcode CollectiveKind} counts them.
 * @param options Number of ranks and their links.
 * @returns Its cost; nothing with one rank.
 * @throws {RangeError} If `bytes`, `ranks` or the link is impossible.
 *
 * @example
 * ```ts
 * import { collectiveCost, timeAlone } from "./links.ts";
 * import assert from "node:assert/strict";
 *
 * const link = { alpha_us: 10, bytes_per_us: 1250 };
 * const cost = collectiveCost("allReduce", 5_000_000, { ranks: 4, link });
 * assert.deepEqual(cost, { latency_us: 60, link_us: 6000, bytes: 7_500_000 });
 * assert.equal(timeAlone(cost), 6060);
 * ```
 */
export function collectiveCost(
  kind: CollectiveKind,
  bytes: number,
  options: { readonly ranks: number; readonly link: Link },
): CollectiveCost {
  const { ranks, link } = options;
  checkRanks(ranks);
  if (!(bytes >= 0 && bytes < Infinity)) {
    throw new RangeError(
      `Cannot tell a collective's cost as its bytes must be at least 0 and finite: current value is ${bytes}`,
    );
  }
  if (!(link.alpha_us >= 0 && link.alpha_us < Infinity && link.bytes_per_us > 0)) {
    throw new RangeError(
      `Cannot tell a collective's cost as its link must have a latency of at least 0 and a positive rate: current value is ${link.alpha_us} µs, ${link.bytes_per_us} bytes/µs`,
    );
  }
  if (ranks === 1) return { latency_us: 0, link_us: 0, bytes: 0 };
  const { share, messages } = traffic(kind, ranks);
  return {
    latency_us: messages * link.alpha_us,
    link_us: share * bytes / link.bytes_per_us,
    bytes: share * bytes,
  };
}

/**
 * Time of a collective that has the link for itself.
 *
 * @param cost What it costs.
 * @returns Its latency and the link's time, in µs.
 */
export function timeAlone(cost: CollectiveCost): number {
  return cost.latency_us + cost.link_us;
}

/**
 * Costs of a training step's collectives on links alike: micro-ops are ring reductions, all-to-alls pairwise.
 *
 * @param links One link for both, or the link as each kind was measured to use it.
 * @param options Number of ranks; whether each rank gets the sums of its pieces only (reduceScatter instead of allReduce; the allGather
 * of parameters that follows the step is not in it); and replicas of each expert, among which its gradients are reduced and in as many groups
 * all-to-alls stay. @default {{scatter: false, replicas: 1}}
 * @returns The costs.
 * @throws {RangeError} If the number of ranks is not a positive integer, or not a multiple of the replicas.
 */
export function stepCosts(
  links: Link | { readonly allToAll: Link; readonly reduction: Link },
  options: { readonly ranks: number; readonly scatter?: boolean; readonly replicas?: number },
): StepCosts {
  const { ranks, replicas = 1 } = options;
  checkRanks(ranks);
  checkRanks(replicas);
  checkRanks(ranks / replicas);
  const { allToAll, reduction } = "allToAll" in links
    ? links
    : { allToAll: links, reduction: links };
  const kind = options.scatter ? "reduceScatter" : "allReduce";
  return {
    allToAll: (bytes) =>
      collectiveCost("allToAllV", bytes, { ranks: ranks / replicas, link: allToAll }),
    reduction: (bytes, group) =>
      group === "replicas"
        ? collectiveCost("allReduce", bytes, { ranks: replicas, link: reduction })
        : collectiveCost(kind, bytes, { ranks, link: reduction }),
  };
}
