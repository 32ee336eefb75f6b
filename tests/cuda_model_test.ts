// The whole model on the CUDA device (a GPU, or its emulator) against the CPU: loss and every gradient, training steps, checkpoints that
// one saves and the other loads, and how often a step makes the host wait.

import assert from "node:assert/strict";
import type { Recompute } from "../moe/block.ts";
import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import { type ModelConfig, modelConfig, type ModelOptions } from "../moe/config.ts";
import { generate } from "../moe/generate.ts";
import { readShown } from "../moe/shown.ts";
import { plainStep } from "../moe/step.ts";
import { Trainer } from "../moe/trainer.ts";
import { trainingData } from "../moe/training_data.ts";
import { type Batch, summaryOf, Transformer } from "../moe/transformer.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, fromArray, type Tensor, zeros } from "../tensor/tensor.ts";
import { emulated, testDevice } from "./emulator/device.ts";

const cuda = await testDevice();
const cpu = cpuDevice();
const ignore = cuda === null;

const SMALL: ModelOptions = {
  vocab: 40,
  width: 32,
  layers: 2,
  heads: 2,
  headDim: 16,
  hidden: 24,
  initStd: 0.15,
};
const MOE: Partial<ModelOptions> = {
  experts: 4,
  router: { kind: "softmax", topK: 2, auxLoss: 0.05, zLoss: 0.01 },
};

function worldOf(device: Device) {
  return createCommunicator(openSelf(), { rank: 0, size: 1, name: "alone", device });
}

function modelOn(device: Device, config: ModelConfig): Transformer {
  return new Transformer({ device, comm: worldOf(device), config, seed: 3 });
}

/** The elements as f32. */
async function numbers(x: Tensor): Promise<Float32Array> {
  if (x.dtype === "f32") return await x.toArray() as Float32Array;
  using wide = empty(x.device, x.shape);
  ops.copy(x, wide);
  return await wide.toArray() as Float32Array;
}

/** Gives a model the weights of another; wide ones become those that were rounded, too, so that both have the same. */
async function share(from: Transformer, to: Transformer): Promise<void> {
  for (const [i, { value }] of from.parameters.entries()) {
    const target = to.parameters[i].value;
    using exact = fromArray(target.device, await numbers(value), value.shape);
    ops.copy(exact, target);
    value.device.write(await numbers(target), value);
  }
}

function batchOf(...offsets: number[]): Batch {
  const length = offsets.at(-1)!;
  return {
    tokens: Int32Array.from({ length }, (_, i) => (i * 17 + 5) % 40),
    targets: Int32Array.from({ length }, (_, i) => i === 3 ? -1 : (i * 23 + 11) % 40),
    offsets: Int32Array.from(offsets),
  };
}

/** Loss and gradients of one pass. */
async function passOn(model: Transformer, device: Device, batch = batchOf(0, 5, 6, 15)) {
  using sum = zeros(device, [1], "f64");
  const step = plainStep(device, { training: true, firstPass: true });
  const shown = await model.pass(batch, step, { lossSum: sum, gradScale: 1 / 14 });
  const { auxLoss, imbalance } = summaryOf(await readShown(shown));
  const [loss] = await sum.toArray() as Float64Array;
  const grads = [];
  for (const { name, grad } of model.parameters) grads.push({ name, grad: await numbers(grad) });
  return { loss: loss / 14, auxLoss, imbalance, grads };
}

/** |a − b| / |b| */
function distance(a: Float32Array, b: Float32Array): number {
  let apart = 0, norm = 0;
  for (let i = 0; i < a.length; i++) {
    apart += (a[i] - b[i]) ** 2;
    norm += b[i] ** 2;
  }
  return Math.sqrt(apart / Math.max(norm, 1e-20));
}

const CASES: readonly Partial<ModelOptions>[] = [
  MOE,
  { tied: true, activation: "gelu", heads: 4, kvHeads: 2, headDim: 8 },
  { ...MOE, denseLayers: 1, sharedExperts: 1, router: { kind: "sigmoid", topK: 2, auxLoss: 0.05 } },
  { ...MOE, router: { kind: "switch", auxLoss: 0.1, capacityFactor: 1 } },
];

for (const dtype of ["f32", "bf16"] as const) {
  for (const change of CASES) {
    const name = `cuda model: ${dtype} loss and gradients are the CPU's ${JSON.stringify(change)}`;
    Deno.test({ name, ignore }, async () => {
      const sizes = { ...SMALL, ...change };
      using host = modelOn(cpu, modelConfig(sizes));
      using model = modelOn(cuda!, modelConfig({ ...sizes, dtype }));
      await share(host, model);
      const want = await passOn(host, cpu), got = await passOn(model, cuda!);
      const tolerance = dtype === "f32" ? 2e-5 : 0.06;
      const near = (a: number, b: number, what: string) =>
        assert(Math.abs(a - b) <= tolerance * Math.abs(b), `${what}: ${a} instead of ${b}`);
      near(got.loss, want.loss, "loss");
      if (dtype === "f32") {
        near(got.auxLoss, want.auxLoss, "aux loss");
        assert.equal(got.imbalance, want.imbalance);
      }
      for (const [i, { name, grad }] of got.grads.entries()) {
        const apart = distance(grad, want.grads[i].grad);
        assert(apart <= tolerance, `gradient of ${name} is ${apart} apart`);
      }
    });
  }
}

for (const dtype of ["f32", "bf16"] as const) {
  Deno.test({
    name: `cuda model: a first pass without rows leaves gradients of zero, ${dtype}`,
    ignore,
    async fn() {
      for (const change of CASES) {
        using model = modelOn(cuda!, modelConfig({ ...SMALL, ...change, dtype }));
        for (const { grad, overwrites } of model.parameters) {
          cuda!.kernels.fill(grad, overwrites ? NaN : 0);
        }
        const { loss, grads } = await passOn(model, cuda!, batchOf(0));
        assert.equal(loss, 0);
        for (const { name, grad } of grads) assert(grad.every((x) => x === 0), name);
      }
    },
  });
}

const TEXT = new TextEncoder().encode(
  "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.",
);

async function train<T>(
  device: Device,
  more: Partial<ModelOptions> & { readonly accumulate?: number; readonly clip?: number },
  use: (trainer: Trainer, model: Transformer) => Promise<T>,
): Promise<T> {
  const { accumulate = 1, clip = 1, ...sizes } = more;
  const config = modelConfig({ ...SMALL, ...MOE, vocab: 128, ...sizes });
  using model = modelOn(device, config);
  const text = { train: TEXT, validation: TEXT, vocabularySize: 128, bytesPerToken: 1 };
  const shape = { sequence: 19, batch: 2, accumulate, seed: 1, rank: 0, size: 1 };
  const data = trainingData(text, shape);
  const learningRate = { peak: 0.02, warmup: 1, steps: 20 };
  const world = worldOf(device);
  await using trainer = await Trainer.create({
    world,
    device,
    model,
    data,
    learningRate,
    accumulate,
    clip,
  });
  return await use(trainer, model);
}

for (const accumulate of [1, 2]) {
  Deno.test({
    name: `cuda model: three steps of ${accumulate} passes as on the CPU, with one wait each`,
    ignore,
    async fn() {
      const more = { accumulate, clip: 0.5 };
      const run = (device: Device) =>
        train(device, more, async (trainer) => {
          const rows = [], waits = [];
          for (let i = 0; i < 3; i++) {
            const before = cuda!.hostWaits;
            rows.push(await trainer.step());
            waits.push(cuda!.hostWaits - before);
          }
          return { rows, waits, validation: await trainer.validate() };
        });
      const want = await run(cpu), got = await run(cuda!);
      assert.deepEqual(got.waits, [1, 1, 1]);
      for (const [i, row] of got.rows.entries()) {
        for (const key of ["loss", "grad_norm", "aux_loss", "load_imbalance"] as const) {
          const a = row[key], b = want.rows[i][key];
          assert(Math.abs(a - b) <= 2e-4 * Math.abs(b), `${key} of step ${i + 1}: ${a}, ${b}`);
        }
      }
      assert(Math.abs(got.validation - want.validation) < 1e-3);
    },
  });
}

Deno.test({
  name: "cuda model: checkpoints go from the CPU to the GPU and back",
  ignore,
  async fn() {
    const directory = await Deno.makeTempDir();
    try {
      for (const [from, to] of [[cpu, cuda!], [cuda!, cpu]] as const) {
        const folder = `${directory}/${from.kind}`;
        const next = await train(from, {}, async (trainer) => {
          await trainer.step();
          await trainer.step();
          await trainer.save(folder);
          return await trainer.step();
        });
        const resumed = await train(to, {}, async (trainer) => {
          assert.equal((await trainer.resume(folder))?.step, 2);
          return await trainer.step();
        });
        assert(Math.abs(next.loss - resumed.loss) < 1e-4 * next.loss, from.kind);
        assert(Math.abs(next.grad_norm - resumed.grad_norm) < 1e-3 * next.grad_norm, from.kind);
      }
    } finally {
      await Deno.remove(directory, { recursive: true });
    }
  },
});

Deno.test({
  name:
    "cuda model: a bf16 run goes on to the bit, master weights and all, and frees what it takes",
  ignore,
  async fn() {
    const directory = await Deno.makeTempDir();
    try {
      const next = await train(cuda!, { dtype: "bf16" }, async (trainer) => {
        await trainer.step();
        await trainer.step();
        await trainer.save(directory);
        const before = cuda!.memory().used_bytes;
        const rows = [await trainer.step(), await trainer.step()];
        assert.equal(cuda!.memory().used_bytes, before);
        return rows.map(({ loss, grad_norm }) => [loss, grad_norm]);
      });
      const resumed = await train(cuda!, { dtype: "bf16" }, async (trainer) => {
        await trainer.resume(directory);
        const rows = [await trainer.step(), await trainer.step()];
        return rows.map(({ loss, grad_norm }) => [loss, grad_norm]);
      });
      assert.deepEqual(resumed, next);
    } finally {
      await Deno.remove(directory, { recursive: true });
    }
  },
});

Deno.test({
  name: "cuda model: an f32 run goes on in bf16, and from there in f32, and loses no bit",
  ignore,
  async fn() {
    const directory = await Deno.makeTempDir();
    try {
      const weights = async (model: Transformer) => {
        const arrays = await Promise.all(model.parameters.map(({ value }) => value.toArray()));
        return model.parameters.map(({ name }, i) => [name, arrays[i]]);
      };
      const exact = await train(cpu, {}, async (trainer, model) => {
        await trainer.step();
        await trainer.save(directory);
        return await weights(model);
      });
      await train(cuda!, { dtype: "bf16" }, async (trainer) => {
        await trainer.step(); // what it has is overwritten
        await trainer.resume(directory);
        await Deno.remove(directory, { recursive: true });
        await trainer.save(directory);
      });
      const generate = new URL("../examples/generate.ts", import.meta.url).href;
      const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
        args: ["run", "-A", "--no-check", generate, directory, "--device", "cpu", "--tokens", "5"],
      }).output();
      const text = new TextDecoder();
      assert.equal(code, 0, text.decode(stderr));
      assert.equal(text.decode(stdout).length, "It was ".length + 5 + 1);
      for (const device of [cpu, cuda!]) {
        await train(device, {}, async (trainer, model) => {
          assert.equal((await trainer.resume(directory))?.step, 1);
          assert.deepEqual(await weights(model), exact);
          await trainer.step();
        });
      }
    } finally {
      await Deno.remove(directory, { recursive: true });
    }
  },
});

Deno.test({
  name: "cuda model: a gradient that is not finite changes no weight and is an error",
  ignore,
  async fn() {
    await train(cuda!, {}, async (trainer, model) => {
      const gain = model.blocks[0].norms[0].gain.value;
      cuda!.write(new Float32Array(gain.size).fill(NaN), gain);
      const before = await model.parameters[0].value.toArray();
      await assert.rejects(trainer.step(), /loss and gradient must be finite/);
      assert.deepEqual(await model.parameters[0].value.toArray(), before);
      assert.equal(trainer.steps, 0);
    });
  },
});

Deno.test({
  name: "cuda model: what is computed again has the same bits, and takes less memory",
  ignore,
  async fn() {
    const config = modelConfig({ ...SMALL, ...MOE, layers: 3, dtype: "bf16", sharedExperts: 1 });
    const run = async (recompute: Recompute) => {
      const options = { device: cuda!, comm: worldOf(cuda!), config, seed: 3, recompute };
      using model = new Transformer(options);
      cuda!.resetPeak();
      const before = cuda!.memory().used_bytes;
      const result = await passOn(model, cuda!, batchOf(0, 50, 90));
      return { result, peak: cuda!.memory().peak_bytes - before };
    };
    const kept = await run("none");
    for (const recompute of ["activation", "block"] as const) {
      const again = await run(recompute);
      assert.deepEqual(again.result, kept.result);
      assert(again.peak < kept.peak, `${recompute}: ${again.peak} bytes, ${kept.peak} kept`);
    }
  },
});

for (const dtype of ["f32", "bf16"] as const) {
  Deno.test({
    name: `cuda model: ${dtype} logits are f32, and the CPU's`,
    ignore,
    async fn() {
      using host = modelOn(cpu, modelConfig({ ...SMALL, ...MOE }));
      using model = modelOn(cuda!, modelConfig({ ...SMALL, ...MOE, dtype }));
      await share(host, model);
      const { tokens, offsets } = batchOf(0, 5, 6, 15);
      using want = await host.logits(tokens, offsets, plainStep(cpu));
      using got = await model.logits(tokens, offsets, plainStep(cuda!));
      const [a, b] = [await got.toArray(), await want.toArray()] as Float32Array[];
      assert(a instanceof Float32Array && a.length === 3 * 40);
      assert(distance(a, b) < (dtype === "f32" ? 1e-5 : 0.03), `${distance(a, b)}`);
    },
  });
}

Deno.test({
  name: "cuda model: a text goes on as on the CPU, and nothing is kept of it",
  ignore,
  async fn() {
    const texts = [];
    for (const device of [cpu, cuda!]) {
      using model = modelOn(device, modelConfig({ ...SMALL, ...MOE, headDim: 16 }));
      const tokens: number[] = [], used: number[] = [];
      const options = { tokens: 12, context: 8, temperature: 0 };
      for await (const token of generate(model, device, [1, 2, 3], options)) {
        tokens.push(token);
        used.push(device.memory().used_bytes);
      }
      texts.push(tokens);
      assert.equal(used.at(-1), used.at(-4)); // the context is full
    }
    assert.deepEqual(texts[1], texts[0]);
  },
});

Deno.test({
  name: "cuda model: memory stays as it is, over a thousand steps on a GPU",
  ignore,
  async fn() {
    await train(cuda!, { dtype: "bf16" }, async (trainer) => {
      const steps = emulated ? 8 : 1000;
      for (let i = 0; i < steps / 4; i++) await trainer.step();
      const before = cuda!.memory(), heap = Deno.memoryUsage().heapUsed;
      cuda!.resetPeak();
      for (let i = 0; i < steps; i++) await trainer.step();
      const after = cuda!.memory();
      assert.equal(after.used_bytes, before.used_bytes);
      assert.equal(after.reserved_bytes, before.reserved_bytes);
      assert(after.peak_bytes <= before.peak_bytes);
      const grown = Deno.memoryUsage().heapUsed - heap;
      assert(grown < 64 * 2 ** 20, `${grown} bytes more on the host`);
    });
  },
});
