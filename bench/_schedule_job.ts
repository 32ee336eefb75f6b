// A rank's part of bench/schedule.ts: a model and its trainer that policies take turns with. Every turn begins at the same weights, moments and
// batches, so losses of policies can be compared, and a turn says nothing of the one before. All ranks call everything here together.

import { TwoLevel } from "../collectives/two_level.ts";
import { progress } from "../collectives/progress.ts";
import type { Communicator } from "../collectives/types.ts";
import { stepBounds } from "../lina/training/bounds.ts";
import { type StepCosts, stepCosts } from "../lina/training/links.ts";
import { computing } from "../lina/training/measures.ts";
import { measureLinks } from "../lina/training/measure_links.ts";
import {
  agreeProfile,
  profiledTimes,
  readProfile,
  type StepProfile,
} from "../lina/training/profile.ts";
import { createScheduler } from "../lina/training/schedulers.ts";
import { timeline } from "../lina/training/timeline.ts";
import type { Mark } from "../moe/gradients.ts";
import type { CollectiveScheduler } from "../moe/hooks.ts";
import { replicatedPlacement, staticPlacement } from "../moe/placement.ts";
import type { AllToAllPlace } from "../moe/step.ts";
import { Trainer } from "../moe/trainer.ts";
import { trainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import { now, recorder, type Span } from "../trace/mod.ts";
import { measureBandwidth } from "./_schedule_links.ts";
import type {
  LinksReply,
  PlanReply,
  Policy,
  Replies,
  Request,
  ShapeReply,
  StepSample,
  TurnReply,
} from "./_schedule_messages.ts";
import { shapeConfig, SHAPES, VOCABULARY } from "./_schedule_shapes.ts";

/** Seed of weights and batches. */
const SEED = 1;
/** Text that is trained on; the rest of the file is not. */
const TEXT = new URL("../examples/data/austen.txt", import.meta.url);
/** Learning rate. */
const RATE = 3e-4;

/** A model that trains. */
interface Training {
  readonly model: Transformer;
  readonly trainer: Trainer;
  /** Steps at which every turn begins. */
  readonly steps: number;
  /** Experts of a device now. */
  experts: number;
  /** State at the begin of turns, by experts of a device: the trainer's tensors and copies of them. */
  readonly snapshots: Map<number, readonly (readonly [live: () => Tensor, copy: Tensor])[]>;
  /** Times of computation, by experts of a device. */
  readonly profiles: Map<number, StepProfile>;
}

/** One rank's job. */
export class Job implements AsyncDisposable {
  readonly #world: Communicator;
  readonly #device: Device;
  /** For measuring links: what gradients have is the trainer's. */
  readonly #beside: Communicator;
  #training: Training | null = null;
  #links: Pick<LinksReply, "allToAll" | "reduction"> | null = null;
  #mbit = 0;
  #twoLevel: TwoLevel | null = null;

  private constructor(world: Communicator, device: Device, beside: Communicator) {
    this.#world = world;
    this.#device = device;
    this.#beside = beside;
  }

  /** Joins. @param world All ranks. @param device Where tensors live. */
  static async create(world: Communicator, device: Device): Promise<Job> {
    return new Job(world, device, await world.dup());
  }

  /** Does what is asked. */
  answer(request: Request): Promise<Replies[Request["kind"]]> {
    switch (request.kind) {
      case "links":
        return this.#measureLinks(request.mbit);
      case "shape":
        return this.#make(request.shape, request.settle);
      case "turn":
        return this.#turn(request);
      case "free":
        return this.#free();
    }
  }

  async #measureLinks(mbit: number): Promise<LinksReply> {
    const world = this.#world, device = this.#device;
    const times = await measureBandwidth({ world, gradients: this.#beside, device, mbit });
    const { allToAll, allReduce } = await measureLinks(world, device);
    this.#mbit = mbit;
    this.#links = { allToAll, reduction: allReduce };
    this.#training?.profiles.clear();
    return { ...times, ...this.#links };
  }

  async #make(name: string, settle: number): Promise<ShapeReply> {
    await this.#free();
    const world = this.#world, device = this.#device, { rank, size } = world, shape = SHAPES[name];
    const cuda = device.kind === "cuda";
    const text = await Deno.readFile(TEXT);
    const data = trainingData(
      { train: text, validation: text, vocabularySize: VOCABULARY, bytesPerToken: 1 },
      { sequence: shape.sequence, batch: shape.sequences * size, seed: SEED, rank, size },
    );
    const config = shapeConfig(shape, { experts: size, cuda });
    const model = new Transformer({ device, comm: world, config, seed: SEED });
    const trainer = await Trainer.create({
      world,
      device,
      model,
      data,
      learningRate: { peak: RATE, warmup: 0, steps: Number.MAX_SAFE_INTEGER },
    });
    let last = { load_imbalance: NaN, loss: NaN };
    for (let i = 0; i < settle; i++) last = await trainer.step();
    const training: Training = {
      model,
      trainer,
      steps: settle,
      experts: 1,
      snapshots: new Map(),
      profiles: new Map(),
    };
    training.snapshots.set(1, snapshot(training));
    this.#training = training;
    const parameters = model.parameters.reduce((sum, { value }) => sum + value.size, 0);
    return { parameters, imbalance: last.load_imbalance, loss: last.loss };
  }

  async #free(): Promise<null> {
    const training = this.#training;
    this.#training = null;
    if (!training) return null;
    for (const tensors of training.snapshots.values()) {
      for (const [, copy] of tensors) copy[Symbol.dispose]();
    }
    await training.trainer[Symbol.asyncDispose]();
    training.model[Symbol.dispose]();
    return null;
  }

  async #turn(request: Request & { kind: "turn" }): Promise<TurnReply> {
    const training = this.#training;
    if (!training) throw new Error("Cannot train as there must be a model: current value is none");
    const { policy } = request, { trainer } = training, device = this.#device;
    await seat(training, policy.experts);
    const scheduler = this.#scheduler(policy, training);
    if (policy.twoLevel) this.#twoLevel ??= await TwoLevel.create(this.#world);
    for (const layer of training.model.moeLayers) {
      layer.exchange = policy.twoLevel ? this.#twoLevel : null;
    }
    await trainer.reschedule(scheduler);
    restore(training);
    device.resetPeak?.();
    const steps: StepSample[] = [], profiles: StepProfile[] = [];
    let spans: readonly Span[] = [];
    recorder.capturing = true;
    try {
      for (let i = -request.warm; i < request.steps; i++) {
        recorder.clearSpans();
        const marks: Mark[] = [];
        const { sample, spans: shown } = await measuredStep(trainer, marks);
        if (i < 0) continue;
        steps.push(sample);
        if (request.profile) profiles.push(readProfile(trainer.graph, marks));
        if (request.spans) spans = shown;
      }
    } finally {
      recorder.capturing = false;
      recorder.clearSpans();
    }
    if (request.profile) {
      training.profiles.set(policy.experts, await agreeProfile(this.#world, profiles));
    }
    const plan = this.#describe(scheduler, policy, training);
    return { plan, steps, spans, peak_bytes: device.memory().peak_bytes };
  }

  #costs(experts: number): StepCosts | undefined {
    const { size: ranks } = this.#world;
    return this.#links ? stepCosts(this.#links, { ranks, replicas: experts }) : undefined;
  }

  #scheduler(policy: Policy, training: Training): CollectiveScheduler {
    const { name, experts, microOpBytes, chunks } = policy;
    return createScheduler(name, {
      microOpBytes,
      chunks,
      linkBytesPerSecond: this.#mbit === 0 ? undefined : this.#mbit * 125_000,
      profile: training.profiles.get(experts),
      costs: this.#costs(experts),
    });
  }

  #describe(scheduler: CollectiveScheduler, policy: Policy, training: Training): PlanReply {
    const { trainer } = training, { schedule, graph } = trainer;
    const profile = training.profiles.get(policy.experts), costs = this.#costs(policy.experts);
    const shown = {
      microOps: schedule.microOps.length,
      microOpBytes: schedule.microOps.reduce((most, { bytes }) => Math.max(most, bytes), 0),
      chunks: [...schedule.chunks.values()].reduce((most, count) => Math.max(most, count), 1),
    };
    const times = profile && costs ? profiledTimes(graph, profile, costs) : null;
    if (!times) return { ...shown, bounds: null };
    const outside = policy.name === "outside";
    const bounds = stepBounds(graph, schedule, { ...times, outside });
    const { end_us } = timeline(graph, scheduler, { ...times, endsTold: "at once" });
    return { ...shown, bounds: { ...bounds, predicted_us: end_us } };
  }

  /** Frees the model. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#free();
    await this.#twoLevel?.[Symbol.asyncDispose]();
    await this.#beside[Symbol.asyncDispose]();
  }
}

/** Seats as many experts on a device as a turn wants, with the state that turns begin at. */
async function seat(training: Training, experts: number): Promise<void> {
  if (training.experts === experts) return;
  const known = training.snapshots.has(experts);
  if (!known) restore(training);
  await training.trainer.moveExperts(
    experts === 1 ? staticPlacement() : replicatedPlacement(experts),
  );
  training.experts = experts;
  if (!known) training.snapshots.set(experts, snapshot(training));
}

/** The tensors of training that a turn changes. They are asked for by name each time, as experts that move have new ones. */
function stateOf({ model, trainer }: Training): Map<string, () => Tensor> {
  const state = new Map<string, () => Tensor>();
  for (const { name } of model.parameters) {
    const live = () => model.parameters.find((parameter) => parameter.name === name)!;
    state.set(name, () => live().value);
    state.set(`${name} moment1`, () => trainer.optimizer.momentsOf(live()).moment1);
    state.set(`${name} moment2`, () => trainer.optimizer.momentsOf(live()).moment2);
    if (trainer.optimizer.momentsOf(live()).residual) {
      state.set(`${name} residual`, () => trainer.optimizer.momentsOf(live()).residual!);
    }
  }
  return state;
}

function snapshot(training: Training): readonly (readonly [() => Tensor, Tensor])[] {
  return [...stateOf(training).values()].map((live) => {
    const tensor = live();
    const copy = empty(tensor.device, tensor.shape, tensor.dtype);
    ops.copy(tensor, copy);
    return [live, copy];
  });
}

function restore(training: Training): void {
  for (const [live, copy] of training.snapshots.get(training.experts)!) ops.copy(copy, live());
  training.trainer.optimizer.steps = training.steps;
}

async function measuredStep(
  trainer: Trainer,
  marks: Mark[],
): Promise<{ sample: StepSample; spans: Span[] }> {
  const before_us = trainer.schedule_us, cpu_ms = threadTime(), begin_us = now();
  const { loss, load_imbalance } = await trainer.step({ marks });
  const end_us = now(), hostCpu_ms = threadTime() - cpu_ms;
  progress(); // notes the ends of what only streams have waited for
  const spans = recorder.spans.filter(({ end }) => end >= begin_us);
  const bytesOf = ({ args }: Span) => Number(args?.bytes ?? 0);
  const sample: StepSample = {
    begin_us,
    end_us,
    loss,
    imbalance: load_imbalance,
    hostCpu_ms: Number.isNaN(hostCpu_ms) ? null : hostCpu_ms,
    schedule_us: trainer.schedule_us - before_us,
    allToAlls: spans.filter(({ args }) => args?.role !== undefined).map((span) => {
      const { layer, phase, role, chunk } = span.args as unknown as AllToAllPlace;
      const { start: start_us, end: end_us } = span;
      return { start_us, end_us, bytes: bytesOf(span), layer, phase, role, chunk };
    }),
    microOps: spans.filter(({ track }) => track === "gradients").map((span) =>
      [span.start, span.end, bytesOf(span)] as const
    ),
    computing: computing(marks).map(({ start_us, end_us }) => [start_us, end_us] as const),
  };
  return { sample, spans };
}

/** Time that this thread was on a processor so far, in ms; NaN where the system does not tell. */
function threadTime(): number {
  try {
    return Number(Deno.readTextFileSync("/proc/thread-self/schedstat").split(" ")[0]) / 1e6;
  } catch {
    return NaN;
  }
}
