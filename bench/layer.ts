// A Mixture-of-Experts layer on one GPU, forward and backward, beside PyTorch's dropless layer: same sizes, same inputs, same gate, so the same
// routing; one run, medians. Both sides enqueue their runs ahead of the GPU, with the L2 cache flushed before each. They have four turns each,
// every time at another place in the round, and a turn begins with 60 ms of the same work that are not timed, as a GPU that has idled has a
// higher clock.
//
//   deno task bench:layer [--shapes E16,E8,E64] [--routing balanced,zipf] [--repeats N] [--json FILE]
//
// Sides: `lina` writes f32 gradients of the weights (the default), `lina-bf16-gradients` bf16 ones, as PyTorch's layer does: the sides of PyTorch,
// eager and compiled, compare with the latter like with like, and with `lina` although it writes twice the bytes. The bounds are the experts' six
// products alone, each by the fastest way of either side (our kernels, torch._grouped_mm, a loop of cuBLAS): `gemm-only` writes bf16 gradients
// and is the bound of `lina-bf16-gradients`, `gemm-only-f32-gradients` writes f32 ones and is that of `lina`. Their sum is of times taken one by one,
// with a cold cache each; `products-in-a-row` and `products-in-a-row-bf16-gradients` are our kernels for all six as one piece of work, as they are
// in a layer.
//
// FLOPs = 2 · (2 · R · D · F) forward for R = tokens · choices rows, three times that forward and backward; the gate is not counted. Experts
// are D → F → D with tanh-GELU. Zipf: the gate is offset so that expert e wants a share of 1 / (e + 1), as far as a token meets an
// expert at most once.

import { parseArgs } from "node:util";
import { cudaDevice } from "../tensor/cuda/device.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import { fillNormal } from "../tensor/random.ts";
import { GpuTimer, hasPyTorch, median, needGpu, origin, Peer } from "./_gpu.ts";
import {
  type GradientDType,
  type Half,
  Layer,
  type Product,
  PRODUCTS,
  Products,
  type Shape,
} from "./_layer_sides.ts";

const SHAPES: Readonly<Record<string, Shape>> = {
  E16: { tokens: 16_384, width: 1024, hidden: 4096, experts: 16, choices: 2 },
  E8: { tokens: 16_384, width: 4096, hidden: 14_336, experts: 8, choices: 2 },
  E64: { tokens: 8192, width: 2048, hidden: 1024, experts: 64, choices: 8 },
};
const HALVES: readonly Half[] = ["fwd", "fwd_bwd"];
const OURS = { f32: "lina", bf16: "lina-bf16-gradients" } as const;
const ROWS = { f32: "products-in-a-row", bf16: "products-in-a-row-bf16-gradients" } as const;
const BOUNDS = { f32: "gemm-only-f32-gradients", bf16: "gemm-only" } as const;
/** Ways of a product: our kernels, and PyTorch's. */
const WAYS = ["lina", "grouped_mm", "cublas_loop"] as const;
/** Turns of a layer, turns of a product, and time of the runs at the begin of each that are not measured. */
const TURNS = 4, PRODUCT_TURNS = 2, WARM_MS = 60;
const STD = 0.02;

interface Row {
  readonly shape: string;
  readonly routing: string;
  readonly side: string;
  readonly dtype: "bf16";
  readonly gradient_dtype: GradientDType;
  readonly fwd_ms: number;
  readonly fwd_bwd_ms: number;
  readonly tflops_fwd: number;
  readonly tflops: number;
  readonly peak_bytes: number;
  readonly host_ms?: number;
  /** Forward and backward, median of each turn. */
  readonly turns_ms?: readonly number[];
}

/** A side of the comparison. */
interface Side {
  readonly side: string;
  readonly gradient_dtype: GradientDType;
  readonly peak_bytes: number;
  /** Times of so many runs. */
  readonly run: (what: Half, repeats: number) => Promise<number[]>;
  /** Times so far, by turn. */
  readonly times: Record<Half, number[][]>;
  /** Times of the host. */
  readonly host_ms?: number[];
}

const began = performance.now();
const { values } = parseArgs({
  args: Deno.args,
  options: {
    shapes: { type: "string", default: "E16,E8,E64" },
    routing: { type: "string", default: "balanced,zipf" },
    repeats: { type: "string", default: "20" },
    json: { type: "string" },
  },
});
needGpu();
const repeats = Number(values.repeats), routings = values.routing.split(",");
const shapes = values.shapes.split(",").map((name): [string, Shape] => {
  if (SHAPES[name]) return [name, SHAPES[name]];
  throw new RangeError(
    `Cannot measure as a shape must be one of ${Object.keys(SHAPES)}: current value is ${name}`,
  );
});

/** The gate [E, D], with the offsets of its experts in its first column, where the input has ones. */
function gateOf(shape: Shape, routing: string): Float32Array {
  const { width, experts } = shape;
  const gate = new Float32Array(experts * width);
  fillNormal(gate, [33, 44], STD);
  const offsets = routing === "zipf" ? zipfOffsets(shape) : new Float64Array(experts);
  for (let e = 0; e < experts; e++) gate[e * width] = offsets[e];
  return gate;
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

/** Normal numbers, bf16 [tokens, D], but for the first column, which is 1; and the same on the host. */
async function inputOf({ tokens, width }: Shape): Promise<[Tensor, Uint16Array]> {
  const x = empty(device, [tokens, width], "bf16");
  device.kernels.normal(x, [11, 22], 1);
  const host = await x.toArray() as Uint16Array;
  for (let n = 0; n < tokens; n++) host[n * width] = 0x3f80;
  device.write(host, x);
  return [x, host];
}

/** A list that begins elsewhere in each turn, every other time backwards. */
function turned<T>(list: readonly T[], turn: number): T[] {
  const round = list.map((_, i) => list[(i + turn) % list.length]);
  return turn % 2 === 0 ? round : round.reverse();
}

/** Times of the other side; none of what it could not do once. */
async function ask(side: string, what: string, runs: number): Promise<number[]> {
  if (impossible.has(`${side} ${what}`)) return [];
  const answer = await peer?.ask({ do: "time", side, what, repeats: runs, warm_ms: WARM_MS });
  if (!answer) impossible.add(`${side} ${what}`);
  return answer?.times as number[] | undefined ?? [];
}

/** One of our sides. */
async function ourSide(layer: Layer, gradient_dtype: GradientDType): Promise<Side> {
  const host_ms: number[] = [];
  return {
    side: OURS[gradient_dtype],
    gradient_dtype,
    peak_bytes: await layer.peak_bytes(),
    times: { fwd: [], fwd_bwd: [] },
    host_ms,
    async run(what, runs) {
      const before = device.hostWaits;
      const times = await timer.times(() => layer.run(what), runs, WARM_MS);
      const waits = device.hostWaits - before - 3; // the timer's own
      if (waits > 0) console.error(`the host waited ${waits} times for the GPU`);
      if (what === "fwd_bwd") host_ms.push(...times.host_ms);
      return times.gpu_ms;
    },
  };
}

/** Our six products in a row. */
function productsSide(products: Products, gradient_dtype: GradientDType): Side {
  return {
    side: ROWS[gradient_dtype],
    gradient_dtype,
    peak_bytes: 0,
    times: { fwd: [], fwd_bwd: [] },
    run: async (what, runs) =>
      (await timer.times(() => products.runAll(what, gradient_dtype), runs, WARM_MS)).gpu_ms,
  };
}

/** One of the other side's. */
async function theirSide(side: string): Promise<Side> {
  const memory = await peer!.ask({ do: "memory", side });
  return {
    side,
    gradient_dtype: "bf16",
    peak_bytes: memory?.peak_bytes as number | undefined ?? NaN,
    times: { fwd: [], fwd_bwd: [] },
    run: (what, runs) => ask(side, what, runs),
  };
}

/** Measures one shape with one routing, all sides in turns. */
async function measure(name: string, routing: string, x: Tensor, gate: Float32Array) {
  const shape = SHAPES[name];
  using wide = new Layer(device, shape, { x, gate }, "f32");
  const sides = [await ourSide(wide, "f32")];
  using narrow = new Layer(device, shape, { x, gate }, "bf16");
  sides.push(await ourSide(narrow, "bf16"));
  const counts = await narrow.counts();
  const other = await peer?.ask({
    do: "inputs",
    shape: name,
    x: `${directory}/x`,
    gate: `${directory}/gate`,
  });
  console.log(`  ${routing}: rows of the experts ${counts.join(" ")}`);
  if (other) {
    const moved = (other.counts as number[]).reduce((n, c, e) => n + Math.abs(c - counts[e]), 0);
    if (moved > 0) console.log(`  ${moved / 2} rows go to another expert in PyTorch`);
    for (const side of other.sides as string[]) sides.push(await theirSide(side));
  }
  using products = new Products(device, shape, counts);
  sides.push(productsSide(products, "f32"), productsSide(products, "bf16"));
  const ways = new Map(PRODUCTS.map((product) => {
    return [product, WAYS.map((): number[] => [])] as const;
  }));
  for (let turn = 0; turn < TURNS; turn++) {
    for (const side of turned(sides, turn)) {
      for (const what of HALVES) {
        side.times[what].push(await side.run(what, Math.ceil(repeats / TURNS)));
      }
    }
    if (turn >= PRODUCT_TURNS) continue;
    const runs = Math.ceil(repeats / PRODUCT_TURNS);
    for (const product of PRODUCTS) {
      for (const way of turned(WAYS.slice(0, other ? 3 : 1), turn)) {
        const times = way === "lina"
          ? (await timer.times(() => products.run(product), runs, WARM_MS)).gpu_ms
          : await ask(way, product, runs);
        ways.get(product)![WAYS.indexOf(way)].push(...times);
      }
    }
  }
  report(name, routing, sides, ways);
}

/** Adds a line to the results and to the table. */
function add(row: Omit<Row, "dtype" | "tflops" | "tflops_fwd">): void {
  const { tokens, choices, width, hidden } = SHAPES[row.shape];
  const flops = 4 * tokens * choices * width * hidden;
  const { fwd_ms, fwd_bwd_ms, side, peak_bytes, host_ms, turns_ms } = row;
  const tflops_fwd = flops / fwd_ms / 1e9, tflops = 3 * flops / fwd_bwd_ms / 1e9;
  rows.push({ ...row, dtype: "bf16", tflops_fwd, tflops });
  const ms = (x: number) => x.toFixed(3).padStart(9);
  console.log(
    `  ${row.routing.padEnd(9)}${side.padEnd(33)}${ms(fwd_ms)} ms ${
      tflops_fwd.toFixed(0).padStart(4)
    } TFLOP/s forward ${ms(fwd_bwd_ms)} ms ${
      tflops.toFixed(0).padStart(4)
    } TFLOP/s forward+backward${
      peak_bytes > 0 ? ` ${(peak_bytes / 2 ** 30).toFixed(2).padStart(6)} GiB` : ""
    }${host_ms === undefined ? "" : ` host ${host_ms.toFixed(2)} ms`}${
      turns_ms ? ` (${turns_ms.map((t) => t.toFixed(2)).join(" ")})` : ""
    }`,
  );
}

function report(
  shape: string,
  routing: string,
  sides: readonly Side[],
  ways: ReadonlyMap<Product, readonly number[][]>,
): void {
  for (const { side, gradient_dtype, peak_bytes, times, host_ms } of sides) {
    if (times.fwd_bwd.flat().length === 0) continue;
    add({
      shape,
      routing,
      side,
      gradient_dtype,
      fwd_ms: median(times.fwd.flat()),
      fwd_bwd_ms: median(times.fwd_bwd.flat()),
      peak_bytes,
      turns_ms: times.fwd_bwd.map(median),
      ...(host_ms ? { host_ms: median(host_ms) } : {}),
    });
  }
  const best = new Map<Product, number>();
  for (const [product, times] of ways) {
    const medians = times.map((list) => list.length > 0 ? median(list) : Infinity);
    best.set(product, Math.min(...medians));
    const cells = WAYS.map((way, i) => {
      return `  ${way} ${medians[i] < Infinity ? `${medians[i].toFixed(3)} ms` : "-"}`;
    });
    console.log(`    ${product.padEnd(10)}${cells.join("")}`);
  }
  const sum = (...products: Product[]) => products.reduce((ms, p) => ms + best.get(p)!, 0);
  for (const gradient_dtype of ["bf16", "f32"] as const) {
    const grads: Product[] = gradient_dtype === "f32"
      ? ["d_up f32", "d_down f32"]
      : ["d_up", "d_down"];
    add({
      shape,
      routing,
      side: BOUNDS[gradient_dtype],
      gradient_dtype,
      fwd_ms: sum("up", "down"),
      fwd_bwd_ms: sum("up", "down", "d_hidden", "d_rows", ...grads),
      peak_bytes: 0,
    });
  }
  const at = (side: string) =>
    rows.find((r) => r.shape === shape && r.routing === routing && r.side === side)?.fwd_bwd_ms ??
      Infinity;
  const torch = Math.min(at("torch-eager"), at("torch-compiled"));
  for (const gradient_dtype of ["f32", "bf16"] as const) {
    const own = at(OURS[gradient_dtype]), bound = BOUNDS[gradient_dtype];
    console.log(
      `  ${shape} ${routing}, ${gradient_dtype} gradients, forward+backward:${
        torch < Infinity ? ` ${(torch / own).toFixed(2)}x of PyTorch's best (bf16 gradients),` : ""
      } ${(at(bound) / own).toFixed(2)} of the products alone (${gradient_dtype} gradients), ${
        (at(ROWS[gradient_dtype]) / own).toFixed(2)
      } of ours in a row`,
    );
  }
}

const rows: Row[] = [];
/** What the other side could not do. */
const impossible = new Set<string>();
const directory = await Deno.makeTempDir({ prefix: "lina-bench-" });
await using peer = await hasPyTorch() ? new Peer("layer.py") : null;
// It compiles every shape once, while the GPU's kernels are loaded here and the gates made.
const prepared = shapes.map(([shape, sizes]) => peer?.ask({ do: "prepare", shape, ...sizes }));
const device = await cudaDevice();
using timer = new GpuTimer(device);
try {
  const gates = shapes.map(([, shape]) => routings.map((routing) => gateOf(shape, routing)));
  const ready = performance.now();
  const compiled = (await Promise.all(prepared)).map((answer) => Number(answer?.seconds));
  console.log(
    `ready after ${((ready - began) / 1000).toFixed(1)} s; PyTorch compiled for ${
      compiled.map((s) => s.toFixed(1)).join(", ")
    } s and is ready after ${((performance.now() - began) / 1000).toFixed(1)} s`,
  );
  for (const [i, [name, shape]] of shapes.entries()) {
    const { tokens, width, hidden, experts, choices } = shape;
    console.log(
      `${name}: tokens ${tokens}, D ${width}, F ${hidden}, E ${experts}, K ${choices}; ${
        (12 * tokens * choices * width * hidden / 1e12).toFixed(2)
      } TFLOP forward and backward`,
    );
    const [input, host] = await inputOf(shape);
    using x = input;
    await Deno.writeFile(`${directory}/x`, new Uint8Array(host.buffer));
    for (const [r, routing] of routings.entries()) {
      await Deno.writeFile(`${directory}/gate`, new Uint8Array(gates[i][r].buffer));
      await measure(name, routing, x, gates[i][r]);
      if (values.json === undefined) continue;
      const command =
        `deno task bench:layer --shapes ${values.shapes} --routing ${values.routing} --repeats ${repeats}`;
      const results = rows.map((row) => ({ ...row, ...origin(device, command) }));
      await Deno.writeTextFile(values.json, JSON.stringify(results, null, 2) + "\n");
    }
    await peer?.ask({ do: "release", shape: name });
  }
} finally {
  await Deno.remove(directory, { recursive: true });
}
console.log(`${((performance.now() - began) / 1000).toFixed(1)} s in all`);
