// A training step on a virtual clock: runs a step graph under a scheduler as the engine does, with given durations and a link's cost, and
// says what happens when. It drives the engine's own `ScheduleRun`, so the decisions are the scheduler's real ones. One rank stands for
// all: load is balanced, and no rank waits for a slower one. It measures nothing and knows no device.

import { groupOf, microOpName } from "../../moe/graph.ts";
import type {
  AllToAllNode,
  Boundary,
  CollectiveScheduler,
  ComputeNode,
  MicroOp,
  StepGraph,
} from "../../moe/hooks.ts";
import { checkSchedule, ScheduleRun } from "../../moe/schedule.ts";
import { type CollectiveCost, type StepCosts, timeAlone } from "./links.ts";
import { checkedTime, SharedLink } from "./shared_link.ts";

/** What a step takes. */
export interface TimelineOptions {
  /**
   * Duration of a piece of computation in µs.
   * @param node The piece.
   */
  compute_us(node: ComputeNode): number;
  /** Costs of the collectives. */
  readonly costs: StepCosts;
  /**
   * When a scheduler of pace `device` hears that a micro-op has ended: right after the next boundary of the program, as the engine does it,
   * or at once, as it would be if somebody watched the device. @default {"boundary"}
   */
  readonly endsTold?: "boundary" | "at once";
}

/** Rows of a timeline: the device's computation, and the two communicators. */
export type TimelineLane = "compute" | "allToAll" | "gradients";

/** Something that a step did. Times in µs since its start. */
export interface TimelineSpan {
  /** Row; spans of a row follow one another. */
  readonly lane: TimelineLane;
  /** For readers: `layer 3 backward experts`, `layer 3 backward combine`, a gradient and its elements. */
  readonly name: string;
  /** When it could have started: the program had come to it, or the scheduler had launched it. */
  readonly asked_us: number;
  /** When it started. */
  readonly start_us: number;
  /** When it ended. */
  readonly end_us: number;
  /** How long it would take with the link for itself. */
  readonly alone_us: number;
  /** Bytes that left the rank; 0 for computation. */
  readonly bytes: number;
}

/** A boundary, and when the program came to it. */
export interface TimelineBoundary {
  /** What the scheduler was told. */
  readonly boundary: Boundary;
  /** When, in µs since the step's start. */
  readonly at_us: number;
}

/** What happened in a step. */
export interface Timeline {
  /** All that was done, by start. */
  readonly spans: readonly TimelineSpan[];
  /** The step's time in µs: the end of the last span. */
  readonly end_us: number;
  /** Time during which bytes were on the link, in µs; its part of `end_us` is the link's utilisation. */
  readonly linkBusy_us: number;
  /** What the scheduler was told of the program, in order; ends of micro-ops are not in it. */
  readonly boundaries: readonly TimelineBoundary[];
}

/**
 * Runs a step under a scheduler on a virtual clock.
 *
 * The program is one thread, as the engine's is: nodes run one after another, in the order of the graph, and computation waits for its
 * all-to-all. Micro-ops are reduced beside it, one at a time, in the order in which they were launched. A transfer first spends its latency,
 * which takes nothing of the link, then its bytes; transfers whose bytes are under way share the link fairly, as the paper has it of
 * streams that nobody coordinates, so the link is never idle while there are bytes to send. If the schedule is exclusive, an all-to-all
 * waits for the micro-ops launched before it, and a micro-op for the all-to-alls started before it.
 *
 * A layer in chunks goes as moe/pipeline.ts has it: all chunks leave one after another, the experts work on each as it arrives, a share of their
 * time each, and its way back starts behind that.
 *
 * @param graph The step.
 * @param scheduler Decides what is launched when.
 * @param options Durations and costs.
 * @returns What happened; the same arguments give the same timeline.
 * @throws {RangeError} If the schedule is wrong, the scheduler asks for what is not ready, or a duration or cost is negative or not finite.
 *
 * @example
 * ```ts
 * import { Fifo } from "../../moe/fifo.ts";
 * import { buildStepGraph } from "../../moe/graph.ts";
 * import { stepCosts } from "./links.ts";
 * import { timeline } from "./timeline.ts";
 * import assert from "node:assert/strict";
 *
 * const weight = { name: "w", elements: 1000, elementBytes: 4, group: "world" } as const;
 * const graph = buildStepGraph({ layers: [], head: [weight], embedding: [] });
 * const { spans, end_us } = timeline(graph, new Fifo(), {
 *   compute_us: () => 1000,
 *   costs: stepCosts({ alpha_us: 50, bytes_per_us: 100 }, { ranks: 2 }),
 * });
 * // Three pieces of computation until the gradient is ready, then a fourth beside its reduction.
 * const [reduction] = spans.filter(({ lane }) => lane === "gradients");
 * assert.deepEqual([reduction.start_us, reduction.end_us, end_us], [3000, 3140, 4000]);
 * ```
 */
export function timeline(
  graph: StepGraph,
  scheduler: CollectiveScheduler,
  options: TimelineOptions,
): Timeline {
  const schedule = scheduler.plan(graph);
  checkSchedule(graph, schedule, scheduler.pace);
  return new Simulation(graph, new ScheduleRun(scheduler, schedule), {
    ...options,
    exclusive: schedule.exclusive ?? false,
  }).finish();
}

/** An all-to-all, or a chunk of it, that was asked for. */
interface Asked {
  readonly name: string;
  readonly cost: CollectiveCost;
  readonly asked_us: number;
  /** Micro-ops that must have ended before. */
  readonly behind: number;
  ended: boolean;
}

/** A micro-op that was launched. */
interface Launched {
  readonly microOp: MicroOp;
  readonly asked_us: number;
  /** All-to-alls that must have ended before. */
  readonly behind: number;
}

/** One step on the way. The program is straight-line code; what runs beside it moves whenever the clock does. */
class Simulation {
  readonly #graph: StepGraph;
  readonly #run: ScheduleRun;
  readonly #options: TimelineOptions & { readonly exclusive: boolean };
  readonly #link = new SharedLink();
  readonly #spans: TimelineSpan[] = [];
  readonly #boundaries: TimelineBoundary[] = [];
  /** All-to-alls and micro-ops that have not ended; the first of each may be under way. */
  readonly #allToAlls: Asked[] = [];
  readonly #queue: Launched[] = [];
  readonly #running = { allToAll: false, microOp: false };
  /** How many were asked for, and how many have ended. */
  readonly #count = { allToAlls: 0, allToAllsEnded: 0, microOps: 0, microOpsEnded: 0 };
  /** Chunks on their way to the experts, or back. */
  #leaving: Asked[] = [];
  #returning: Asked[] = [];
  /** Micro-ops that have ended and that the scheduler has not heard of. */
  #untold = 0;

  constructor(
    graph: StepGraph,
    run: ScheduleRun,
    options: TimelineOptions & { readonly exclusive: boolean },
  ) {
    this.#graph = graph;
    this.#run = run;
    this.#options = options;
  }

  /** Runs the step. */
  finish(): Timeline {
    const link = this.#link;
    /** The layer whose backward pass ends after the gradients that come next. */
    let ending: number | null = null;
    for (const node of this.#graph.nodes) {
      if (node.kind === "gradient") {
        this.#on({ kind: "gradientReady", gradient: node.id });
        continue;
      }
      if (ending !== null) this.#on({ kind: "layerBackwardEnds", layer: ending });
      ending = null;
      if (node.kind === "allToAll") {
        this.#exchange(node);
        continue;
      }
      if (node.phase === "backward" && node.name === "combine") {
        this.#on({ kind: "combineBackwardStarts", layer: node.layer });
      }
      if (this.#leaving.length > 0) this.#experts(node);
      else this.#compute(node, 0, 1);
      if (node.phase === "backward" && node.name === "gate") ending = node.layer;
    }
    if (ending !== null) this.#on({ kind: "layerBackwardEnds", layer: ending });
    this.#on({ kind: "stepEnds" });
    link.runUntil(() => this.#queue.length === 0);
    // Stable, so what starts together keeps the order in which it ended.
    const spans = this.#spans.sort((a, b) => a.start_us - b.start_us);
    const { now_us: end_us, busy_us: linkBusy_us } = link;
    return { spans, end_us, linkBusy_us, boundaries: this.#boundaries };
  }

  #chunksOf(layer: number): number {
    return this.#run.schedule.chunks.get(layer) ?? 1;
  }

  #compute(node: ComputeNode, chunk: number, chunks: number): void {
    const start_us = this.#link.now_us, name = chunkName(nodeName(node), chunk, chunks);
    const whole_us = checkedTime(this.#options.compute_us(node), `duration of ${nodeName(node)}`);
    const alone_us = whole_us / chunks;
    this.#link.runTo(start_us + alone_us);
    this.#add({ lane: "compute", name, asked_us: start_us, start_us, alone_us });
  }

  /** All chunks leave; or the last one returns, and all are waited for. */
  #exchange(node: AllToAllNode): void {
    const chunks = this.#chunksOf(node.layer);
    if ((node.phase === "forward") === (node.role === "dispatch")) {
      for (let c = 0; c < chunks; c++) this.#leaving.push(this.#ask(node, c));
      if (chunks > 1) return; // the experts wait for each
      this.#arrive(node, 0, this.#leaving[0]);
      this.#leaving = [];
      return;
    }
    this.#returning.push(this.#ask(node, chunks - 1));
    this.#returning.forEach((asked, c) => this.#arrive(node, c, asked));
    this.#returning = [];
  }

  /** The experts work on each chunk as it arrives; its way back starts behind that, the last one's with the node of its own. */
  #experts(node: ComputeNode): void {
    const leaving = this.#leaving;
    const ofLayer = this.#graph.nodes.filter((other): other is AllToAllNode =>
      other.kind === "allToAll" && other.layer === node.layer && other.phase === node.phase
    );
    leaving.forEach((asked, c) => {
      this.#arrive(ofLayer[0], c, asked);
      this.#compute(node, c, leaving.length);
      if (c < leaving.length - 1) this.#returning.push(this.#ask(ofLayer[1], c));
    });
    this.#leaving = [];
  }

  /** Asks for a chunk of an all-to-all. */
  #ask(node: AllToAllNode, chunk: number): Asked {
    const asked_us = this.#link.now_us, chunks = this.#chunksOf(node.layer);
    this.#on({ kind: "allToAllStarts", node: node.id, chunk });
    const asked = {
      name: chunkName(nodeName(node), chunk, chunks),
      cost: this.#options.costs.allToAll(node.bytes / chunks),
      asked_us,
      behind: this.#options.exclusive ? this.#count.microOps : 0,
      ended: false,
    };
    this.#count.allToAlls++;
    this.#allToAlls.push(asked);
    this.#go();
    return asked;
  }

  #arrive(node: AllToAllNode, chunk: number, asked: Asked): void {
    this.#link.runUntil(() => asked.ended);
    this.#on({ kind: "allToAllEnds", node: node.id, chunk });
  }

  /** Adds a span that ends now. */
  #add(span: Omit<TimelineSpan, "end_us" | "bytes"> & { readonly bytes?: number }): void {
    this.#spans.push({ bytes: 0, ...span, end_us: this.#link.now_us });
  }

  #on(boundary: Boundary): void {
    this.#boundaries.push({ boundary, at_us: this.#link.now_us });
    this.#tell(boundary);
    for (; this.#untold > 0; this.#untold--) this.#tell({ kind: "microOpEnds" });
  }

  #tell(boundary: Boundary): void {
    for (const microOp of this.#run.on(boundary)) {
      const behind = this.#options.exclusive ? this.#count.allToAlls : 0;
      this.#count.microOps++;
      this.#queue.push({ microOp, asked_us: this.#link.now_us, behind });
      this.#go();
    }
  }

  /** Starts what is first in its queue and need not wait. */
  #go(): void {
    const count = this.#count, running = this.#running, start_us = this.#link.now_us;
    const asked = this.#allToAlls[0];
    if (asked && !running.allToAll && count.microOpsEnded >= asked.behind) {
      running.allToAll = true;
      this.#link.start(asked.cost, () => {
        const { name, asked_us, cost } = asked, alone_us = timeAlone(cost);
        this.#add({ lane: "allToAll", name, asked_us, start_us, alone_us, bytes: cost.bytes });
        this.#allToAlls.shift();
        running.allToAll = false;
        count.allToAllsEnded++;
        asked.ended = true;
        this.#go();
      });
    }
    const launched = this.#queue[0];
    if (launched && !running.microOp && count.allToAllsEnded >= launched.behind) {
      running.microOp = true;
      this.#reduce(launched, start_us);
    }
  }

  /** Reduces the first micro-op of the queue. */
  #reduce({ microOp, asked_us }: Launched, start_us: number): void {
    const cost = this.#options.costs.reduction(microOp.bytes, groupOf(this.#graph, microOp));
    this.#link.start(cost, () => {
      const name = microOpName(this.#graph, microOp), alone_us = timeAlone(cost);
      this.#add({ lane: "gradients", name, asked_us, start_us, alone_us, bytes: cost.bytes });
      this.#queue.shift();
      this.#running.microOp = false;
      this.#count.microOpsEnded++;
      this.#go();
      if (this.#options.endsTold === "at once") this.#tell({ kind: "microOpEnds" });
      else this.#untold++;
    });
  }
}

/** Name of computation or of an all-to-all for readers. */
function nodeName(node: { layer: number; phase: string; name?: string; role?: string }): string {
  const what = `${node.phase} ${node.name ?? node.role}`;
  return node.layer < 0 ? what : `layer ${node.layer} ${what}`;
}

function chunkName(name: string, chunk: number, chunks: number): string {
  return chunks === 1 ? name : `${name} ${chunk}/${chunks}`;
}
