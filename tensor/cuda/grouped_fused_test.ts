// Grouped products with an activation on the GPU (or its emulator, which has only the two kernels in turn) against the CPU: every kind, both
// directions, uneven and empty groups, groups that end inside a tile, rows outside the groups, scales and their gradients, sizes and addresses
// for which the fused kernels are not.

import assert from "node:assert/strict";
import { emulated, smallSizes, testDevice } from "../../tests/emulator/device.ts";
import { cpuDevice } from "../cpu/device.ts";
import type { Activation } from "../device.ts";
import type { Tensor } from "../tensor.ts";
import { Case, type Dtype, type Pair } from "./_compare.ts";
import { elementwiseKernels, elementwiseModule } from "./elementwise.ts";
import { groupedKernels, groupedModule } from "./grouped.ts";
import { fusedModule, groupedActivationKernels } from "./grouped_fused.ts";
import { hopperModule } from "./grouped_hopper.ts";

const device = await testDevice([groupedModule, hopperModule, fusedModule, elementwiseModule]);
const cpu = cpuDevice().kernels;

/** First rows of the groups and the end, the batch's rows, D, F, elements by which addresses are off. */
const SIZES: readonly (readonly [readonly number[], number, number, number, number])[] = [
  [[0, 1], 1, 1, 1, 0],
  [[0, 3, 3, 20], 20, 24, 64, 0],
  [[2, 5, 69, 75], 80, 72, 128, 0],
  [[0, 0, 33], 33, 40, 24, 1],
  [[0, 0, 0], 5, 16, 64, 0],
  [[0, 0], 0, 16, 8, 0],
  // deno-fmt-ignore
  ...smallSizes ? [] : [
    [[0, 300, 301, 302, 1000, 1001, 1001, 1064, 1192, 1500], 1501, 776, 704, 0],
    [[7, 231, 500], 600, 1032, 264, 0],
    [[0, 1024, 2048, 2052], 2052, 1024, 512, 0],
    [[0, 1000, 4000], 4003, 136, 1088, 0],
  ] as const,
];

/** The matrices of a stack, one below the other. */
function each(stack: Tensor, groups: number): Tensor[] {
  const rows = stack.shape[0] / groups;
  return Array.from({ length: groups }, (_, g) => stack.rows(g * rows, (g + 1) * rows));
}

/** The rows of all groups: those outside are unspecified. */
function inside(pair: Pair, starts: readonly number[]): Pair {
  const [first, end] = [starts[0], starts.at(-1)!];
  return { cpu: pair.cpu.rows(first, end), gpu: pair.gpu.rows(first, end) };
}

/** Cases of one kind, dtype and choice of kernels, with scales and their gradients or without. */
function products(kind: Activation, dtype: Dtype, force?: "fused", scaled = false): void {
  for (const [starts, R, D, F, shift] of SIZES) {
    Deno.test({
      name: `grouped products with ${kind} of ${starts.length - 1} groups, ${R} rows, ` +
        `${D} to ${F}, ${dtype}, ${force ?? "best"}${scaled ? ", scales" : ""}${
          shift ? ", not aligned" : ""
        }`,
      ignore: !device,
      async fn() {
        using test = new Case(device!, dtype, shift);
        const { context } = device!;
        const parts = { ...groupedKernels(context), ...elementwiseKernels(context) };
        const kernels = groupedActivationKernels(context, parts, force);
        const G = starts.length - 1, offsets = Int32Array.from(starts);
        const H = kind === "swiglu" ? 2 * F : F;
        const offsetsPair = test.integers(offsets);
        const x = test.random(R, D), dY = test.random(R, D);
        const w1 = test.random(G * H, D), w2 = test.random(G * D, F);
        const up = test.random(R, H), active = test.result(R, F), dUp = test.result(R, H);
        // The gradient takes a matrix of its own: signs of relu must not hang on a rounding.
        const before = test.random(R, H);
        // Some scales are 0 or negative.
        const scales = test.pair(
          [R],
          Float32Array.from({ length: R }, (_, r) => (r * 5 % 9 - 3) / 4),
          "f32",
        );
        const dScales = test.resultF32(R);
        for (const [on, k] of [["cpu", cpu], ["gpu", kernels]] as const) {
          const groups = { offsets: offsetsPair[on], host: on === "cpu" ? offsets : null };
          const options = scaled ? { scales: scales[on], dScales: dScales[on] } : {};
          k.groupedGemmActivation(
            x[on],
            each(w1[on], G),
            groups,
            kind,
            up[on],
            active[on],
            options.scales,
          );
          k.groupedGemmActivationBackward(
            dY[on],
            each(w2[on], G),
            groups,
            kind,
            before[on],
            dUp[on],
            options,
          );
        }
        const bound = dtype === "f32" ? 2e-5 : 0.012;
        await test.same("up", up, bound);
        await test.same("active", inside(active, starts), bound);
        await test.same("dUp", inside(dUp, starts), bound);
        if (scaled) await test.same("dScales", inside(dScales, starts), bound);
      },
    });
  }
}

for (const kind of ["relu", "gelu", "swiglu"] as readonly Activation[]) {
  for (const scaled of [false, true]) {
    products(kind, "f32", undefined, scaled);
    products(kind, "bf16", undefined, scaled);
    // The emulator has no fused kernels.
    if (!emulated) products(kind, "bf16", "fused", scaled);
  }
}

Deno.test({
  name: "the fused kernels write nothing outside the groups, nor read scales there",
  ignore: !device || emulated,
  async fn() {
    using test = new Case(device!, "bf16");
    const { context } = device!;
    const parts = { ...groupedKernels(context), ...elementwiseKernels(context) };
    const kernels = groupedActivationKernels(context, parts, "fused");
    const starts = Int32Array.of(70, 201, 260), [R, D, F] = [333, 1024, 320];
    const inGroups = (row: number) => row >= starts[0] && row < starts[2];
    const groups = { offsets: test.integers(starts).gpu, host: null };
    const x = test.random(R, D).gpu, before = test.random(R, F).gpu;
    const w1 = each(test.random(2 * 2 * F, D).gpu, 2), w2 = each(test.random(2 * D, F).gpu, 2);
    const scales = test.pair(
      [R],
      Float32Array.from({ length: R }, (_, r) => inGroups(r) ? 0.5 : NaN),
      "f32",
    ).gpu;
    for (const given of [undefined, scales]) {
      const up = test.result(R, 2 * F).gpu, active = test.result(R, F).gpu;
      const dUp = test.result(R, F).gpu, dScales = test.resultF32(R).gpu;
      kernels.groupedGemmActivation(x, w1, groups, "swiglu", up, active, given);
      // SwiGLU's gradient is not fused.
      kernels.groupedGemmActivationBackward(x, w2, groups, "gelu", before, dUp, {
        scales: given,
        dScales: given && dScales,
      });
      for (const [name, result] of Object.entries({ up, active, dUp })) {
        const values = await result.toArray() as Uint16Array, width = result.shape[1];
        for (let i = 0; i < values.length; i++) {
          const row = Math.floor(i / width), isNaN = (values[i] & 0x7fff) > 0x7f80;
          assert.equal(isNaN, !inGroups(row), `${name}, row ${row}`);
        }
      }
      if (given) {
        const values = await dScales.toArray();
        for (let r = 0; r < R; r++) assert.ok(inGroups(r) ? values[r] !== 0 : values[r] === 0);
      }
    }
  },
});

Deno.test({
  name: "gradients of scales are the same bits in each run",
  ignore: !device,
  async fn() {
    using test = new Case(device!, "bf16");
    const { context } = device!;
    const parts = { ...groupedKernels(context), ...elementwiseKernels(context) };
    const kernels = groupedActivationKernels(context, parts, emulated ? undefined : "fused");
    const [R, D, F] = smallSizes ? [40, 64, 264] : [1500, 776, 2056];
    const groups = {
      offsets: test.integers(Int32Array.of(0, R >> 2, R)).gpu,
      host: null,
    };
    const dY = test.random(R, D).gpu, up = test.random(R, F).gpu, dUp = test.result(R, F).gpu;
    const weights = each(test.random(2 * D, F).gpu, 2);
    const runs = await Promise.all(Array.from({ length: 3 }, () => {
      const dScales = test.resultF32(R).gpu;
      kernels.groupedGemmActivationBackward(dY, weights, groups, "gelu", up, dUp, {
        dScales,
      });
      return dScales.toArray();
    }));
    assert.deepEqual(runs[1], runs[0]);
    assert.deepEqual(runs[2], runs[0]);
    assert.ok((runs[0] as Float32Array).every((value) => Number.isFinite(value)));
  },
});
