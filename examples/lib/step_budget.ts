// How many steps fit into a time: measured in the first steps and corrected twice soon after; from then on it is only lowered, so that
// a machine that slows down still ends in time. The number is agreed on by all ranks. A run with a time budget is the only thing
// here that depends on a clock.

import type { Communicator } from "../../collectives/types.ts";

/** Steps that warm up; steps after which the number is set; steps between later looks. */
const WARM_UP = 5, SET: readonly number[] = [15, 40, 80], WATCH = 100;

/** What a {@linkcode StepBudget} starts from. */
export interface StepBudgetOptions {
  /** Most steps. */
  readonly steps: number;
  /** Seconds of training, or null. */
  readonly seconds: number | null;
  /** What an earlier part of the run had {@linkcode StepBudget.settled}; only a run with a time budget keeps to it. */
  readonly settled?: { readonly steps?: number };
  /** Step that the run goes on from. */
  readonly from: number;
}

/** The number of steps of a run. */
export class StepBudget {
  /** Number of the last step, as far as it is settled. */
  steps: number;
  readonly #world: Communicator;
  readonly #budget_ms: number | null;
  readonly #most: number;
  readonly #from: number;
  readonly #began = performance.now();
  #lastTime = 0;
  #lastStep = 0;
  #settled: boolean;

  /**
   * Starts the clock.
   *
   * @param world All ranks.
   * @param options Steps and time.
   */
  constructor(world: Communicator, options: StepBudgetOptions) {
    this.#world = world;
    this.#from = options.from;
    this.#most = options.steps;
    const settled = options.seconds === null ? undefined : options.settled?.steps;
    this.steps = settled ?? options.steps;
    this.#settled = settled !== undefined;
    this.#budget_ms = options.seconds === null || this.#settled ? null : options.seconds * 1000;
  }

  /** The number of steps to keep to after a restart; absent until a time budget has settled it. */
  get settled(): { readonly steps?: number } {
    return this.#settled ? { steps: this.steps } : {};
  }

  /**
   * Call after every step, on every rank.
   *
   * @param row The step.
   * @returns Whether the number of steps has changed.
   */
  async onStep(row: { readonly step: number }): Promise<boolean> {
    if (this.#budget_ms === null) return false;
    const done = row.step - this.#from;
    if (done === WARM_UP) this.#mark(row.step);
    const sets = SET.includes(done);
    if (!sets && !(done > SET[0] && done % WATCH === 0)) return false;
    const perStep = (performance.now() - this.#lastTime) / (row.step - this.#lastStep);
    const left = this.#budget_ms - (performance.now() - this.#began);
    const fits = Float64Array.of(row.step + Math.max(1, Math.floor(left / perStep)));
    await this.#world.broadcast(fits);
    this.#mark(row.step);
    this.#settled = true;
    const before = this.steps;
    // Later a plan is only changed if it would be late by more than 3 %.
    const late = fits[0] < before - 0.03 * (before - row.step);
    if (sets || late) this.steps = Math.min(this.#most, fits[0]);
    return this.steps !== before;
  }

  #mark(step: number): void {
    this.#lastTime = performance.now();
    this.#lastStep = step;
  }
}
