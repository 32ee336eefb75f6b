// Fills the time between all-to-alls with gradients: a plan of micro-ops that fit there, by arithmetic on when the program comes to what. It knows
// how long things take and judges nothing: planned.ts compares what comes out.

import { reducedGradients } from "../../moe/graph.ts";
import type { Boundary, GradientNode, MicroOp, NodeId, StepGraph } from "../../moe/hooks.ts";
import { type StepCosts, timeAlone } from "./links.ts";
import { PART_ALIGNMENT, partition } from "./partition.ts";
import { simulate, type TimelineOptions } from "./timeline.ts";

/** How a step is filled. */
export interface FillOptions {
  /** Part of the time from a boundary to the next all-to-all that is left free: 0 to less than 1. */
  readonly margin: number;
  /** A part of a gradient, or a bucket, takes the link for at least this many latencies of a reduction, or it waits for more. */
  readonly least: number;
}

/** What was filled in. */
export interface Filled {
  /** Micro-ops in the order in which they are launched. */
  readonly microOps: readonly MicroOp[];
  /** How many of them are launched by which boundary, as {@linkcode boundaryKey} names them. */
  readonly launched: ReadonlyMap<string, number>;
}

/** Gradients that take less than this many latencies of a reduction share one, by copies. */
const SMALL_LATENCIES = 2;

/** A step with nothing to reduce before its end: what is filled in delays no all-to-all. */
export class QuietStep {
  readonly #graph: StepGraph;
  readonly #costs: StepCosts;
  readonly #boundaries: readonly { readonly boundary: Boundary; readonly at_us: number }[];
  /** When all-to-alls are asked for, and when they have ended. */
  readonly #starts: readonly number[];
  readonly #ends: readonly number[];

  /**
   * Runs the step on a virtual clock.
   *
   * @param graph The step.
   * @param options Durations and costs, and chunks by layer.
   */
  constructor(
    graph: StepGraph,
    options: TimelineOptions & { readonly chunks: ReadonlyMap<number, number> },
  ) {
    this.#graph = graph;
    this.#costs = options.costs;
    const { chunks } = options;
    const microOps = partition(reducedGradients(graph), Infinity);
    const schedule = { microOps, chunks, exclusive: true };
    const { boundaries, spans } = simulate(graph, {
      name: "quiet",
      plan: () => schedule,
      launch: ({ kind }, { ready }) => kind === "stepEnds" ? ready : 0,
    }, { ...options, schedule });
    this.#boundaries = boundaries;
    this.#starts = boundaries.filter(({ boundary }) => boundary.kind === "allToAllStarts")
      .map(({ at_us }) => at_us);
    this.#ends = spans.filter(({ lane }) => lane === "allToAll").map(({ end_us }) => end_us)
      .sort((a, b) => a - b);
  }

  /**
   * Launches at every boundary what is ready and done before the next all-to-all is asked for; the rest follows the last of them.
   *
   * @param options How much is left free, and what is too small.
   * @returns The micro-ops and who launches them.
   */
  fill({ margin, least }: FillOptions): Filled {
    const pool = new Pool(this.#graph, this.#costs, least);
    const microOps: MicroOp[] = [], launched = new Map<string, number>();
    let started = 0, free_us = 0;
    for (const { boundary, at_us } of this.#boundaries) {
      if (boundary.kind === "gradientReady") pool.add(boundary.gradient);
      if (boundary.kind === "allToAllStarts") started++; // nothing goes before it, as it would wait
      else {
        const next_us = this.#starts[started] ?? Infinity;
        const until_us = next_us === Infinity ? Infinity : next_us - margin * (next_us - at_us);
        free_us = Math.max(free_us, at_us, started > 0 ? this.#ends[started - 1] : 0);
        const last = boundary.kind === "stepEnds";
        for (;;) {
          const microOp = pool.take(until_us - free_us, last);
          if (!microOp) break;
          microOps.push(microOp);
          free_us += pool.timeOf(microOp);
        }
      }
      launched.set(boundaryKey(boundary), microOps.length);
    }
    return { microOps, launched };
  }
}

/**
 * Names a boundary of a step.
 *
 * @param boundary The boundary.
 * @returns A name that no other boundary of the program has.
 */
export function boundaryKey(boundary: Boundary): string {
  switch (boundary.kind) {
    case "gradientReady":
      return `gradient ${boundary.gradient}`;
    case "allToAllStarts":
    case "allToAllEnds":
      return `${boundary.kind} ${boundary.node} ${boundary.chunk}`;
    case "combineBackwardStarts":
    case "layerBackwardEnds":
      return `${boundary.kind} ${boundary.layer}`;
    default:
      return boundary.kind;
  }
}

/** Gradients that are ready and not planned: large ones in order, and small ones that share a reduction. */
class Pool {
  readonly #graph: StepGraph;
  readonly #costs: StepCosts;
  readonly #least: number;
  /** Latency of a reduction, and time of the link per byte, by group. */
  readonly #links = new Map<string, { readonly latency_us: number; readonly byte_us: number }>();
  readonly #large: { readonly node: GradientNode; start: number }[] = [];
  /** By group and element size. */
  readonly #small = new Map<string, GradientNode[]>();

  constructor(graph: StepGraph, costs: StepCosts, least: number) {
    this.#graph = graph;
    this.#costs = costs;
    this.#least = least;
  }

  /** Time of a micro-op that has the link for itself. */
  timeOf({ bytes, parts }: MicroOp): number {
    const { group } = this.#gradient(parts[0].gradient);
    return timeAlone(this.#costs.reduction(bytes, group));
  }

  /** A gradient is ready. */
  add(id: NodeId): void {
    const node = this.#gradient(id), { elements, bytes, group } = node;
    if (elements === 0) return;
    const { latency_us, byte_us } = this.#link(group);
    if (bytes * byte_us >= SMALL_LATENCIES * latency_us) {
      this.#large.push({ node, start: 0 });
      return;
    }
    const kind = `${group} ${bytes / elements}`, alike = this.#small.get(kind);
    if (alike) alike.push(node);
    else this.#small.set(kind, [node]);
  }

  /** The next micro-op that takes so long at most; null if there is none, or it would not pay yet. With `last`, everything pays. */
  take(most_us: number, last: boolean): MicroOp | null {
    return this.#takeLarge(most_us, last) ?? this.#takeSmall(most_us, last);
  }

  #takeLarge(most_us: number, last: boolean): MicroOp | null {
    const first = this.#large[0];
    if (!first) return null;
    const { node, start } = first, elementBytes = node.bytes / node.elements;
    const left = (node.elements - start) * elementBytes;
    const most = last ? left : Math.min(left, this.#bytesIn(most_us, node.group));
    const bytes = most === left ? left : most - most % PART_ALIGNMENT;
    if (bytes <= 0 || (!last && bytes < left && !this.#pays(bytes, node.group))) return null;
    const end = start + bytes / elementBytes;
    if (end === node.elements) this.#large.shift();
    else first.start = end;
    return { parts: [{ gradient: node.id, start, end }], bytes };
  }

  #takeSmall(most_us: number, last: boolean): MicroOp | null {
    for (const nodes of this.#small.values()) {
      if (nodes.length === 0) continue;
      const { group } = nodes[0], most = last ? Infinity : this.#bytesIn(most_us, group);
      let bytes = 0, count = 0;
      while (count < nodes.length && bytes + nodes[count].bytes <= most) {
        bytes += nodes[count++].bytes;
      }
      if (count === 0 || (!last && !this.#pays(bytes, group))) continue;
      const parts = nodes.splice(0, count).map(({ id, elements }) => {
        return { gradient: id, start: 0, end: elements };
      });
      return { parts, bytes };
    }
    return null;
  }

  /** Most bytes that are reduced in some time. */
  #bytesIn(time_us: number, group: GradientNode["group"]): number {
    const { latency_us, byte_us } = this.#link(group), left_us = time_us - latency_us;
    if (left_us < 0) return 0;
    return byte_us === 0 ? Infinity : Math.floor(left_us / byte_us);
  }

  /** Whether a reduction of so many bytes saves more than its latency costs. */
  #pays(bytes: number, group: GradientNode["group"]): boolean {
    const { latency_us, byte_us } = this.#link(group);
    return bytes * byte_us >= this.#least * latency_us;
  }

  #link(group: GradientNode["group"]): { readonly latency_us: number; readonly byte_us: number } {
    const known = this.#links.get(group);
    if (known) return known;
    const sample = 2 ** 20, { latency_us } = this.#costs.reduction(0, group);
    const byte_us = this.#costs.reduction(sample, group).link_us / sample;
    const link = { latency_us, byte_us };
    this.#links.set(group, link);
    return link;
  }

  #gradient(id: NodeId): GradientNode {
    return this.#graph.nodes[id] as GradientNode;
  }
}
