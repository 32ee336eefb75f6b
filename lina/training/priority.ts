// Strict priority without partition: whole gradients, one at a time, while no all-to-all runs. The paper's step on the way to Lina (section
// 3.2, figure 7b), which a long gradient that has just begun makes worse than no scheduling at all: here for comparison.

import { reducedGradients } from "../../moe/graph.ts";
import type {
  Boundary,
  CollectiveScheduler,
  LaunchState,
  Schedule,
  StepGraph,
} from "../../moe/hooks.ts";
import { partition } from "./partition.ts";

/**
 * Whole gradients, one after the other in the order in which they become ready, each launched when no all-to-all has been started that has
 * not ended, however soon the next one comes.
 *
 * Each rank decides by what it sees to be running. So the schedule must not be exclusive: with an all-to-all that waits for a micro-op of
 * its own rank, one rank could hold its all-to-all back for a gradient that another rank launches only after that very all-to-all, and both
 * would wait forever. As it is, an all-to-all waits for nothing, and shares the link with at most one gradient that was faster.
 */
export class Priority implements CollectiveScheduler {
  /** Name for traces and tables. */
  readonly name: string = "priority";
  /** Decides by what is running. */
  readonly pace = "device";

  /**
   * Takes the gradients as they are.
   *
   * @param graph The step.
   * @returns One micro-op per gradient, in the order of the graph; all-to-alls stay whole.
   */
  plan(graph: StepGraph): Schedule {
    return { microOps: partition(reducedGradients(graph), Infinity), chunks: new Map() };
  }

  /**
   * One goes if nothing runs; at the step's end the rest goes, as no all-to-all comes any more.
   *
   * @param boundary What has happened.
   * @param state What is ready, and what runs.
   * @returns 0 or 1; all at the step's end.
   */
  launch(boundary: Boundary, state: LaunchState): number {
    if (boundary.kind === "stepEnds") return state.ready;
    return state.running === 0 && state.allToAlls === 0 ? Math.min(1, state.ready) : 0;
  }
}
