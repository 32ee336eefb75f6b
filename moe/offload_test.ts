// Moments in host memory: the same bits as on the device, wherever experts sit and move, and in checkpoints; memory that is freed.

import assert from "node:assert/strict";
import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { Device } from "../tensor/device.ts";
import { testDevice } from "../tests/emulator/device.ts";
import { modelConfig } from "./config.ts";
import { Trainer } from "./trainer.ts";
import { trainingData } from "./training_data.ts";
import { Transformer } from "./transformer.ts";

const gpu = await testDevice();
const TEXT = new TextEncoder().encode("Moments may stay at home; what they say does not change.");

interface Run {
  readonly device: Device;
  readonly dtype: "f32" | "bf16";
  readonly offload: number;
  /** Offloads so many after each step instead. */
  readonly then?: readonly number[];
  readonly directory?: string;
  readonly resume?: boolean;
}

async function train({ device, dtype, offload, then = [], directory, resume }: Run) {
  const world = createCommunicator(openSelf(), { rank: 0, size: 1, name: "alone", device });
  const sizes = { vocab: 128, width: 32, layers: 2, heads: 2, hidden: 24, experts: 4 };
  const config = modelConfig({ ...sizes, dtype });
  using model = new Transformer({ device, comm: world, config, seed: 1 });
  const text = { train: TEXT, validation: TEXT, vocabularySize: 128, bytesPerToken: 1 };
  const sequence = TEXT.length - 1;
  const data = trainingData(text, { sequence, batch: 1, seed: 1, rank: 0, size: 1 });
  await using trainer = await Trainer.create({
    world,
    device,
    model,
    data,
    learningRate: { peak: 0.02, warmup: 1, steps: 10 },
    offloadExperts: offload,
  });
  const [{ store }] = model.moeLayers;
  assert.equal(store.offloaded, Math.min(4, offload));
  if (resume) assert.ok(await trainer.resume(directory!));
  const losses: number[] = [], norms: number[] = [];
  while (trainer.steps < 4) {
    const row = await trainer.step();
    losses.push(row.loss);
    norms.push(row.grad_norm);
    const next = then[row.step - 1];
    if (next !== undefined) {
      await trainer.moveExperts(model.moeLayers[0].placement, { offload: next });
      assert.equal(store.offloaded, next);
    }
    if (!resume && directory && row.step === 2) await trainer.save(directory);
  }
  const weights = await Promise.all(model.parameters.map(({ value }) => value.toArray()));
  return {
    losses,
    norms,
    weights,
    used_bytes: device.memory().used_bytes,
    expert: store.expertBytes,
  };
}

for (
  const [name, device, dtypes] of [
    ["CPU", cpuDevice(), ["f32"]],
    ["CUDA", gpu as Device | null, ["f32", "bf16"]],
  ] as const
) {
  for (const dtype of dtypes) {
    Deno.test({
      name: `offload: the same bits, and less memory (${name}, ${dtype})`,
      ignore: !device,
      fn: async () => {
        const run = { device: device!, dtype };
        const before = device!.memory().used_bytes;
        const plain = await train({ ...run, offload: 0 });
        const after = device!.memory().used_bytes;
        for (const offload of [1, 99]) {
          const { losses, norms, weights, used_bytes, expert } = await train({ ...run, offload });
          assert.deepEqual({ losses, norms, weights }, {
            losses: plain.losses,
            norms: plain.norms,
            weights: plain.weights,
          });
          // Two layers' experts, but for the buffers, and the arena's rounding.
          const count = 2 * Math.min(4, offload), buffers = Math.min(3, count);
          const saved = plain.used_bytes - used_bytes,
            expected = (count - buffers) * expert.moments;
          assert.ok(Math.abs(saved - expected) <= 10 * 4096, `${saved} and ${expected} bytes`);
        }
        const moved = await train({ ...run, offload: 0, then: [2, 4, 1] });
        assert.deepEqual([moved.losses, moved.weights], [plain.losses, plain.weights]);
        // Tables of kernels are kept.
        assert.ok(
          device!.memory().used_bytes <= Math.max(before, after) + 32768,
          "memory is left over",
        );
      },
    });
    Deno.test({
      name: `offload: checkpoints are the same (${name}, ${dtype})`,
      ignore: !device,
      fn: async () => {
        const run = { device: device!, dtype };
        for (const [saver, loader] of [[0, 3], [4, 0]]) {
          const directory = await Deno.makeTempDir({ prefix: "lina-offload-" });
          try {
            const whole = await train({ ...run, offload: saver, directory });
            const rest = await train({ ...run, offload: loader, directory, resume: true });
            assert.deepEqual(rest.losses, whole.losses.slice(2));
            assert.deepEqual(rest.weights, whole.weights);
          } finally {
            await Deno.remove(directory, { recursive: true });
          }
        }
      },
    });
  }
}
