// Whether a model learns here as it does in PyTorch: both sides begin with the same weights, see the same batches of a text, and their losses are
// compared step by step. bf16 rounds differently in every kernel, so losses agree to that noise, not to the bit.
//
//   deno task bench:agree [--layers N] [--steps N] [--text FILE] [--json FILE]
//
// Tokens are the bytes of the text. PyTorch runs eager, with f32 master weights and AdamW as moe/optimizer.ts has it.

import { parseArgs } from "node:util";
import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import { modelConfig } from "../moe/config.ts";
import { createFile, writeSafetensors } from "../moe/safetensors.ts";
import { Trainer } from "../moe/trainer.ts";
import type { TrainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import { parameterTensors } from "../moe/weights.ts";
import { cudaDevice } from "../tensor/cuda/device.ts";
import { origin, peer } from "./_gpu.ts";

const { values } = parseArgs({
  args: Deno.args,
  options: {
    layers: { type: "string", default: "12" },
    steps: { type: "string", default: "100" },
    text: {
      type: "string",
      default: new URL("../examples/data/austen.txt", import.meta.url).pathname,
    },
    json: { type: "string" },
  },
});
const layers = Number(values.layers), steps = Number(values.steps);
const sequence = 1024, batch = 16, peak = 3e-4, warmup = 20;
const config = modelConfig({
  vocab: 32_000,
  width: 1024,
  layers,
  heads: 16,
  hidden: 2816,
  experts: 16,
  router: { kind: "softmax", topK: 2, auxLoss: 0.01 },
  dtype: "bf16",
});

const text = await Deno.readFile(values.text);
const windows = new Int32Array(steps * batch * (sequence + 1));
for (let w = 0; w < steps * batch; w++) {
  const start = Math.imul(w, 0x9e3779b1) >>> 0; // anywhere in the text, alike on both sides
  const at = start % (text.length - sequence - 1);
  windows.set(text.subarray(at, at + sequence + 1), w * (sequence + 1));
}
const data = {
  tokensPerStep: sequence * batch,
  sequence,
  batch,
  seed: 0,
  training(pass: number) {
    const tokens = new Int32Array(sequence * batch), targets = new Int32Array(sequence * batch);
    for (let b = 0; b < batch; b++) {
      const from = (pass * batch + b) * (sequence + 1);
      tokens.set(windows.subarray(from, from + sequence), b * sequence);
      targets.set(windows.subarray(from + 1, from + sequence + 1), b * sequence);
    }
    const offsets = Int32Array.from({ length: batch + 1 }, (_, i) => i * sequence);
    return { tokens, targets, offsets };
  },
  validation: () => [],
} satisfies TrainingData;

const device = await cudaDevice();
const directory = await Deno.makeTempDir({ prefix: "lina-agree-" });
const losses: number[] = [];
try {
  {
    const world = createCommunicator(openSelf(), { rank: 0, size: 1, name: "world", device });
    using model = new Transformer({ device, comm: world, config, seed: 1 });
    const file = createFile(`${directory}/model.safetensors`);
    await writeSafetensors(file, parameterTensors(model.parameters));
    file.close();
    await Deno.writeFile(`${directory}/tokens`, new Uint8Array(windows.buffer));
    await using trainer = await Trainer.create({
      world,
      device,
      model,
      data,
      learningRate: { peak, warmup, steps: 1e9 },
    });
    for (let i = 0; i < steps; i++) losses.push((await trainer.step()).loss);
  }
  const sides = await peer("step.py", [
    ...["--layers", String(layers), "--steps", String(steps), "--mode", "eager"],
    ...["--lr", String(peak), "--warmup", String(warmup)],
    ...["--weights", directory, "--tokens", `${directory}/tokens`],
  ]);
  const theirs = sides.map(({ loss }) => loss as number);
  const gaps = losses.map((loss, i) => Math.abs(loss - theirs[i]));
  for (let i = 0; i < steps; i += Math.max(1, Math.floor(steps / 20))) {
    console.log(`step ${i + 1}: lina ${losses[i].toFixed(4)}, PyTorch ${theirs[i]?.toFixed(4)}`);
  }
  const largest = Math.max(...gaps), mean = gaps.reduce((a, b) => a + b, 0) / steps;
  console.log(`${steps} steps: largest gap ${largest.toFixed(4)}, mean ${mean.toFixed(4)} nats`);
  if (values.json !== undefined) {
    const command = `deno task bench:agree --layers ${layers} --steps ${steps}`;
    const result = { layers, steps, largest, mean, lina: losses, torch: theirs };
    await Deno.writeTextFile(
      values.json,
      JSON.stringify([{ ...result, ...origin(device, command) }], null, 2) + "\n",
    );
  }
} finally {
  await Deno.remove(directory, { recursive: true });
}
