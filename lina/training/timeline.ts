// A training step on a virtual clock: runs a step graph under a scheduler as the engine does, with given durations and a link's cost, and
// says what happens when. It drives the engine's own `ScheduleRun`, so the decisions are the scheduler's real ones. One rank stands for
// all: load is balanced, and no rank waits for a slower one. It measures nothing and knows no device.

import { groupOf, microOpName } from "../../moe/graph.ts";
import type {
  AllToAllNode,
  Boundary,
  CollectiveScheduler,
  ComputeNode,
  GradientNode,
  MicroOp,
  Schedule,
  StepGraph,
  StepNode,
} from "../../moe/hooks.ts";
import { checkSchedule, ScheduleRun } from "../../moe/schedule.ts";
import { type StepCosts, timeAlone } from "./links.ts";
import { checkedTime, SharedLink } from "./shared_link.ts";

/** What a step takes. */
export interface TimelineOptions {
  /**
   * Duration of a piece of computation in µs, all chunks of it together where its layer is not cut.
   * @param node The piece.
   */
  compute_us(node: ComputeNode): number;
  /**
   * Duration of the experts of one chunk of a layer that is cut into several. @default {compute_us(node) / chunks}
   * @param node The experts.
   * @param chunks Into how many.
   */
  chunk_us?(node: ComputeNode, chunks: number): number;
  /**
   * How long before the end of the computation that it follows a gradient is ready, in µs. @default {0}
   * @param gradient The gradient.
   */
  lead_us?(gradient: GradientNode): number;
  /** Costs of the collectives. */
  readonly costs: StepCosts;
  /**
   * When a scheduler of pace `device` hears that a micro-op has ended: right after the next boundary of the program, as on a CPU, or at once,
   * as it would be if somebody watched the device. @default {"boundary"}
   */
  readonly endsTold?: "boundary" | "at once";
  /**
   * On a GPU a scheduler of pace `device` hears of every boundary and end so much later, in µs; `endsTold` is then of no interest.
   * @default {as `endsTold` says, and boundaries at once}
   */
  readonly pump_us?: number;
}

/** Rows of a timeline: the device's computation, and the two communicators. */
export type TimelineLane = "compute" | "allToAll" | "gradients";

/** Something that a step did. Times in µs since its start. */
export interface TimelineSpan {
  /** Row; spans of a row follow one another. */
  readonly lane: TimelineLane;
  /** For readers: `layer 3 backward experts`, `layer 3 backward combine`, with ` 0/2` where it is a chunk; a gradient and its elements. */
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
  /** Which. */
  readonly boundary: Boundary;
  /** When, in µs since the step's start. */
  readonly at_us: number;
}

/** What happened in a step. */
export interface Timeline {
  /** All that was done, by start. */
  readonly spans: readonly TimelineSpan[];
  /** What the program came to, in order, `stepEnds` last; ends of micro-ops are not in it. */
  readonly boundaries: readonly TimelineBoundary[];
  /** The step's time in µs: the end of the last span. */
  readonly end_us: number;
  /** Time during which bytes were on the link, in µs; its part of `end_us` is the link's utilisation. */
  readonly linkBusy_us: number;
}

/**
 * Runs a step under a scheduler on a virtual clock.
 *
 * The program is one thread, as the engine's is: nodes run one after another, in the order of the graph, and computation waits for its
 * all-to-all. Where a layer is cut into chunks, all chunks of its first all-to-all are asked for together; the experts of each chunk run as it
 * arrives, and its second all-to-all is asked for behind them. All-to-alls go one at a time, in the order in which they were asked for. Micro-ops
 * are reduced beside the program, one at a time, in the order in which they were launched. Transfers share the link as {@linkcode SharedLink}
 * has it. If the schedule is exclusive, the link carries one thing at a time in the order of the program: an all-to-all waits for the micro-ops
 * launched before it, and a micro-op for the all-to-alls asked for before it; computation waits for neither.
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
  return simulate(graph, scheduler, { schedule, ...options });
}

/**
 * The same for a schedule that is at hand and known to fit the graph.
 *
 * @param graph The step.
 * @param scheduler Decides what is launched when.
 * @param options The schedule, durations and costs, and whether nobody looks at the spans, so that none are made.
 * @returns What happened.
 * @throws {RangeError} If the scheduler asks for what is not ready, or a duration or cost is negative or not finite.
 */
export function simulate(
  graph: StepGraph,
  scheduler: Pick<CollectiveScheduler, "name" | "pace" | "plan" | "launch">,
  options: TimelineOptions & { readonly schedule: Schedule; readonly quiet?: boolean },
): Timeline {
  return new Simulation(graph, scheduler, options).finish();
}

/** An all-to-all, or a chunk of one, that has been asked for. */
interface Request {
  readonly node: AllToAllNode;
  readonly chunk: number;
  readonly chunks: number;
  readonly asked_us: number;
  /** Micro-ops that it waits for, from the first. */
  readonly behind: number;
  ended: boolean;
}

/** A micro-op that has been launched. */
interface Launched {
  readonly microOp: MicroOp;
  readonly asked_us: number;
  /** All-to-alls that it waits for, from the first. */
  readonly behind: number;
}

/** One step on the way. The program is straight-line code; what runs beside it moves whenever the clock does. */
class Simulation {
  readonly #graph: StepGraph;
  readonly #run: ScheduleRun;
  readonly #options: Parameters<typeof simulate>[2];
  readonly #exclusive: boolean;
  readonly #link = new SharedLink();
  readonly #spans: TimelineSpan[] = [];
  readonly #boundaries: TimelineBoundary[] = [];
  /** Every all-to-all asked for, in order, and how many have started and ended. */
  readonly #requests: Request[] = [];
  #requestsStarted = 0;
  #requestsEnded = 0;
  /** Every micro-op launched, in order, and how many have started and ended. */
  readonly #launched: Launched[] = [];
  #launchedStarted = 0;
  #launchedEnded = 0;
  /** Micro-ops that have ended and that the scheduler has not heard of. */
  #untold = 0;
  /** How late the scheduler hears, where it watches a GPU; else null. */
  readonly #pump_us: number | null;
  /** The layer whose backward pass ends after the gradients that come next. */
  #ending: number | null = null;

  constructor(
    graph: StepGraph,
    scheduler: Parameters<typeof simulate>[1],
    options: Parameters<typeof simulate>[2],
  ) {
    this.#graph = graph;
    this.#run = new ScheduleRun(scheduler, options.schedule);
    this.#options = options;
    this.#exclusive = options.schedule.exclusive ?? false;
    this.#pump_us = scheduler.pace === "device" ? options.pump_us ?? null : null;
    if (this.#pump_us !== null) checkedTime(this.#pump_us, "latency of the pump");
  }

  /** Runs the step. */
  finish(): Timeline {
    const link = this.#link, { nodes } = this.#graph;
    for (let i = 0; i < nodes.length;) {
      const node = nodes[i];
      if (node.kind === "gradient") {
        this.#on({ kind: "gradientReady", gradient: node.id });
        i++;
      } else if (node.kind === "compute") {
        const gradients = gradientsAfter(nodes, i);
        this.#compute(node, gradients);
        i += 1 + gradients.length;
      } else i = this.#allToAlls(i, node);
    }
    this.#endLayer();
    const program_us = link.now_us;
    this.#on({ kind: "stepEnds" });
    const all = this.#options.schedule.microOps.length;
    link.runUntil(() => this.#launchedEnded === all);
    // Stable, so what starts together keeps the order in which it ended.
    const spans = this.#spans.sort((a, b) => a.start_us - b.start_us);
    const end_us = Math.max(program_us, link.now_us);
    return { spans, boundaries: this.#boundaries, end_us, linkBusy_us: link.busy_us };
  }

  /** Runs a piece of computation, or one chunk of it, up to whose end its gradients become ready. */
  #compute(
    node: ComputeNode,
    gradients: readonly GradientNode[],
    { chunk, chunks } = { chunk: 0, chunks: 1 },
  ): void {
    this.#endLayer();
    if (node.phase === "backward" && node.name === "combine") {
      this.#on({ kind: "combineBackwardStarts", layer: node.layer });
    }
    const { compute_us, chunk_us, lead_us } = this.#options;
    const link = this.#link, start_us = link.now_us;
    const time_us = chunks === 1
      ? compute_us(node)
      : chunk_us?.(node, chunks) ?? compute_us(node) / chunks;
    const alone_us = checkedTime(time_us, `duration of ${nodeName(node)}`);
    const end_us = start_us + alone_us;
    for (const gradient of gradients) {
      link.runTo(Math.max(link.now_us, end_us - (lead_us?.(gradient) ?? 0)));
      this.#on({ kind: "gradientReady", gradient: gradient.id });
    }
    link.runTo(end_us);
    this.#add(() => ({
      lane: "compute",
      name: nodeName(node) + chunkName(chunk, chunks),
      asked_us: start_us,
      start_us,
      alone_us,
    }));
    if (node.phase === "backward" && node.name === "gate") this.#ending = node.layer;
  }

  /** Runs an all-to-all, or both of a layer's with the experts between them in chunks; returns the node that follows. */
  #allToAlls(at: number, node: AllToAllNode): number {
    const { nodes } = this.#graph, chunks = this.#options.schedule.chunks.get(node.layer) ?? 1;
    this.#endLayer();
    if (chunks === 1) {
      this.#await(this.#ask(node, 0, 1));
      return at + 1;
    }
    const experts = nodes[at + 1];
    const gradients = gradientsAfter(nodes, at + 1);
    const second = nodes[at + 2 + gradients.length];
    if (experts?.kind !== "compute" || second?.kind !== "allToAll") {
      throw new RangeError(
        `Cannot run ${nodeName(node)} in chunks as experts and an all-to-all must follow it`,
      );
    }
    const count = Array.from({ length: chunks }, (_, chunk) => chunk);
    const arriving = count.map((chunk) => this.#ask(node, chunk, chunks));
    const leaving = count.map((chunk) => {
      this.#await(arriving[chunk]);
      this.#compute(experts, chunk === chunks - 1 ? gradients : [], { chunk, chunks });
      return this.#ask(second, chunk, chunks);
    });
    for (const request of leaving) this.#await(request);
    return second.id + 1;
  }

  #ask(node: AllToAllNode, chunk: number, chunks: number): Request {
    const asked_us = this.#link.now_us;
    this.#on({ kind: "allToAllStarts", node: node.id, chunk });
    const behind = this.#exclusive ? this.#launched.length : 0;
    const request = { node, chunk, chunks, asked_us, behind, ended: false };
    this.#requests.push(request);
    this.#advance();
    return request;
  }

  #await(request: Request): void {
    this.#link.runUntil(() => request.ended);
    this.#on({ kind: "allToAllEnds", node: request.node.id, chunk: request.chunk });
  }

  /** Starts what may start. */
  #advance(): void {
    if (this.#requestsStarted === this.#requestsEnded) {
      const request = this.#requests[this.#requestsStarted];
      if (request && this.#launchedEnded >= request.behind) this.#exchange(request);
    }
    if (this.#launchedStarted === this.#launchedEnded) {
      const launched = this.#launched[this.#launchedStarted];
      if (launched && this.#requestsEnded >= launched.behind) this.#reduce(launched);
    }
  }

  #exchange(request: Request): void {
    const { node, chunk, chunks, asked_us } = request;
    this.#requestsStarted++;
    const start_us = this.#link.now_us;
    const cost = this.#options.costs.allToAll(node.bytes / chunks, node);
    this.#link.start(cost, () => {
      request.ended = true;
      this.#requestsEnded++;
      this.#add(() => ({
        lane: "allToAll",
        name: nodeName(node) + chunkName(chunk, chunks),
        asked_us,
        start_us,
        alone_us: timeAlone(cost),
        bytes: cost.bytes,
      }));
      this.#advance();
    });
  }

  #reduce({ microOp, asked_us }: Launched): void {
    this.#launchedStarted++;
    const start_us = this.#link.now_us, graph = this.#graph;
    const cost = this.#options.costs.reduction(microOp.bytes, groupOf(graph, microOp));
    this.#link.start(cost, () => {
      this.#launchedEnded++;
      this.#add(() => ({
        lane: "gradients",
        name: microOpName(graph, microOp),
        asked_us,
        start_us,
        alone_us: timeAlone(cost),
        bytes: cost.bytes,
      }));
      this.#advance();
      if (this.#pump_us !== null) this.#later({ kind: "microOpEnds" });
      else if (this.#options.endsTold === "at once") this.#tell({ kind: "microOpEnds" });
      else this.#untold++;
    });
  }

  /** Adds a span that ends now. */
  #add(
    span: () => Omit<TimelineSpan, "end_us" | "bytes"> & { readonly bytes?: number },
  ): void {
    if (!this.#options.quiet) this.#spans.push({ bytes: 0, ...span(), end_us: this.#link.now_us });
  }

  #endLayer(): void {
    if (this.#ending !== null) this.#on({ kind: "layerBackwardEnds", layer: this.#ending });
    this.#ending = null;
  }

  #on(boundary: Boundary): void {
    this.#boundaries.push({ boundary, at_us: this.#link.now_us });
    if (this.#pump_us !== null) return this.#later(boundary);
    this.#tell(boundary);
    for (; this.#untold > 0; this.#untold--) this.#tell({ kind: "microOpEnds" });
  }

  #later(boundary: Boundary): void {
    this.#link.at(this.#link.now_us + this.#pump_us!, () => this.#tell(boundary));
  }

  #tell(boundary: Boundary): void {
    for (const microOp of this.#run.on(boundary)) {
      const behind = this.#exclusive ? this.#requests.length : 0;
      this.#launched.push({ microOp, asked_us: this.#link.now_us, behind });
    }
    this.#advance();
  }
}

/** The gradients that directly follow a node. */
function gradientsAfter(nodes: readonly StepNode[], at: number): GradientNode[] {
  const gradients: GradientNode[] = [];
  for (let i = at + 1; i < nodes.length; i++) {
    const node = nodes[i];
    if (node.kind !== "gradient") break;
    gradients.push(node);
  }
  return gradients;
}

/** Name of computation or of an all-to-all for readers. */
function nodeName(node: { layer: number; phase: string; name?: string; role?: string }): string {
  const what = `${node.phase} ${node.name ?? node.role}`;
  return node.layer < 0 ? what : `layer ${node.layer} ${what}`;
}

function chunkName(chunk: number, chunks: number): string {
  return chunks === 1 ? "" : ` ${chunk}/${chunks}`;
}
