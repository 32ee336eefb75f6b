// The training schedulers by name, as command lines and benchmarks ask for them. The schedulers themselves are in files of their own.

import { Fifo, type FifoOptions } from "../../moe/fifo.ts";
import type { CollectiveScheduler, StepGraph } from "../../moe/hooks.ts";
import { Lina, type LinaOptions } from "./lina.ts";
import { Outside } from "./outside.ts";
import { Planned, type PlannedOptions } from "./planned.ts";
import { Priority } from "./priority.ts";

/** Name of a training scheduler. */
export type SchedulerName =
  | "fifo"
  | "outside"
  | "priority"
  | "lina"
  | "lina+pipeline"
  | "planned"
  | "planned+pipeline";

/** The names, from the plainest scheduler on. */
export const SCHEDULER_NAMES: readonly SchedulerName[] = [
  "fifo",
  "outside",
  "priority",
  "lina",
  "lina+pipeline",
  "planned",
  "planned+pipeline",
];

/**
 * Options for all schedulers; each takes those that it knows: buckets for `fifo` and `outside`, micro-ops and link for `lina`, profile and costs for
 * `planned`.
 */
export interface SchedulerOptions extends FifoOptions, LinaOptions {
  /** What `planned` plans from; without it, it acts as `outside`. */
  readonly profile?: PlannedOptions["profile"];
  /** Costs of the step's collectives, for `planned`. */
  readonly costs?: PlannedOptions["costs"];
  /** Part of the time between two all-to-alls that `planned` leaves free. @default {0.05} */
  readonly margin?: number;
  /** Slices of every all-to-all of `+pipeline`. @default {2; `planned+pipeline` takes 1 where that is faster by its prediction} */
  readonly chunks?: number;
}

/**
 * Makes a training scheduler. All change only when gradients are reduced, never what is summed:
 *
 * - `fifo`: buckets, reduced as soon as they are full, beside whatever all-to-all runs;
 * - `outside`: the same buckets, reduced outside the MoE layers only;
 * - `priority`: whole gradients, one at a time, launched while no all-to-all runs;
 * - `lina`: micro-ops, one at a time, launched while no all-to-all runs or is imminent;
 * - `lina+pipeline`: the same, and tokens travel in slices, so that experts work on one while others are under way;
 * - `planned`: micro-ops that fit into the measured gaps between all-to-alls, at boundaries fixed beforehand;
 * - `planned+pipeline`: the same, with slices.
 *
 * @param name Which.
 * @param options Sizes of what it reduces at once.
 * @returns The scheduler.
 * @throws {RangeError} If there is none of that name, or a size that it takes is impossible.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 *
 * const scheduler = createScheduler("lina", { linkBytesPerSecond: 1.25e9 }); // 10 Gbit/s
 * assert.equal(scheduler.name, "lina");
 * ```
 */
export function createScheduler(
  name: SchedulerName,
  options: SchedulerOptions = {},
): CollectiveScheduler {
  switch (name) {
    case "fifo":
      return new Fifo(options);
    case "outside":
      return new Outside(options);
    case "priority":
      return new Priority();
    case "lina":
      return new Lina(options);
    case "lina+pipeline":
      return pipelined(new Lina(options), options.chunks);
    case "planned":
      return new Planned({ ...options, chunks: 1 });
    case "planned+pipeline":
      return new Planned({ ...options, chunks: options.chunks ?? [CHUNKS, 1] });
    default:
      throw new RangeError(
        `Cannot schedule gradients as the name must be one of ${
          SCHEDULER_NAMES.join(", ")
        }: current value is ${name}`,
      );
  }
}

/** Slices of an all-to-all unless another number is asked for. */
const CHUNKS = 2;

/**
 * A scheduler whose all-to-alls are cut into slices, so that experts work on one slice while others are under way.
 *
 * @param scheduler Decides on the gradients.
 * @param chunks Slices of every layer's all-to-alls. @default {2}
 * @returns The scheduler, called as the other with `+pipeline`.
 * @throws {RangeError} If the slices are not a whole number >= 1.
 */
export function pipelined(
  scheduler: CollectiveScheduler,
  chunks: number = CHUNKS,
): CollectiveScheduler {
  if (!(Number.isSafeInteger(chunks) && chunks >= 1)) {
    throw new RangeError(
      `Cannot cut all-to-alls as "chunks" must be a whole number >= 1: current value is ${chunks}`,
    );
  }
  return {
    name: `${scheduler.name}+pipeline`,
    pace: scheduler.pace,
    plan: (graph) => ({ ...scheduler.plan(graph), chunks: chunksOf(graph, chunks) }),
    launch: (boundary, state) => scheduler.launch(boundary, state),
  };
}

/** The same number of slices for every layer that has all-to-alls. */
function chunksOf({ nodes }: StepGraph, chunks: number): Map<number, number> {
  const layers = new Map<number, number>();
  for (const node of nodes) if (node.kind === "allToAll") layers.set(node.layer, chunks);
  return layers;
}
