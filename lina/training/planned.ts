// One static interleaving of gradients and all-to-alls, planned from measured times: how long each piece of computation takes (profile.ts) and what
// the link costs (links.ts) say when the link is idle between two all-to-alls, and gradients are cut to fit there. All ranks plan from the same
// numbers, so all launch alike: nobody looks at a clock, nothing is polled, and no order of ranks can deadlock. It measures nothing itself.

import { reducedGradients } from "../../moe/graph.ts";
import type {
  Boundary,
  CollectiveScheduler,
  GradientNode,
  LaunchState,
  MicroOp,
  NodeId,
  Schedule,
  StepGraph,
} from "../../moe/hooks.ts";
import { type StepCosts, timeAlone } from "./links.ts";
import { Outside } from "./outside.ts";
import { PART_ALIGNMENT, partition } from "./partition.ts";
import { type Timeline, timeline } from "./timeline.ts";

/** Options of {@linkcode Planned}. */
export interface PlannedOptions {
  /** Times of the step's computation in µs, by node, alike on all ranks; without it, or with one of another step, it acts as `outside`. */
  readonly profile?: { readonly compute_us: ReadonlyMap<NodeId, number> };
  /** Costs of the step's collectives, alike on all ranks; without them it acts as `outside`. */
  readonly costs?: StepCosts;
  /** Part of the time between two all-to-alls that is left free, as times vary: 0 to less than 1. @default {0.05} */
  readonly margin?: number;
  /** Slices of every layer's all-to-alls, or several such numbers, of which the best by prediction is taken. @default {1} */
  readonly chunks?: number | readonly number[];
  /** Bytes of a bucket while it acts as `outside`. @default {26_214_400} */
  readonly bucketBytes?: number;
}

/** Gradients that take less than this many latencies of a reduction share one, by copies. */
const SMALL_LATENCIES = 2;
/** A reduction between all-to-alls takes the link for at least this many latencies, or it waits. */
const LEAST_LATENCIES = 0.5;

/** A schedule with how many micro-ops are launched by which boundary. */
interface Plan {
  readonly schedule: Schedule;
  readonly launched: ReadonlyMap<string, number>;
}

/** Micro-ops that fit into the measured gaps between all-to-alls, launched at boundaries that were fixed beforehand. */
export class Planned implements CollectiveScheduler {
  /** Name for traces and tables. */
  readonly name: string;
  readonly #options: PlannedOptions;
  readonly #margin: number;
  readonly #chunks: readonly number[];
  readonly #outside: Outside;
  readonly #launched = new WeakMap<Schedule, ReadonlyMap<string, number>>();

  /**
   * Makes the scheduler.
   *
   * @param options Profile and costs, and how many slices all-to-alls may be cut into.
   * @throws {RangeError} If the margin is not in [0, 1), or slices are not whole numbers >= 1.
   */
  constructor(options: PlannedOptions = {}) {
    const { margin = 0.05, chunks = 1, bucketBytes } = options;
    if (!(margin >= 0 && margin < 1)) {
      throw new RangeError(
        `Cannot plan a step as "margin" must be at least 0 and below 1: current value is ${margin}`,
      );
    }
    this.#chunks = typeof chunks === "number" ? [chunks] : chunks;
    if (
      this.#chunks.length === 0 || this.#chunks.some((n) => !(Number.isSafeInteger(n) && n > 0))
    ) {
      throw new RangeError(
        `Cannot cut all-to-alls as "chunks" must be whole numbers >= 1: current value is ${chunks}`,
      );
    }
    this.name = this.#chunks.some((n) => n > 1) ? "planned+pipeline" : "planned";
    this.#options = options;
    this.#margin = margin;
    this.#outside = new Outside({ bucketBytes });
  }

  /**
   * Plans the step: pure, and alike on all ranks whose options are.
   *
   * @param graph The step.
   * @returns Micro-ops in the order in which they are launched; all-to-alls come after those before them.
   */
  plan(graph: StepGraph): Schedule {
    const costs = this.#costsOf(graph);
    if (!costs) {
      return { ...this.#outside.plan(graph), chunks: chunksOf(graph, this.#chunks[0]) };
    }
    let best: Plan | null = null, least_us = Infinity;
    for (const chunks of this.#chunks) {
      const plan = fill(graph, { ...costs, chunks: chunksOf(graph, chunks), margin: this.#margin });
      const { end_us } = timeline(graph, following(plan), costs);
      if (best && end_us >= least_us) continue;
      best = plan;
      least_us = end_us;
    }
    this.#launched.set(best!.schedule, best!.launched);
    return best!.schedule;
  }

  /**
   * What was planned for a boundary goes; at the step's end all that is left.
   *
   * @param boundary What has happened.
   * @param state What is ready, and how many micro-ops have gone.
   * @returns How many go now.
   */
  launch(boundary: Boundary, state: LaunchState): number {
    if (boundary.kind === "stepEnds") return state.ready;
    const launched = this.#launched.get(state.schedule);
    if (!launched) return this.#outside.launch(boundary, state);
    return dueAt(launched, boundary, state);
  }

  /**
   * What the plan is expected to take.
   *
   * @param graph The step.
   * @returns The step's course on a virtual clock; null if there is no profile of this step, or no costs.
   */
  predict(graph: StepGraph): Timeline | null {
    const costs = this.#costsOf(graph);
    return costs && timeline(graph, this, costs);
  }

  /** Durations and costs, where they are known of all of the step. */
  #costsOf(graph: StepGraph): Times | null {
    const { profile, costs } = this.#options;
    if (!profile || !costs) return null;
    for (const node of graph.nodes) {
      if (node.kind === "compute" && !profile.compute_us.has(node.id)) return null;
    }
    return { compute_us: ({ id }) => profile.compute_us.get(id)!, costs };
  }
}

interface Times {
  compute_us(node: { readonly id: NodeId }): number;
  readonly costs: StepCosts;
}

/** Fills the time between all-to-alls with what is ready then; the rest follows the last of them. */
function fill(
  graph: StepGraph,
  options: Times & { readonly chunks: ReadonlyMap<number, number>; readonly margin: number },
): Plan {
  const { chunks, margin } = options;
  // The step as it is with nothing to reduce before its end: what is filled in delays no all-to-all.
  const quiet = { microOps: partition(reducedGradients(graph), Infinity), chunks, exclusive: true };
  const { boundaries, spans } = timeline(graph, {
    name: "quiet",
    plan: () => quiet,
    launch: ({ kind }, { ready }) => kind === "stepEnds" ? ready : 0,
  }, options);
  const ends = spans.filter(({ lane }) => lane === "allToAll").map(({ end_us }) => end_us);
  const starts = boundaries.filter(({ boundary }) => boundary.kind === "allToAllStarts");
  const pool = new Pool(graph, options.costs);
  const microOps: MicroOp[] = [], launched = new Map<string, number>();
  let started = 0, free_us = 0;
  for (const { boundary, at_us } of boundaries) {
    if (boundary.kind === "gradientReady") pool.add(boundary.gradient);
    if (boundary.kind === "allToAllStarts") started++; // nothing goes before it, as it would wait
    else {
      const next_us = starts.at(started)?.at_us ?? Infinity;
      const until_us = next_us === Infinity ? Infinity : next_us - margin * (next_us - at_us);
      free_us = Math.max(free_us, at_us, started > 0 ? ends[started - 1] : 0);
      const last = boundary.kind === "stepEnds";
      for (;;) {
        const microOp = pool.take(until_us - free_us, last);
        if (!microOp) break;
        microOps.push(microOp);
        free_us += pool.timeOf(microOp);
      }
    }
    launched.set(keyOf(boundary), microOps.length);
  }
  return { schedule: { microOps, chunks, exclusive: true }, launched };
}

/** Gradients that are ready and not planned: large ones in order, and small ones that share a reduction. */
class Pool {
  readonly #graph: StepGraph;
  readonly #costs: StepCosts;
  /** Latency of a reduction, and time of the link per byte, by group. */
  readonly #links = new Map<string, { readonly latency_us: number; readonly byte_us: number }>();
  readonly #large: { readonly node: GradientNode; start: number }[] = [];
  /** By group and element size. */
  readonly #small = new Map<string, GradientNode[]>();

  constructor(graph: StepGraph, costs: StepCosts) {
    this.#graph = graph;
    this.#costs = costs;
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
    return bytes * byte_us >= LEAST_LATENCIES * latency_us;
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

/** A scheduler that follows a plan. */
function following({ schedule, launched }: Plan): CollectiveScheduler {
  return {
    name: "planned",
    plan: () => schedule,
    launch: (boundary, state) => {
      return boundary.kind === "stepEnds" ? state.ready : dueAt(launched, boundary, state);
    },
  };
}

/** Micro-ops that were to be launched by a boundary and have not been: as many of them as are ready. */
function dueAt(
  launched: ReadonlyMap<string, number>,
  boundary: Boundary,
  { next, ready }: LaunchState,
): number {
  return Math.max(0, Math.min(ready, (launched.get(keyOf(boundary)) ?? 0) - next));
}

function keyOf(boundary: Boundary): string {
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

/** The same number of slices for every layer that has all-to-alls. */
function chunksOf({ nodes }: StepGraph, chunks: number): Map<number, number> {
  const layers = new Map<number, number>();
  if (chunks === 1) return layers;
  for (const node of nodes) if (node.kind === "allToAll") layers.set(node.layer, chunks);
  return layers;
}
