// What no schedule can beat: lower bounds of a training step's time from its graph, durations and the link's cost. They say how much of a
// measured step is the schedule's fault. Plain arithmetic on one rank that stands for all; runs no scheduler.

import { groupOf } from "../../moe/graph.ts";
import type { ComputeNode, GradientNode, NodeId, Schedule, StepGraph } from "../../moe/hooks.ts";
import { type StepCosts, timeAlone } from "./links.ts";

/** What a step takes, and what its class of schedules allows. */
export interface BoundOptions {
  /**
   * Duration of a piece of computation in µs.
   * @param node The piece.
   */
  compute_us(node: ComputeNode): number;
  /**
   * How long before the end of the computation that it follows a gradient is ready, in µs. @default {0}
   * @param gradient The gradient.
   */
  lead_us?(gradient: GradientNode): number;
  /** Costs of the collectives. */
  readonly costs: StepCosts;
  /**
   * Whether no micro-op is launched between the start of a layer's combine and the end of the layer, in the backward pass: the class of the
   * paper's Figure 7c. @default {false}
   */
  readonly outside?: boolean;
}

/** Lower bounds of a step's time, in µs. */
export interface StepBounds {
  /** Sum of all computation. */
  readonly compute_us: number;
  /** Time that the link needs for all bytes. */
  readonly link_us: number;
  /** `max(compute_us, link_us)`: for every schedule, whatever its order. */
  readonly floor_us: number;
  /** Longest path through the step with every collective at its α-β time and no contention. */
  readonly criticalPath_us: number;
  /** The largest bound known: of the critical path, the floor, and bytes that have yet to cross the link at some moment of the step. */
  readonly bound_us: number;
}

/**
 * Lower bounds of a step under a class of schedules: those that launch the micro-ops of `schedule`, in its order, one at a time, at whatever
 * moments. In an exclusive schedule no micro-op runs beside an all-to-all; if it is of the class `outside`, too, none runs from the first
 * all-to-all of a layer's backward pass to the end of the layer.
 *
 * The longest path goes through the program to where a micro-op's gradients are ready, and on through all micro-ops from there; where
 * the class keeps micro-ops from running beside parts of the program, what is left of those parts is on the path as well. Program nodes
 * are a chain, as those of `buildStepGraph` are; where a layer is run in chunks, its experts work on one while others are under way.
 *
 * @param graph The step.
 * @param schedule What a scheduler planned for it.
 * @param options Durations, costs and the class.
 * @returns The bounds: `floor_us ≤ bound_us`, `criticalPath_us ≤ bound_us`, and no timeline of the class is shorter than `bound_us`.
 *
 * @example
 * ```ts
 * import { Fifo } from "../../moe/fifo.ts";
 * import { buildStepGraph } from "../../moe/graph.ts";
 * import { stepBounds } from "./bounds.ts";
 * import { stepCosts } from "./links.ts";
 * import assert from "node:assert/strict";
 *
 * const weight = { name: "w", elements: 1000, elementBytes: 4, group: "world" } as const;
 * const graph = buildStepGraph({ layers: [], head: [], embedding: [weight] });
 * const costs = stepCosts({ alpha_us: 50, bytes_per_us: 100 }, { ranks: 2 });
 * const bounds = stepBounds(graph, new Fifo().plan(graph), { compute_us: () => 1000, costs });
 * // Four pieces of computation, then two messages of 50 µs + 20 µs.
 * assert.equal(bounds.criticalPath_us, 4140);
 * assert.equal(bounds.floor_us, 4000);
 * ```
 */
export function stepBounds(
  graph: StepGraph,
  schedule: Schedule,
  options: BoundOptions,
): StepBounds {
  const { costs } = options;
  let compute_us = 0, link_us = 0, path_us = 0;
  /** Earliest end of each node. */
  const ends: number[] = [];
  /** By node: time of the program up to and with it beside which no micro-op may run. */
  const closed: number[] = [];
  /** Bytes that the link carries, as its time, and the earliest moment for the first of them. */
  const loads: { readonly earliest_us: number; readonly link_us: number }[] = [];
  let closed_us = 0;
  /** Whether the program is past the first all-to-all of a layer's backward pass, and not at the layer's end. */
  let inside = false;
  /** The exchange there and back whose slices the experts work on now. */
  let sliced: Sliced | null = null;
  for (const node of graph.nodes) {
    const start_us = node.after.reduce((latest, id) => Math.max(latest, ends[id]), 0);
    let duration_us = 0;
    if (node.kind === "compute") {
      duration_us = options.compute_us(node);
      compute_us += duration_us;
      if (sliced) {
        sliced.compute_us += duration_us;
        sliced.experts_id = node.id;
        duration_us = sliced.experts() - start_us;
      }
      if (inside && options.outside && schedule.exclusive) closed_us += duration_us;
      if (node.name === "gate") inside = false;
    } else if (node.kind === "allToAll") {
      const chunks = schedule.chunks.get(node.layer) ?? 1;
      const cost = costs.allToAll(node.bytes / chunks, node), all_us = chunks * timeAlone(cost);
      let earliest_us = start_us;
      duration_us = all_us;
      if (sliced) {
        duration_us = sliced.back(all_us) - start_us;
        earliest_us = sliced.first();
        if (schedule.exclusive && !(inside && options.outside)) {
          // All slices but the last may be back when the gradients of the experts are ready.
          closed_us += all_us * (chunks - 1) / chunks;
          for (let id = sliced.experts_id; id < node.id; id++) closed[id] = closed_us;
          closed_us -= all_us * (chunks - 1) / chunks;
        }
      } else if (chunks > 1) sliced = new Sliced(chunks, start_us, all_us);
      link_us += chunks * cost.link_us;
      loads.push({ earliest_us: earliest_us + cost.latency_us, link_us: chunks * cost.link_us });
      if (schedule.exclusive) closed_us += inside && options.outside ? duration_us : all_us;
      if (sliced && sliced.experts_id >= 0) sliced = null;
      if (node.phase === "backward") inside = true;
    }
    ends[node.id] = start_us + duration_us;
    if (node.kind === "gradient") {
      ends[node.id] = Math.max(0, start_us - (options.lead_us?.(node) ?? 0));
    }
    closed[node.id] = closed_us;
    path_us = Math.max(path_us, ends[node.id]);
  }

  const reductions = schedule.microOps.map((microOp) =>
    costs.reduction(microOp.bytes, groupOf(graph, microOp))
  );
  let left_us = reductions.reduce((sum, cost) => sum + timeAlone(cost), 0);
  let free_us = 0;
  schedule.microOps.forEach(({ parts }, i) => {
    const last = parts.reduce<NodeId>((last, { gradient }) => Math.max(last, gradient), 0);
    const ready_us = parts.reduce((latest, { gradient }) => Math.max(latest, ends[gradient]), 0);
    path_us = Math.max(path_us, ready_us + closed_us - closed[last] + left_us);
    const cost = reductions[i], start_us = Math.max(ready_us, free_us);
    loads.push({ earliest_us: start_us + cost.latency_us, link_us: cost.link_us });
    link_us += cost.link_us;
    left_us -= timeAlone(cost);
    free_us = start_us + timeAlone(cost);
  });

  const floor_us = Math.max(compute_us, link_us);
  const bound_us = Math.max(path_us, floor_us, linkBound(loads));
  return { compute_us, link_us, floor_us, criticalPath_us: path_us, bound_us };
}

/**
 * A layer's two all-to-alls of a half of the step, and the experts between them, cut into slices: how early each can be done when slices follow one
 * another on the link, and in the experts.
 */
class Sliced {
  readonly #chunks: number;
  readonly #start_us: number;
  readonly #there_us: number;
  /** Time of the experts, all slices. */
  compute_us = 0;
  /** Their node, once the program has come to it. */
  experts_id: NodeId = -1;

  constructor(chunks: number, start_us: number, there_us: number) {
    this.#chunks = chunks;
    this.#start_us = start_us;
    this.#there_us = there_us;
  }

  /** When the experts can be done: behind the first slice all of theirs, behind the last one of theirs. */
  experts(): number {
    const parts = this.#chunks;
    const all_us = this.#there_us / parts + this.compute_us;
    return this.#start_us + Math.max(all_us, this.#there_us + this.compute_us / parts);
  }

  /** When the first slice can leave the experts. */
  first(): number {
    return this.#start_us + (this.#there_us + this.compute_us) / this.#chunks;
  }

  /** When the way back can be done: behind the experts one slice of it, behind the first slice of theirs, and of the way there, all of it. */
  back(back_us: number): number {
    const parts = this.#chunks;
    return Math.max(
      this.experts() + back_us / parts,
      this.#start_us + this.#there_us + back_us,
      this.first() + back_us,
    );
  }
}

/** When the link can be done at the earliest: from any moment on, it has to carry all that cannot have begun before. */
function linkBound(
  loads: readonly { readonly earliest_us: number; readonly link_us: number }[],
): number {
  let bound_us = 0, later_us = 0;
  for (const { earliest_us, link_us } of loads.toSorted((a, b) => b.earliest_us - a.earliest_us)) {
    later_us += link_us;
    bound_us = Math.max(bound_us, earliest_us + later_us);
  }
  return bound_us;
}
