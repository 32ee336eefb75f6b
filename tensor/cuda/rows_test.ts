// Rows that move on the GPU (or its emulator) against the CPU: every way that a row can be taken, odd sizes, no rows, addresses off, rows
// that are named often or not at all.

import assert from "node:assert/strict";
import { smallSizes, testDevice } from "../../tests/emulator/device.ts";
import { cpuDevice } from "../cpu/device.ts";
import type { TypedArray } from "../dtype.ts";
import { empty, fromArray } from "../tensor.ts";
import { Case, type Dtype } from "./_compare.ts";
import { rowsKernels, rowsModule } from "./rows.ts";
import { sortModule } from "./sort.ts";

const device = await testDevice([rowsModule, sortModule]), cpu = cpuDevice().kernels;
const kernels = device && rowsKernels(device.context);
const DTYPES: readonly Dtype[] = ["f32", "bf16"];
const BOUND = { f32: 4e-6, bf16: 0.008 };

/** Rows, width, and elements by which addresses are off. */
const SIZES: readonly (readonly [number, number, number])[] = [
  [1, 8, 0],
  [3, 5, 0],
  [17, 129, 0],
  [33, 264, 0],
  [5, 1024, 1],
  [7, 2056, 0],
  [0, 64, 0],
  ...smallSizes ? [] : [[3001, 1024, 0], [501, 4096, 0], [777, 1000, 3]] as const,
];

let seed = 1;
function random(below: number): number {
  seed = Math.imul(seed, 1664525) + 1013904223 | 0;
  return Math.floor((seed >>> 8) / 2 ** 24 * below);
}

/** A random order of 0..n − 1. */
function shuffled(n: number): Int32Array {
  const order = Int32Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1; i > 0; i--) {
    const j = random(i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

for (const dtype of DTYPES) {
  for (const [N, D, shift] of SIZES) {
    Deno.test({
      name: `rows [${N}, ${D}] in ${dtype}${shift ? ", not aligned" : ""}`,
      ignore: !kernels,
      async fn() {
        using test = new Case(device!, dtype, shift);
        const bound = BOUND[dtype];
        // Gather, with rows that are named twice, never, and no row.
        const x = test.random(Math.max(N, 1), D), count = 2 * N + 1;
        const rows = test.integers(
          Int32Array.from({ length: count }, () => random(Math.max(N, 1) + 1) - 1),
        );
        const gathered = test.result(count, D);
        cpu.gatherRows(x.cpu, rows.cpu, gathered.cpu);
        kernels!.gatherRows(x.gpu, rows.gpu, gathered.gpu);
        await test.same("gathered", gathered, 0);

        // Scatter-add: one row gets a third of them.
        const V = 2 * N + 3, y = test.random(N, D);
        const to = test.integers(
          Int32Array.from(
            { length: N },
            () => random(3) === 0 ? 2 : random(20) === 0 ? -1 : random(V),
          ),
        );
        for (const wide of dtype === "bf16" ? [false, true] : [false]) {
          const first = Float32Array.from({ length: V * D }, (_, i) => i % 7 - 3);
          const sums = test.pair([V, D], first, wide ? "f32" : dtype);
          cpu.scatterAddRows(y.cpu, to.cpu, sums.cpu);
          kernels!.scatterAddRows(y.gpu, to.gpu, sums.gpu);
          // In f32 both add in the same order, but for runs longer than a piece: the bits are the same.
          await test.same("sums", sums, wide || dtype === "f32" ? N > 128 ? 2e-6 : 0 : 0.01);
        }

        // Combine and its gradient.
        for (const K of [1, 2, 3, 5, 8, 11]) {
          const all = N * K;
          for (const [R, dropped] of [[all, 0], [all + 3, 0], [all, all >> 2]] as const) {
            const slots = shuffled(R).subarray(0, all).slice();
            for (let i = 0; i < dropped; i++) slots[random(all)] = -1;
            const used = dropped > 0 ? R + 1 : R; // else the drops' rows are nobody's, in as many rows as choices
            const values = test.random(used, D), places = test.integers(slots);
            const at = { cpu: places.cpu.reshape(N, K), gpu: places.gpu.reshape(N, K) };
            const weights = test.pair(
              [N, K],
              Float32Array.from({ length: all }, (_, i) => (i % 5 - 2) / 4 + 0.125),
              K % 2 ? "f32" : dtype,
            );
            const residual = test.random(N, D), out = test.result(N, D);
            cpu.combineRows(values.cpu, at.cpu, weights.cpu, out.cpu, residual.cpu);
            kernels!.combineRows(values.gpu, at.gpu, weights.gpu, out.gpu, residual.gpu);
            await test.same(`out, K ${K}`, out, bound);
            cpu.combineRows(values.cpu, at.cpu, null, out.cpu);
            kernels!.combineRows(values.gpu, at.gpu, null, out.gpu);
            await test.same(`out without weights, K ${K}`, out, bound);
            cpu.combineRows(values.cpu, at.cpu, weights.cpu, residual.cpu, residual.cpu);
            kernels!.combineRows(values.gpu, at.gpu, weights.gpu, residual.gpu, residual.gpu);
            await test.same(`out in place, K ${K}`, residual, bound);
            const dOut = test.random(N, D), dY = test.result(used, D);
            const dWeights = test.pair(
              [N, K],
              new Float32Array(all).fill(NaN),
              K % 2 ? "f32" : dtype,
            );
            cpu.combineRowsBackward(
              dOut.cpu,
              values.cpu,
              at.cpu,
              weights.cpu,
              dY.cpu,
              dWeights.cpu,
            );
            kernels!.combineRowsBackward(
              dOut.gpu,
              values.gpu,
              at.gpu,
              weights.gpu,
              dY.gpu,
              dWeights.gpu,
            );
            await test.same(`dY, K ${K}`, dY, bound);
            await test.same(`dWeights, K ${K}`, dWeights, K % 2 ? 1e-5 : bound);
          }
          if (N * D > 1e6 && K === 3) break;
        }
      },
    });
  }
}

Deno.test({
  name: "rows of every dtype are gathered",
  ignore: !kernels,
  async fn() {
    const arrays: readonly TypedArray[] = [
      Float64Array.of(1, 2, 3, 4, 5, 6),
      Int32Array.of(1, 2, 3, 4, 5, 6),
      Uint8Array.of(1, 2, 3, 4, 5, 6),
    ];
    for (const array of arrays) {
      using x = fromArray(device!, array, [2, 3]);
      using rows = fromArray(device!, Int32Array.of(1, -1, 0));
      using out = empty(device!, [3, 3], x.dtype);
      kernels!.gatherRows(x, rows, out);
      assert.deepEqual(Array.from(await out.toArray() as Float64Array), [
        4,
        5,
        6,
        0,
        0,
        0,
        1,
        2,
        3,
      ]);
    }
  },
});

Deno.test({
  name: "many rows into few and few rows into very many are added up",
  ignore: !kernels,
  async fn() {
    const D = 24;
    for (const [N, V] of [[smallSizes ? 3000 : 20_000, 3], [50, 300_000], [2100, 700], [5, 1]]) {
      using test = new Case(device!, "f32");
      const x = test.random(N, D);
      const rows = test.integers(Int32Array.from({ length: N }, () => random(V)));
      const sums = test.pair([V, D], new Float32Array(V * D));
      cpu.scatterAddRows(x.cpu, rows.cpu, sums.cpu);
      kernels!.scatterAddRows(x.gpu, rows.gpu, sums.gpu);
      await test.same(`${N} rows into ${V}`, sums, N > 128 ? 5e-6 : 0);
    }
  },
});
