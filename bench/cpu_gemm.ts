// Matrix products and the other kernels of one CPU core: OpenBLAS beside the compiled kernel over squares and the demo's skinny
// shapes, then GB/s of the element-wise kernels. `cpu.ts` calls it; alone it prints its tables.

import { openBlas } from "../ffi/openblas.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { type MatrixProduct, matrixProduct, wasmProduct } from "../tensor/cpu/gemm.ts";
import { wasmKernels } from "../tensor/cpu/wasm.ts";
import * as ops from "../tensor/ops.ts";
import { fromArray, type Shape, sizeOf, type Tensor, zeros } from "../tensor/tensor.ts";

/** A line of the benchmark's JSON. */
export interface KernelRow {
  /** `gemm-<backend>-<M>x<N>x<K>-<transposes>`, or `kernel-<name>`. */
  readonly name: string;
  /** Rate of arithmetic; 0 where only memory counts. */
  readonly gflops: number;
  /** Always 0: a kernel handles no tokens. */
  readonly tokens_per_s: number;
  /** Always 1. */
  readonly ranks: number;
  /** Time of one call in µs, the best of several. */
  readonly time_us: number;
  /** Bytes read and written per second / 1e9, where that is what limits. */
  readonly gbs?: number;
}

const device = cpuDevice();

function random(shape: Shape): Tensor {
  return fromArray(
    device,
    Float32Array.from({ length: sizeOf(shape) }, () => Math.random() * 2 - 1),
    shape,
  );
}

/** The best of several times in µs: on a shared machine, everything else is somebody's noise. */
function best_us(run: () => void): number {
  // V8 compiles quickly first and well later, on another thread.
  const start = performance.now();
  let calls = 0;
  for (; calls < 10 || performance.now() - start < 50; calls++) run();
  calls = Math.ceil(calls / (performance.now() - start)); // about 1 ms
  let best = Infinity;
  for (let repeat = 0; repeat < 50; repeat++) {
    const start = performance.now();
    for (let i = 0; i < calls; i++) run();
    best = Math.min(best, (performance.now() - start) / calls);
  }
  return best * 1000;
}

/** Squares, then [M, N, K, transposes]: forward (NT), input's gradient (NN), weights' gradient (TN), attention tiles. */
const SHAPES: readonly [number, number, number, "NN" | "NT" | "TN"][] = [
  [64, 64, 64, "NN"],
  [128, 128, 128, "NN"],
  [256, 256, 256, "NN"],
  [512, 512, 512, "NN"],
  [1024, 1024, 1024, "NN"],
  [512, 256, 128, "NT"],
  [1024, 384, 128, "NT"],
  [2048, 512, 192, "NT"],
  [1024, 128, 512, "NN"],
  [2048, 192, 512, "NN"],
  [512, 128, 1024, "TN"],
  [512, 192, 2048, "TN"],
  [1024, 8, 128, "NT"],
  [64, 128, 32, "NT"],
  [64, 32, 128, "NN"],
];

/**
 * Measures matrix products in f32 on one thread.
 *
 * @returns Rows of the compiled kernel and, where it is installed, of OpenBLAS.
 */
export function benchGemm(): KernelRow[] {
  const backends: [string, MatrixProduct][] = [["wasm", wasmProduct(wasmKernels().f32, 4)]];
  if (openBlas()) backends.push(["blas", matrixProduct("f32")]);
  const rows: KernelRow[] = [];
  for (const [m, n, k, kind] of SHAPES) {
    using a = random([m * k]), b = random([k * n]), out = zeros(device, [m * n]);
    const transposeA = kind === "TN", transposeB = kind === "NT";
    const lda = transposeA ? m : k, ldb = transposeB ? k : n;
    for (const [backend, product] of backends) {
      const time_us = best_us(() =>
        // deno-fmt-ignore
        product(transposeA, transposeB, m, n, k, 1, a.address, lda, b.address, ldb, 0, out.address, n)
      );
      rows.push({
        name: `gemm-${backend}-${m}x${n}x${k}-${kind}`,
        gflops: 2 * m * n * k / time_us / 1e3,
        tokens_per_s: 0,
        ranks: 1,
        time_us,
      });
    }
  }
  return rows;
}

/**
 * Measures the kernels that memory limits (or `exp`), on 1024 rows of 192 columns, and attention.
 *
 * @returns One row per kernel.
 */
export function benchKernels(): KernelRow[] {
  const N = 1024, D = 192, F = 512, V = 256, P = 1 << 20;
  const rows: KernelRow[] = [];
  const measure = (name: string, bytes: number, flops: number, run: () => void) => {
    const time_us = best_us(run);
    const gbs = bytes / time_us / 1e3, gflops = flops / time_us / 1e3;
    rows.push({ name: `kernel-${name}`, gflops, tokens_per_s: 0, ranks: 1, time_us, gbs });
  };
  using x = random([N, D]), y = random([N, D]), out = random([N, D]);
  using gain = random([D]), dGain = random([D]), invRms = zeros(device, [N]);
  using weights = random([N, 1]), dWeights = random([N, 1]);
  const shuffled = Int32Array.from({ length: N }, (_, i) => (i * 7) % N);
  using slots = fromArray(device, shuffled, [N, 1]);
  using positions = fromArray(device, Int32Array.from({ length: N }, (_, i) => i % 128));
  using gateUp = random([N, 2 * F]), hidden = random([N, F]), dGateUp = random([N, 2 * F]);
  using logits = random([N, V]), probabilities = random([N, V]);
  const bytes = N * D * 4, rotary = { headDim: 32, theta: 10_000 };
  measure("add", 3 * bytes, 0, () => ops.add(x, y, out));
  measure("copy", 2 * bytes, 0, () => ops.copy(x, out));
  measure("gatherRows", 2 * bytes, 0, () => ops.gatherRows(x, slots, out));
  measure("scatterAddRows", 3 * bytes, 0, () => ops.scatterAddRows(x, slots, out));
  measure("combineRows", 2 * bytes, 0, () => ops.combineRows(x, slots, weights, out));
  measure(
    "combineRowsBackward",
    3 * bytes,
    0,
    () => ops.combineRowsBackward(x, y, slots, weights, out, dWeights),
  );
  measure("rmsNorm", 2 * bytes, 0, () => ops.rmsNorm(x, gain, out, invRms, 1e-5));
  measure(
    "rmsNormBackward",
    3 * bytes,
    0,
    () => ops.rmsNormBackward(y, x, gain, invRms, out, dGain),
  );
  measure("rope", 2 * bytes, 0, () => ops.rope(x, positions, rotary));
  measure("swiglu", 3 * N * F * 4, 0, () => ops.activation("swiglu", gateUp, hidden));
  measure(
    "swigluBackward",
    5 * N * F * 4,
    0,
    () => ops.activationBackward("swiglu", hidden, gateUp, dGateUp),
  );
  measure("softmax", 2 * N * V * 4, 0, () => ops.softmax(logits, probabilities));
  measure("crossEntropy", 2 * N * V * 4, 0, () => ops.crossEntropy(logits, positions, invRms, 1));
  {
    using p = random([P]), g = random([P]), m = zeros(device, [P]), v = zeros(device, [P]);
    using total = zeros(device, [1], "f64");
    using gradScale = fromArray(device, Float32Array.of(1));
    // deno-fmt-ignore
    const adam = { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 3, gradScale, zeroGradient: false };
    // deno-fmt-ignore
    const update = { parameter: p, gradient: g, moment1: m, moment2: v, residual: null, weightDecay: 0.1 };
    measure("adamW", 7 * P * 4, 0, () => ops.adamW([update], adam));
    measure("sumSquares", P * 4, 0, () => ops.sumSquares([p], total));
  }
  const heads = 6, headDim = 32, width = heads * headDim;
  for (const [sequences, length] of [[8, 128], [4, 256], [1, 1024]]) {
    const offsets = Int32Array.from({ length: sequences + 1 }, (_, i) => i * length);
    const shape = { offsets, heads, kvHeads: heads, headDim };
    const [q, k, v, dOut, o, dQ, dK, dV] = Array.from({ length: 8 }, () => random([N, width]));
    using lse = zeros(device, [N, heads]);
    const flops = sequences * heads * length * length * headDim * 2; // two products, half of each hidden
    const name = `${sequences}x${length}`;
    measure(`attention-${name}`, 0, flops, () => ops.attention(q, k, v, o, lse, shape));
    measure(
      `attentionBackward-${name}`,
      0,
      2.5 * flops,
      () => ops.attentionBackward(dOut, q, k, v, o, lse, shape, dQ, dK, dV),
    );
    for (const tensor of [q, k, v, dOut, o, dQ, dK, dV]) tensor[Symbol.dispose]();
  }
  return rows;
}

/** Prints rows as a table. */
export function printKernels(rows: readonly KernelRow[]): void {
  for (const { name, gflops, time_us, gbs } of rows) {
    const rate = gflops > 0
      ? `${gflops.toFixed(1).padStart(7)} GFLOP/s`
      : `${(gbs ?? 0).toFixed(1).padStart(7)} GB/s`;
    console.log(`${name.padEnd(34)} ${time_us.toFixed(1).padStart(10)} µs ${rate}`);
  }
}

if (import.meta.main) {
  console.log(`${device.name}, BLAS ${openBlas()?.path ?? "none"}, one thread`);
  printKernels(benchGemm());
  printKernels(benchKernels());
}
