// Trains a language model as SPMD code: one object per rank that runs a step, validates, saves and goes on from a checkpoint. What
// surrounds a run (files, progress, when to save) is in `run.ts`. The data are a function of the number of the pass, so the step's
// number is their position.

import { progress } from "../collectives/progress.ts";
import type { Communicator, Traffic } from "../collectives/types.ts";
import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { type Tensor, zeros } from "../tensor/tensor.ts";
import { now, recorder } from "../trace/mod.ts";
import type { Checkpoint, CheckpointContents, CheckpointTensor } from "./checkpoint.ts";
import { loadCheckpoint, newestCheckpoint, saveCheckpoint } from "./checkpoint.ts";
import { Fifo } from "./fifo.ts";
import { GradientReducer, type Mark } from "./gradients.ts";
import { buildStepGraph, groupOf } from "./graph.ts";
import type { CollectiveScheduler, ExpertPlacement, Schedule, StepGraph } from "./hooks.ts";
import { CheckpointError } from "./manifest.ts";
import { loadingMasters } from "./masters.ts";
import { mixtralConfig } from "./mixtral_config.ts";
import { dropShown, finishShown, readTogether, recordsOf, type Shown } from "./shown.ts";
import { type Batch, summaryOf, type Transformer } from "./transformer.ts";
import { AdamW, type AdamWSettings, learningRate, type LearningRateOptions } from "./optimizer.ts";
import type { Parameter } from "./parameter.ts";
import { seatGradients } from "./seats.ts";
import { OptimizerShards } from "./shards.ts";
import { plainStep } from "./step.ts";
import type { TrainingData } from "./training_data.ts";
import { parameterTensors } from "./weights.ts";

/** What {@linkcode Trainer} works with. */
export interface TrainerOptions {
  /** All ranks. */
  readonly world: Communicator;
  /** Where the model lives. */
  readonly device: Device;
  /** What is trained; the trainer does not own it. */
  readonly model: Transformer;
  /** Batches. */
  readonly data: TrainingData;
  /** Course of the learning rate. */
  readonly learningRate: LearningRateOptions;
  /** Constants of AdamW. */
  readonly adamW?: AdamWSettings;
  /** Passes whose gradients make one step. @default {1} */
  readonly accumulate?: number;
  /** Largest norm of the gradient; 0 is no limit. @default {1} */
  readonly clip?: number;
  /** Decides when gradients are reduced. @default {new Fifo()} */
  readonly scheduler?: CollectiveScheduler;
  /**
   * Whether each rank keeps the optimizer's tensors of a part of the replicated parameters only (ZeRO, stage 1): gradients are then
   * reduce-scattered and weights all-gathered. Losses are the same, and so are checkpoints. @default {false}
   */
  readonly shardOptimizer?: boolean;
  /**
   * How many experts of each layer of a rank have AdamW's moments in host memory instead of the device's, through which they pass at the
   * update; the same bits. All of them if it is more than there are; alike on all ranks. @default {0}
   */
  readonly offloadExperts?: number;
}

/** What a step has shown, alike on all ranks but for the times, which are this rank's. */
export interface StepMetrics {
  /** Number of the step, from 1. */
  readonly step: number;
  /** Mean loss of the global batch before the update, in nats per token; auxiliary losses are not in it. */
  readonly loss: number;
  /** Sum of the routers' auxiliary losses, coefficients applied. */
  readonly aux_loss: number;
  /** Learning rate. */
  readonly lr: number;
  /** Tokens of the global batch per second. */
  readonly tokens_per_s: number;
  /** Time of the step in ms. */
  readonly step_ms: number;
  /** Time in ms until the host had enqueued the whole step: a GPU still works then, a CPU is done. */
  readonly host_ms: number;
  /** Most memory of this rank's device that was in use at once so far, in bytes. */
  readonly peak_bytes: number;
  /** Time of all-to-alls / time of the step; mean over ranks. */
  readonly a2a_share: number;
  /** Rows of the most loaded expert / mean rows; mean over layers and passes. */
  readonly load_imbalance: number;
  /** Norm of the whole gradient before clipping. */
  readonly grad_norm: number;
}

// Places of the step's sums over ranks.
const LOSS = 0, ALL_TO_ALL = 1, SQUARES = 2, SUMS = 3;

/** How the gradients of a step are reduced. */
interface Reduced {
  readonly scheduler: CollectiveScheduler;
  readonly graph: StepGraph;
  readonly reducer: GradientReducer;
  /** Layers whose experts' gradients are reduced by it; the others' by their stores. */
  readonly seated: ReadonlySet<number>;
}

/** Trains a model on all ranks together. */
export class Trainer implements AsyncDisposable {
  /** The optimizer and its moments. */
  readonly optimizer: AdamW;
  /** Course of the learning rate; may be changed between steps, alike on all ranks. */
  learningRate: LearningRateOptions;
  /** Where the next step notes its marks, if whoever makes that step gives it no other place. @default {null} */
  marks: Mark[] | null = null;
  readonly #options: Required<TrainerOptions>;
  readonly #gradients: Communicator;
  #reduced: Reduced;
  readonly #shards: OptimizerShards | null;
  readonly #sums: Tensor;
  /** Factor of the gradients in the update. */
  readonly #gradScale: Tensor;
  /** The next pass's rows, made while a GPU works on this step. */
  #ahead: { readonly pass: number; readonly batch: Batch } | null = null;
  /** Time of all-to-alls that has been shown. */
  #allToAll_us = 0;
  /** Whether a step has begun and not succeeded. */
  #failed = false;

  /**
   * Prepares training: a communicator for the gradients, the optimizer's moments, the schedule. All ranks call it together.
   *
   * @param options What to train, on what, how.
   * @returns The trainer; dispose of it.
   * @throws {RangeError} If the options are impossible.
   */
  static async create(options: TrainerOptions): Promise<Trainer> {
    const full = {
      adamW: {},
      accumulate: 1,
      clip: 1,
      scheduler: new Fifo(),
      shardOptimizer: false,
      offloadExperts: 0,
      ...options,
    };
    if (!(Number.isSafeInteger(full.accumulate) && full.accumulate >= 1)) {
      throw new RangeError(
        `Cannot train as "accumulate" must be a whole number >= 1: current value is ${full.accumulate}`,
      );
    }
    const gradients = await options.world.dup();
    try {
      const reduced = await reduction(full, gradients, full.scheduler);
      return new Trainer(full, gradients, reduced);
    } catch (error) {
      await gradients[Symbol.asyncDispose]();
      throw error;
    }
  }

  private constructor(
    options: Required<TrainerOptions>,
    gradients: Communicator,
    reduced: Reduced,
  ) {
    const { model, device, world, adamW } = options;
    this.#options = options;
    this.#gradients = gradients;
    this.learningRate = options.learningRate;
    // The host sees only when it called and when it looked, which overlap and say nothing of the share.
    if (device.kind === "cuda" && world.size > 1) recorder.timed = true;
    using undo = new DisposableStack();
    for (const { store } of model.moeLayers) {
      undo.defer(() => store.holdMoments(false));
      store.holdMoments(true, { offload: options.offloadExperts });
    }
    this.#reduced = reduced;
    this.#shards = options.shardOptimizer && world.size > 1
      ? new OptimizerShards({
        graph: reduced.graph,
        schedule: reduced.reducer.schedule,
        comm: world,
        device,
        parameters: model.parameters,
      })
      : null;
    this.optimizer = undo.use(new AdamW(() => this.#updated, adamW));
    this.#sums = undo.use(zeros(device, [SUMS], "f64"));
    this.#gradScale = undo.use(zeros(device, [1]));
    undo.move();
  }

  /** What this rank updates: its parameters, or its experts and its shards of the others. */
  get #updated(): readonly Parameter[] {
    const { parameters } = this.#options.model;
    if (!this.#shards) return parameters;
    return [...this.#shards.parameters, ...parameters.filter(({ group }) => group === "replicas")];
  }

  /** How gradients are reduced. */
  get schedule(): Schedule {
    return this.#reduced.reducer.schedule;
  }

  /** What is trained. */
  get model(): Transformer {
    return this.#options.model;
  }

  /** What one pass computes, exchanges and reduces; alike on all ranks. */
  get graph(): StepGraph {
    return this.#reduced.graph;
  }

  /**
   * Reduces gradients by another scheduler from the next step on. All ranks call it together, between steps.
   *
   * @param scheduler The scheduler, alike on all ranks.
   * @throws {RangeError} If its plan does not reduce every element once, or a sharded optimizer would have to be cut otherwise; nothing has
   * changed then.
   */
  async reschedule(scheduler: CollectiveScheduler): Promise<void> {
    this.#checkBetweenSteps();
    const reduced = await reduction(this.#options, this.#gradients, scheduler);
    this.#checkShards(reduced);
    this.#reduced = reduced;
  }

  /**
   * Seats the experts of all layers as a placement has them, with their moments, from the next step on; losses are the same to rounding. All
   * ranks call it together, between steps.
   *
   * @param placement Where experts sit from now on.
   * @param options `offload`: as `TrainerOptions.offloadExperts`, from now on. @default {{offload: as before}}
   * @returns Bytes that this rank has sent.
   * @throws {RangeError} If its seats are not valid: then nothing has changed; or if a sharded optimizer would have to be cut otherwise: then
   * the trainer makes no more steps.
   * @throws {OutOfMemoryError} On all ranks, if the memory of one does not suffice: then nothing has changed.
   */
  async moveExperts(
    placement: ExpertPlacement,
    options: { readonly offload?: number } = {},
  ): Promise<number> {
    this.#checkBetweenSteps();
    progress();
    const before_us = recorder.total("allToAll");
    const bytes = await this.#options.model.moveExperts(placement, options);
    this.#failed = true;
    const reduced = await reduction(this.#options, this.#gradients, this.#reduced.scheduler);
    this.#checkShards(reduced);
    this.#reduced = reduced;
    this.#failed = false;
    // The exchange is none of the next step's.
    if (bytes > 0) await this.#options.device.stream.synchronize();
    progress();
    this.#allToAll_us += recorder.total("allToAll") - before_us;
    return bytes;
  }

  #checkShards(reduced: Reduced): void {
    if (!this.#shards || cuts(reduced) === cuts(this.#reduced)) return;
    throw new RangeError(
      `Cannot reduce gradients by "${reduced.scheduler.name}" as a sharded optimizer must keep its shards: current value is a schedule of other micro-ops`,
    );
  }

  #checkBetweenSteps(): void {
    if (!this.#failed) return;
    throw new Error(
      `Cannot go on training as the last step must have succeeded: current value is a failed step ${
        this.steps + 1
      }; go on from a checkpoint with a new model and trainer`,
    );
  }

  /** Time of the host in µs that the schedule has cost since it is in force: see `GradientReducer.host_us`. */
  get schedule_us(): number {
    return this.#reduced.reducer.host_us;
  }

  /** What this rank has sent: on the model's communicator, and on that of the gradients. */
  get traffic(): { readonly world: Traffic; readonly gradients: Traffic } {
    return { world: this.#options.world.traffic, gradients: this.#gradients.traffic };
  }

  /** Steps done. */
  get steps(): number {
    return this.optimizer.steps;
  }

  /**
   * One step: forward, backward, reduction, update. All ranks call it together.
   *
   * @param options `marks`: where the boundaries of the pass whose gradients are reduced are noted, with the device's times. @default {{}}
   * @returns What it has shown.
   * @throws {Error} If the loss or the gradient is not finite; no weight has changed if it is the gradient. A trainer whose step has failed,
   * for whatever reason, makes no more steps, as gradients and loads may be half a step's.
   */
  async step(options: { readonly marks?: Mark[] } = {}): Promise<StepMetrics> {
    this.#checkBetweenSteps();
    this.#failed = true;
    const marks = options.marks ?? this.marks ?? undefined;
    this.marks = null;
    const shown = await this.#step(marks);
    this.#failed = false;
    return shown;
  }

  async #step(marks: Mark[] | undefined): Promise<StepMetrics> {
    const { model, data, device, world, accumulate, clip } = this.#options;
    const { reducer, seated } = this.#reduced;
    const { chunks } = reducer.schedule;
    const began = now();
    // A GPU's all-to-alls are counted when the host sees their end, some in the next step; a CPU's at once.
    if (device.kind === "cpu") this.#allToAll_us = recorder.total("allToAll");
    const number = this.steps + 1;
    const sum = (place: number) => this.#sums.rows(place, place + 1);
    ops.fill(this.#sums, 0);
    const tokens = data.tokensPerStep;
    const scales = { gradScale: 1 / tokens, auxScale: 1 / accumulate };
    const shown: Shown[] = [];
    using held = new DisposableStack();
    held.defer(() => dropShown(shown));
    for (let i = 0; i < accumulate; i++) {
      const pass = (number - 1) * accumulate + i, firstPass = i === 0;
      using reduces = i === accumulate - 1 ? reducer.begin(pass, { firstPass, marks }) : null;
      const step = reduces ??
        plainStep(device, { training: true, number: pass, firstPass, chunks });
      const batch = this.#ahead?.pass === pass ? this.#ahead.batch : data.training(pass);
      shown.push(...await model.pass(batch, step, { lossSum: sum(LOSS), ...scales }));
      await reduces?.finish();
    }
    for (const layer of model.moeLayers) {
      if (!seated.has(layer.layer)) await layer.reduceReplicas();
    }
    const allToAll_us = recorder.total("allToAll");
    ops.fill(sum(ALL_TO_ALL), allToAll_us - this.#allToAll_us);
    this.#allToAll_us = allToAll_us;
    // A shard is this rank's alone.
    const counts = (parameter: Parameter) =>
      (this.#shards !== null && parameter.group === "world") ||
      model.ownerOf(parameter) === world.rank;
    this.optimizer.addSquaredNorms(counts, sum(SQUARES));
    await world.allReduce(this.#sums).wait(device.stream);
    const lr = learningRate(number, this.learningRate);
    ops.clipScale(sum(SQUARES), clip, this.#gradScale);
    this.optimizer.update(lr, this.#gradScale);
    await this.#shards?.gatherWeights();
    const enqueued = now();
    const next = number * accumulate; // while a GPU works
    this.#ahead = { pass: next, batch: data.training(next) };
    // The step's one wait for the device: sums and what the layers have shown come to the host together.
    const [sums, ...records] = await readTogether([this.#sums, ...recordsOf(shown)]);
    const loss = sums[LOSS] / tokens, norm = Math.sqrt(sums[SQUARES]);
    if (!Number.isFinite(loss) || !Number.isFinite(norm)) {
      this.optimizer.steps = number - 1;
      throw new Error(
        `Cannot go on training as loss and gradient must be finite: current value is ${loss} and ${norm} at step ${number}`,
      );
    }
    const read = finishShown(shown, records);
    let imbalance = 0, auxLoss = 0;
    for (let i = 0, each = read.length / accumulate; i < accumulate; i++) {
      const summary = summaryOf(read.slice(i * each, (i + 1) * each));
      imbalance += summary.imbalance / accumulate;
      auxLoss += summary.auxLoss / accumulate;
    }
    model.endStep();
    const step_us = now() - began;
    return {
      step: number,
      loss,
      aux_loss: auxLoss,
      lr,
      tokens_per_s: tokens / step_us * 1e6,
      step_ms: step_us / 1000,
      host_ms: (enqueued - began) / 1000,
      peak_bytes: device.memory().peak_bytes,
      a2a_share: sums[ALL_TO_ALL] / world.size / step_us,
      load_imbalance: imbalance,
      grad_norm: norm,
    };
  }

  /**
   * Mean loss of validation batches. All ranks call it together.
   *
   * @param limit At most so many global batches. @default {all}
   * @returns Nats per token.
   */
  async validate(limit?: number): Promise<number> {
    const { model, data, device, world } = this.#options;
    // A GPU's all-to-alls of steps before count in the next step, but none of these.
    progress();
    const before_us = recorder.total("allToAll");
    using sums = zeros(device, [2], "f64");
    let tokens = 0;
    for (const batch of data.validation(limit)) {
      dropShown(await model.pass(batch, plainStep(device), { lossSum: sums.rows(0, 1) }));
      for (const target of batch.targets) if (target >= 0) tokens++;
    }
    ops.fill(sums.rows(1, 2), tokens);
    await world.allReduce(sums).wait(device.stream);
    const [loss, all] = await sums.toArray() as Float64Array;
    progress();
    this.#allToAll_us += recorder.total("allToAll") - before_us;
    return loss / all;
  }

  /**
   * Saves weights, moments and position. All ranks call it together.
   *
   * @param directory Where checkpoints lie.
   * @param options How many to keep, and more to put into the state.
   * @returns The checkpoint.
   */
  async save(
    directory: string,
    options: { readonly keep?: number; readonly state?: object } = {},
  ): Promise<Checkpoint> {
    const { model, world, data } = this.#options;
    const sharded = await this.#shards?.forSaving((shard) => this.optimizer.momentsOf(shard));
    const contents: CheckpointContents = {
      step: this.steps,
      config: model.description,
      model: [...this.#weights(), ...model.buffers],
      optimizer: this.#moments(sharded),
      state: { ...options.state, ...positionOf(data) },
      transformersConfig: mixtralConfig(model.config, data.sequence) ?? undefined,
    };
    return await saveCheckpoint(directory, contents, { comm: world, keep: options.keep });
  }

  /**
   * Goes on from a checkpoint, which any number of ranks may have written, in another dtype, too. All ranks call it together.
   *
   * @param directory Where checkpoints lie: the newest complete one is taken.
   * @returns It, or null if there is none, and then nothing has changed.
   * @throws {CheckpointError} If it is of another model, or of data in another order or batches of another size; nothing has changed then.
   */
  async resume(directory: string): Promise<Checkpoint | null> {
    const { model, world, data } = this.#options;
    const found = await newestCheckpoint(directory, { comm: world });
    if (!found) return null;
    checkPosition(found, data);
    const sharded = this.#shards?.forLoading((shard) => this.optimizer.momentsOf(shard));
    const { parameters, optimizer } = loadingMasters(this.#weights(), this.#moments(sharded));
    const checkpoint = await loadCheckpoint(found, {
      model: [...parameters, ...model.buffers],
      optimizer,
      config: { ...model.description, dtype: found.config.dtype },
      comm: world,
    });
    this.optimizer.steps = checkpoint.step;
    return checkpoint;
  }

  #weights(): CheckpointTensor[] {
    const { model } = this.#options;
    return parameterTensors(model.parameters, (parameter) => model.ownerOf(parameter));
  }

  /** The optimizer's tensors; those of the replicated parameters are given where they are sharded. */
  #moments(sharded: readonly CheckpointTensor[] | undefined): CheckpointTensor[] {
    const { model } = this.#options;
    const whole = model.parameters.filter(({ group }) => !sharded || group === "replicas");
    const own = whole.flatMap((parameter) =>
      this.optimizer.tensorsOf(parameter, model.ownerOf(parameter))
    );
    return sharded ? [...sharded, ...own] : own;
  }

  /** Frees the optimizer's moments and the gradients' communicator. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.optimizer[Symbol.dispose]();
    for (const { store } of this.#options.model.moeLayers) {
      await store.settle();
      store.holdMoments(false);
    }
    this.#sums[Symbol.dispose]();
    this.#gradScale[Symbol.dispose]();
    await this.#gradients[Symbol.asyncDispose]();
  }
}

/** Plans the reduction of a step's gradients, and opens what communicators it needs. All ranks call it together. */
async function reduction(
  { model, device, data, world, accumulate, shardOptimizer }: Required<TrainerOptions>,
  gradients: Communicator,
  scheduler: CollectiveScheduler,
): Promise<Reduced> {
  // The mean, not this rank's own rows: the graph must be alike on all ranks.
  const rows = data.tokensPerStep / (accumulate * world.size);
  const graph = buildStepGraph(model.outline(rows, world.size));
  const seats = await seatGradients(graph, model.moeLayers, world);
  const reducer = new GradientReducer({
    graph,
    scheduler,
    comm: gradients,
    device,
    parameters: model.parameters,
    seats,
    scatter: shardOptimizer && world.size > 1,
  });
  return { scheduler, graph, reducer, seated: new Set(seats.map(({ layer }) => layer)) };
}

/** How the gradients that all ranks reduce are cut up, whatever else is in the graph. */
function cuts({ graph, reducer }: Reduced): string {
  const world = reducer.schedule.microOps.filter((op) => groupOf(graph, op) === "world");
  return JSON.stringify(world.map(({ parts }) =>
    parts.map(({ gradient, start, end }) => {
      const node = graph.nodes[gradient];
      return [node.kind === "gradient" && node.name, start, end];
    })
  ));
}

/** What makes a step's number a position in the text. */
function positionOf({ seed, batch, sequence }: TrainingData) {
  return { seed, batch, sequence };
}

/** With other batches, going on would repeat or skip text without a word. */
function checkPosition({ path, state }: Checkpoint, data: TrainingData): void {
  for (const [name, value] of Object.entries(positionOf(data))) {
    if (state[name] !== value) {
      throw new CheckpointError(
        `Cannot go on from ${path} as ${name} must be ${
          state[name] ?? "absent"
        }, as in the checkpoint: current value is ${value}; give the checkpoint's, or begin a new run`,
      );
    }
  }
}
