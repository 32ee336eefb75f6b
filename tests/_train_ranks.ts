// One rank of the training tests: trains a small model as the test says and returns what it saw.

import type { Communicator } from "../collectives/types.ts";
import type { Recompute } from "../moe/block.ts";
import { type ModelConfig, modelConfig, type ModelOptions } from "../moe/config.ts";
import { replicatedPlacement } from "../moe/placement.ts";
import { Trainer } from "../moe/trainer.ts";
import { type TrainingData, trainingData } from "../moe/training_data.ts";
import { type Batch, Transformer } from "../moe/transformer.ts";
import { stepVolume } from "../moe/volume.ts";
import { TwoLevel } from "../collectives/two_level.ts";
import { createScheduler, pipelined, type SchedulerName } from "../lina/training/schedulers.ts";
import { Fifo } from "../moe/fifo.ts";
import { reducedGradients } from "../moe/graph.ts";
import type { Boundary, CollectiveScheduler, PlacementPlan } from "../moe/hooks.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import { rankMain } from "./_ranks.ts";

/** What a test asks for. */
export interface TrainArgs {
  readonly model?: Partial<ModelOptions>;
  readonly steps: number;
  readonly batch?: number;
  /** Order of the data. */
  readonly dataSeed?: number;
  /** Tokens of a sequence. */
  readonly sequence?: number;
  readonly accumulate?: number;
  readonly clip?: number;
  readonly replicas?: number;
  /** After every step experts move on: to other ranks, or to more ranks and back. */
  readonly moves?: "turn" | "replicate";
  /** After a step each expert goes to sit on so many ranks. */
  readonly packs?: readonly { readonly after: number; readonly replicas: number }[];
  /** After a step another scheduler takes over. */
  readonly reschedules?: readonly { readonly after: number; readonly schedule: SchedulerName }[];
  /** Bytes of a bucket of gradients. */
  readonly bucketBytes?: number;
  /** In place of buckets: parts of at most 300 elements, launched while no all-to-all runs, or all at the step's end. */
  readonly policy?: "parts" | "deferred";
  /** A scheduler of lina/, with buckets as above. */
  readonly schedule?: SchedulerName;
  /** Slices of every layer's all-to-alls. @default {as the scheduler has them} */
  readonly chunks?: number;
  /** All-to-alls on two levels, between hosts of so many ranks. @default {direct} */
  readonly perHost?: number;
  /** Most bytes of its micro-ops. @default {1000} */
  readonly microOpBytes?: number;
  /** All tokens go to the first experts. */
  readonly crowded?: boolean;
  /** This rank has no tokens; the others have as many as without it. */
  readonly idleRank?: number;
  /** Checkpoints lie here. */
  readonly directory?: string;
  /** Goes on from the newest checkpoint. */
  readonly resume?: boolean;
  /** Steps after which a checkpoint is saved. */
  readonly saveAt?: number;
  /** Routes tokens to experts in turn, so that load is balanced. */
  readonly balanced?: boolean;
  /** Each rank keeps the optimizer's tensors of a part of the replicated parameters only. */
  readonly shardOptimizer?: boolean;
  /** What is computed again in the backward pass. */
  readonly recompute?: Recompute;
  /** Validations after each step. @default {0} */
  readonly validations?: number;
  /** Returns a checksum of every parameter that the rank speaks for. */
  readonly parameters?: boolean;
}

/** What a rank has seen. */
export interface TrainResult {
  readonly loss: readonly number[];
  readonly gradNorm: readonly number[];
  readonly auxLoss: readonly number[];
  /** Part of each step in all-to-alls. */
  readonly a2aShare: readonly number[];
  readonly valLoss: number;
  readonly sums: Readonly<Record<string, readonly number[]>>;
  /** Bytes sent in the last step, per operation; `gradients` is the gradients' allReduce. */
  readonly bytes: Readonly<Record<string, number>>;
  /** What happened in the last step, as the scheduler was told: kind, and node or layer. */
  readonly boundaries: readonly (readonly [Boundary["kind"], number])[];
  /** How many micro-ops the scheduler launched at each of them. */
  readonly launched: readonly number[];
  /** The step's nodes: kind, and what they are. */
  readonly nodes: readonly string[];
  /** What the formula says. */
  readonly formula: Readonly<Record<string, number>>;
  /** Memory in use before the first step. */
  readonly used_bytes: number;
}

/** Sizes of the tests' models. */
export const SMALL = {
  vocab: 64,
  width: 32,
  layers: 2,
  heads: 4,
  kvHeads: 2,
  hidden: 24,
  experts: 8,
  initStd: 0.1,
  router: { kind: "softmax", topK: 2, auxLoss: 0.02, zLoss: 0.01 },
} as const;

/** Tokens of a sequence. */
export const SEQUENCE = 16;

/** A text with structure, so that there is something to learn. */
export function smallText(size: number): Uint8Array {
  const text = new Uint8Array(size);
  let x = 7;
  for (let i = 0; i < size; i++) {
    x = (Math.imul(x, 1103515245) + 12345) >>> 0;
    text[i] = x % 5 === 0 ? (x >>> 16) % 64 : (text[Math.max(0, i - 1)] * 3 + 1) % 64;
  }
  return text;
}

/**
 * Trains as one rank.
 *
 * @param comm All ranks; several trainings may follow one another on it.
 * @param args What the test asks for.
 * @param device Where.
 * @returns What the rank has seen.
 */
export async function train(
  comm: Communicator,
  args: TrainArgs,
  device: Device,
): Promise<TrainResult> {
  const { steps, batch = 8, accumulate = 1, clip = 1, dataSeed = 5, sequence = SEQUENCE } = args;
  const config = modelConfig({ ...SMALL, ...args.model });
  const text = smallText(4000);
  const { idleRank } = args;
  const idle = idleRank !== undefined;
  const share = trainingData(
    {
      train: text.subarray(0, 3000),
      validation: text.subarray(3000),
      vocabularySize: 64,
      bytesPerToken: 1,
    },
    {
      sequence,
      batch,
      accumulate,
      seed: dataSeed,
      rank: Math.min(
        comm.rank - Number(idle && comm.rank > idleRank),
        comm.size - 1 - Number(idle),
      ),
      size: comm.size - Number(idle),
    },
  );
  const data = comm.rank === idleRank ? withoutTokens(share) : share;
  const seatings = seatingsOf(args, config.experts, comm.size);
  let seating = 0;
  const placement = { name: "moving", plan: () => seatings[seating] };
  const { perHost } = args;
  await using exchange = perHost === undefined ? null : await TwoLevel.create(comm, {
    hosts: Array.from({ length: comm.size }, (_, rank) => Math.floor(rank / perHost)),
  });
  using model = new Transformer({
    device,
    comm,
    config,
    exchange,
    seed: 11,
    placement,
    recompute: args.recompute,
  });
  const boundaries: [Boundary["kind"], number][] = [];
  const launched: number[] = [];
  let nodes: string[] = [];
  const { bucketBytes = 4000 } = args;
  const named = (name: SchedulerName) =>
    createScheduler(name, {
      bucketBytes,
      microOpBytes: args.microOpBytes ?? 1000,
      ...(name.endsWith("+pipeline") && { chunks: args.chunks }),
    });
  const whole: CollectiveScheduler = args.policy
    ? parts(args.policy)
    : args.schedule
    ? named(args.schedule)
    : new Fifo({ bucketBytes });
  const inner = args.chunks === undefined || args.schedule?.endsWith("+pipeline")
    ? whole
    : pipelined(whole, args.chunks);
  const scheduler: CollectiveScheduler = {
    name: "watched",
    pace: inner.pace,
    plan(graph) {
      nodes = graph.nodes.map((node) =>
        node.kind === "gradient"
          ? node.name
          : `${node.kind} ${node.layer} ${node.phase} ${node.kind === "allToAll" ? node.bytes : ""}`
      );
      return inner.plan(graph);
    },
    launch(boundary, state) {
      const of = "gradient" in boundary
        ? boundary.gradient
        : "node" in boundary
        ? boundary.node
        : "layer" in boundary
        ? boundary.layer
        : -1;
      boundaries.push([boundary.kind, of]);
      const count = inner.launch(boundary, state);
      launched.push(count);
      return count;
    },
  };
  await using trainer = await Trainer.create({
    world: comm,
    device,
    model,
    data,
    learningRate: { peak: 0.01, warmup: 4, steps: 40 },
    accumulate,
    clip,
    scheduler,
    shardOptimizer: args.shardOptimizer,
  });
  const used_bytes = device.memory().used_bytes;
  if (args.resume && !await trainer.resume(args.directory!)) throw new Error("no checkpoint");
  const loss: number[] = [], gradNorm: number[] = [], auxLoss: number[] = [];
  const a2aShare: number[] = [];
  const replay = args.balanced ? inTurn(config) : args.crowded ? crowded(config) : null;
  if (replay) { for (const layer of model.moeLayers) layer.tap = { replay }; }
  let before: Record<string, number> = {};
  while (trainer.steps < steps) {
    before = bytesOf(trainer);
    boundaries.length = launched.length = 0;
    const row = await trainer.step();
    loss.push(row.loss);
    gradNorm.push(row.grad_norm);
    auxLoss.push(row.aux_loss);
    a2aShare.push(row.a2a_share);
    for (let i = args.validations ?? 0; i > 0; i--) await trainer.validate();
    if (seatings.length > 1) {
      seating = (seating + 1) % seatings.length;
      for (const layer of model.moeLayers) await layer.store.moveTo(seatings[seating].seats);
    }
    for (const { after, replicas } of args.packs ?? []) {
      if (after === row.step) await trainer.moveExperts(replicatedPlacement(replicas));
    }
    for (const { after, schedule } of args.reschedules ?? []) {
      if (after === row.step) await trainer.reschedule(named(schedule));
    }
    if (args.saveAt === row.step) await trainer.save(args.directory!, { state: { mark: 1 } });
  }
  const bytes = bytesOf(trainer);
  for (const name of Object.keys(bytes)) bytes[name] -= before[name] ?? 0;
  const formula = stepVolume({
    ranks: comm.size,
    rows: batch * SEQUENCE / accumulate / comm.size,
    passes: accumulate,
    width: config.width,
    routers: model.moeLayers.map((layer) => layer.router),
    schedule: trainer.schedule,
  });
  const sums: Record<string, number[]> = {};
  if (args.parameters) {
    for (const parameter of model.parameters) {
      if (model.ownerOf(parameter) === comm.rank) {
        sums[parameter.name] = await sketch(parameter.value);
      }
    }
    for (const { name, read } of model.buffers) sums[name] = [...await read() as Float64Array];
  }
  const valLoss = await trainer.validate();
  return {
    loss,
    gradNorm,
    auxLoss,
    a2aShare,
    valLoss,
    sums,
    bytes,
    boundaries,
    launched,
    nodes,
    formula: { ...formula },
    used_bytes,
  };
}

/** Where experts sit, step after step. */
function seatingsOf({ replicas = 1, moves }: TrainArgs, experts: number, ranks: number) {
  const plan = (replicas: number): PlacementPlan =>
    replicatedPlacement(replicas).plan({ layer: 0, experts, ranks, counts: null });
  if (experts === 0) return [];
  const first = plan(replicas);
  if (moves === undefined) return [first];
  if (moves === "replicate") return [first, plan(ranks)];
  // Each rank gets its neighbour's experts, in the opposite order.
  const turn = ({ seats, split }: PlacementPlan): PlacementPlan => ({
    seats: seats.map((_, rank) => seats[(rank + 1) % ranks].toReversed()),
    split,
  });
  return [first, turn(first), turn(turn(first))];
}

/** Small parts of single gradients. */
function parts(policy: "parts" | "deferred"): CollectiveScheduler {
  return {
    name: policy,
    pace: policy === "parts" ? "device" : "program",
    plan(graph) {
      const microOps = reducedGradients(graph).flatMap(({ id, elements }) => {
        return Array.from({ length: Math.ceil(elements / 300) }, (_, i) => {
          const start = 300 * i, end = Math.min(elements, start + 300);
          return { parts: [{ gradient: id, start, end }], bytes: 4 * (end - start) };
        });
      });
      return { microOps, chunks: new Map() };
    },
    launch: (boundary, { ready, allToAlls }) =>
      boundary.kind === "stepEnds" || (policy === "parts" && allToAlls === 0) ? ready : 0,
  };
}

function bytesOf({ traffic }: Trainer): Record<string, number> {
  const bytes: Record<string, number> = { gradients: traffic.gradients.allReduce?.bytes ?? 0 };
  for (const [name, sent] of Object.entries(traffic.world)) bytes[name] = sent?.bytes ?? 0;
  return bytes;
}

/** Token t's choice k is expert (t K + k) mod E. */
function inTurn({ experts, router }: ModelConfig) {
  const choices = (router as { topK: number }).topK;
  return (_layer: number, firstToken: number, tokens: number) => ({
    choices,
    experts_NK: Int32Array.from(
      { length: tokens * choices },
      (_, i) => (firstToken * choices + i) % experts,
    ),
  });
}

/** Every token chooses the first experts. */
function crowded({ router }: ModelConfig) {
  const choices = router.kind === "softmax" ? router.topK : 1;
  return (_layer: number, _firstToken: number, tokens: number) => ({
    choices,
    experts_NK: Int32Array.from({ length: tokens * choices }, (_, i) => i % choices),
  });
}

/** The same passes, of which this rank has nothing. */
function withoutTokens(data: TrainingData): TrainingData {
  const none: Batch = {
    tokens: new Int32Array(0),
    targets: new Int32Array(0),
    offsets: new Int32Array(1),
  };
  return {
    ...data,
    training: () => none,
    *validation(limit) {
      for (const _ of data.validation(limit)) yield none;
    },
  };
}

/** A few numbers that change if any element does. */
async function sketch(tensor: Tensor): Promise<number[]> {
  using wide = empty(tensor.device, tensor.shape);
  if (tensor.dtype !== "f32") ops.copy(tensor, wide);
  const x = await (tensor.dtype === "f32" ? tensor : wide).toArray() as Float32Array;
  let sum = 0, weighted = 0, squares = 0;
  for (let i = 0; i < x.length; i++) {
    sum += x[i];
    weighted += x[i] * (i % 97 + 1);
    squares += x[i] * x[i];
  }
  return [sum, weighted, squares];
}

if (import.meta.main) {
  await rankMain(({ comm, args, device }) => {
    return train(comm, args as TrainArgs, device ?? cpuDevice());
  });
}
