// A training step on a virtual clock: runs a step graph under a scheduler as the engine does, with given durations and a link's cost, and
// says what happens when. It drives the engine's own `ScheduleRun`, so the decisions are the scheduler's real ones. One rank stands for
// all: load is balanced, and no rank waits for a slower one. It measures nothing and knows no device.

import { microOpName } from "../../moe/graph.ts";
import type {
  Boundary,
  CollectiveScheduler,
  ComputeNode,
  MicroOp,
  StepGraph,
} from "../../moe/hooks.ts";
import { checkSchedule, ScheduleRun } from "../../moe/schedule.ts";
import { type CollectiveCost, type StepCosts, timeAlone } from "./links.ts";

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

/** What happened in a step. */
export interface Timeline {
  /** All that was done, by start. */
  readonly spans: readonly TimelineSpan[];
  /** The step's time in µs: the end of the last span. */
  readonly end_us: number;
  /** Time during which bytes were on the link, in µs; its part of `end_us` is the link's utilisation. */
  readonly linkBusy_us: number;
}

/**
 * Runs a step under a scheduler on a virtual clock.
 *
 * The program is one thread, as the engine's is: nodes run one after another, in the order of the graph, and computation waits for its
 * all-to-all. Micro-ops are reduced beside it, one at a time, in the order in which they were launched. A transfer first spends its latency,
 * which takes nothing of the link, then its bytes; transfers whose bytes are under way share the link fairly, as the paper has it of
 * streams that nobody coordinates, so the link is never idle while there are bytes to send. If the schedule is exclusive, an all-to-all
 * waits for the micro-ops launched before it. Gradients of group `replicas` are not reduced here.
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

/** One step on the way. The program is straight-line code; what runs beside it moves whenever the clock does. */
class Simulation {
  readonly #graph: StepGraph;
  readonly #run: ScheduleRun;
  readonly #options: TimelineOptions & { readonly exclusive: boolean };
  readonly #link = new SharedLink();
  readonly #spans: TimelineSpan[] = [];
  /** Micro-ops launched and not complete; the first is being reduced. */
  readonly #queue: { readonly microOp: MicroOp; readonly asked_us: number }[] = [];
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
      if (node.kind === "compute") {
        if (node.phase === "backward" && node.name === "combine") {
          this.#on({ kind: "combineBackwardStarts", layer: node.layer });
        }
        const start_us = link.now_us;
        const alone_us = checked(this.#options.compute_us(node), `duration of ${nodeName(node)}`);
        link.runTo(start_us + alone_us);
        this.#add({
          lane: "compute",
          name: nodeName(node),
          asked_us: start_us,
          start_us,
          alone_us,
        });
        if (node.phase === "backward" && node.name === "gate") ending = node.layer;
      } else {
        const asked_us = link.now_us;
        this.#on({ kind: "allToAllStarts", node: node.id, chunk: 0 });
        if (this.#options.exclusive) link.runUntil(() => this.#queue.length === 0);
        const cost = this.#options.costs.allToAll(node.bytes);
        const start_us = link.now_us;
        let ended = false;
        link.start(cost, () => ended = true);
        link.runUntil(() => ended);
        const alone_us = timeAlone(cost);
        const name = nodeName(node);
        this.#add({ lane: "allToAll", name, asked_us, start_us, alone_us, bytes: cost.bytes });
        this.#on({ kind: "allToAllEnds", node: node.id, chunk: 0 });
      }
    }
    if (ending !== null) this.#on({ kind: "layerBackwardEnds", layer: ending });
    this.#on({ kind: "stepEnds" });
    link.runUntil(() => this.#queue.length === 0);
    // Stable, so what starts together keeps the order in which it ended.
    const spans = this.#spans.sort((a, b) => a.start_us - b.start_us);
    return { spans, end_us: link.now_us, linkBusy_us: link.busy_us };
  }

  /** Adds a span that ends now. */
  #add(span: Omit<TimelineSpan, "end_us" | "bytes"> & { readonly bytes?: number }): void {
    this.#spans.push({ bytes: 0, ...span, end_us: this.#link.now_us });
  }

  #on(boundary: Boundary): void {
    this.#tell(boundary);
    for (; this.#untold > 0; this.#untold--) this.#tell({ kind: "microOpEnds" });
  }

  #tell(boundary: Boundary): void {
    for (const microOp of this.#run.on(boundary)) {
      this.#queue.push({ microOp, asked_us: this.#link.now_us });
      if (this.#queue.length === 1) this.#reduce();
    }
  }

  /** Starts to reduce the first micro-op of the queue. */
  #reduce(): void {
    const { microOp, asked_us } = this.#queue[0];
    const start_us = this.#link.now_us;
    const cost = this.#options.costs.reduction(microOp.bytes);
    this.#link.start(cost, () => {
      const name = microOpName(this.#graph, microOp), alone_us = timeAlone(cost);
      this.#add({ lane: "gradients", name, asked_us, start_us, alone_us, bytes: cost.bytes });
      this.#queue.shift();
      if (this.#queue.length > 0) this.#reduce();
      if (this.#options.endsTold === "at once") this.#tell({ kind: "microOpEnds" });
      else this.#untold++;
    });
  }
}

/** A transfer that has not ended. */
interface Transfer {
  /** Latency that is left. */
  latency_us: number;
  /** Time of the link alone that is left. */
  link_us: number;
  readonly ended: () => void;
}

/** The virtual clock and what is on the link. */
class SharedLink {
  /** The clock. */
  now_us = 0;
  /** Time with bytes on the link. */
  busy_us = 0;
  readonly #transfers: Transfer[] = [];

  /** Puts a transfer on the link; `ended` is called once it is complete, never before this returns. */
  start({ latency_us, link_us }: CollectiveCost, ended: () => void): void {
    checked(latency_us, "latency of a collective");
    checked(link_us, "link's time of a collective");
    this.#transfers.push({ latency_us, link_us, ended });
  }

  /** Lets time pass, what ends at the very end included. */
  runTo(end_us: number): void {
    while (this.#next() <= end_us) this.#event();
    this.#pass(end_us - this.now_us);
    this.now_us = end_us;
  }

  /** Lets time pass until something is so. */
  runUntil(done: () => boolean): void {
    while (!done()) this.#event();
  }

  /** Transfers whose bytes are under way. */
  #sharing(): number {
    return this.#transfers.filter(({ latency_us }) => latency_us === 0).length;
  }

  /** Time until a transfer's latency is over or its bytes are. */
  #left({ latency_us, link_us }: Transfer, sharing: number): number {
    return latency_us > 0 ? latency_us : link_us * sharing;
  }

  /** When the next latency or transfer is over. */
  #next(): number {
    const sharing = this.#sharing();
    return this.#transfers.reduce(
      (next, transfer) => Math.min(next, this.now_us + this.#left(transfer, sharing)),
      Infinity,
    );
  }

  /** Goes to the next moment at which a latency or a transfer is over. */
  #event(): void {
    const sharing = this.#sharing();
    let first = this.#transfers[0];
    for (const transfer of this.#transfers) {
      if (this.#left(transfer, sharing) < this.#left(first, sharing)) first = transfer;
    }
    const wait_us = this.#left(first, sharing);
    const waited = first.latency_us > 0;
    this.#pass(wait_us);
    this.now_us += wait_us;
    first.latency_us = 0;
    if (waited) return; // its bytes come now
    this.#transfers.splice(this.#transfers.indexOf(first), 1);
    first.ended();
  }

  /** Takes time off what is under way. */
  #pass(time_us: number): void {
    const sharing = this.#sharing();
    if (sharing > 0) this.busy_us += time_us;
    for (const transfer of this.#transfers) {
      if (transfer.latency_us > 0) transfer.latency_us = Math.max(0, transfer.latency_us - time_us);
      else transfer.link_us = Math.max(0, transfer.link_us - time_us / sharing);
    }
  }
}

/** Name of computation or of an all-to-all for readers. */
function nodeName(node: { layer: number; phase: string; name?: string; role?: string }): string {
  const what = `${node.phase} ${node.name ?? node.role}`;
  return node.layer < 0 ? what : `layer ${node.layer} ${what}`;
}

function checked(time_us: number, what: string): number {
  if (time_us >= 0 && time_us < Infinity) return time_us;
  throw new RangeError(
    `Cannot run a timeline as the ${what} must be at least 0 and finite: current value is ${time_us}`,
  );
}
