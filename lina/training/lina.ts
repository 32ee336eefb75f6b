// The paper's training scheduler (section 4): all-to-alls first. Gradients are cut into micro-ops that go one at a time while the link has
// nothing more urgent to carry, and are held back as soon as an all-to-all is about to come. Pipelined all-to-alls and packed experts are
// not here.

import { reducedGradients } from "../../moe/graph.ts";
import type {
  Boundary,
  CollectiveScheduler,
  LaunchState,
  Schedule,
  StepGraph,
} from "../../moe/hooks.ts";
import { partition } from "./partition.ts";

/** Seconds of link time that a micro-op takes: the paper's 30 MB at its 100 Gbit/s. */
const MICRO_OP_SECONDS = 0.0024;

/** Bytes of a micro-op where nothing is known of the link: 2.4 ms at 10 Gbit/s. */
export const MICRO_OP_BYTES: number = 3_000_000;

/** Options of {@linkcode Lina}. */
export interface LinaOptions {
  /** Most bytes of a micro-op, at least 16. @default {2.4 ms of the link's rate, or 3_000_000 if that is not given} */
  readonly microOpBytes?: number;
  /** The link's rate in one direction in bytes per second; of no interest if `microOpBytes` is given. */
  readonly linkBytesPerSecond?: number;
}

/**
 * Micro-ops of single gradients, one at a time in the order in which gradients become ready, launched when no all-to-all has been started
 * that has not ended, and none from the start of a combine's backward to the all-to-all that follows it. So an all-to-all meets at most one
 * micro-op on the link, of a known size.
 *
 * Each rank decides by what it sees to be running, so the schedule must not be exclusive, for the reason that `Priority` has. On a GPU it is
 * told what the device passes, by threads that wait for events; on a CPU what its host passes.
 */
export class Lina implements CollectiveScheduler {
  /** Name for traces and tables. */
  readonly name: string = "lina";
  /** Decides by what is running. */
  readonly pace = "device";
  /** Most bytes of a micro-op. */
  readonly microOpBytes: number;

  /**
   * Makes the scheduler.
   *
   * @param options Size of the micro-ops, or the link's rate.
   * @throws {RangeError} If a micro-op would have less than 16 bytes, or the rate is no positive number.
   */
  constructor(options: LinaOptions = {}) {
    const { linkBytesPerSecond: rate } = options;
    if (rate !== undefined && !(rate > 0 && rate < Infinity)) {
      throw new RangeError(
        `Cannot size micro-ops as "linkBytesPerSecond" must be a number above 0: current value is ${rate}`,
      );
    }
    this.microOpBytes = options.microOpBytes ??
      (rate === undefined ? MICRO_OP_BYTES : Math.round(rate * MICRO_OP_SECONDS));
    partition([], this.microOpBytes); // sizes that it refuses are refused before ranks meet
  }

  /**
   * Cuts the gradients.
   *
   * @param graph The step.
   * @returns Micro-ops of at most `microOpBytes`, in the order of the graph; all-to-alls stay whole.
   */
  plan(graph: StepGraph): Schedule {
    return { microOps: partition(reducedGradients(graph), this.microOpBytes), chunks: new Map() };
  }

  /**
   * One goes if nothing runs and no all-to-all is imminent; at the step's end the rest goes, as no all-to-all comes any more.
   *
   * @param boundary What has happened.
   * @param state What is ready, what runs, and what is imminent.
   * @returns 0 or 1; all at the step's end.
   */
  launch(boundary: Boundary, state: LaunchState): number {
    if (boundary.kind === "stepEnds") return state.ready;
    const idle = state.running === 0 && state.allToAlls === 0;
    return idle && !state.imminent ? Math.min(1, state.ready) : 0;
  }
}
