// The training schedulers by name, as command lines and benchmarks ask for them. The schedulers themselves are in files of their own.

import { Fifo, type FifoOptions } from "../../moe/fifo.ts";
import type { CollectiveScheduler } from "../../moe/hooks.ts";
import { Lina, type LinaOptions } from "./lina.ts";
import { Outside } from "./outside.ts";
import { Priority } from "./priority.ts";

/** Name of a training scheduler. */
export type SchedulerName = "fifo" | "outside" | "priority" | "lina";

/** The names, from the plainest scheduler on. */
export const SCHEDULER_NAMES: readonly SchedulerName[] = ["fifo", "outside", "priority", "lina"];

/** Sizes for all schedulers; each takes those that it knows: buckets for `fifo` and `outside`, micro-ops and link for `lina`. */
export interface SchedulerOptions extends FifoOptions, LinaOptions {}

/**
 * Makes a training scheduler. All change only when gradients are reduced, never what is summed:
 *
 * - `fifo`: buckets, reduced as soon as they are full, beside whatever all-to-all runs;
 * - `outside`: the same buckets, reduced outside the MoE layers only;
 * - `priority`: whole gradients, one at a time, launched while no all-to-all runs;
 * - `lina`: micro-ops, one at a time, launched while no all-to-all runs or is imminent.
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
    default:
      throw new RangeError(
        `Cannot schedule gradients as the name must be one of ${
          SCHEDULER_NAMES.join(", ")
        }: current value is ${name}`,
      );
  }
}
