// A Mixture-of-Experts layer on one GPU, forward and backward, beside PyTorch's dropless layer: same sizes, same inputs, same gate, so the same
// routing; one run, medians, the L2 cache cold before each repeat.
//
//   deno task bench:layer [--shapes E16,E8,E64] [--routing balanced,zipf] [--repeats N] [--json FILE]
//
// FLOPs = 2 · (2 · R · D · F) forward for R = tokens · choices rows, three times that forward and backward; the gate is not counted. Experts
// are D → F → D with tanh-GELU. Zipf: the gate is offset so that expert e wants a share of 1 / (e + 1), as far as a token meets an
// expert at most once.

import { parseArgs } from "node:util";
import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import { MoeLayer } from "../moe/moe_layer.ts";
import { dropShown } from "../moe/shown.ts";
import { plainStep } from "../moe/step.ts";
import { type CudaDevice, cudaDevice } from "../tensor/cuda/device.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";
import { fillNormal } from "../tensor/random.ts";
import { GpuTimer, origin, peer } from "./_gpu.ts";

interface Shape {
  readonly tokens: number;
  readonly width: number;
  readonly hidden: number;
  readonly experts: number;
  readonly choices: number;
}

const SHAPES: Readonly<Record<string, Shape>> = {
  E16: { tokens: 16_384, width: 1024, hidden: 4096, experts: 16, choices: 2 },
  E8: { tokens: 16_384, width: 4096, hidden: 14_336, experts: 8, choices: 2 },
  E64: { tokens: 8192, width: 2048, hidden: 1024, experts: 64, choices: 8 },
};

interface Row {
  readonly shape: string;
  readonly routing: string;
  readonly side: string;
  readonly dtype: string;
  readonly fwd_ms: number;
  readonly fwd_bwd_ms: number;
  readonly tflops_fwd: number;
  readonly tflops: number;
  readonly peak_bytes: number;
  readonly host_ms?: number;
}

const { values } = parseArgs({
  args: Deno.args,
  options: {
    shapes: { type: "string", default: "E16,E8,E64" },
    routing: { type: "string", default: "balanced,zipf" },
    repeats: { type: "string", default: "20" },
    json: { type: "string" },
  },
});

const STD = 0.02;

/** Input f32 [N, D], whose first column is 1, and the gate [E, D] with the offsets of its experts in that column. */
function inputs(shape: Shape, routing: string): { x: Float32Array; gate: Float32Array } {
  const { tokens, width, experts } = shape;
  const x = new Float32Array(tokens * width), gate = new Float32Array(experts * width);
  fillNormal(x, [11, 22], 1);
  fillNormal(gate, [33, 44], STD);
  for (let n = 0; n < tokens; n++) x[n * width] = 1;
  const offsets = routing === "zipf" ? zipfOffsets(shape) : new Float64Array(experts);
  for (let e = 0; e < experts; e++) gate[e * width] = offsets[e];
  return { x, gate };
}

/** Offsets of logits with which top-k choices of normal logits have shares like 1 / (e + 1), found by trying. */
function zipfOffsets({ width, experts, choices }: Shape): Float64Array {
  const samples = 2000;
  const noise = new Float64Array(samples * experts), offsets = new Float64Array(experts);
  fillNormal(noise, [55, 66], STD * Math.sqrt(width));
  const harmonic = Array.from({ length: experts }, (_, e) => 1 / (e + 1)).reduce((a, b) => a + b);
  for (let round = 0; round < 60; round++) {
    const counts = new Float64Array(experts).fill(0.5);
    for (let n = 0; n < samples; n++) {
      const logits = offsets.map((offset, e) => offset + noise[n * experts + e]);
      const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]);
      for (let k = 0; k < choices; k++) counts[order[k]]++;
    }
    for (let e = 0; e < experts; e++) {
      const share = Math.min(1 / choices, 1 / ((e + 1) * harmonic));
      offsets[e] += 0.4 * Math.log(share * samples * choices / counts[e]);
    }
  }
  return offsets;
}

/** A f32 host array as a bf16 tensor. */
function halved(device: CudaDevice, array: Float32Array, shape: readonly number[]): Tensor {
  using exact = fromArray(device, array, shape);
  const out = empty(device, shape, "bf16");
  device.kernels.copy(exact, out);
  return out;
}

async function ours(
  device: CudaDevice,
  shape: Shape,
  given: { x: Tensor; gate: Float32Array },
  repeats: number,
): Promise<Omit<Row, "shape" | "routing" | "tflops" | "tflops_fwd">> {
  const { width, hidden, experts, choices } = shape;
  using timer = new GpuTimer(device);
  using layer = new MoeLayer({
    device,
    comm: createCommunicator(openSelf(), { rank: 0, size: 1, name: "world", device }),
    layer: 0,
    width,
    hidden,
    experts,
    router: { kind: "softmax", topK: choices },
    activation: "gelu",
    dtype: "bf16",
  });
  device.write(given.gate, layer.gate.value);
  using dOut = empty(device, given.x.shape, "bf16");
  device.kernels.normal(dOut, [77, 88], 1);
  const evaluation = plainStep(device);
  const training = plainStep(device, { training: true, number: 1, firstPass: true });
  const forward = async () => {
    const { out_ND, shown } = await layer.forward(given.x, evaluation);
    dropShown([shown]);
    out_ND[Symbol.dispose]();
  };
  const both = async () => {
    const { out_ND, saved, shown } = await layer.forward(given.x, training);
    dropShown([shown]);
    using _out = out_ND;
    using _dX = await layer.backward(dOut, saved, training);
  };
  await both();
  device.resetPeak();
  const waits = device.hostWaits;
  const alone = await timer.time(forward, repeats);
  const whole = await timer.time(both, repeats);
  const { peak_bytes } = device.memory();
  const hostWaits = device.hostWaits - waits - 4; // the timer's own
  if (hostWaits > 0) console.error(`the host waited ${hostWaits} times for the GPU`);
  return {
    side: "lina",
    dtype: "bf16",
    fwd_ms: alone.gpu_ms,
    fwd_bwd_ms: whole.gpu_ms,
    host_ms: whole.host_ms,
    peak_bytes: peak_bytes - 256 * 2 ** 20,
  };
}

/** The experts' six products alone, through our kernels. */
async function products(
  device: CudaDevice,
  shape: Shape,
  counts: readonly number[],
  repeats: number,
): Promise<Record<string, number>> {
  const { width, hidden, experts } = shape;
  using timer = new GpuTimer(device);
  const host = new Int32Array(experts + 1);
  counts.forEach((n, e) => host[e + 1] = host[e] + n);
  using offsets = fromArray(device, host);
  const rows = host[experts];
  const make = (sizes: readonly number[], dtype: "bf16" | "f32" = "bf16") => {
    const tensor = empty(device, sizes, dtype);
    device.kernels.normal(tensor, [sizes[0], sizes[1]], 1);
    return tensor;
  };
  using x = make([rows, width]);
  using h = make([rows, hidden]);
  using up = make([experts * hidden, width]);
  using down = make([experts * width, hidden]);
  using dUp = make([experts * hidden, width], "f32");
  using dDown = make([experts * width, hidden], "f32");
  using x2 = empty(device, x.shape, "bf16");
  using h2 = empty(device, h.shape, "bf16");
  const split = (tensor: Tensor) => {
    const each = tensor.shape[0] / experts;
    return Array.from({ length: experts }, (_, e) => tensor.rows(e * each, (e + 1) * each));
  };
  const ups = split(up), downs = split(down), dUps = split(dUp), dDowns = split(dDown);
  const groups = { offsets, host: null }, back = { transposeWeight: true };
  const { kernels } = device;
  const runs: Record<string, () => void> = {
    up: () => kernels.groupedGemm(x, ups, groups, h2),
    down: () => kernels.groupedGemm(h, downs, groups, x2),
    d_hidden: () => kernels.groupedGemm(x, downs, groups, h2, back),
    d_rows: () => kernels.groupedGemm(h, ups, groups, x2, back),
    d_up: () => kernels.groupedGemmWeightGrad(h, x, groups, dUps, { beta: 0 }),
    d_down: () => kernels.groupedGemmWeightGrad(x, h, groups, dDowns, { beta: 0 }),
  };
  const times: Record<string, number> = {};
  for (const [name, run] of Object.entries(runs)) {
    times[name] = (await timer.time(run, repeats)).gpu_ms;
  }
  return times;
}

const repeats = Number(values.repeats);
const device = await cudaDevice();
const directory = await Deno.makeTempDir({ prefix: "lina-bench-" });
const rows: Row[] = [];
try {
  for (const name of values.shapes.split(",")) {
    const shape = SHAPES[name];
    if (!shape) {
      throw new RangeError(
        `Cannot measure as a shape must be one of ${Object.keys(SHAPES)}: current value is ${name}`,
      );
    }
    const { tokens, width, hidden, experts, choices } = shape;
    const forwardFlops = 4 * tokens * choices * width * hidden;
    console.log(
      `${name}: tokens ${tokens}, D ${width}, F ${hidden}, E ${experts}, K ${choices}; ${
        (3 * forwardFlops / 1e12).toFixed(2)
      } TFLOP forward and backward`,
    );
    for (const routing of values.routing.split(",")) {
      const { x, gate } = inputs(shape, routing);
      using xTensor = halved(device, x, [tokens, width]);
      await Deno.writeFile(`${directory}/x`, new Uint8Array((await xTensor.toArray()).buffer));
      await Deno.writeFile(`${directory}/gate`, new Uint8Array(gate.buffer));
      const add = (row: Omit<Row, "shape" | "routing" | "tflops" | "tflops_fwd">) => {
        rows.push({
          shape: name,
          routing,
          ...row,
          tflops_fwd: forwardFlops / row.fwd_ms / 1e9,
          tflops: 3 * forwardFlops / row.fwd_bwd_ms / 1e9,
        });
        const { side, fwd_ms, fwd_bwd_ms, tflops_fwd, tflops, peak_bytes, host_ms } = rows.at(-1)!;
        console.log(
          `  ${routing.padEnd(9)}${side.padEnd(16)}${fwd_ms.toFixed(3).padStart(9)} ms ${
            tflops_fwd.toFixed(0).padStart(4)
          } TFLOP/s forward ${fwd_bwd_ms.toFixed(3).padStart(9)} ms ${
            tflops.toFixed(0).padStart(4)
          } TFLOP/s forward+backward ${(peak_bytes / 2 ** 30).toFixed(2).padStart(6)} GiB${
            host_ms === undefined ? "" : ` host ${host_ms.toFixed(2)} ms`
          }`,
        );
      };
      add(await ours(device, shape, { x: xTensor, gate }, repeats));
      const sides = await peer("layer.py", [
        ...Object.entries(shape).flatMap(([key, value]) => [`--${key}`, String(value)]),
        ...["--repeats", String(repeats), "--x", `${directory}/x`, "--gate", `${directory}/gate`],
      ]);
      const counts = sides.find(({ side }) => side === "torch-routing")?.counts as
        | number[]
        | undefined;
      if (!counts) continue;
      console.log(`  ${routing} counts ${counts.join(" ")}`);
      for (const row of sides) {
        if (row.side === "torch-routing") continue;
        if (row.side !== "gemm-only") {
          add({ dtype: "bf16", ...row } as unknown as Row);
          continue;
        }
        const own = await products(device, shape, counts, repeats);
        const theirs = row.detail as Record<string, Record<string, number>>;
        const best: Record<string, number> = {};
        for (const [product, times] of Object.entries(theirs)) {
          best[product] = Math.min(own[product], ...Object.values(times));
          console.log(
            `    ${product.padEnd(9)} lina ${own[product].toFixed(3)} ms  _grouped_mm ${
              times.grouped_mm_ms.toFixed(3)
            } ms  cuBLAS loop ${times.cublas_loop_ms.toFixed(3)} ms`,
          );
        }
        add({
          side: "gemm-only",
          dtype: "bf16",
          fwd_ms: best.up + best.down,
          fwd_bwd_ms: Object.values(best).reduce((a, b) => a + b),
          peak_bytes: 0,
        });
      }
      const at = (side: string) =>
        rows.findLast((r) => r.shape === name && r.routing === routing && r.side === side)
          ?.fwd_bwd_ms;
      const torch = Math.min(at("torch-eager") ?? Infinity, at("torch-compiled") ?? Infinity);
      console.log(
        `  ${routing}: forward+backward ${(torch / at("lina")!).toFixed(2)}x of PyTorch's best, ${
          (at("gemm-only")! / at("lina")!).toFixed(2)
        } of the products alone`,
      );
    }
  }
} finally {
  await Deno.remove(directory, { recursive: true });
}
if (values.json !== undefined) {
  const command =
    `deno task bench:layer --shapes ${values.shapes} --routing ${values.routing} --repeats ${repeats}`;
  const results = rows.map((row) => ({ ...row, ...origin(device, command) }));
  await Deno.writeTextFile(values.json, JSON.stringify(results, null, 2) + "\n");
}
