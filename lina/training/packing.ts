// How many experts a device holds (section 4.3 of the paper): as many as make the experts' work on a chunk of tokens last longer than the
// chunk's all-to-all, so that the one hides behind the other. Pure: reads times, decides, remembers what it has seen; moves nothing.

import type { Mark } from "../../moe/gradients.ts";
import type { StepGraph } from "../../moe/hooks.ts";
import { timesOf } from "./measures.ts";

/** What a chunk of tokens takes in the forward half of a step. */
export interface ChunkTimes {
  /** Its all-to-all to the experts, in µs. */
  readonly allToAll_us: number;
  /** The experts' work on it, in µs. */
  readonly experts_us: number;
}

/** What {@linkcode Packing} may choose from. */
export interface PackingOptions {
  /** Experts E of a layer. */
  readonly experts: number;
  /** Ranks R. */
  readonly ranks: number;
  /** Ranks that hold all experts of a layer between them, at least: the smallest expert-parallel size. @default {2} */
  readonly leastRanks?: number;
  /** Copies of every expert to begin with. @default {1} */
  readonly replicas?: number;
}

/** A chunk's experts must outlast its all-to-all by so much before fewer of them are thought to be enough: what is near goes back and forth. */
const MARGIN = 1.15;

/**
 * Chooses the number of copies k of every expert: with k copies the ranks form k groups, each group holds every expert, and a rank holds
 * k E / R of them. From one copy on, it is doubled until the experts take longer than the all-to-all, which becomes smaller with every doubling,
 * as a larger part of the tokens stays; and it is halved again if half of it would do by what the smaller k has shown.
 */
export class Packing {
  /** Copies of every expert now. */
  replicas: number;
  readonly #options: Required<PackingOptions>;
  /** What chunks took at each number of copies, when it was seen last. */
  readonly #seen = new Map<number, ChunkTimes>();
  /** Numbers of copies that have been found impossible. */
  readonly #refused = new Set<number>();

  /**
   * Begins.
   *
   * @param options Experts, ranks, and the bounds.
   * @throws {RangeError} If the first number of copies is impossible.
   */
  constructor(options: PackingOptions) {
    const { ranks, experts, leastRanks = 2, replicas = 1 } = options;
    this.#options = { ranks, experts, leastRanks, replicas };
    this.replicas = replicas;
    const group = ranks / this.replicas;
    if (!Number.isInteger(group) || !(this.replicas >= 1) || experts < group) {
      throw new RangeError(
        `Cannot pack experts as the copies must divide ${ranks} ranks into groups of at most ${experts}: current value is ${this.replicas}`,
      );
    }
  }

  /** Experts that the first rank holds, of each layer. */
  get expertsPerDevice(): number {
    return Math.floor(this.replicas * this.#options.experts / this.#options.ranks);
  }

  /**
   * What comes next.
   *
   * @param times What chunks take with the present number of copies; alike on all ranks.
   * @returns The number of copies to have from now on: the present one, twice or half of it.
   */
  next(times: ChunkTimes): number {
    const k = this.replicas;
    this.#seen.set(k, times);
    if (times.experts_us <= times.allToAll_us) return this.#allows(2 * k) ? 2 * k : k;
    const group = this.#options.ranks / k;
    if (k % 2 !== 0 || group === 1 || !this.#allows(k / 2)) return k;
    // With half as many copies more tokens leave a rank, and its experts have as much to do.
    const away = (ranks: number) => (ranks - 1) / ranks;
    const fewer_us = times.allToAll_us * away(2 * group) / away(group);
    // What was measured there has the last word: a guess that has been wrong is not made again.
    const seen_us = this.#seen.get(k / 2)?.allToAll_us ?? 0;
    return times.experts_us > MARGIN * Math.max(fewer_us, seen_us) ? k / 2 : k;
  }

  /**
   * Takes a number of copies for impossible: there is no room for them.
   *
   * @param replicas The number; larger ones are impossible, too.
   */
  refuse(replicas: number): void {
    this.#refused.add(replicas);
  }

  #allows(replicas: number): boolean {
    const { ranks, leastRanks } = this.#options, group = ranks / replicas;
    if (!Number.isInteger(group) || group < leastRanks) return false;
    return [...this.#refused].every((refused) => replicas < refused);
  }
}

/** Experts of a layer on a device. */
export interface Held {
  /** How many. */
  readonly experts: number;
  /** How many of them have their moments in host memory. */
  readonly offloaded: number;
}

/** Buffers on the device for moments that pass through: those of moe/offload.ts. */
const BUFFERS = 3;

/**
 * Memory that a device needs more of for another packing.
 *
 * @param change The number of layers; bytes of an expert, as `ExpertStore.expertBytes` has them; and what each layer holds and shall hold.
 * @returns Bytes; below 0 if less is needed.
 */
export function packedBytes(change: {
  readonly layers: number;
  readonly expert: {
    readonly weights: number;
    readonly gradient: number;
    readonly moments: number;
  };
  readonly before: Held;
  readonly after: Held;
}): number {
  const { layers, expert } = change;
  const bytes = ({ experts, offloaded }: Held) => {
    const resident = layers * (experts - offloaded) + Math.min(BUFFERS, layers * offloaded);
    return layers * experts * (expert.weights + expert.gradient) + resident * expert.moments;
  };
  return bytes(change.after) - bytes(change.before);
}

/**
 * Times of a chunk, from the marks of a step: medians over layers and chunks of the forward half. The all-to-all is that of a layer's first chunk,
 * behind which the device waits at once; where shared experts work meanwhile, it seems to last as long as they do at least.
 *
 * @param graph The step.
 * @param marks Its marks; the step has ended.
 * @returns The times, of this rank; null if the step has no MoE layer.
 */
export function chunkTimes(graph: StepGraph, marks: readonly Mark[]): ChunkTimes | null {
  const times = timesOf(marks);
  const exchanges: number[] = [], works: number[] = [];
  /** When the first chunk of each dispatch started, and when each chunk had arrived. */
  const started = new Map<number, number>(), arrived = new Map<string, number>();
  marks.forEach(({ boundary }, i) => {
    if (boundary.kind !== "allToAllStarts" && boundary.kind !== "allToAllEnds") return;
    const node = graph.nodes[boundary.node], { chunk } = boundary;
    if (node?.kind !== "allToAll" || node.phase !== "forward") return;
    const key = `${node.layer} ${chunk}`;
    if (node.role === "dispatch") {
      if (boundary.kind === "allToAllEnds") {
        arrived.set(key, times[i]);
        const start_us = started.get(node.layer);
        if (chunk === 0 && start_us !== undefined) exchanges.push(times[i] - start_us);
      } else if (chunk === 0) started.set(node.layer, times[i]);
    } else if (boundary.kind === "allToAllStarts") {
      const start_us = arrived.get(key);
      if (start_us !== undefined) works.push(times[i] - start_us);
    }
  });
  if (exchanges.length === 0 || works.length === 0) return null;
  return { allToAll_us: median(exchanges), experts_us: median(works) };
}

/**
 * The middle of some numbers.
 *
 * @param numbers One at least.
 * @returns Their median.
 */
export function median(numbers: readonly number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
