// The compiled kernels against the plain TypeScript ones, over random shapes (odd, one, empty), in f32 and f64, with and
// without BLAS.

import assert from "node:assert/strict";
import fc from "fast-check";
import type { Kernels } from "../device.ts";
import { type DType, newArray, type TypedArray } from "../dtype.ts";
import { fromArray, type Shape, sizeOf, Tensor, zeros } from "../tensor.ts";
import { cpuDevice, hostView } from "./device.ts";
import { cpuKernels } from "./kernels.ts";
import { referenceKernels } from "./reference/mod.ts";
import { wasmProduct } from "./gemm.ts";
import { realKernels } from "./wasm.ts";

const device = cpuDevice();
type Real = "f32" | "f64";

/** Numbers in [−2, 2) from a seed. */
function random(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = Math.imul(state ^ (state >>> 15), 0x2c1b3c6d) + 0x6d2b79f5 | 0;
    const bits = Math.imul(state ^ (state >>> 13), 0x297a2d39);
    return ((bits ^ (bits >>> 15)) >>> 0) / 2 ** 30 - 2;
  };
}

function fill(dtype: DType, size: number, next: () => number): TypedArray {
  const array = newArray(dtype, size);
  for (let i = 0; i < size; i++) array[i] = next();
  return array;
}

function assertClose(actual: TypedArray, expected: TypedArray, tolerance: number, what: string) {
  let largest = 1;
  for (const x of expected) largest = Math.max(largest, Math.abs(Number(x)));
  for (let i = 0; i < expected.length; i++) {
    const error = Math.abs(Number(actual[i]) - Number(expected[i])) / largest;
    assert(error <= tolerance, `${what}[${i}]: ${actual[i]} instead of ${expected[i]}`);
  }
}

interface Case {
  readonly inputs: readonly Shape[];
  readonly outputs: readonly Shape[];
  /** Shapes of i32 inputs and their contents. */
  readonly indices?: readonly Int32Array[];
  /** dtype of an output that is not the case's own. */
  readonly sumIn64?: boolean;
  run(kernels: Kernels, inputs: Tensor[], outputs: Tensor[], indices: Tensor[]): void;
}

/** Runs a case on both sides; every tensor is compared, so that writes to inputs and outputs alike are seen. */
function compare(name: string, dtype: Real, seed: number, c: Case): void {
  const results = [cpuKernels, referenceKernels].map((kernels) => {
    const next = random(seed);
    const inputs = c.inputs.map((s) => fromArray(device, fill(dtype, sizeOf(s), next), s));
    const outputs = c.outputs.map((s) =>
      fromArray(device, fill(c.sumIn64 ? "f64" : dtype, sizeOf(s), next), s)
    );
    const indices = (c.indices ?? []).map((array) => fromArray(device, array));
    c.run(kernels, inputs, outputs, indices);
    const all = [...inputs, ...outputs];
    const arrays = all.map((x) => hostView(x).slice());
    for (const x of [...all, ...indices]) x[Symbol.dispose]();
    return arrays;
  });
  results[0].forEach((array, i) =>
    assertClose(array, results[1][i], dtype === "f32" ? 2e-5 : 1e-13, `${name} tensor ${i}`)
  );
}

const N = fc.integer({ min: 0, max: 40 }), D = fc.integer({ min: 1, max: 70 });
const dtypes = fc.constantFrom<Real>("f32", "f64");
const seeds = fc.integer();

function property(name: string, make: (n: number, d: number, next: () => number) => Case): void {
  Deno.test(`${name}: compiled equals reference`, () => {
    fc.assert(
      fc.property(N, D, dtypes, seeds, (n, d, dtype, seed) => {
        compare(name, dtype, seed, make(n, d, random(seed + 1)));
      }),
      { numRuns: 60 },
    );
  });
}

/** `count` whole numbers in [low, high). */
function whole(count: number, low: number, high: number, next: () => number): Int32Array {
  return Int32Array.from(
    { length: count },
    () => low + Math.min(high - low - 1, Math.floor((next() + 2) / 4 * (high - low))),
  );
}

property("add, axpy, scale, fill", (n, d) => ({
  inputs: [[n, d], [n, d], [n, d]],
  outputs: [[n, d], [n, d]],
  run(kernels, [x, y, z], [out, filled]) {
    kernels.add(x, y, out);
    kernels.axpy(0.75, x, y);
    kernels.scale(x, -1.5);
    kernels.add(z, x, z);
    kernels.fill(filled, 2.5);
  },
}));

property("sum, sumSquares", (n, d) => ({
  inputs: [[n, d]],
  outputs: [[1], [1]],
  sumIn64: true,
  run(kernels, [x], [sum, squares]) {
    kernels.sum(x, sum);
    kernels.sumSquares([x, x], squares);
  },
}));

property("clipScale", (n, d) => ({
  inputs: [],
  outputs: [[1]],
  run(kernels, _, [out]) {
    using squares = fromArray(device, Float64Array.of((n - 5) * d));
    using scale = zeros(device, [1]);
    kernels.clipScale(squares, n % 3, scale);
    kernels.copy(scale, out);
    const [factor] = hostView(scale);
    const norm = Math.sqrt((n - 5) * d), limit = n % 3;
    const expected = limit === 0 || norm <= limit ? 1 : limit / norm;
    if (n >= 5) assert.equal(factor, Math.fround(expected));
    device.write(Float64Array.of(n % 2 ? NaN : Infinity), squares);
    kernels.clipScale(squares, limit, scale);
    assert(Number.isNaN(hostView(scale)[0]));
  },
}));

for (const kind of ["swiglu", "relu", "gelu"] as const) {
  property(`activation ${kind}`, (n, d) => {
    const wide = kind === "swiglu" ? 2 * d : d;
    return {
      inputs: [[n, wide], [n, d], [n]],
      outputs: [[n, d], [n, wide], [n, d], [n, wide], [n], [n, wide], [n]],
      run(kernels, [x, dOut, scales], [out, dX, scaled, dScaled, dScales, plain, dOnes]) {
        kernels.scale(x, 6);
        kernels.activation(kind, x, out);
        kernels.activationBackward(kind, dOut, x, dX);
        kernels.activation(kind, x, scaled, scales);
        kernels.activationBackward(kind, dOut, x, dScaled, { scales, dScales });
        kernels.activationBackward(kind, dOut, x, plain, { dScales: dOnes });
        assert.deepEqual(hostView(plain), hostView(dX));
        assert.deepEqual(hostView(dOnes), hostView(dScales));
      },
    };
  });
}

property("adamW", (n, d) => ({
  inputs: [[n, d], [n, d], [n, d], [n, d], [d], [d], [d], [d]],
  outputs: [],
  run(kernels, [p, g, m, v, p1, g1, m1, v1]) {
    using gradScale = fromArray(device, Float32Array.of(n % 7 === 0 ? NaN : 0.5));
    for (const x of [v, v1]) kernels.activation("relu", x, x); // second moments are not negative
    const update = (parameter: Tensor, gradient: Tensor, moment1: Tensor, moment2: Tensor) => ({
      parameter,
      gradient,
      moment1,
      moment2,
      residual: null,
      weightDecay: parameter === p ? 0.1 : 0,
    });
    // deno-fmt-ignore
    kernels.adamW([update(p, g, m, v), update(p1, g1, m1, v1)],
      { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, step: n + 1, gradScale, zeroGradient: n % 2 === 0 });
  },
}));

property("gatherRows, scatterAddRows", (n, d, next) => ({
  inputs: [[n + 1, d], [2 * n, d]],
  outputs: [[2 * n, d], [n + 1, d]],
  indices: [whole(2 * n, -1, n + 1, next)],
  run(kernels, [x, y], [gathered, scattered], [rows]) {
    kernels.gatherRows(x, rows, gathered);
    kernels.scatterAddRows(y, rows, scattered);
  },
}));

property("combineRows, combineRowsBackward", (n, d, next) => {
  const K = 1 + d % 3, R = n * K + d % 2;
  const slots = Int32Array.from({ length: n * K }, (_, i) => next() < -1 ? -1 : n * K - 1 - i);
  return {
    inputs: [[R, d], [n, K], [n, d]],
    outputs: [[n, d], [R, d], [n, K], [n, d], [n, d]],
    indices: [slots],
    run(kernels, [y, weights, dOut], [out, dY, dWeights, plain, sum], [flat]) {
      const shaped = flat.reshape(n, K);
      kernels.combineRows(y, shaped, weights, out);
      kernels.combineRows(y, shaped, null, plain);
      kernels.combineRows(y, shaped, weights, sum, dOut);
      kernels.combineRows(y, shaped, null, sum, sum);
      kernels.combineRowsBackward(dOut, y, shaped, weights, dY, dWeights);
    },
  };
});

property("rmsNorm", (n, d) => ({
  inputs: [[n, d], [d], [n, d]],
  outputs: [[n, d], [n], [n, d], [d], [n, d], [n, d], [n, d]],
  run(kernels, [x, gain, dOut], [out, invRms, dX, dGain, sum, summed, more]) {
    kernels.rmsNorm(x, gain, out, invRms, 0.1);
    kernels.rmsNormBackward(dOut, x, gain, invRms, dX, dGain);
    kernels.rmsNormBackward(dOut, x, gain, invRms, more, dGain, dX);
    kernels.rmsNormBackward(dOut, x, gain, invRms, more, dGain, more);
    kernels.addRmsNorm(x, dOut, gain, sum, summed, invRms, 0.1);
    kernels.addRmsNorm(x, dOut, gain, x, summed, invRms, 0.1);
  },
}));

property("rope", (n, d, next) => ({
  inputs: [[n, 3 * 2 * d]],
  outputs: [],
  indices: [whole(n, 0, 1000, next)],
  run(kernels, [x], _, [positions]) {
    const inverse = n % 2 === 1;
    kernels.rope(x, positions, { headDim: 2 * d, theta: 10_000, inverse });
  },
}));

property("splitQkv, joinQkv", (n, d, next) => {
  const C = 2 * (1 + d % 9), G = 1 + d % 2, H = G * (1 + d % 3);
  return {
    inputs: [[n, (H + 2 * G) * C]],
    outputs: [[n, H * C], [n, G * C], [n, G * C], [n, (H + 2 * G) * C]],
    indices: [whole(n, 0, 1000, next)],
    run(kernels, [qkv], [q, k, v, dQkv], [positions]) {
      const options = { headDim: C, theta: 10_000 };
      kernels.splitQkv(qkv, positions, options, q, k, v);
      kernels.joinQkv(q, k, v, positions, options, dQkv);
      assertClose(hostView(dQkv), hostView(qkv), 2e-5, "turned there and back");
      kernels.scale(k, 0.5);
      kernels.joinQkv(q, k, v, positions, options, dQkv);
    },
  };
});

property("softmax", (n, d) => ({
  inputs: [[n, d], [n, d]],
  outputs: [[n, d], [n, d]],
  run(kernels, [x, dY], [y, dX]) {
    kernels.scale(x, 10);
    kernels.softmax(x, y);
    kernels.softmaxBackward(dY, y, dX);
    kernels.softmax(x, x);
    kernels.softmaxBackward(dY, y, dY);
  },
}));

property("crossEntropy", (n, d, next) => ({
  inputs: [[n, d]],
  outputs: [[n]],
  indices: [whole(n, -1, d, next)],
  run(kernels, [logits], [losses], [targets]) {
    kernels.scale(logits, 5);
    kernels.crossEntropy(logits, targets, losses, 0.25);
  },
}));

for (const transposeA of [false, true]) {
  for (const transposeB of [false, true]) {
    property(`gemm ${transposeA ? "T" : "N"}${transposeB ? "T" : "N"}`, (n, d, next) => {
      const k = whole(1, 0, 300, next)[0];
      return {
        inputs: [transposeA ? [k, n] : [n, k], transposeB ? [d, k] : [k, d]],
        outputs: [[n, d], [n, d], [n, d]],
        run(kernels, [a, b], [out, sum, byWasm]) {
          kernels.gemm(a, b, out, { transposeA, transposeB });
          kernels.gemm(a, b, sum, { transposeA, transposeB, alpha: 0.5, beta: -2 });
          if (kernels === referenceKernels) {
            kernels.gemm(a, b, byWasm, { transposeA, transposeB, alpha: 0.5, beta: 1.5 });
            return;
          }
          const bytes = a.dtype === "f32" ? 4 : 8;
          const product = wasmProducts[a.dtype as Real] ??= wasmProduct(
            realKernels(a.dtype),
            bytes,
          );
          // deno-fmt-ignore
          product(transposeA, transposeB, n, d, k, 0.5, a.address, a.shape[1], b.address, b.shape[1], 1.5, byWasm.address, d);
        },
      };
    });
  }
}
const wasmProducts: Partial<Record<Real, ReturnType<typeof wasmProduct>>> = {};

property("groupedGemm, groupedGemmWeightGrad", (n, d, next) => {
  const to = whole(1, 1, 40, next)[0], groups = 4;
  const cuts = Int32Array.from([0, ...whole(groups - 1, 0, n + 1, next), n]).sort();
  return {
    inputs: [[n, d], [n, to], [groups * to, d], [groups * to, d]],
    outputs: [[n, to], [n, d], [groups * to, d]],
    indices: [cuts],
    run(kernels, [x, dy, stacked, dStacked], [y, dx, overwritten], [starts]) {
      const rows = { offsets: starts, host: n % 2 ? cuts : null };
      const each = (w: Tensor) =>
        Array.from({ length: groups }, (_, g) => w.rows(g * to, (g + 1) * to));
      kernels.groupedGemm(x, each(stacked), rows, y);
      kernels.groupedGemm(dy, each(stacked), rows, dx, { transposeWeight: true, beta: 1 });
      kernels.groupedGemmWeightGrad(dy, x, rows, each(dStacked));
      kernels.groupedGemmWeightGrad(dy, x, rows, each(overwritten), { beta: 0 });
    },
  };
});

property("grouped products with an activation and scales", (n, d, next) => {
  const F = whole(1, 1, 20, next)[0], groups = 3;
  const kind = (["relu", "gelu", "swiglu"] as const)[d % 3], H = kind === "swiglu" ? 2 * F : F;
  const cuts = Int32Array.from([0, ...whole(groups - 1, 0, n + 1, next), n]).sort();
  return {
    inputs: [[n, d], [n, d], [groups * H, d], [groups * d, F], [n]],
    outputs: [[n, H], [n, F], [n, H], [n]],
    indices: [cuts],
    run(kernels, [x, dY, into, outOf, scales], [up, active, dUp, dScales], [starts]) {
      const rows = { offsets: starts, host: n % 2 ? cuts : null };
      const each = (w: Tensor) => {
        const size = w.shape[0] / groups;
        return Array.from({ length: groups }, (_, g) => w.rows(g * size, (g + 1) * size));
      };
      kernels.groupedGemmActivation(x, each(into), rows, kind, up, active, scales);
      const back = { scales, dScales };
      kernels.groupedGemmActivationBackward(dY, each(outOf), rows, kind, up, dUp, back);
    },
  };
});

property("attention", (n, d, next) => {
  const headDim = 1 + d % 19, kvHeads = 1 + d % 2, heads = kvHeads * (1 + n % 3);
  const rows = n === 40 ? 600 : 3 * n; // 600: several tiles of keys
  const offsets = Int32Array.from([0, ...whole(n === 40 ? 1 : 2, 0, rows + 1, next), rows]).sort();
  const shape = { offsets, heads, kvHeads, headDim };
  const wide = [rows, heads * headDim], narrow = [rows, kvHeads * headDim];
  return {
    inputs: [wide, narrow, narrow, wide],
    outputs: [wide, [rows, heads], wide, narrow, narrow],
    run(kernels, [q, k, v, dOut], [out, lse, dQ, dK, dV]) {
      kernels.attention(q, k, v, out, lse, shape);
      kernels.attentionBackward(dOut, q, k, v, out, lse, shape, dQ, dK, dV);
    },
  };
});

Deno.test("kernels and BLAS reach the upper half of the memory", () => {
  const n = 20, next = random(7);
  const low = [0, 1, 2].map(() => fromArray(device, fill("f32", n * n, next), [n, n]));
  const high = low.map((owner, i) =>
    new Tensor(device, "f32", [n, n], { address: 2 ** 31 + 2 ** 20 * (i + 1), owner })
  );
  low.forEach((x, i) => cpuKernels.copy(x, high[i]));
  for (const [a, b, out] of [low, high]) {
    cpuKernels.gemm(a, b, out, { beta: 1 });
    cpuKernels.add(out, a, out);
    cpuKernels.softmax(out, b);
    using rows = fromArray(device, Int32Array.from({ length: n }, (_, i) => n - 1 - i));
    cpuKernels.gatherRows(b, rows, out);
  }
  low.forEach((x, i) => assert.deepEqual(hostView(high[i]), hostView(x)));
});

Deno.test("copy converts between every pair of dtypes as the reference does", () => {
  const values = [0, 1, 2, 3, 100, 127, 0.5, 1.00390625, 1.01171875, 3.14159, 65504, 200];
  const all: DType[] = ["f32", "f64", "f16", "bf16", "i32", "u8", "i64", "i16"];
  for (const from of all) {
    for (const to of all) {
      using exact = fromArray(device, Float64Array.from(values));
      using x = zeros(device, [values.length], from);
      referenceKernels.copy(exact, x);
      using out = zeros(device, [values.length], to);
      using expected = zeros(device, [values.length], to);
      cpuKernels.copy(x, out);
      referenceKernels.copy(x, expected);
      assert.deepEqual(hostView(out), hostView(expected), `${from} to ${to}`);
    }
  }
});

Deno.test("bf16 rounds to nearest even and keeps NaN and infinity", () => {
  const x = [1, 1 + 2 ** -8, 1 + 3 * 2 ** -8, -1 - 2 ** -8, NaN, Infinity, -Infinity, 3.4e38];
  using from = fromArray(device, Float32Array.from(x));
  using half = zeros(device, [x.length], "bf16"), back = zeros(device, [x.length]);
  cpuKernels.copy(from, half);
  cpuKernels.copy(half, back);
  const expected = [1, 1, 1 + 4 * 2 ** -8, -1, NaN, Infinity, -Infinity, Infinity];
  assert.deepEqual([...hostView(back)], expected);
});

Deno.test("gatherRows copies rows of every dtype", () => {
  for (const dtype of ["f32", "f64", "f16", "bf16", "i32", "u8", "i64", "i16"] as const) {
    using whole = fromArray(device, Int32Array.from({ length: 21 }, (_, i) => i), [7, 3]);
    using x = zeros(device, [7, 3], dtype), out = zeros(device, [3, 3], dtype);
    using expected = zeros(device, [3, 3], dtype);
    using rows = fromArray(device, new Int32Array([6, -1, 2]));
    cpuKernels.copy(whole, x);
    cpuKernels.gatherRows(x, rows, out);
    referenceKernels.gatherRows(x, rows, expected);
    assert.deepEqual(hostView(out), hostView(expected));
  }
});

Deno.test("exp inside the kernels is within 2 ulp over its whole range", () => {
  for (const dtype of ["f32", "f64"] as const) {
    const step = dtype === "f32" ? 2 ** -23 : 2 ** -52, lowest = dtype === "f32" ? -86.6 : -707.3;
    const count = 20_001;
    // softmax of [0, x] is [1, e^x] / (1 + e^x): its second entry over its first is e^x.
    const xs = newArray(dtype, 2 * count);
    for (let i = 0; i < count; i++) xs[2 * i + 1] = lowest * i / (count - 1);
    using x = fromArray(device, xs, [count, 2]), y = zeros(device, [count, 2], dtype);
    cpuKernels.softmax(x, y);
    const result = hostView(y);
    for (let i = 0; i < count; i++) {
      const ratio = Number(result[2 * i + 1]) / Number(result[2 * i]);
      const exact = Math.exp(Number(xs[2 * i + 1]));
      assert(Math.abs(ratio - exact) <= 4 * step * exact, `exp(${xs[2 * i + 1]}) = ${ratio}`);
    }
  }
});

Deno.test("infinite and NaN scores: hidden columns vanish, NaN spreads over its row only", () => {
  using x = fromArray(device, new Float32Array([-Infinity, 0, 0, NaN, 1, 2]), [2, 3]);
  using y = zeros(device, [2, 3]);
  cpuKernels.softmax(x, y);
  assert.deepEqual([...hostView(y)].slice(0, 3), [0, 0.5, 0.5]);
  assert([...hostView(y)].slice(3).every(Number.isNaN));
});
