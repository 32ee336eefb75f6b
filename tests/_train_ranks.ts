// One rank of the training tests: trains a small model as the test says and returns what it saw.

import type { Communicator } from "../collectives/types.ts";
import { modelConfig, type ModelOptions } from "../moe/config.ts";
import { replicatedPlacement } from "../moe/placement.ts";
import { Trainer } from "../moe/trainer.ts";
import { trainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import { Fifo } from "../moe/fifo.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { rankMain } from "./_ranks.ts";

/** What a test asks for. */
export interface TrainArgs {
  readonly model?: Partial<ModelOptions>;
  readonly steps: number;
  readonly batch?: number;
  readonly accumulate?: number;
  readonly clip?: number;
  readonly replicas?: number;
  /** Bytes of a bucket of gradients. */
  readonly bucketBytes?: number;
  /** Checkpoints lie here. */
  readonly directory?: string;
  /** Goes on from the newest checkpoint. */
  readonly resume?: boolean;
  /** Steps after which a checkpoint is saved. */
  readonly saveAt?: number;
  /** Returns a checksum of every parameter that the rank speaks for. */
  readonly parameters?: boolean;
}

/** What a rank has seen. */
export interface TrainResult {
  readonly loss: readonly number[];
  readonly gradNorm: readonly number[];
  readonly auxLoss: readonly number[];
  readonly valLoss: number;
  readonly sums: Readonly<Record<string, readonly number[]>>;
  /** Bytes sent in the last step, per operation, on the world's communicator. */
  readonly worldBytes: Readonly<Record<string, number>>;
  /** Elements of replicated parameters. */
  readonly worldElements: number;
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

async function train(comm: Communicator, args: TrainArgs): Promise<TrainResult> {
  const device = cpuDevice();
  const { steps, batch = 8, accumulate = 1, clip = 1 } = args;
  const config = modelConfig({ ...SMALL, ...args.model });
  const text = smallText(4000);
  const data = trainingData(
    {
      train: text.subarray(0, 3000),
      validation: text.subarray(3000),
      vocabularySize: 64,
      bytesPerToken: 1,
    },
    { sequence: SEQUENCE, batch, accumulate, seed: 5, rank: comm.rank, size: comm.size },
  );
  const placement = replicatedPlacement(args.replicas ?? 1);
  using model = new Transformer({ device, comm, config, seed: 11, placement });
  await using trainer = await Trainer.create({
    world: comm,
    device,
    model,
    data,
    learningRate: { peak: 0.01, warmup: 4, steps: 40 },
    accumulate,
    clip,
    scheduler: new Fifo({ bucketBytes: args.bucketBytes ?? 4000 }),
  });
  if (args.resume && !await trainer.resume(args.directory!)) throw new Error("no checkpoint");
  const loss: number[] = [], gradNorm: number[] = [], auxLoss: number[] = [];
  let before: Record<string, number> = {};
  while (trainer.steps < steps) {
    before = bytesOf(comm);
    const row = await trainer.step();
    loss.push(row.loss);
    gradNorm.push(row.grad_norm);
    auxLoss.push(row.aux_loss);
    if (args.saveAt === row.step) await trainer.save(args.directory!, { state: { mark: 1 } });
  }
  const after = bytesOf(comm);
  const worldBytes = Object.fromEntries(
    Object.keys(after).map((name) => [name, after[name] - (before[name] ?? 0)]),
  );
  const sums: Record<string, number[]> = {};
  if (args.parameters) {
    for (const parameter of model.parameters) {
      if (model.ownerOf(parameter) === comm.rank) {
        sums[parameter.name] = await sketch(parameter.value);
      }
    }
    for (const { name, read } of model.buffers) sums[name] = [...await read() as Float64Array];
  }
  const worldElements = model.parameters.filter((p) => p.group === "world")
    .reduce((sum, p) => sum + p.value.size, 0);
  const valLoss = await trainer.validate();
  return { loss, gradNorm, auxLoss, valLoss, sums, worldBytes, worldElements };
}

function bytesOf(comm: Communicator): Record<string, number> {
  return Object.fromEntries(
    Object.entries(comm.traffic).map(([name, traffic]) => [name, traffic!.bytes]),
  );
}

/** A few numbers that change if any element does. */
async function sketch(tensor: Tensor): Promise<number[]> {
  const x = await tensor.toArray() as Float32Array;
  let sum = 0, weighted = 0, squares = 0;
  for (let i = 0; i < x.length; i++) {
    sum += x[i];
    weighted += x[i] * (i % 97 + 1);
    squares += x[i] * x[i];
  }
  return [sum, weighted, squares];
}

if (import.meta.main) {
  await rankMain(({ comm, args }) => train(comm, args as TrainArgs));
}
