// Where the time of a training step on a GPU goes: device time and host time of every kernel of `Kernels`, by timed events around each call.
// The step is that of bench/step.ts. Not a benchmark against anything.
//
//   deno run -A bench/step_profile.ts [--layers N] [--steps N] [--batch N] [--sequence N] [--width N] [--hidden N] [--vocab N]
//     [--recompute none|activation|block] [--gradient-dtype f32|bf16]
//
// A profiled step is slower on the host than a plain one, so gaps between kernels are not in the table; the plain step's time is above it.

import { parseArgs } from "node:util";
import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import type { Recompute } from "../moe/block.ts";
import { modelConfig } from "../moe/config.ts";
import { type StepMetrics, Trainer } from "../moe/trainer.ts";
import type { TrainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import { cudaDevice } from "../tensor/cuda/device.ts";
import { Tensor } from "../tensor/tensor.ts";
import { recorder } from "../trace/mod.ts";
import { needGpu } from "./_gpu.ts";

const { values } = parseArgs({
  args: Deno.args,
  options: {
    layers: { type: "string", default: "12" },
    steps: { type: "string", default: "20" },
    batch: { type: "string", default: "16" },
    sequence: { type: "string", default: "1024" },
    width: { type: "string", default: "1024" },
    hidden: { type: "string", default: "2816" },
    vocab: { type: "string", default: "32000" },
    recompute: { type: "string", default: "none" },
    "gradient-dtype": { type: "string", default: "f32" },
  },
});
needGpu();
const steps = Number(values.steps), batch = Number(values.batch);
const sequence = Number(values.sequence);
const config = modelConfig({
  vocab: Number(values.vocab),
  width: Number(values.width),
  layers: Number(values.layers),
  heads: 16,
  hidden: Number(values.hidden),
  experts: 16,
  router: { kind: "softmax", topK: 2, auxLoss: 0.01 },
  dtype: "bf16",
  gradientDtype: values["gradient-dtype"] as "f32" | "bf16",
});

/** Random tokens, the same in every step. */
function randomData(): TrainingData {
  const draw = () =>
    Int32Array.from({ length: batch * sequence }, () => Math.floor(Math.random() * config.vocab));
  const offsets = Int32Array.from({ length: batch + 1 }, (_, i) => i * sequence);
  const only = { tokens: draw(), targets: draw(), offsets };
  return {
    tokensPerStep: batch * sequence,
    sequence,
    batch,
    seed: 0,
    training: () => only,
    validation: () => [],
  };
}

/** One call of a kernel. */
interface Call {
  readonly name: string;
  readonly host_us: number;
  readonly bytes: number;
  readonly flops: number;
  readonly time_us: () => number;
}

function tensorsIn(values: readonly unknown[]): Tensor[] {
  return values.flatMap((value) => {
    if (value instanceof Tensor) return [value];
    if (Array.isArray(value)) return tensorsIn(value);
    return typeof value === "object" && value !== null && !ArrayBuffer.isView(value)
      ? tensorsIn(Object.values(value))
      : [];
  });
}

function flopsOf(name: string, args: readonly unknown[]): number {
  if (name === "gemm") {
    const [a, , out] = args as Tensor[];
    return 2 * a.size * out.shape[1];
  }
  if (name === "groupedGemm") {
    const [x, , , out] = args as Tensor[];
    return 2 * x.shape[1] * out.size;
  }
  if (name === "groupedGemmActivation") {
    const [x, , , , up] = args as Tensor[];
    return 2 * x.shape[1] * up.size;
  }
  if (name === "groupedGemmActivationBackward") {
    const [dY, weights, , , up] = args as [Tensor, Tensor[], unknown, unknown, Tensor];
    return 2 * up.shape[0] * dY.shape[1] * weights[0].shape[1];
  }
  if (name === "groupedGemmWeightGrad") {
    const [dy, x] = args as Tensor[];
    return 2 * dy.size * x.shape[1];
  }
  return 0;
}

function nameOf(name: string, args: readonly unknown[]): string {
  const [a, b, c, d] = args as Tensor[];
  if (name === "gemm") {
    const { transposeA, beta } = (args[3] ?? {}) as { transposeA?: boolean; beta?: number };
    const K = transposeA ? a.shape[0] : a.shape[1];
    return `gemm ${c.shape[0]}x${c.shape[1]}x${K} ${c.dtype}${beta ? " +=" : ""}`;
  }
  if (name === "groupedGemm") return `groupedGemm ${a.shape[1]} -> ${d.shape[1]}`;
  if (name === "groupedGemmWeightGrad") {
    return `groupedGemmWeightGrad ${b.shape[1]} -> ${a.shape[1]}`;
  }
  return name;
}

/** Puts timed events around every kernel of a device. */
function watch(calls: Call[], timed: boolean): void {
  const around = (kernels: object) => {
    const watched: Record<string, unknown> = {};
    for (const [name, kernel] of Object.entries(kernels)) {
      watched[name] = (...args: unknown[]) => {
        const tensors = timed ? tensorsIn(args) : [];
        const bytes = tensors.reduce((sum, tensor) => sum + tensor.bytes, 0);
        const what = timed ? nameOf(name, args) : name, flops = timed ? flopsOf(name, args) : 0;
        const start = timed ? device.stream.recordTimed() : null;
        const before = performance.now();
        const result = kernel(...args);
        const host_us = (performance.now() - before) * 1000;
        const end = timed ? device.stream.recordTimed() : null;
        const time_us = () => end!.time() - start!.time();
        calls.push({ name: what, host_us, bytes, flops, time_us });
        return result;
      };
    }
    return watched;
  };
  const { kernels, routing } = plain;
  Object.defineProperty(device, "kernels", { configurable: true, value: around(kernels) });
  Object.defineProperty(device, "routing", { configurable: true, value: around(routing) });
}

function table(title: string, rows: readonly (readonly (string | number)[])[]): void {
  console.log(title);
  for (const row of rows) {
    console.log(
      "  " +
        row.map((cell, i) => i === 0 ? String(cell).padEnd(44) : String(cell).padStart(10)).join(
          "",
        ),
    );
  }
}

const device = await cudaDevice();
const plain = { kernels: device.kernels, routing: device.routing };
const world = createCommunicator(openSelf(), { rank: 0, size: 1, name: "world", device });
const began = performance.now();
using model = new Transformer({
  device,
  comm: world,
  config,
  seed: 1,
  recompute: values.recompute as Recompute,
});
await using trainer = await Trainer.create({
  world,
  device,
  model,
  data: randomData(),
  learningRate: { peak: 3e-4, warmup: 0, steps: 1_000_000 },
});
await device.stream.synchronize();
console.log(`made in ${((performance.now() - began) / 1000).toFixed(2)} s`);
for (let i = 0; i < 3; i++) {
  const { step_ms, loss } = await trainer.step();
  console.log(`step ${i + 1}: ${step_ms.toFixed(1)} ms, loss ${loss.toFixed(4)}`);
}
device.resetPeak();
const waits = device.hostWaits, rows: StepMetrics[] = [];
for (let i = 0; i < steps; i++) rows.push(await trainer.step());
const median = (key: "step_ms" | "host_ms") => {
  const sorted = rows.map((row) => row[key]).sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
};
console.log(
  `${steps} steps: ${median("step_ms").toFixed(2)} ms, ${
    (batch * sequence / median("step_ms") * 1000).toFixed(0)
  } tokens/s, host ${median("host_ms").toFixed(2)} ms, ${
    ((device.hostWaits - waits) / steps).toFixed(2)
  } host waits, ${(device.memory().peak_bytes / 2 ** 30).toFixed(2)} GiB peak, loss ${
    rows.at(-1)!.loss.toFixed(4)
  }`,
);

const hostCalls: Call[] = [];
watch(hostCalls, false);
recorder.resetTotals();
const hostStep = await trainer.step();
const deviceCalls: Call[] = [];
watch(deviceCalls, true);
await device.stream.synchronize();
device.anchor();
await trainer.step();
await device.stream.synchronize();

interface Sum {
  calls: number;
  us: number;
  bytes: number;
  flops: number;
}
function sums(calls: readonly Call[], us: (call: Call) => number): [string, Sum][] {
  const all = new Map<string, Sum>();
  for (const call of calls) {
    const sum = all.get(call.name) ?? { calls: 0, us: 0, bytes: 0, flops: 0 };
    sum.calls++;
    sum.us += us(call);
    sum.bytes += call.bytes;
    sum.flops += call.flops;
    all.set(call.name, sum);
  }
  return [...all].sort((a, b) => b[1].us - a[1].us);
}
const onDevice = sums(deviceCalls, (call) => call.time_us());
const total = onDevice.reduce((sum, [, { us }]) => sum + us, 0);
table(`device: ${(total / 1000).toFixed(2)} ms in ${deviceCalls.length} calls`, [
  ["kernel", "calls", "ms", "%", "us each", "TFLOP/s", "GB/s"],
  ...onDevice.slice(0, 45).map(([name, { calls, us, bytes, flops }]) => [
    name,
    calls,
    (us / 1000).toFixed(3),
    (100 * us / total).toFixed(1),
    (us / calls).toFixed(1),
    flops > 0 ? (flops / us / 1e6).toFixed(0) : "",
    (bytes / us / 1e3).toFixed(0),
  ]),
]);
const onHost = sums(hostCalls, (call) => call.host_us);
const hostTotal = onHost.reduce((sum, [, { us }]) => sum + us, 0);
table(
  `host: ${(hostTotal / 1000).toFixed(2)} ms in kernels of ${hostStep.host_ms.toFixed(2)} ms`,
  onHost.slice(0, 25).map(([name, { calls, us }]) => [
    name,
    calls,
    (us / 1000).toFixed(3),
    (us / calls).toFixed(1),
  ]),
);
