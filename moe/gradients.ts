// Reduces gradients over the ranks while the backward pass runs: launches the micro-ops that a scheduler lets go, on a communicator of
// its own. Which goes when is the scheduler's decision (`hooks.ts`) and the bookkeeping `schedule.ts`'s; here bytes move.

import { COMPLETED } from "../collectives/progress.ts";
import type { Communicator, Work } from "../collectives/types.ts";
import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
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
import type { Step } from "./step.ts";

/** What {@linkcode GradientReducer} works with. */
export interface GradientReducerOptions {
  /** The step, alike on all ranks. */
  readonly graph: StepGraph;
  /** Decides on micro-ops and their order. */
  readonly scheduler: CollectiveScheduler;
  /** All ranks; gradients use this communicator alone. */
  readonly comm: Communicator;
  /** Where the gradients are. */
  readonly device: Device;
  /** The parameters of the graph's gradients. */
  readonly parameters: readonly Parameter[];
  /** Whether each rank gets the sums of its pieces only, as shards.ts has them; the rest of the gradients is then of no use. @default {false} */
  readonly scatter?: boolean;
}

/** A step whose gradients are being reduced. */
export interface ReducingStep extends Step {
  /** Launches what is left and waits: after it every gradient of group `world`, or this rank's pieces, is the sum over all ranks. */
  finish(): Promise<void>;
}

/** Sums the gradients of group `world` over the ranks, step after step. */
export class GradientReducer {
  /** What the scheduler planned. */
  readonly schedule: Schedule;
  readonly #options: GradientReducerOptions;
  readonly #nodes = new Map<string, NodeId>();
  readonly #allToAlls = new Map<string, NodeId>();
  /** Gradients as flat arrays, by node. */
  readonly #flat = new Map<NodeId, Tensor>();

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
    const grads = new Map(options.parameters.map(({ name, grad }) => [name, grad]));
    for (const node of options.graph.nodes) {
      if (node.kind === "allToAll") {
        this.#allToAlls.set(`${node.layer} ${node.phase} ${node.role}`, node.id);
      } else if (node.kind === "gradient" && node.group === "world") {
        const grad = grads.get(node.name);
        if (grad?.size !== node.elements) {
          throw new RangeError(
            `Cannot reduce ${node.name} as its gradient must have ${node.elements} elements: current value is ${grad?.size}`,
          );
        }
        this.#nodes.set(node.name, node.id);
        this.#flat.set(node.id, grad.reshape(grad.size));
      }
    }
    for (const { parts } of this.schedule.microOps) {
      const dtypes = new Set(parts.map(({ gradient }) => this.#flat.get(gradient)!.dtype));
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
   * Begins the backward pass whose gradients are reduced: the last one of a step.
   *
   * @param number Number of the pass.
   * @param options Whether it is the first pass of its step, too. @default {{firstPass: false}}
   * @returns The step to run the model in; finish it.
   */
  begin(number: number, options: { readonly firstPass?: boolean } = {}): ReducingStep {
    return new Reduction(
      { number, firstPass: options.firstPass ?? false },
      this.#options,
      new ScheduleRun(this.#options.scheduler, this.schedule),
      {
        gradients: this.#nodes,
        allToAlls: this.#allToAlls,
        flat: this.#flat,
        exclusive: this.schedule.exclusive ?? false,
      },
    );
  }
}

interface Tables {
  readonly gradients: ReadonlyMap<string, NodeId>;
  readonly allToAlls: ReadonlyMap<string, NodeId>;
  readonly flat: ReadonlyMap<NodeId, Tensor>;
  /** Whether all-to-alls start after the micro-ops before them. */
  readonly exclusive: boolean;
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
  readonly #run: ScheduleRun;
  readonly #tables: Tables;
  readonly #launched: Launched[] = [];
  /** The first launched micro-op that was not seen to end. */
  #oldest = 0;

  constructor(
    pass: { readonly number: number; readonly firstPass: boolean },
    options: GradientReducerOptions,
    run: ScheduleRun,
    tables: Tables,
  ) {
    this.number = pass.number;
    this.firstPass = pass.firstPass;
    this.#options = options;
    this.#run = run;
    this.#tables = tables;
  }

  async allToAll(
    where: Parameters<Step["allToAll"]>[0],
    start: () => Work,
  ): Promise<void> {
    const node = this.#tables.allToAlls.get(`${where.layer} ${where.phase} ${where.role}`);
    if (node === undefined) {
      throw new RangeError(
        `Cannot run an all-to-all as it must be in the step graph: current value is layer ${where.layer} ${where.phase} ${where.role}`,
      );
    }
    this.#on({ kind: "allToAllStarts", node });
    const { stream } = this.#options.device;
    if (this.#tables.exclusive) {
      for (const { work, ended } of this.#launched) if (!ended) await work.wait(stream);
    }
    await start().wait(stream);
    this.#on({ kind: "allToAllEnds", node });
  }

  combineBackwardStarts(layer: number): void {
    this.#on({ kind: "combineBackwardStarts", layer });
  }

  layerBackwardEnds(layer: number): void {
    this.#on({ kind: "layerBackwardEnds", layer });
  }

  gradientReady(name: string): void {
    const gradient = this.#tables.gradients.get(name);
    // Gradients of experts are reduced among their replicas, by the experts' store.
    if (gradient !== undefined) this.#on({ kind: "gradientReady", gradient });
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
    this.#on({ kind: "stepEnds" });
    for (const launched of this.#launched) {
      await launched.work.wait(this.#options.device.stream);
      if (launched.bucket) this.#unpack(launched.microOp, launched.bucket);
    }
  }

  #on(boundary: Boundary): void {
    this.#noticeEnds();
    for (const microOp of this.#run.on(boundary)) this.#launch(microOp);
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
    if (this.#options.comm.size === 1) {
      this.#launched.push({ microOp, work: COMPLETED, bucket: null, ended: false });
      return;
    }
    const { comm, scatter } = this.#options;
    const piece = scatter ? pieceElements(microOp, comm.size) : 0;
    const size = elementsOf(microOp.parts);
    const packs = microOp.parts.length > 1 || (scatter && size !== piece * comm.size);
    const bucket = packs ? this.#pack(microOp, scatter ? piece * comm.size : size) : null;
    const data = bucket ?? this.#part(microOp.parts[0]);
    const work = scatter
      ? comm.reduceScatter(data, data.rows(comm.rank * piece, (comm.rank + 1) * piece))
      : comm.allReduce(data);
    this.#launched.push({ microOp, work, bucket, ended: false });
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
    const { comm, scatter } = this.#options;
    const parts = scatter ? pieceOf(microOp, comm.rank, comm.size) : microOp.parts;
    let at = scatter ? comm.rank * pieceElements(microOp, comm.size) : 0;
    for (const part of parts) {
      ops.copy(bucket.rows(at, at += part.end - part.start), this.#part(part));
    }
    bucket[Symbol.dispose]();
  }
}
