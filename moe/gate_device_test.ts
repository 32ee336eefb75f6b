// The gate's products on the GPU (or its emulator) against sums in f64: logits, their gradients, and the gate's part of the input's gradient.

import assert from "node:assert/strict";
import type { Device } from "../tensor/device.ts";
import * as routing from "../tensor/ops/routing.ts";
import { empty, fromArray } from "../tensor/tensor.ts";
import { smallSizes, testDevice } from "../tests/emulator/device.ts";
import { close, numbers, read, rounded } from "./_device_numbers.ts";
import { random } from "./init.ts";

const device = await testDevice() as Device | null;
const options = { ignore: !device };

const SHAPES: readonly (readonly [N: number, D: number, E: number])[] = [
  [1, 8, 1],
  [3, 24, 3],
  [65, 72, 8],
  [129, 200, 16],
  [70, 136, 20],
  [64, 264, 64],
  [33, 64, 100],
  [17, 33, 6],
  [0, 16, 4],
  // Several slices in a block, and shares of a sum.
  [20, 2056, 64],
  [1300, 3080, 4],
  ...smallSizes
    ? []
    : [[1031, 1024, 16], [131, 2048, 64], [259, 4096, 8], [19, 3584, 256], [50, 999, 40]] as const,
];

for (const dtype of ["bf16", "f32"] as const) {
  for (const [N, D, E] of SHAPES) {
    if (dtype === "f32" && N * D > 2 ** 20) continue; // the plain kernels know no slices
    Deno.test(
      `gate [${N}, ${D}] of ${E} experts in ${dtype}: logits and gradients`,
      options,
      async () => {
        const wide = numbers(1, "x", N * D), half = rounded(wide);
        const x = dtype === "bf16" ? half.values : Float64Array.from(wide);
        const g = Float64Array.from(numbers(2, "gate", E * D));
        const dL = Float64Array.from(numbers(3, "dLogits", N * E));
        const old = rounded(numbers(4, "dX", N * D));
        using x_ND = fromArray(device!, dtype === "bf16" ? half.bits : wide, [N, D]);
        using gate_ED = fromArray(device!, Float32Array.from(g), [E, D]);
        using logits_NE = empty(device!, [N, E]);
        routing.gate(x_ND, gate_ED, logits_NE);
        const logits = new Float64Array(N * E), dX = new Float64Array(N * D);
        const dGate = new Float64Array(E * D), sizes = new Float64Array(N * E);
        const first = Float64Array.from(numbers(5, "dGate", E * D));
        for (let n = 0; n < N; n++) {
          for (let e = 0; e < E; e++) {
            let sum = 0, size = 0;
            const l = dL[n * E + e];
            for (let d = 0; d < D; d++) {
              const product = x[n * D + d] * g[e * D + d];
              sum += product;
              size += Math.abs(product);
              dX[n * D + d] += l * g[e * D + d];
              dGate[e * D + d] += l * x[n * D + d];
            }
            logits[n * E + e] = sum;
            sizes[n * E + e] = size;
          }
        }
        const got = await read(logits_NE);
        for (let i = 0; i < got.length; i++) {
          // Rounding of f32 sums; products of bf16 operands would be 2⁻⁹ off.
          const bound = 2 ** -22 * sizes[i];
          assert.ok(
            Math.abs(got[i] - logits[i]) <= bound,
            `logits[${i}]: ${got[i]}, not ${logits[i]}`,
          );
        }
        for (let i = 0; i < dX.length; i++) dX[i] += old.values[i];
        for (let i = 0; i < dGate.length; i++) dGate[i] += first[i];
        const oldWide = Float32Array.from(old.values);
        const outcomes: Float64Array[] = [];
        using none_NK = fromArray(device!, new Int32Array(N).fill(-1), [N, 1]); // no rows
        for (let beta = 1; beta >= 0; beta--) {
          using dX_ND = fromArray(device!, dtype === "bf16" ? old.bits : oldWide, [N, D]);
          using dLogits_NE = fromArray(device!, Float32Array.from(dL), [N, E]);
          using dGate_ED = fromArray(device!, Float32Array.from(first), [E, D]);
          routing.combineRowsGate(x_ND, none_NK, dLogits_NE, gate_ED, dX_ND, {
            beta: beta as 0 | 1,
          });
          routing.gateWeightGrad(dLogits_NE, x_ND, dGate_ED);
          const want = beta === 1 ? dX : dX.map((v, i) => v - old.values[i]);
          close(
            await read(dX_ND),
            want,
            dtype === "bf16" ? 2 ** -8 * Math.ceil(E / 64) : 2e-6,
            "dX",
          );
          outcomes.push(await read(dGate_ED));
        }
        close(outcomes[0], dGate, 3e-6, "dGate");
        assert.deepEqual(outcomes[0], outcomes[1], "dGate is the same every time");
      },
    );
  }
}

for (const dtype of ["bf16", "f32"] as const) {
  Deno.test(`rows and the gate's part are the input's gradient in ${dtype}`, options, async () => {
    const shapes: readonly (readonly [N: number, D: number, E: number, K: number])[] = [
      [1, 8, 1, 1],
      [65, 72, 8, 2],
      [300, 264, 16, 2],
      [77, 520, 12, 4],
      [43, 264, 16, 16],
      [39, 96, 20, 3],
      [50, 304, 32, 8],
      [50, 264, 50, 4],
      [135, 520, 64, 8],
      [21, 64, 100, 9],
      [5, 40, 3, 20],
      [17, 33, 6, 2],
      [0, 16, 4, 2],
      ...smallSizes ? [] : [[1100, 1024, 16, 2], [530, 2048, 64, 8]] as const,
    ];
    for (const [N, D, E, K] of shapes) {
      const next = random(N, "slots");
      const slots = Int32Array.from(
        { length: N * K },
        () => Math.floor(next() * (N * K + 1)) - 1,
      );
      const y = rounded(numbers(1, "y", N * K * D)), old = rounded(numbers(2, "out", N * D));
      const g = numbers(3, "gate", E * D), dL = numbers(4, "dLogits", N * E);
      const bits = dtype === "bf16";
      using y_SD = fromArray(device!, bits ? y.bits : Float32Array.from(y.values), [N * K, D]);
      using slots_NK = fromArray(device!, slots, [N, K]);
      using gate_ED = fromArray(device!, g, [E, D]);
      using dLogits_NE = fromArray(device!, dL, [N, E]);
      for (const beta of [undefined, 1] as const) {
        using out = fromArray(device!, bits ? old.bits : Float32Array.from(old.values), [N, D]);
        routing.combineRowsGate(y_SD, slots_NK, dLogits_NE, gate_ED, out, beta && { beta });
        const got = await read(out), rows = N > 400 ? [0, 1, 257, N - 1] : Array(N).keys();
        for (const n of rows) {
          for (let d = 0; d < D; d++) {
            let want = beta ? old.values[n * D + d] : 0, size = Math.abs(want);
            for (let k = 0; k < K; k++) {
              const slot = slots[n * K + k], value = slot < 0 ? 0 : y.values[slot * D + d];
              want += value;
              size += Math.abs(value);
            }
            for (let e = 0; e < E; e++) {
              const value = dL[n * E + e] * g[e * D + d];
              want += value;
              size += Math.abs(value);
            }
            // More than 64 experts: what is stored in between is rounded, too.
            const rounding = E > 64 ? 2 ** -8 : 2 ** -14;
            const bound = bits ? 2 ** -8 * Math.abs(want) + rounding * size : 1e-6 * size;
            assert.ok(
              Math.abs(got[n * D + d] - want) <= bound,
              `[${n}, ${d}] of [${N}, ${D}], ${E} experts, ${K}: ${got[n * D + d]}, not ${want}`,
            );
          }
        }
      }
    }
  });
}
