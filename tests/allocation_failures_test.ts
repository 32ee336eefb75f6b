// Out of memory at any point: whichever allocation of making a model, a step, a validation or a sample fails, the error comes through and
// nothing is leaked or freed twice. On the CPU, and on the CUDA device (a GPU, or its emulator), where kernels allocate, too.

import assert from "node:assert/strict";
import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import type { Recompute } from "../moe/block.ts";
import { modelConfig, type ModelOptions } from "../moe/config.ts";
import { plainStep } from "../moe/step.ts";
import { Trainer } from "../moe/trainer.ts";
import { trainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { CudaDevice } from "../tensor/cuda/device.ts";
import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import * as routing from "../tensor/ops/routing.ts";
import { TensorScope, zeros } from "../tensor/tensor.ts";
import { testDevice } from "./emulator/device.ts";

class NoMemory extends RangeError {}

/** Watches a device's allocations, its kernels' own among them: those from the number `first` on fail. */
class Watched implements Disposable {
  /** Allocations that were asked for. */
  count = 0;
  /** Addresses of live tensors. */
  readonly live = new Set<number>();
  /** Addresses of what kernels hold: of their scratch memory, and of the tables that they keep. */
  readonly held = new Set<number>();
  readonly #undo = new DisposableStack();

  constructor(device: Device, first: number) {
    const ask = () => {
      if (++this.count >= first) throw new NoMemory(`allocation ${this.count}`);
    };
    const allocate = device.allocate.bind(device), free = device.free.bind(device);
    this.#replace(device, "allocate", (bytes: number) => {
      ask();
      const address = allocate(bytes);
      this.live.add(address);
      return address;
    });
    this.#replace(device, "free", (address: number) => {
      this.live.delete(address);
      free(address);
    });
    const { context } = device as Partial<CudaDevice>;
    if (!context) return;
    const { allocate: take, free: give } = context;
    this.#replace(context, "allocate", (bytes: number) => {
      ask();
      const address = take(bytes);
      this.held.add(address);
      return address;
    });
    this.#replace(context, "free", (address: number) => {
      this.held.delete(address);
      give(address);
    });
  }

  #replace(owner: object, name: string, value: unknown): void {
    const own = Object.getOwnPropertyDescriptor(owner, name);
    Object.defineProperty(owner, name, { configurable: true, value });
    this.#undo.defer(() => {
      if (own) Object.defineProperty(owner, name, own);
      else Reflect.deleteProperty(owner, name);
    });
  }

  [Symbol.dispose](): void {
    this.#undo[Symbol.dispose]();
  }
}

interface Case {
  readonly name: string;
  readonly model: Partial<ModelOptions>;
  readonly recompute?: Recompute;
  readonly accumulate?: number;
}

const SIZES = { vocab: 32, width: 16, layers: 2, heads: 2, headDim: 8, hidden: 12, experts: 4 };
const CASES: readonly Case[] = [
  { name: "softmax", model: { sharedExperts: 1, denseLayers: 1 }, accumulate: 2 },
  { name: "tied, dense", model: { experts: 0, tied: true }, recompute: "activation" },
  {
    name: "sigmoid, run again",
    model: { router: { kind: "sigmoid", topK: 2 }, sharedExperts: 1 },
    recompute: "block",
  },
  {
    name: "capacity, run again",
    model: { router: { kind: "gshard", capacityFactor: 1 } },
    recompute: "block",
  },
];

const TEXT = Uint8Array.from({ length: 200 }, (_, i) => (i * i + 7 * i) % 31);

/** Makes a model, trains it, measures it and samples from it. */
async function everything(device: Device, { model: sizes, recompute, accumulate = 1 }: Case) {
  const dtype = device.kind === "cuda" ? "bf16" : "f32";
  const config = modelConfig({ ...SIZES, dtype, ...sizes });
  const world = createCommunicator(openSelf(), { rank: 0, size: 1, name: "alone", device });
  using model = new Transformer({ device, comm: world, config, seed: 3, recompute });
  const text = { train: TEXT, validation: TEXT, vocabularySize: 32, bytesPerToken: 1 };
  const data = trainingData(text, {
    sequence: 9,
    batch: 2,
    accumulate,
    seed: 1,
    rank: 0,
    size: 1,
  });
  const learningRate = { peak: 0.01, warmup: 1, steps: 5 };
  await using trainer = await Trainer.create({
    world,
    device,
    model,
    data,
    learningRate,
    accumulate,
  });
  await trainer.step();
  await trainer.validate(1);
  const logits = await model.logits(Int32Array.of(1, 2, 3), Int32Array.of(0, 3), plainStep(device));
  logits[Symbol.dispose]();
}

const cuda = await testDevice();

for (const [device, every] of [[cpuDevice(), 1], [cuda, 7]] as const) {
  for (const one of CASES) {
    Deno.test({
      name: `no memory at any point, nothing leaks: ${one.name}, ${device?.kind ?? "cuda"}`,
      ignore: device === null,
      async fn() {
        await everything(device!, one); // what is kept for good is there then
        let most: number;
        {
          using watched = new Watched(device!, Infinity);
          await everything(device!, one);
          most = watched.count;
          assert.equal(watched.live.size, 0);
        }
        for (let first = 1; first <= most; first += every) {
          using watched = new Watched(device!, first);
          const failed = await everything(device!, one).then(() => null, (error) => error);
          if (failed === null) break; // kernels have kept what they made in the runs before
          assert(failed instanceof NoMemory, `${first}: ${(failed as Error).stack}`);
          await new Promise((resolve) => setTimeout(resolve)); // what was under way has come
          assert.equal(watched.live.size, 0, `${failed.stack}`);
        }
      },
    });
  }
}

Deno.test({
  name: "no memory for a kernel's own needs: what it has taken is given back",
  ignore: cuda === null,
  fn() {
    const device = cuda!, N = 300, D = 16, E = 6, K = 2;
    using scope = new TensorScope();
    const f32 = (...shape: number[]) => zeros(device, shape);
    const i32 = (...shape: number[]) => zeros(device, shape, "i32");
    const x = f32(N, D), rows = i32(N), logits = f32(N, E), gain = f32(D), invRms = f32(N);
    const experts = i32(N, K), weights = f32(N, K), record = zeros(device, [3 * E + 2], "f64");
    const layout = { experts: E, starts: null };
    const route = {
      experts: E,
      choices: K,
      scores: "softmax",
      renormalise: true,
      scale: 1,
      groups: 1,
      groupLimit: 1,
      firstOnly: false,
    } as const;
    const narrow = zeros(device, [N, D], "bf16"), shape = { heads: 2, kvHeads: 2, headDim: 8 };
    const attention = { ...shape, offsets: Int32Array.of(0, N) };
    const squares = [f32(D, D)]; // devices keep what they derive from lists
    const calls: Record<string, () => void> = {
      scatterAddRows: () => ops.scatterAddRows(x, rows, f32(70_000, D)),
      route: () => {
        routing.route(logits, null, route, { experts, weights, lse: invRms, record });
      },
      placeRows: () => {
        const out = { slots: i32(N, K), tokens: i32(N * K), offsets: i32(E + 1) };
        routing.placeRows(experts, layout, out);
      },
      "grouped products with scales": () => {
        const groups = { offsets: i32(2), host: null };
        const up = f32(N, D), back = { scales: invRms, dScales: f32(N) };
        ops.groupedGemmActivation(x, squares, groups, "gelu", up, f32(N, D), invRms);
        ops.groupedGemmActivationBackward(x, squares, groups, "gelu", up, f32(N, D), back);
      },
      gate: () => routing.gate(narrow, f32(E, D), logits),
      gateWeightGrad: () => routing.gateWeightGrad(logits, x, f32(E, D)),
      rmsNormBackward: () => ops.rmsNormBackward(x, f32(N, D), gain, invRms, f32(N, D), f32(D)),
      attention: () => ops.attention(x, x, x, f32(N, D), f32(N, 2), attention),
      attentionBackward: () => {
        const [dQ, dK, dV] = [f32(N, D), f32(N, D), f32(N, D)];
        ops.attentionBackward(x, x, x, x, f32(N, D), f32(N, 2), attention, dQ, dK, dV);
      },
      sumSquares: () => ops.sumSquares([x, logits], zeros(device, [1], "f64")),
    };
    for (const [name, call] of Object.entries(calls)) {
      call(); // tables are kept
      for (let first = 1;; first++) {
        using watched = new Watched(device, first);
        try {
          using _scope = new TensorScope();
          call();
          assert(first > 1, name);
          break;
        } catch (error) {
          assert(error instanceof NoMemory, `${name}: ${(error as Error).stack}`);
        } finally {
          assert.equal(watched.held.size, 0, `${name}, allocation ${first}`);
        }
      }
    }
    void scope;
  },
});
