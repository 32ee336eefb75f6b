// Whether a model learns here as it does in PyTorch: all sides begin with the same weights, see the same batches of a text, and their losses are
// compared step by step.
//
//   deno task bench:agree [--device cuda|cpu] [--layers N] [--steps N] [--dtype bf16|f32] [--text FILE] [--json FILE]
//
// Tokens are the bytes of the text; the dtype is bf16 on a GPU and f32 on a CPU if none is given. bf16 rounds differently in every kernel, and a token that goes to another expert for that makes all that
// follows different: what such noise amounts to, PyTorch's own two sides show, eager and compiled. In f32 (a few layers: its experts run one
// after another in PyTorch) sides agree to rounding; so they do on a CPU, with a model of width 64. PyTorch has f32 master weights and AdamW as moe/optimizer.ts has it; its gradients
// are bf16 where its weights are used in bf16, so a side of ours has them, too.

import { parseArgs } from "node:util";
import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import { modelConfig } from "../moe/config.ts";
import { createFile, writeSafetensors } from "../moe/safetensors.ts";
import { Trainer } from "../moe/trainer.ts";
import type { TrainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import { parameterTensors } from "../moe/weights.ts";
import type { DType } from "../tensor/dtype.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { cudaDevice } from "../tensor/cuda/device.ts";
import type { Device } from "../tensor/device.ts";
import { needGpu, origin, peer } from "./_gpu.ts";

const { values } = parseArgs({
  args: Deno.args,
  options: {
    device: { type: "string", default: "cuda" },
    layers: { type: "string", default: "12" },
    dtype: { type: "string" },
    steps: { type: "string", default: "100" },
    text: {
      type: "string",
      default: new URL("../examples/data/austen.txt", import.meta.url).pathname,
    },
    json: { type: "string" },
  },
});
const layers = Number(values.layers), steps = Number(values.steps);
const onGpu = values.device !== "cpu";
if (onGpu) needGpu();
const dtype = (values.dtype ?? (onGpu ? "bf16" : "f32")) as DType;
if (dtype !== "bf16" && dtype !== "f32") {
  throw new RangeError(
    `Cannot compare as the dtype must be bf16 or f32: current value is ${values.dtype}`,
  );
}
const sizes = onGpu
  ? { vocab: 32_000, width: 1024, heads: 16, hidden: 2816, experts: 16 }
  : { vocab: 256, width: 64, heads: 4, hidden: 96, experts: 8 };
const [sequence, batch, peak] = onGpu ? [1024, 16, 3e-4] : [64, 4, 3e-3], warmup = 20;
const config = modelConfig({
  ...sizes,
  layers,
  router: { kind: "softmax", topK: 2, auxLoss: 0.01 },
  dtype,
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

const device: Device = onGpu ? await cudaDevice() : cpuDevice();
const directory = await Deno.makeTempDir({ prefix: "lina-agree-" });
const sides: { side: string; losses: number[] }[] = [];

/** Trains our model; with `save`, its weights as they were before go into the directory. */
async function train(gradientDtype: DType, save: boolean): Promise<number[]> {
  const world = createCommunicator(openSelf(), { rank: 0, size: 1, name: "world", device });
  using model = new Transformer({
    device,
    comm: world,
    config: modelConfig({ ...config, gradientDtype }),
    seed: 1,
  });
  if (save) {
    const file = createFile(`${directory}/model.safetensors`);
    await writeSafetensors(file, parameterTensors(model.parameters));
    file.close();
  }
  await using trainer = await Trainer.create({
    world,
    device,
    model,
    data,
    learningRate: { peak, warmup, steps: 1e9 },
  });
  const losses: number[] = [];
  for (let i = 0; i < steps; i++) losses.push((await trainer.step()).loss);
  return losses;
}

try {
  await Deno.writeFile(`${directory}/tokens`, new Uint8Array(windows.buffer));
  sides.push({ side: "lina", losses: await train("f32", true) });
  if (dtype === "bf16") {
    sides.push({ side: "lina-bf16-gradients", losses: await train("bf16", false) });
  }
  for (const mode of dtype === "bf16" ? ["eager", "compiled"] : ["eager"]) {
    const rows = await peer("step.py", [
      ...["--layers", String(layers), "--steps", String(steps), "--mode", mode, "--dtype", dtype],
      ...["--lr", String(peak), "--warmup", String(warmup), "--device", device.kind],
      ...["--sequence", String(sequence), "--batch", String(batch)],
      ...Object.entries(sizes).flatMap(([name, size]) => [`--${name}`, String(size)]),
      ...["--weights", directory, "--tokens", `${directory}/tokens`],
    ]);
    const losses = rows.map(({ loss }) => loss as number);
    if (losses.length === steps) sides.push({ side: `torch-${mode}`, losses });
  }
} finally {
  await Deno.remove(directory, { recursive: true });
}

console.log(["step", ...sides.map(({ side }) => side.padStart(20))].join(" "));
for (let i = 0; i < steps; i += i < 10 ? 1 : Math.max(1, Math.floor(steps / 20))) {
  const losses = sides.map((side) => side.losses[i].toFixed(4).padStart(20));
  console.log([String(i + 1).padStart(4), ...losses].join(" "));
}
/** Gaps of two sides in nats; `mean` has its sign: above 0 where the first loses more. */
const gaps = sides.flatMap((a, i) =>
  sides.slice(0, i).map((b) => {
    const each = b.losses.map((loss, step) => loss - a.losses[step]);
    const sizes = each.map(Math.abs), sum = (list: number[]) => list.reduce((x, y) => x + y, 0);
    return {
      of: [b.side, a.side],
      first_10: Math.max(...sizes.slice(0, 10)),
      largest: Math.max(...sizes),
      median: sizes.toSorted((x, y) => x - y)[steps >> 1],
      mean: sum(each) / steps,
    };
  })
);
for (const { of, first_10, largest, median, mean } of gaps) {
  console.log(
    `${of.join(" and ")}: gap of at most ${first_10.toFixed(5)} in 10 steps, ${
      largest.toFixed(4)
    } in ${steps}; median ${median.toFixed(4)}, mean with its sign ${mean.toFixed(4)} nats`,
  );
}
if (values.json !== undefined) {
  const command =
    `deno task bench:agree --device ${device.kind} --layers ${layers} --steps ${steps} --dtype ${dtype}`;
  const result = { layers, steps, dtype, gaps, sides, ...origin(device, command) };
  await Deno.writeTextFile(values.json, JSON.stringify([result], null, 2) + "\n");
}
