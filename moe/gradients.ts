// Reduces gradients over the ranks while the backward pass runs: launches the micro-ops that a scheduler lets go, on communicators of
// their own. Which goes when is the scheduler's decision (`hooks.ts`) and the bookkeeping `schedule.ts`'s; here bytes move.

import { COMPLETED } from "../collectives/progress.ts";
import type { Communicator, Label, Work } from "../collectives/types.ts";
import type { Device, Stream, StreamEvent } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import { recorder, type SpanArgs } from "../trace/mod.ts";
import { groupOf, microOpName } from "./graph.ts";
import type {
  Boundary,
  CollectiveScheduler,
  MicroOp,
  NodeId,
  Schedule,
  StepGraph,
} from "./hooks.ts";
import type { Parameter } from "./parameter.ts";
import { checkSchedule, ScheduleRun } from "./schedule.ts";
import { elementsOf, pieceElements, pieceOf } from "./shards.ts";
import type { SeatGradient } from "./seats.ts";
import type { AllToAllPlace, Step } from "./step.ts";

/** What {@linkcode GradientReducer} works with. */
export interface GradientReducerOptions {
  /** The step, alike on all ranks. */
  readonly graph: StepGraph;
  /** Decides on micro-ops and their order. */
  readonly scheduler: CollectiveScheduler;
  /** All ranks; gradients of group `world` use this communicator alone. */
  readonly comm: Communicator;
  /** Where the gradients are. */
  readonly device: Device;
  /** The parameters of the graph's gradients. */
  readonly parameters: readonly Parameter[];
  /** The gradients of group `replicas` in the graph. @default {none} */
  readonly seats?: readonly SeatGradient[];
  /**
   * Whether each rank gets the sums of its pieces only, as shards.ts has them, of the gradients of group `world`; the rest of them is then of no
   * use. @default {false}
   */
  readonly scatter?: boolean;
}

/** A point of a step, and when the device's computation passed it. */
export interface Mark {
  /** What the program came to; the ends of micro-ops are not told, as they are no part of it. */
  readonly boundary: Boundary | { readonly kind: "passBegins" } | { readonly kind: "passEnds" };
  /** Its `time()`, once it is done, is the device's. */
  readonly event: StreamEvent;
}

/** Options of {@linkcode GradientReducer.begin}. */
export interface BeginOptions {
  /** Whether it is the first pass of its step. @default {false} */
  readonly firstPass?: boolean;
  /** Where the boundaries of the pass are noted, forward half and backward half, in the order of the program. @default {nowhere} */
  readonly marks?: Mark[];
}

/** A step whose gradients are being reduced. */
export interface ReducingStep extends Step {
  /** Launches what is left and waits: after it every gradient, or this rank's pieces, is the sum over its ranks. */
  finish(): Promise<void>;
}

/** Sums gradients over the ranks, step after step. */
export class GradientReducer {
  /** What the scheduler planned. */
  readonly schedule: Schedule;
  readonly #options: GradientReducerOptions;
  readonly #tables: Tables;

  /**
   * Plans the reduction.
   *
   * @param options The step, the scheduler and where to reduce.
   * @throws {RangeError} If the scheduler's plan does not reduce every element once, or a parameter is missing.
   */
  constructor(options: GradientReducerOptions) {
    this.#options = options;
    this.schedule = options.scheduler.plan(options.graph);
    checkSchedule(options.graph, this.schedule, options.scheduler.pace);
    this.#tables = tablesOf(options);
    const { flat } = this.#tables;
    for (const { parts } of this.schedule.microOps) {
      const dtypes = new Set(parts.map(({ gradient }) => flat.get(gradient)!.dtype));
      if (dtypes.size > 1) {
        throw new RangeError(
          `Cannot reduce gradients together as their dtype must be the same: current value is ${
            [...dtypes].join(" and ")
          }`,
        );
      }
    }
  }

  /**
   * Begins the pass whose gradients are reduced: the last one of a step.
   *
   * @param number Number of the pass.
   * @param options Whether it is the first pass of its step, too, and where its boundaries are noted.
   * @returns The step to run the model in; finish it.
   */
  begin(number: number, options: BeginOptions = {}): ReducingStep {
    const run = new ScheduleRun(this.#options.scheduler, this.schedule);
    return new Reduction(number, options, this.#options, run, this.#tables);
  }
}

/** What a step looks things up in. */
interface Tables {
  /** Nodes of the gradients by the names of the parameters; those of a seat have several. */
  readonly gradients: ReadonlyMap<string, NodeId>;
  /** Names that a gradient is made of. */
  readonly names: ReadonlyMap<NodeId, number>;
  /** Nodes of all-to-alls. */
  readonly allToAlls: ReadonlyMap<string, NodeId>;
  /** Gradients as flat arrays, by node. */
  readonly flat: ReadonlyMap<NodeId, Tensor>;
  /** Communicators, by node, of group `replicas`. */
  readonly replicas: ReadonlyMap<NodeId, Communicator>;
}

function tablesOf({ graph, parameters, seats = [] }: GradientReducerOptions): Tables {
  const grads = new Map(parameters.map(({ name, grad }) => [name, grad]));
  const bySeat = new Map(seats.map((seat) => [seat.name, seat]));
  const gradients = new Map<string, NodeId>(), names = new Map<NodeId, number>();
  const allToAlls = new Map<string, NodeId>();
  const flat = new Map<NodeId, Tensor>(), replicas = new Map<NodeId, Communicator>();
  for (const node of graph.nodes) {
    if (node.kind === "allToAll") {
      allToAlls.set(`${node.layer} ${node.phase} ${node.role}`, node.id);
    }
    if (node.kind !== "gradient") continue;
    const seat = node.group === "replicas" ? bySeat.get(node.name) : undefined;
    const grad = node.group === "replicas" ? seat?.grad : grads.get(node.name);
    if (grad?.size !== node.elements) {
      throw new RangeError(
        `Cannot reduce ${node.name} as its gradient must have ${node.elements} elements: current value is ${grad?.size}`,
      );
    }
    flat.set(node.id, grad.reshape(grad.size));
    const parts = seat?.parameters ?? [node.name];
    for (const name of parts) gradients.set(name, node.id);
    names.set(node.id, parts.length);
    if (seat) replicas.set(node.id, seat.comm);
  }
  return { gradients, names, allToAlls, flat, replicas };
}

/** A micro-op in flight. */
interface Launched {
  readonly microOp: MicroOp;
  readonly work: Work;
  /** The bucket, where it is not one part in place. */
  readonly bucket: Tensor | null;
  ended: boolean;
}

class Reduction implements ReducingStep {
  readonly training = true;
  readonly number: number;
  readonly firstPass: boolean;
  readonly #options: GradientReducerOptions;
  readonly #schedule: Schedule;
  readonly #run: ScheduleRun;
  readonly #tables: Tables;
  readonly #marks: Mark[] | undefined;
  /** Names that are still missing of gradients that have several. */
  readonly #missing = new Map<NodeId, number>();
  /** When gradients became ready on the device, while spans are kept. */
  readonly #ready = new Map<NodeId, StreamEvent>();
  readonly #launched: Launched[] = [];
  /** The first launched micro-op that was not seen to end. */
  #oldest = 0;

  constructor(
    number: number,
    { firstPass = false, marks }: BeginOptions,
    options: GradientReducerOptions,
    run: ScheduleRun,
    tables: Tables,
  ) {
    this.number = number;
    this.firstPass = firstPass;
    this.#marks = marks;
    this.#options = options;
    this.#schedule = run.schedule;
    this.#run = run;
    this.#tables = tables;
    this.#mark({ kind: "passBegins" });
  }

  chunks(layer: number): number {
    return this.#schedule.chunks.get(layer) ?? 1;
  }

  async allToAll(
    { layer, phase, role, chunk }: AllToAllPlace,
    start: (after?: StreamEvent) => Work,
  ): Promise<() => Promise<void>> {
    const node = this.#tables.allToAlls.get(`${layer} ${phase} ${role}`)!;
    this.#on({ kind: "allToAllStarts", node, chunk });
    const after = this.#schedule.exclusive ? await this.#afterMicroOps() : undefined;
    const work = start(after);
    return async () => {
      await work.wait(this.#options.device.stream);
      this.#on({ kind: "allToAllEnds", node, chunk });
    };
  }

  /** A point behind the micro-ops that have been launched, and behind all that the device's stream holds now; a CPU waits. */
  async #afterMicroOps(): Promise<StreamEvent | undefined> {
    const { device } = this.#options;
    const running = this.#launched.filter(({ ended }) => !ended);
    if (running.length === 0) return undefined;
    const beside = streamBeside(device);
    beside.wait(device.stream.record());
    for (const { work } of running) await work.wait(beside);
    return beside.record();
  }

  combineBackwardStarts(layer: number): void {
    this.#on({ kind: "combineBackwardStarts", layer });
  }

  layerBackwardEnds(layer: number): void {
    this.#on({ kind: "layerBackwardEnds", layer });
  }

  gradientReady(name: string): void {
    const gradient = this.#tables.gradients.get(name);
    if (gradient === undefined) return; // an expert without replicas, or one whose store reduces it
    const missing = (this.#missing.get(gradient) ?? this.#tables.names.get(gradient)!) - 1;
    this.#missing.set(gradient, missing);
    if (missing > 0) return;
    const { stream } = this.#options.device;
    if (recorder.capturing) this.#ready.set(gradient, timed(stream));
    this.#on({ kind: "gradientReady", gradient });
  }

  async finish(): Promise<void> {
    if (this.#run.unready.length > 0) {
      const names = this.#run.unready.map((id) => {
        const node = this.#options.graph.nodes[id];
        return node.kind === "gradient" ? node.name : String(id);
      });
      throw new Error(
        `Cannot end step ${this.number} as every gradient must be ready: current value lacks ${
          names.join(", ")
        }`,
      );
    }
    this.#mark({ kind: "passEnds" });
    this.#on({ kind: "stepEnds" });
    for (const launched of this.#launched) {
      await launched.work.wait(this.#options.device.stream);
      if (launched.bucket) this.#unpack(launched.microOp, launched.bucket);
    }
  }

  #mark(boundary: Mark["boundary"]): void {
    this.#marks?.push({ boundary, event: timed(this.#options.device.stream) });
  }

  #on(boundary: Boundary): void {
    if (boundary.kind !== "stepEnds") this.#mark(boundary);
    // The boundary first: at the start of an all-to-all, an end that is noticed only now must not let a micro-op slip in before it.
    for (const microOp of this.#run.on(boundary)) this.#launch(microOp);
    this.#noticeEnds();
  }

  /** Tells the scheduler of micro-ops that have ended; asking also lets those in flight move on. */
  #noticeEnds(): void {
    for (let i = this.#oldest; i < this.#launched.length; i++) {
      const launched = this.#launched[i];
      if (!launched.ended && launched.work.done) {
        launched.ended = true;
        for (const microOp of this.#run.on({ kind: "microOpEnds" })) this.#launch(microOp);
      }
      if (launched.ended && i === this.#oldest) this.#oldest++;
    }
  }

  #launch(microOp: MicroOp): void {
    const comm = this.#commOf(microOp);
    if (comm.size === 1) {
      this.#launched.push({ microOp, work: COMPLETED, bucket: null, ended: false });
      return;
    }
    const scatter = this.#scatters(microOp);
    const piece = scatter ? pieceElements(microOp, comm.size) : 0;
    const size = elementsOf(microOp.parts);
    const packs = microOp.parts.length > 1 || (scatter && size !== piece * comm.size);
    const bucket = packs ? this.#pack(microOp, scatter ? piece * comm.size : size) : null;
    const data = bucket ?? this.#part(microOp.parts[0]);
    const options = { label: recorder.capturing ? this.#label(microOp) : undefined };
    const work = scatter
      ? comm.reduceScatter(data, data.rows(comm.rank * piece, (comm.rank + 1) * piece), options)
      : comm.allReduce(data, options);
    this.#launched.push({ microOp, work, bucket, ended: false });
  }

  #commOf({ parts }: MicroOp): Communicator {
    return this.#tables.replicas.get(parts[0].gradient) ?? this.#options.comm;
  }

  #scatters(microOp: MicroOp): boolean {
    return (this.#options.scatter ?? false) && groupOf(this.#options.graph, microOp) === "world";
  }

  /** What the trace says of a micro-op; readiness is the device's, and on the clock of the span. */
  #label(microOp: MicroOp): Label {
    const priority = this.#launched.length;
    const ready = microOp.parts.map(({ gradient }) => this.#ready.get(gradient));
    return {
      name: microOpName(this.#options.graph, microOp),
      track: "gradients",
      args: (start_us) => {
        const ready_us = ready.reduce((last, event) => Math.max(last, event?.time() ?? NaN), 0);
        const args: SpanArgs = { priority };
        return ready_us > 0 ? { ...args, queued_us: start_us - ready_us } : args;
      },
    };
  }

  #part({ gradient, start, end }: MicroOp["parts"][number]): Tensor {
    return this.#tables.flat.get(gradient)!.rows(start, end);
  }

  /** The parts one after another; what the bucket has beyond them is zero. */
  #pack(microOp: MicroOp, elements: number): Tensor {
    const { dtype } = this.#tables.flat.get(microOp.parts[0].gradient)!;
    const bucket = empty(this.#options.device, [elements], dtype);
    let at = 0;
    for (const part of microOp.parts) {
      ops.copy(this.#part(part), bucket.rows(at, at += part.end - part.start));
    }
    if (at < elements) ops.fill(bucket.rows(at, elements), 0);
    return bucket;
  }

  #unpack(microOp: MicroOp, bucket: Tensor): void {
    const { comm } = this.#options, scatter = this.#scatters(microOp);
    const parts = scatter ? pieceOf(microOp, comm.rank, comm.size) : microOp.parts;
    let at = scatter ? comm.rank * pieceElements(microOp, comm.size) : 0;
    for (const part of parts) {
      ops.copy(bucket.rows(at, at += part.end - part.start), this.#part(part));
    }
    bucket[Symbol.dispose]();
  }
}

const besides = new WeakMap<Device, Stream>();

/** A stream that only waits, so that the device's own need not. */
function streamBeside(device: Device): Stream {
  let stream = besides.get(device);
  if (!stream) besides.set(device, stream = device.createStream("beside"));
  return stream;
}

/** The present end of a stream's work, with the device's time. */
function timed(stream: Stream): StreamEvent {
  return stream.recordTimed?.() ?? stream.record();
}
