// A whole training step of a Mixture-of-Experts language model on one GPU, beside PyTorch (compiled, fused AdamW, SDPA's flash attention): same
// sizes, one run, medians. Random tokens: a step's time does not depend on them, but for the balance of the experts.
//
// Sides: `lina` has f32 gradients (the default), as PyTorch's side has, whose parameters are f32 and cast in the forward pass;
// `lina-bf16-gradients` has bf16 ones and compares with nothing on the other side.
//
//   deno task bench:step [--steps N] [--layers N] [--mode compiled|eager|both|none] [--json FILE]
//
// FLOPs of a step = 6 · (active parameters without the embedding) · tokens + attention's 3.5 · 4 · sequences · heads · length² · C / 2 per
// layer; MFU is against the 989 TFLOP/s of dense bf16 that NVIDIA gives for H100 and H200.

import { parseArgs } from "node:util";
import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import { countParameters, modelConfig } from "../moe/config.ts";
import { Trainer } from "../moe/trainer.ts";
import type { TrainingData } from "../moe/training_data.ts";
import { type Batch, Transformer } from "../moe/transformer.ts";
import { cudaDevice } from "../tensor/cuda/device.ts";
import { median, needGpu, origin, peer } from "./_gpu.ts";

const PEAK_TFLOPS = 989;

const { values } = parseArgs({
  args: Deno.args,
  options: {
    steps: { type: "string", default: "20" },
    layers: { type: "string", default: "12" },
    mode: { type: "string", default: "both" },
    json: { type: "string" },
  },
});
needGpu();
const steps = Number(values.steps), layers = Number(values.layers);
const sequence = 1024, batch = 16;
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
const tokens = sequence * batch;
const active = countParameters(config).active - config.vocab * config.width;
const attention = 3.5 * 4 * batch * config.heads * sequence ** 2 * config.headDim / 2 * layers;
const flops = 6 * active * tokens + attention;

/** The same random sequences in every step. */
function randomData(): TrainingData {
  const ids = new Int32Array(tokens), targets = new Int32Array(tokens);
  for (let i = 0; i < tokens; i++) {
    ids[i] = Math.floor(Math.random() * config.vocab);
    targets[i] = Math.floor(Math.random() * config.vocab);
  }
  const offsets = Int32Array.from({ length: batch + 1 }, (_, i) => i * sequence);
  const only: Batch = { tokens: ids, targets, offsets };
  return {
    tokensPerStep: tokens,
    seed: 0,
    batch,
    sequence,
    training: () => only,
    validation: () => [],
  } as unknown as TrainingData;
}

interface Row {
  readonly side: string;
  readonly tokens_per_s: number;
  readonly step_ms: number;
  readonly peak_bytes: number;
  readonly mfu: number;
  readonly host_ms?: number;
  readonly gradient_dtype: "f32" | "bf16";
}

const device = await cudaDevice(), data = randomData();
const rows: Row[] = [];
function add(row: Omit<Row, "mfu">): void {
  rows.push({ ...row, mfu: flops / row.step_ms / 1e9 / PEAK_TFLOPS });
  const { side, tokens_per_s, step_ms, peak_bytes, mfu, host_ms } = rows.at(-1)!;
  console.log(
    `${side.padEnd(20)}${step_ms.toFixed(2).padStart(8)} ms ${
      tokens_per_s.toFixed(0).padStart(8)
    } tokens/s ${(100 * mfu).toFixed(1).padStart(5)} % of ${PEAK_TFLOPS} TFLOP/s ${
      (peak_bytes / 2 ** 30).toFixed(2).padStart(6)
    } GiB peak${host_ms === undefined ? "" : ` host ${host_ms.toFixed(2)} ms`}`,
  );
}
console.log(
  `${layers} layers, D ${config.width}, ${config.experts} experts top-2, F ${config.hidden}, ${batch} x ${sequence} tokens, V ${config.vocab}; ` +
    `${(countParameters(config).total / 1e9).toFixed(2)} G parameters, ${
      (flops / 1e12).toFixed(1)
    } TFLOP a step`,
);
for (const gradient_dtype of ["f32", "bf16"] as const) {
  const world = createCommunicator(openSelf(), { rank: 0, size: 1, name: "world", device });
  using model = new Transformer({
    device,
    comm: world,
    config: { ...config, gradientDtype: gradient_dtype },
    seed: 1,
  });
  await using trainer = await Trainer.create({
    world,
    device,
    model,
    data,
    learningRate: { peak: 3e-4, warmup: 0, steps: 1_000_000 },
  });
  for (let i = 0; i < 5; i++) await trainer.step();
  device.resetPeak();
  const waits = device.hostWaits;
  const times: number[] = [], host: number[] = [];
  for (let i = 0; i < steps; i++) {
    const start = device.stream.recordTimed();
    const shown = await trainer.step();
    const end = device.stream.recordTimed();
    await device.stream.synchronize();
    times.push((end.time() - start.time()) / 1000);
    host.push(shown.host_ms);
  }
  console.log(`host waits per step: ${(device.hostWaits - waits) / steps - 1}`); // one is this loop's own
  const step_ms = median(times);
  add({
    side: gradient_dtype === "f32" ? "lina" : "lina-bf16-gradients",
    step_ms,
    tokens_per_s: tokens / step_ms * 1e3,
    peak_bytes: device.memory().peak_bytes,
    host_ms: median(host),
    gradient_dtype,
  });
}
const modes = values.mode === "both"
  ? ["eager", "compiled"]
  : values.mode === "none"
  ? []
  : [values.mode];
for (const mode of modes) {
  const sides = await peer("step.py", [
    "--mode",
    mode,
    "--steps",
    String(steps),
    "--layers",
    String(layers),
  ]);
  for (const row of sides) add({ ...row as unknown as Row, gradient_dtype: "f32" });
}
const theirs = rows.filter(({ side }) => !side.startsWith("lina")).map(({ step_ms }) => step_ms);
for (const { side, step_ms } of rows) {
  if (theirs.length === 0 || side !== "lina") continue; // gradients in bf16 are on our side only
  console.log(`${side}: ${(Math.min(...theirs) / step_ms).toFixed(2)}x of PyTorch's best`);
}
if (values.json !== undefined) {
  const command = `deno task bench:step --steps ${steps} --layers ${layers} --mode ${values.mode}`;
  const results = rows.map((row) => ({ ...row, ...origin(device, command) }));
  await Deno.writeTextFile(values.json, JSON.stringify(results, null, 2) + "\n");
}
