// Reduces gradients over the ranks while the backward pass runs, on communicators of their own: plans once per graph, checks the plan, and
// runs every step by it. What moves bytes within a step is `reduction.ts`; which micro-op goes when is the scheduler's decision (`hooks.ts`)
// and the bookkeeping `schedule.ts`'s.

import type { Communicator } from "../collectives/types.ts";
import type { Device } from "../tensor/device.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { CollectiveScheduler, NodeId, Schedule, StepGraph } from "./hooks.ts";
import type { Parameter } from "./parameter.ts";
import { type BeginOptions, type ReducingStep, Reduction, type Tables } from "./reduction.ts";
import { checkSchedule, ScheduleRun } from "./schedule.ts";
import type { SeatGradient } from "./seats.ts";

export type { BeginOptions, Mark, ReducingStep } from "./reduction.ts";

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
   * Time of the host in µs that all steps so far have spent on the schedule: asking the scheduler, launching micro-ops, noting and noticing
   * what the device passes. Other threads' sleep is not in it.
   */
  get host_us(): number {
    return this.#tables.spent.host_us;
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
  return { gradients, names, allToAlls, flat, replicas, spent: { host_us: 0 } };
}
