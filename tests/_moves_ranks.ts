// One rank of the tests of moves: experts of two layers move at random, with moments here and there; and a training that packs, unpacks and saves.

import assert from "node:assert/strict";
import type { Communicator } from "../collectives/types.ts";
import { modelConfig } from "../moe/config.ts";
import { ExpertStore } from "../moe/expert_store.ts";
import type { Parameter } from "../moe/parameter.ts";
import { replicatedPlacement } from "../moe/placement.ts";
import { Trainer } from "../moe/trainer.ts";
import { trainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import type { Device } from "../tensor/device.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { zeros } from "../tensor/tensor.ts";
import { SEQUENCE, SMALL, smallText } from "./_train_ranks.ts";
import { rankMain } from "./_ranks.ts";

/** What a test asks for. */
export interface MovesArgs {
  /** Seats of each layer, move after move; and the experts of a rank whose moments are then in host memory. */
  readonly random?: {
    readonly dtype: "f32" | "bf16";
    readonly experts: number;
    readonly moves: readonly {
      readonly seats: readonly (readonly (readonly number[])[])[];
      readonly offload: number;
    }[];
    readonly staging_bytes: number;
  };
  /** Copies of each expert before each step. */
  readonly train?: {
    readonly replicas: readonly number[];
    readonly offload?: number;
    readonly shardOptimizer?: boolean;
    /** Step after which a checkpoint is saved there. */
    readonly save?: readonly [step: number, directory: string];
    readonly resume?: string;
  };
  /** This rank finds no memory when experts come. */
  readonly fails?: number;
}

/** What a training has shown. */
export interface MovesResult {
  readonly losses: readonly number[];
  readonly gradNorms: readonly number[];
  readonly sent_bytes: number;
  readonly move_ms: number;
  readonly used_bytes: number;
}

/** Element i of a part of an expert: its value, or its moments of a kind, by the name's length. A bf16 number has it exactly. */
function mark({ name, expert }: Parameter, kind: number, i: number): number {
  const part = name.charCodeAt(name.length - 8);
  return (expert!.layer * 79 + expert!.id * 61 + kind * 101 + part + i * 3) % 251;
}

/** Every element says whose it is. */
async function fill(store: ExpertStore): Promise<void> {
  for (const parameter of store.parameters) {
    const { value, moments } = parameter, { device } = value;
    const array = await value.toArray();
    array.forEach((_: number | bigint, i: number) => array[i] = mark(parameter, 0, i));
    device.write(array, value);
    for (const [kind, tensor] of Object.entries(moments ?? {})) {
      if (!tensor) continue;
      const array = await tensor.toArray();
      array.forEach((_: number | bigint, i: number) => array[i] = mark(parameter, kind.length, i));
      device.write(array, tensor);
    }
  }
}

async function check(store: ExpertStore): Promise<void> {
  for (const parameter of store.parameters) {
    const { value, grad, name, moments, offloaded } = parameter;
    const marked = (array: ArrayLike<number | bigint>, kind: number, what: string) => {
      for (let i = 0; i < array.length; i++) {
        const expected = mark(parameter, kind, i);
        if (Number(array[i]) !== expected) {
          throw new Error(`${name} ${what} ${i} must be ${expected}: current value is ${array[i]}`);
        }
      }
    };
    marked(await value.toArray(), 0, "value");
    assert.ok((await grad.toArray()).every((x) => Number(x) === 0), "gradients begin at zero");
    for (const [kind, tensor] of Object.entries(moments ?? {})) {
      if (tensor) marked(await tensor.toArray(), kind.length, kind);
    }
    if (!offloaded) continue;
    const { memory, start, end } = offloaded;
    assert.ok(memory.moments?.place === "host");
    for (const { kind } of memory.moments.layout.parts) {
      marked((await memory.moments.read(kind, start, end))!, kind.length, kind);
    }
  }
}

/** Transports keep a little that they take when they need it; an expert is larger. */
function assertUsed(device: Device, expected_bytes: number): void {
  const { used_bytes } = device.memory();
  assert.ok(Math.abs(used_bytes - expected_bytes) < 20_000, `${used_bytes}, not ${expected_bytes}`);
}

async function moveAtRandom(
  comm: Communicator,
  device: Device,
  { dtype, experts, moves, staging_bytes }: NonNullable<MovesArgs["random"]>,
  fails?: number,
): Promise<number> {
  // What transports keep, they take at the first use.
  using cell = zeros(device, [1], "f64"), bytes = zeros(device, [comm.size], "u8");
  using other = zeros(device, [comm.size], "u8");
  await comm.allReduce(cell);
  await comm.allToAllV(bytes, Array(comm.size).fill(1), other, Array(comm.size).fill(1));
  const before = device.memory().used_bytes;
  const [first, ...rest] = moves;
  const stores = first.seats.map((seats, layer) =>
    new ExpertStore({
      device,
      comm,
      layer,
      experts,
      width: 33,
      hidden: 65,
      activation: layer % 2 === 0 ? "swiglu" : "relu",
      dtype,
      seats,
      seed: 1,
      initStd: 1,
      downStd: 1,
    })
  );
  for (const store of stores) {
    store.holdMoments(true);
    await fill(store);
  }
  let sent = 0;
  for (const { seats, offload } of rest) {
    const all = stores.map((store, layer) => ({ store, seats: seats[layer], offload }));
    if (fails !== undefined) {
      const held = stores.map(({ parameters }) => parameters);
      const used = device.memory().used_bytes;
      const allocate = device.allocate;
      if (comm.rank === fails) {
        let left = 1;
        device.allocate = (bytes) => {
          if (left-- > 0) return allocate.call(device, bytes);
          throw new Error("no memory here");
        };
      }
      const failed = ExpertStore.moveAll(all, { staging_bytes });
      await assert.rejects(
        failed,
        comm.rank === fails ? /no memory here/ : /must have memory .* 1 without; nothing has moved/,
      );
      device.allocate = allocate;
      assert.ok(stores.every(({ parameters }, layer) => parameters === held[layer]));
      assertUsed(device, used);
    }
    sent += await ExpertStore.moveAll(all, { staging_bytes });
    for (const [layer, store] of stores.entries()) {
      assert.deepEqual(store.seats, seats[layer]);
      assert.equal(store.offloaded, Math.min(offload, seats[layer][comm.rank].length));
      await check(store);
    }
  }
  for (const store of stores) {
    await store.settle();
    store[Symbol.dispose]();
  }
  assertUsed(device, before);
  return sent;
}

async function train(
  comm: Communicator,
  device: Device,
  args: NonNullable<MovesArgs["train"]>,
): Promise<MovesResult> {
  const config = modelConfig({ ...SMALL, dtype: "f32" });
  const text = smallText(3000);
  const data = trainingData(
    { train: text, validation: text, vocabularySize: 64, bytesPerToken: 1 },
    { sequence: SEQUENCE, batch: 8, seed: 5, rank: comm.rank, size: comm.size },
  );
  using model = new Transformer({ device, comm, config, seed: 11 });
  await using trainer = await Trainer.create({
    world: comm,
    device,
    model,
    data,
    learningRate: { peak: 0.01, warmup: 4, steps: 40 },
    offloadExperts: args.offload,
    shardOptimizer: args.shardOptimizer,
  });
  if (args.resume) assert.ok(await trainer.resume(args.resume));
  const losses: number[] = [], gradNorms: number[] = [];
  let sent_bytes = 0, move_ms = 0, now = 1;
  for (const replicas of args.replicas) {
    if (replicas !== now) {
      const start = performance.now();
      sent_bytes += await trainer.moveExperts(replicatedPlacement(replicas));
      move_ms += performance.now() - start;
      now = replicas;
    }
    const row = await trainer.step();
    losses.push(row.loss);
    gradNorms.push(row.grad_norm);
    if (args.save?.[0] === row.step) await trainer.save(args.save[1]);
  }
  return { losses, gradNorms, sent_bytes, move_ms, used_bytes: device.memory().used_bytes };
}

if (import.meta.main) {
  await rankMain(async ({ comm, args, device }) => {
    const { random, train: training, fails } = args as MovesArgs;
    const here = device ?? cpuDevice();
    return {
      sent: random && await moveAtRandom(comm, here, random, fails),
      trained: training && await train(comm, here, training),
    };
  });
}
