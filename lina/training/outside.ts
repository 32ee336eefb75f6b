// Gradients and all-to-alls never share a link because gradients wait: buckets are reduced only outside the MoE layers. The cheap, strong
// baseline that needs no look at what is running, so that all ranks decide alike.

import { Fifo, type FifoOptions } from "../../moe/fifo.ts";
import type {
  Boundary,
  CollectiveScheduler,
  LaunchState,
  Schedule,
  StepGraph,
} from "../../moe/hooks.ts";

/**
 * The buckets of {@linkcode Fifo}, launched outside the MoE region of the backward pass only, which reaches from the start of a combine's
 * backward to the end of the MoE layer's. The next all-to-all starts after them, so the two never run together.
 */
export class Outside implements CollectiveScheduler {
  /** Name for traces and tables. */
  readonly name: string = "outside";
  readonly #buckets: Fifo;

  /**
   * Makes the scheduler.
   *
   * @param options Size of the buckets.
   * @throws {RangeError} If the size is not positive.
   */
  constructor(options: FifoOptions = {}) {
    this.#buckets = new Fifo(options);
  }

  /**
   * Fills the buckets.
   *
   * @param graph The step.
   * @returns The buckets of {@linkcode Fifo}, exclusive with all-to-alls.
   */
  plan(graph: StepGraph): Schedule {
    return { ...this.#buckets.plan(graph), exclusive: true };
  }

  /**
   * Everything that is ready goes, outside the MoE layers.
   *
   * @param _boundary What has happened; of no interest here.
   * @param state What is ready, and where the step is.
   * @returns All of it, or nothing.
   */
  launch(_boundary: Boundary, state: LaunchState): number {
    return state.insideMoe ? 0 : state.ready;
  }
}
