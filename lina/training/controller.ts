// Fits a running training to what is measured of it: profiles steps and plans their collectives, plans anew when steps take longer or shorter
// than that, and packs experts until their work hides the all-to-alls. It decides between steps, from numbers that all ranks agree on, by
// pure policies (planned.ts, packing.ts); the trainer does what it decides.

import type { Communicator } from "../../collectives/types.ts";
import type { Mark } from "../../moe/gradients.ts";
import type { CollectiveScheduler, StepGraph } from "../../moe/hooks.ts";
import { replicatedPlacement } from "../../moe/placement.ts";
import { regularReplicas } from "../../moe/plan.ts";
import type { Trainer } from "../../moe/trainer.ts";
import type { Device } from "../../tensor/device.ts";
import { OutOfMemoryError } from "../../tensor/memory_error.ts";
import { now } from "../../trace/mod.ts";
import { stepCosts } from "./links.ts";
import { type MeasuredLinks, measureLinks } from "./measure_links.ts";
import { type ChunkTimes, chunkTimes, median, packedBytes, Packing } from "./packing.ts";
import { agreeProfile, profiledTimes, readProfile, type StepProfile } from "./profile.ts";
import { createScheduler, type SchedulerName, type SchedulerOptions } from "./schedulers.ts";
import { timesOf } from "./measures.ts";
import { timeline } from "./timeline.ts";

/** What a {@linkcode TrainingController} works with; all but trainer, device and outputs is alike on all ranks. */
export interface TrainingControllerOptions extends SchedulerOptions {
  /** What is controlled; its scheduler is replaced by `policy`. */
  readonly trainer: Trainer;
  /** All ranks. */
  readonly world: Communicator;
  /** Where the model lives. */
  readonly device: Device;
  /** Decides when gradients are reduced. */
  readonly policy: SchedulerName;
  /** Copies of every expert, or as many as pay. @default {1} */
  readonly packing?: number | "auto";
  /** Ranks that hold all experts between them, at least, for packing `auto`. @default {2} */
  readonly leastRanks?: number;
  /**
   * How many experts of each layer of a rank have AdamW's moments in host memory; `auto`: as few as let packed experts fit, none if all do.
   * @default {as the trainer has it}
   */
  readonly offloadExperts?: number | "auto";
  /** Steps before anything is measured: routers settle meanwhile. @default {10} */
  readonly from?: number;
  /**
   * Told what has been decided, on every rank.
   * @param line For readers.
   * @param decision The same as plain data, for a line of JSON.
   */
  readonly log?: (line: string, decision: Decision) => void;
}

/** What has been decided after a step: what for, and the numbers behind it. */
export interface Decision {
  /** Steps that the controller has seen. */
  readonly step: number;
  /** What was decided. */
  readonly decision: "pack" | "no room" | "plan" | "plan anew";
  /** Times in ms or µs, by their names, and what is in force from now on. */
  readonly [name: string]: string | number;
}

/** What is in force, for tables. */
export interface ControllerState {
  /** Name of the scheduler. */
  readonly policy: string;
  /** Experts that this rank holds, of each layer. */
  readonly experts_per_device: number;
  /** Experts of this rank, of each layer, whose moments are in host memory. */
  readonly offloaded: number;
  /** Most slices of a layer's tokens. */
  readonly chunks: number;
  /** Largest micro-op. */
  readonly micro_op_bytes: number;
  /** Time of the last planning, profile and plan; absent before the first. */
  readonly plan_ms?: number;
}

/** Steps of a profile, steps between two looks, and the part by which a step's time may differ from what is expected. */
const PROFILED = 3, EVERY = 4, DRIFT = 0.1;
/** The part of the free memory that a move may take. */
const ROOM = 0.9;

/** What a step's marks have shown. */
interface Sample {
  readonly profile: StepProfile;
  readonly chunk: ChunkTimes | null;
  /** From the pass's begin to its end. */
  readonly pass_us: number;
}

/** Controls a training. */
export class TrainingController {
  readonly #options: TrainingControllerOptions;
  readonly #packing: Packing | null;
  readonly #samples: Sample[] = [];
  /** The scheduler in force. */
  #scheduler: CollectiveScheduler;
  /** Steps to come that are profiled. */
  #wanted = 0;
  #marks: Mark[] | null = null;
  #steps = 0;
  /** Times of the last steps, in ms. */
  #times: number[] = [];
  /** What a step should take, in ms; null until it is known. */
  #expected_ms: number | null = null;
  /** Whether the present plan was made because a step took another time than expected. */
  #replanned = false;
  #links: MeasuredLinks | null = null;
  #plan_ms: number | undefined;
  #host_us = 0;

  /**
   * Takes control: replaces the scheduler and, with a number, seats the experts. All ranks call it together, between steps.
   *
   * @param options What to control, and how.
   * @returns The controller.
   * @throws {RangeError} If the number of copies is impossible, or experts do not sit in a regular way.
   */
  static async create(options: TrainingControllerOptions): Promise<TrainingController> {
    const controller = new TrainingController(options);
    await controller.#reschedule(controller.#scheduler);
    const { packing, offloadExperts } = options;
    const replicas = typeof packing === "number" ? packing : controller.#replicas;
    const moves = replicas !== controller.#replicas || typeof offloadExperts === "number";
    if (moves && options.trainer.model.moeLayers.length > 0) {
      const offload = await controller.#room(replicas);
      await options.trainer.moveExperts(replicatedPlacement(replicas), { offload: offload ?? 0 });
    }
    return controller;
  }

  private constructor(options: TrainingControllerOptions) {
    this.#options = options;
    this.#scheduler = createScheduler(options.policy, options);
    const { trainer: { model }, world, leastRanks } = options;
    const { experts } = model.config;
    const packs = options.packing === "auto" && model.moeLayers.length > 0 && world.size > 1;
    if (packs && this.#replicas === 0) {
      throw new RangeError(
        "Cannot pack experts as they must sit in the regular way: current value is another placement",
      );
    }
    this.#packing = packs
      ? new Packing({ experts, ranks: world.size, leastRanks, replicas: this.#replicas })
      : null;
  }

  /** What is in force. */
  get state(): ControllerState {
    const { trainer, world, policy } = this.#options, { schedule } = trainer;
    const [layer] = trainer.model.moeLayers;
    return {
      policy,
      experts_per_device: layer?.store.seats[world.rank].length ?? 0,
      offloaded: layer?.store.offloaded ?? 0,
      chunks: Math.max(1, ...schedule.chunks.values()),
      micro_op_bytes: Math.max(0, ...schedule.microOps.map(({ bytes }) => bytes)),
      ...(this.#plan_ms !== undefined && { plan_ms: this.#plan_ms }),
    };
  }

  /**
   * Looks at a step that was made, and decides. All ranks call it together, after every step.
   *
   * @param row What the step has shown.
   */
  async afterStep(row: { readonly step_ms: number }): Promise<void> {
    const start = now();
    await this.#after(row);
    this.#host_us += now() - start;
  }

  /** Time of the host in ms that this controller has taken so far, moves of experts and the wait for other ranks included. */
  get host_ms(): number {
    return this.#host_us / 1000;
  }

  async #after(row: { readonly step_ms: number }): Promise<void> {
    const { from = 10, policy, trainer } = this.#options;
    this.#steps++;
    this.#times.push(row.step_ms);
    this.#take();
    const plans = policy.startsWith("planned");
    if (!plans && !this.#packing) return;
    if (this.#steps === from) this.#wanted = PROFILED;
    else if (this.#samples.length > 0 && this.#wanted === 0) await this.#decide(plans);
    else if (this.#steps > from && this.#wanted === 0 && this.#times.length >= EVERY) {
      await this.#look(plans);
    }
    if (this.#wanted > 0) {
      this.#wanted--;
      trainer.marks = this.#marks = [];
    }
  }

  /** Reads the marks of the step that was made. */
  #take(): void {
    const { graph } = this.#options.trainer, marks = this.#marks;
    this.#marks = null;
    if (!marks || marks.length === 0) return;
    const times = timesOf(marks);
    this.#samples.push({
      profile: readProfile(graph, marks),
      chunk: chunkTimes(graph, marks),
      pass_us: times[times.length - 1] - times[0],
    });
  }

  /** Every few steps: whether steps take what they should, and how long chunks take now. */
  async #look(plans: boolean): Promise<void> {
    const [step_ms] = await this.#agree([median(this.#times)]);
    this.#times = [];
    if (this.#packing) this.#wanted = 1;
    if (!plans) return;
    const expected_ms = this.#expected_ms ??= step_ms;
    if (Math.abs(step_ms - expected_ms) <= DRIFT * expected_ms) return;
    this.#log(
      `steps take ${step_ms.toFixed(1)} ms, not ${expected_ms.toFixed(1)}: planned anew`,
      "plan anew",
      { step_ms, expected_ms },
    );
    this.#wanted = PROFILED;
    this.#expected_ms = null;
    this.#replanned = true;
  }

  /** There are profiles: packs experts or plans. */
  async #decide(plans: boolean): Promise<void> {
    const samples = this.#samples.splice(0);
    this.#times = this.#times.slice(-samples.length);
    if (await this.#pack(samples)) {
      this.#times = []; // everything is new
      this.#wanted = plans ? PROFILED : 0;
      return;
    }
    if (plans && samples.length >= PROFILED) await this.#plan(samples);
  }

  /** Packs more experts, or fewer, if that pays. */
  async #pack(samples: readonly Sample[]): Promise<boolean> {
    const packing = this.#packing, chunks = samples.flatMap(({ chunk }) => chunk ?? []);
    if (!packing || chunks.length === 0) return false;
    const { trainer, policy } = this.#options;
    const [allToAll_us, experts_us] = await this.#agree([
      median(chunks.map((chunk) => chunk.allToAll_us)),
      median(chunks.map((chunk) => chunk.experts_us)),
    ]);
    const replicas = packing.next({ allToAll_us, experts_us });
    if (replicas === packing.replicas) return false;
    const why = `a chunk's all-to-all takes ${allToAll_us.toFixed(0)} us, its experts ${
      experts_us.toFixed(0)
    } us`;
    const numbers = { all_to_all_us: allToAll_us, experts_us };
    const offload = await this.#room(replicas);
    if (offload === null) {
      packing.refuse(replicas);
      this.#log(`${why}: no memory for more experts on a device`, "no room", numbers);
      return false;
    }
    const start = now();
    // A plan is for the step as it was.
    await this.#reschedule(createScheduler(policy, this.#options));
    let sent_bytes: number;
    try {
      sent_bytes = await trainer.moveExperts(replicatedPlacement(replicas), { offload });
    } catch (error) {
      if (!(error instanceof OutOfMemoryError)) throw error;
      packing.refuse(replicas); // all ranks have it, and nothing has moved
      this.#log(`${why}: no memory for more experts on a device`, "no room", numbers);
      return true;
    }
    packing.replicas = replicas;
    this.#expected_ms = null;
    const { expertsPerDevice } = packing, move_ms = (now() - start) / 1000;
    this.#log(
      `${why}: ${expertsPerDevice} experts per device from now on${
        offload > 0 ? `, moments of ${offload} in host memory` : ""
      }`,
      "pack",
      { ...numbers, experts_per_device: expertsPerDevice, offloaded: offload, move_ms, sent_bytes },
    );
    return true;
  }

  /**
   * How many experts of each layer are to have their moments in host memory for so many copies to fit on every rank; null if they do not. All
   * ranks call it together.
   */
  async #room(replicas: number): Promise<number | null> {
    const { trainer: { model }, world, device, offloadExperts } = this.#options;
    const [{ store }] = model.moeLayers;
    const { experts } = model.config;
    const seats = (copies: number) => Math.ceil(experts * copies / world.size);
    const before = Math.max(...store.seats.map((held) => held.length));
    const all = Float64Array.of(device.memory().free_bytes, -store.offloaded);
    await world.allReduce(all, { op: "min" }); // ranks may hold one expert less
    const offloaded = -all[1];
    const fixed = offloadExperts === "auto" ? null : offloadExperts ?? offloaded;
    const after = seats(replicas), most = fixed ?? after;
    for (let offload = fixed ?? 0; offload <= most; offload++) {
      const more_bytes = packedBytes({
        layers: model.moeLayers.length,
        expert: store.expertBytes,
        before: { experts: before, offloaded },
        after: { experts: after, offloaded: Math.min(offload, after) },
      });
      const fits = more_bytes <= 0 || more_bytes <= ROOM * all[0];
      if (fits || (fixed !== null && after <= before)) return Math.min(offload, after);
    }
    return null;
  }

  async #reschedule(scheduler: CollectiveScheduler): Promise<void> {
    await this.#options.trainer.reschedule(scheduler);
    this.#scheduler = scheduler;
  }

  /** Plans the step's collectives from profiles. */
  async #plan(samples: readonly Sample[]): Promise<void> {
    const { trainer, world, device, policy } = this.#options;
    if (world.size === 1) return;
    const start = now();
    const profile = await agreeProfile(world, samples.map(({ profile }) => profile));
    this.#links ??= await measureLinks(world, device);
    const { allToAll, allReduce } = this.#links;
    const costs = stepCosts({ allToAll, reduction: allReduce }, {
      ranks: world.size,
      replicas: Math.max(1, this.#replicas),
    });
    const known = { ...this.#options, profile, costs };
    const scheduler = createScheduler(policy, known);
    // What the model makes of the step as it is: what it lacks, the optimizer above all, stays the same.
    const times = profiledTimes(trainer.graph, profile, costs);
    const modelled_ms = times &&
      timeline(trainer.graph, this.#scheduler, { ...times, endsTold: "at once" }).end_us / 1000;
    await this.#reschedule(scheduler);
    this.#plan_ms = (now() - start) / 1000;
    const [step_ms, pass_ms] = await this.#agree([
      median(this.#times),
      median(samples.map(({ pass_us }) => pass_us)) / 1000,
    ]);
    const predicted_ms = predict(scheduler, trainer.graph);
    this.#times = [];
    // A prediction that was wrong once is not believed again.
    const believes = predicted_ms !== null && modelled_ms !== null && !this.#replanned;
    this.#expected_ms = believes ? predicted_ms + step_ms - modelled_ms : null;
    this.#replanned = false;
    const told = predicted_ms === null ? "" : `, ${predicted_ms.toFixed(1)} ms predicted`;
    this.#log(
      `planned in ${this.#plan_ms.toFixed(1)} ms: the passes took ${pass_ms.toFixed(1)} ms${told}`,
      "plan",
      { plan_ms: this.#plan_ms, pass_ms, ...(predicted_ms !== null && { predicted_ms }) },
    );
  }

  /** Copies of every expert as they sit; 0 if not in the regular way. */
  get #replicas(): number {
    const { model } = this.#options.trainer;
    const [layer] = model.moeLayers;
    return layer ? regularReplicas(layer.store.seats, model.config.experts) : 1;
  }

  /** The mean of every rank's numbers, the same bits on all ranks. */
  async #agree(numbers: readonly number[]): Promise<number[]> {
    const { world } = this.#options;
    const all = Float64Array.from(numbers, (x) => x / world.size);
    await world.allReduce(all);
    await world.broadcast(all, 0); // a sum's order is the backend's
    return [...all];
  }

  #log(
    line: string,
    decision: Decision["decision"],
    numbers: Readonly<Record<string, number>>,
  ): void {
    this.#options.log?.(line, { step: this.#steps, decision, ...numbers });
  }
}

/** What a scheduler says that a pass will take, in ms; null if it says nothing. */
function predict(scheduler: CollectiveScheduler, graph: StepGraph): number | null {
  const { predict } = scheduler as {
    predict?(graph: StepGraph): number | { readonly end_us: number } | null;
  };
  const predicted = predict?.call(scheduler, graph) ?? null;
  if (predicted === null) return null;
  return (typeof predicted === "number" ? predicted : predicted.end_us) / 1000;
}
