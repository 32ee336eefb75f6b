// One rank of the CPU benchmark: a MoE layer and a training step at the demo's sizes, with a profile by operation. `cpu.ts` starts it
// on several ranks; alone it runs as a world of one.

import { init, type World } from "../collectives/world.ts";
import { countParameters } from "../moe/config.ts";
import { random } from "../moe/init.ts";
import { MoeLayer } from "../moe/moe_layer.ts";
import { plainStep } from "../moe/step.ts";
import { Trainer } from "../moe/trainer.ts";
import { trainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import { fromArray } from "../tensor/tensor.ts";
import { recorder, type Span } from "../trace/mod.ts";
import { parseTrainOptions } from "../examples/lib/train_options.ts";

/** A line of the benchmark's JSON. */
export interface CpuRow {
  readonly name: string;
  readonly gflops: number;
  readonly tokens_per_s: number;
  readonly ranks: number;
  /** Parts of the time of a training step, by operation. */
  readonly profile?: Readonly<Record<string, number>>;
  /** Part of the time of a training step that is GEMM or communication. */
  readonly gemm_and_comm?: number;
}

const WARM_UP = 3, REPEATS = 20;

async function layerRow(world: World): Promise<CpuRow> {
  const rows = 1024, width = 256, hidden = 512, experts = 8, topK = 2;
  const { device, size: ranks } = world;
  using layer = new MoeLayer({
    device,
    comm: world,
    layer: 0,
    width,
    hidden,
    experts,
    router: { kind: "softmax", topK },
  });
  const next = random(world.rank, "rows");
  const numbers = () => Float32Array.from({ length: rows * width }, () => next() - 0.5);
  using x = fromArray(device, numbers(), [rows, width]);
  using dOut = fromArray(device, numbers(), [rows, width]);
  const step = plainStep(device, { training: true });
  const seconds = await median(async () => {
    const { out_ND, saved } = await layer.forward(x, step);
    (await layer.backward(dOut, saved, step))[Symbol.dispose]();
    out_ND[Symbol.dispose]();
  }, world);
  // Three matrices of two flops per weight, once forward and twice backward.
  const flops = 3 * 2 * 3 * width * hidden * topK * rows * ranks;
  return {
    name: "moe-layer",
    gflops: flops / seconds / 1e9,
    tokens_per_s: rows * ranks / seconds,
    ranks,
  };
}

async function stepRow(world: World): Promise<CpuRow> {
  const options = parseTrainOptions(["--demo"]);
  const { device, size: ranks } = world;
  const config = options.model(256, "f32");
  const sequence = options.number("seq"), batch = options.number("batch");
  using model = new Transformer({ device, comm: world, config, seed: 1 });
  const next = random(1, "text");
  const text = Uint8Array.from({ length: 1e6 }, () => Math.floor(next() ** 2 * 100));
  const data = trainingData(
    { train: text, validation: text, vocabularySize: 256, bytesPerToken: 1 },
    { sequence, batch, seed: 1, rank: world.rank, size: ranks },
  );
  await using trainer = await Trainer.create({
    world,
    device,
    model,
    data,
    learningRate: { peak: 1e-3, warmup: 1, steps: 1000 },
  });
  const times: number[] = [];
  for (let i = 0; i < WARM_UP + REPEATS; i++) {
    recorder.capturing = i >= WARM_UP;
    times.push((await trainer.step()).step_ms);
  }
  recorder.capturing = false;
  const spans = recorder.spans.splice(0);
  const total = times.slice(WARM_UP).reduce((a, b) => a + b) * 1000;
  const seconds = times.slice(WARM_UP).sort((a, b) => a - b)[REPEATS >> 1] / 1000;
  const { active } = countParameters(config);
  const tokens = batch * sequence;
  // Attention's scores and sums of values, causal: half of the square.
  const attention = 4 * config.layers * config.heads * config.headDim * sequence / 2;
  const flops = 3 * tokens * (2 * (active - config.vocab * config.width) + attention);
  return {
    name: "train-step",
    gflops: flops / seconds / 1e9,
    tokens_per_s: tokens / seconds,
    ranks,
    profile: profileOf(spans, total),
    gemm_and_comm: shareOf(spans, ["gemm", "allToAll", "allReduce", "comm", "wait"], total),
  };
}

/** Parts of the time by name, the largest first; what no span covers is `other`. */
function profileOf(spans: readonly Span[], total: number): Record<string, number> {
  const sums = new Map<string, number>();
  for (const { name, start, end } of spans) sums.set(name, (sums.get(name) ?? 0) + end - start);
  const parts = [...sums].map(([name, time]) => [name, time / total] as const);
  parts.push(["other", (total - covered(spans)) / total]);
  return Object.fromEntries(parts.sort((a, b) => b[1] - a[1]));
}

function shareOf(spans: readonly Span[], categories: readonly string[], total: number): number {
  return covered(spans.filter((span) => categories.includes(span.category))) / total;
}

/** Time that at least one span covers, in µs. */
function covered(spans: readonly Span[]): number {
  let sum = 0, end = -Infinity;
  for (const span of spans.toSorted((a, b) => a.start - b.start)) {
    sum += Math.max(0, span.end - Math.max(span.start, end));
    end = Math.max(end, span.end);
  }
  return sum;
}

async function median(action: () => Promise<void>, world: World): Promise<number> {
  const times: number[] = [];
  for (let i = 0; i < WARM_UP + REPEATS; i++) {
    await world.barrier();
    const start = performance.now();
    await action();
    await world.barrier();
    if (i >= WARM_UP) times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b)[REPEATS >> 1] / 1000;
}

if (import.meta.main) {
  await using world = await init();
  const rows = [await layerRow(world), await stepRow(world)];
  if (world.rank === 0) {
    if (Deno.args[0]) Deno.writeTextFileSync(Deno.args[0], JSON.stringify(rows));
    else console.log(rows);
  }
}
