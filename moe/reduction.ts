// One step of training whose gradients are reduced: tells the scheduler what happens, launches the micro-ops that it lets go, and orders
// all-to-alls and micro-ops after one another where the schedule wants that. With pace `device` on a GPU the telling is the pump's
// (`pump.ts`), as the host is far ahead there.

import { COMPLETED } from "../collectives/progress.ts";
import type { Communicator, Label, Work } from "../collectives/types.ts";
import { Events, type Stream, type StreamEvent } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import { now, recorder, type SpanArgs } from "../trace/mod.ts";
import type { GradientReducerOptions } from "./gradients.ts";
import { groupOf, microOpName } from "./graph.ts";
import type { Boundary, MicroOp, NodeId, Schedule } from "./hooks.ts";
import { type Place, Pump } from "./pump.ts";
import type { ScheduleRun } from "./schedule.ts";
import { elementsOf, pieceElements, pieceOf } from "./shards.ts";
import type { AllToAllPlace, Step } from "./step.ts";

/** A step whose gradients are being reduced. Dispose of it if it is not finished: nothing is launched any more then. */
export interface ReducingStep extends Step, Disposable {
  /** Launches what is left and waits: after it every gradient, or this rank's pieces, is the sum over its ranks. */
  finish(): Promise<void>;
}

/** A point of a step, and when the device's computation passed it. */
export interface Mark {
  /** What the program came to; the ends of micro-ops are not told, as they are no part of it. */
  readonly boundary: Boundary | { readonly kind: "passBegins" } | { readonly kind: "passEnds" };
  /** Its `time()`, once it is done, is the device's. */
  readonly event: StreamEvent;
}

/** Options of `GradientReducer.begin`. */
export interface BeginOptions {
  /** Whether it is the first pass of its step. @default {false} */
  readonly firstPass?: boolean;
  /** Where the boundaries of the pass are noted, forward half and backward half, in the order of the program. @default {nowhere} */
  readonly marks?: Mark[];
}

/** What a step looks things up in. */
export interface Tables {
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
  /** Time of the host that steps have spent on the schedule. */
  readonly spent: { host_us: number };
}

/** A micro-op in flight. */
interface Launched {
  readonly microOp: MicroOp;
  readonly work: Work;
  /** The bucket, where it is not one part in place. */
  readonly bucket: Tensor | null;
  ended: boolean;
}

/** Micro-ops in flight at a step's end. */
const MOST_LAST = 32;
/** What a collective is ordered after if nothing needs to be waited for. */
const PASSED: StreamEvent = { done: () => true, time: () => NaN };

/** Runs one step. */
export class Reduction implements ReducingStep {
  readonly training = true;
  readonly number: number;
  readonly firstPass: boolean;
  readonly #options: GradientReducerOptions;
  readonly #schedule: Schedule;
  readonly #run: ScheduleRun;
  readonly #tables: Tables;
  readonly #marks: Mark[] | undefined;
  /** Names that are still missing of every gradient that is not ready. */
  readonly #missing: Map<NodeId, number>;
  /** When gradients became ready on the device, while spans are kept. */
  readonly #ready = new Map<NodeId, StreamEvent>();
  readonly #launched: Launched[] = [];
  /** The first launched micro-op that was not seen to end. */
  #oldest = 0;
  /** All-to-alls that have been started, and not been waited for. */
  readonly #flying = new Set<Work>();
  /** Micro-ops of an exclusive schedule that wait for all-to-alls which only the host can wait for. */
  #held: MicroOp[] = [];
  /** Tells what happens when the device passes it. */
  readonly #pump: Pump | null = null;
  /** Whether a gradient is ready. Before that there is nothing to launch, and what happens is told as the host passes it. */
  #begun = false;
  /** Whether time is being counted. */
  #spending = false;
  /** Ends of all-to-alls that the device's computation is behind. */
  #behind: Place | null = null;

  /** `GradientReducer.begin` makes them. @ignore */
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
    this.#missing = new Map(tables.names);
    const { device, comm, scheduler } = options;
    const ahead = device.passing !== undefined && comm.size > 1;
    if (ahead && scheduler.pace === "device") this.#pump = new Pump(device, () => this.#check());
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
    const { stream } = this.#options.device;
    const ends = { kind: "allToAllEnds", node, chunk } as const;
    this.#on({ kind: "allToAllStarts", node, chunk });
    const after = this.#schedule.exclusive ? await this.#afterMicroOps() : undefined;
    const work = start(after);
    if (work !== COMPLETED) this.#flying.add(work);
    const pump = this.#begun ? this.#pump : null;
    let end: Place | null = null;
    if (pump && work.mark) {
      const tell = () => this.#spend(() => this.#tell(ends));
      this.#spend(() => pump.push(pump.allToAlls, work.mark!(), tell, [pump.compute.end]));
      end = pump.allToAlls.end;
    }
    if (pump) await turn(); // what has passed is told now, though the host has more to enqueue
    return async () => {
      await work.wait(stream);
      this.#flying.delete(work);
      if (end === null) this.#on(ends);
      else {
        this.#mark(ends);
        if (end.count > (this.#behind?.count ?? 0)) this.#behind = end;
      }
      if (this.#flying.size === 0) this.#letGo();
    };
  }

  /**
   * A point behind the micro-ops that have been launched, and behind all that the device's stream holds now. Where the host alone can wait, it
   * has waited then.
   */
  async #afterMicroOps(): Promise<StreamEvent | undefined> {
    const { stream } = this.#options.device;
    if (this.#held.length > 0) {
      for (const work of this.#flying) await work.wait(stream);
      this.#letGo();
    }
    const ends: StreamEvent[] = [];
    for (const { work, ended } of this.#launched) {
      if (ended) continue;
      if (work.end) ends.push(work.end);
      else await work.wait(stream);
    }
    return ends.length === 0 ? undefined : new Events([stream.record(), ...ends]);
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
    const missing = this.#missing.get(gradient)! - 1;
    if (missing > 0) {
      this.#missing.set(gradient, missing);
      return;
    }
    this.#missing.delete(gradient);
    this.#begun = true;
    if (recorder.capturing) this.#ready.set(gradient, timed(this.#options.device.stream));
    this.#on({ kind: "gradientReady", gradient });
  }

  async finish(): Promise<void> {
    const { device: { stream }, graph } = this.#options;
    if (this.#missing.size > 0) {
      const names = [...this.#missing.keys()].map((id) => {
        const node = graph.nodes[id];
        return node.kind === "gradient" ? node.name : String(id);
      });
      throw new Error(
        `Cannot end step ${this.number} as every gradient must be ready: current value lacks ${
          names.join(", ")
        }`,
      );
    }
    this.#mark({ kind: "passEnds" });
    const ends = { kind: "stepEnds" } as const;
    if (this.#pump) {
      const tell = () => this.#spend(() => this.#held.push(...this.#run.on(ends)));
      await this.#pump.finish(stream.mark!(), tell, this.#causes);
      await this.#startLast();
    } else this.#on(ends);
    for (const launched of this.#launched) {
      await launched.work.wait(stream);
      if (launched.bucket) this.#unpack(launched.microOp, launched.bucket);
    }
  }

  /** Starts what is left at the step's end, a few at a time: a GPU's queues are short, and the host would wait for room in them. */
  async #startLast(): Promise<void> {
    const { device } = this.#options, marks: StreamEvent[] = [];
    for (const microOp of this.#held.splice(0)) {
      this.#spend(() => this.#start(microOp));
      const mark = this.#launched.at(-1)!.work.mark?.();
      if (mark) marks.push(mark);
      if (marks.length > MOST_LAST) await device.passing!(marks.shift()!);
    }
  }

  [Symbol.dispose](): void {
    this.#pump?.[Symbol.dispose]();
  }

  #mark(boundary: Mark["boundary"]): void {
    this.#marks?.push({ boundary, event: timed(this.#options.device.stream) });
  }

  /** The program has come to a boundary. */
  #on(boundary: Boundary): void {
    if (boundary.kind !== "stepEnds") this.#mark(boundary);
    this.#spend(() => this.#come(boundary));
  }

  #come(boundary: Boundary): void {
    const pump = this.#pump;
    if (pump && this.#begun) {
      const passed = this.#options.device.stream.mark!();
      const tell = () => this.#spend(() => this.#tell(boundary));
      pump.push(pump.compute, passed, tell, this.#causes);
      return;
    }
    // The boundary first: at the start of an all-to-all, an end that is noticed only now must not let a micro-op slip in before it.
    this.#tell(boundary);
    if (boundary.kind !== "stepEnds") this.#noticeEnds(); // then nothing is left to launch
  }

  /** What the scheduler hears of before it hears of anything that the device's stream holds now. */
  get #causes(): readonly Place[] {
    return this.#behind ? [this.#behind] : [];
  }

  /** Does something whose time of the host is the schedule's. */
  #spend(action: () => void): void {
    if (this.#spending) return action();
    this.#spending = true;
    const start = now();
    try {
      action();
    } finally {
      this.#spending = false;
      this.#tables.spent.host_us += now() - start;
    }
  }

  #tell(boundary: Boundary): void {
    for (const microOp of this.#run.on(boundary)) this.#launch(microOp);
  }

  /** Tells the scheduler of micro-ops that have ended; asking also lets those in flight move on. */
  #noticeEnds(): void {
    for (let i = this.#oldest; i < this.#launched.length; i++) {
      const launched = this.#launched[i];
      if (!launched.ended && launched.work.done) this.#ends(launched);
      if (launched.ended && i === this.#oldest) this.#oldest++;
    }
  }

  #ends(launched: Launched): void {
    launched.ended = true;
    this.#tell({ kind: "microOpEnds" });
  }

  /** Throws if something that the device works on has failed, or has taken too long. */
  #check(): void {
    for (const work of this.#flying) void work.done;
    for (const { work, ended } of this.#launched) if (!ended) void work.done;
  }

  #launch(microOp: MicroOp): void {
    // Only the host can wait for an all-to-all that has no end on a device, and it must not wait here.
    const holds = this.#schedule.exclusive && [...this.#flying].some(({ end }) => !end);
    if (holds || this.#held.length > 0) this.#held.push(microOp);
    else this.#start(microOp);
  }

  /** Starts what was held back. */
  #letGo(): void {
    for (const microOp of this.#held.splice(0)) this.#start(microOp);
  }

  #start(microOp: MicroOp): void {
    const comm = this.#tables.replicas.get(microOp.parts[0].gradient) ?? this.#options.comm;
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
    const label = recorder.capturing ? this.#label(microOp) : undefined;
    const options = { after: this.#afterGradients(bucket !== null), label };
    const work = scatter
      ? comm.reduceScatter(data, data.rows(comm.rank * piece, (comm.rank + 1) * piece), options)
      : comm.allReduce(data, options);
    const launched = { microOp, work, bucket, ended: false };
    this.#launched.push(launched);
    const pump = this.#pump;
    const tell = () => this.#spend(() => this.#ends(launched));
    pump?.push(pump.reductions, work.mark?.() ?? null, tell);
  }

  /** What a micro-op is ordered after; undefined is all that the device's stream holds now. */
  #afterGradients(packed: boolean): StreamEvent | undefined {
    if (this.#pump && !packed) return PASSED; // the pump has seen that the gradient is complete
    if (!this.#schedule.exclusive) return undefined;
    const ends = [...this.#flying].flatMap(({ end }) => end ?? []);
    if (ends.length === 0) return undefined;
    return new Events([this.#options.device.stream.record(), ...ends]);
  }

  #scatters(microOp: MicroOp): boolean {
    return (this.#options.scatter ?? false) && groupOf(this.#options.graph, microOp) === "world";
  }

  /** What the trace says of a micro-op; readiness is the device's, and on the clock of the span. */
  #label(microOp: MicroOp): Label {
    const { graph } = this.#options, priority = this.#launched.length;
    const ready = microOp.parts.map(({ gradient }) => this.#ready.get(gradient));
    const parts = microOp.parts.slice(-1);
    const last: SpanArgs = microOp.parts.length > 1
      ? { last: microOpName(graph, { ...microOp, parts }) }
      : {};
    return {
      name: microOpName(graph, microOp),
      track: "gradients",
      args: (start_us) => {
        const ready_us = ready.reduce((last, event) => Math.max(last, event?.time() ?? NaN), 0);
        const args: SpanArgs = { priority, ...last };
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

/** Lets the event loop turn once. */
function turn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

/** The present end of a stream's work, with the device's time. */
function timed(stream: Stream): StreamEvent {
  return stream.recordTimed?.() ?? stream.record();
}
