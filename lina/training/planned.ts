// One static interleaving of gradients and all-to-alls, planned from measured times: how long each piece of computation takes (profile.ts) and what
// the link costs (links.ts) say when the link is idle between two all-to-alls, and gradients are cut to fit there. All ranks plan from the same
// numbers, so all launch alike: nobody looks at a clock, nothing is polled, and no order of ranks can deadlock. It measures nothing itself.
//
// Several plans are made and run on the timeline's virtual clock, and the fastest is taken: gaps filled with small and with large micro-ops, and what
// the other schedulers would launch, written down. So by its own model it is never slower than those.

import { Fifo } from "../../moe/fifo.ts";
import type {
  Boundary,
  CollectiveScheduler,
  LaunchState,
  Schedule,
  StepGraph,
} from "../../moe/hooks.ts";
import { boundaryKey, QuietStep } from "./filling.ts";
import { Lina } from "./lina.ts";
import type { StepCosts } from "./links.ts";
import { Outside } from "./outside.ts";
import { Priority } from "./priority.ts";
import { type ProfiledTimes, profiledTimes, type StepProfile } from "./profile.ts";
import { simulate, type Timeline, timeline } from "./timeline.ts";

/** Options of {@linkcode Planned}. */
export interface PlannedOptions {
  /** Times of the step, alike on all ranks; without it, or with one of another step, it acts as `outside`. */
  readonly profile?: StepProfile;
  /** Costs of the step's collectives, alike on all ranks; without them it acts as `outside`. */
  readonly costs?: StepCosts;
  /**
   * Part of the time between two all-to-alls that is left free, as times vary: 0 to less than 1.
   * @default {twice the profile's jitter, 0.02 at least and 0.2 at most; 0.05 if it has none}
   */
  readonly margin?: number;
  /** Slices of every layer's all-to-alls, or several such numbers, of which the best by prediction is taken. @default {1} */
  readonly chunks?: number | readonly number[];
  /** Bytes of a bucket while it acts as `outside`, and of the buckets that its plans are compared with. @default {26_214_400} */
  readonly bucketBytes?: number;
}

/** Least link time of what is put between all-to-alls, in latencies of a reduction: the plans that are compared. */
const LEAST_LATENCIES: readonly number[] = [0.5, 2, 8];
/** Link times of `lina`'s micro-ops that are compared, in µs: its own size, and others. */
const MICRO_OPS_US: readonly number[] = [2400, 600, 1200, 4800];
/** A plan is better than another if it is shorter by more than rounding. */
const ROUNDING = 1e-9;

/** A schedule with how many micro-ops are launched by which boundary. */
interface Plan {
  readonly schedule: Schedule;
  readonly launched: ReadonlyMap<string, number>;
}

/** Micro-ops that fit into the measured gaps between all-to-alls, launched at boundaries that were fixed beforehand. */
export class Planned implements CollectiveScheduler {
  /** Name for traces and tables. */
  readonly name: string;
  readonly #options: PlannedOptions;
  readonly #margin: number;
  readonly #chunks: readonly number[];
  readonly #outside: Outside;
  readonly #launched = new WeakMap<Schedule, ReadonlyMap<string, number>>();

  /**
   * Makes the scheduler.
   *
   * @param options Profile and costs, and how many slices all-to-alls may be cut into.
   * @throws {RangeError} If the margin is not in [0, 1), or slices are not whole numbers >= 1.
   */
  constructor(options: PlannedOptions = {}) {
    const { profile, chunks = 1, bucketBytes } = options;
    const { margin = marginOf(profile) } = options;
    if (!(margin >= 0 && margin < 1)) {
      throw new RangeError(
        `Cannot plan a step as "margin" must be at least 0 and below 1: current value is ${margin}`,
      );
    }
    this.#chunks = typeof chunks === "number" ? [chunks] : chunks;
    if (
      this.#chunks.length === 0 || this.#chunks.some((n) => !(Number.isSafeInteger(n) && n > 0))
    ) {
      throw new RangeError(
        `Cannot cut all-to-alls as "chunks" must be whole numbers >= 1: current value is ${chunks}`,
      );
    }
    this.name = this.#chunks.some((n) => n > 1) ? "planned+pipeline" : "planned";
    this.#options = options;
    this.#margin = margin;
    this.#outside = new Outside({ bucketBytes });
  }

  /**
   * Plans the step: pure, and alike on all ranks whose options are.
   *
   * @param graph The step.
   * @returns Micro-ops in the order in which they are launched. All-to-alls come after those before them, unless a plan that shares the link is
   * faster.
   */
  plan(graph: StepGraph): Schedule {
    const times = this.#timesOf(graph);
    if (!times) {
      return { ...this.#outside.plan(graph), chunks: chunksOf(graph, this.#chunks[0]) };
    }
    let best: Plan | null = null, least_us = Infinity;
    for (const count of this.#chunks) {
      for (const plan of this.#candidates(graph, times, chunksOf(graph, count))) {
        const options = { ...times, schedule: plan.schedule, quiet: true };
        const { end_us } = simulate(graph, following(plan), options);
        if (best && end_us >= least_us * (1 - ROUNDING)) continue;
        best = plan;
        least_us = end_us;
      }
    }
    this.#launched.set(best!.schedule, best!.launched);
    return best!.schedule;
  }

  /**
   * What was planned for a boundary goes; at the step's end all that is left.
   *
   * @param boundary What has happened.
   * @param state What is ready, and how many micro-ops have gone.
   * @returns How many go now.
   */
  launch(boundary: Boundary, state: LaunchState): number {
    if (boundary.kind === "stepEnds") return state.ready;
    const launched = this.#launched.get(state.schedule);
    if (!launched) return this.#outside.launch(boundary, state);
    return dueAt(launched, boundary, state);
  }

  /**
   * What the plan is expected to take, from the begin of the pass that reduces to the end of the last reduction.
   *
   * @param graph The step.
   * @returns Time in µs; null if there is no profile of this step, or no costs.
   */
  predict(graph: StepGraph): number | null {
    return this.course(graph)?.end_us ?? null;
  }

  /**
   * The course that the plan is expected to take.
   *
   * @param graph The step.
   * @returns The step on a virtual clock; null if there is no profile of this step, or no costs.
   */
  course(graph: StepGraph): Timeline | null {
    const times = this.#timesOf(graph);
    return times && timeline(graph, this, times);
  }

  /** Durations and costs, where they are known of all of the step. */
  #timesOf(graph: StepGraph): ProfiledTimes | null {
    const { profile, costs } = this.#options;
    return profile && costs ? profiledTimes(graph, profile, costs) : null;
  }

  /** Plans to compare; of those that take as long, the first is taken. */
  *#candidates(
    graph: StepGraph,
    times: ProfiledTimes,
    chunks: ReadonlyMap<number, number>,
  ): Generator<Plan> {
    const quiet = new QuietStep(graph, { ...times, chunks });
    const filled = LEAST_LATENCIES.map((least) => {
      const { microOps, launched } = quiet.fill({ margin: this.#margin, least });
      return { schedule: { microOps, chunks, exclusive: true }, launched };
    });
    yield* filled;
    const { bucketBytes } = this.#options;
    const written = (scheduler: CollectiveScheduler) => writeDown(graph, scheduler, times, chunks);
    yield written(this.#outside);
    const rate = times.costs.allToAll(2 ** 20), bytes_per_us = rate.bytes / rate.link_us;
    const shared: Plan[] = [written(new Fifo({ bucketBytes }))];
    if (bytes_per_us > 0 && bytes_per_us < Infinity) {
      for (const micro_us of MICRO_OPS_US) {
        const microOpBytes = Math.max(64, Math.round(micro_us * bytes_per_us));
        yield written(new Outside({ bucketBytes: microOpBytes }));
        shared.push(written(new Lina({ microOpBytes })));
      }
    }
    shared.push(written(new Priority()));
    for (const plan of shared) {
      yield { ...plan, schedule: { ...plan.schedule, exclusive: true } };
    }
    for (const plan of filled) {
      shared.push({ ...plan, schedule: { ...plan.schedule, exclusive: false } });
    }
    yield* shared;
  }
}

/** A margin that covers what steps were seen to vary by. */
function marginOf(profile: StepProfile | undefined): number {
  const jitter = profile?.jitter;
  return jitter === undefined ? 0.05 : Math.min(0.2, Math.max(0.02, 2 * jitter));
}

/** What a scheduler launches in the step as it is known, boundary by boundary. What runs as another ends is launched with that, behind it. */
function writeDown(
  graph: StepGraph,
  scheduler: CollectiveScheduler,
  times: ProfiledTimes,
  chunks: ReadonlyMap<number, number>,
): Plan {
  const schedule = { ...scheduler.plan(graph), chunks }, launched = new Map<string, number>();
  let key = "", count = 0;
  simulate(graph, {
    name: scheduler.name,
    pace: scheduler.pace,
    plan: () => schedule,
    launch: (boundary, state) => {
      if (boundary.kind !== "microOpEnds") key = boundaryKey(boundary);
      const now = scheduler.launch(boundary, state);
      launched.set(key, count += now);
      return now;
    },
  }, { ...times, schedule, endsTold: "at once", quiet: true });
  return { schedule, launched };
}

/** A scheduler that follows a plan. */
function following({ schedule, launched }: Plan): CollectiveScheduler {
  return {
    name: "planned",
    plan: () => schedule,
    launch: (boundary, state) => {
      return boundary.kind === "stepEnds" ? state.ready : dueAt(launched, boundary, state);
    },
  };
}

/** Micro-ops that were to be launched by a boundary and have not been: as many of them as are ready. */
function dueAt(
  launched: ReadonlyMap<string, number>,
  boundary: Boundary,
  { next, ready }: LaunchState,
): number {
  return Math.max(0, Math.min(ready, (launched.get(boundaryKey(boundary)) ?? 0) - next));
}

/** The same number of slices for every layer that has all-to-alls. */
function chunksOf({ nodes }: StepGraph, chunks: number): Map<number, number> {
  const layers = new Map<number, number>();
  if (chunks === 1) return layers;
  for (const node of nodes) if (node.kind === "allToAll") layers.set(node.layer, chunks);
  return layers;
}
