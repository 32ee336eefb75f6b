// Grouped products with an activation on the GPU (or its emulator, which has only the two kernels in turn) against the CPU: every kind, both
// directions, uneven and empty groups, groups that end inside a tile, rows outside the groups, sizes and addresses for which the fused kernels
// are not.

import assert from "node:assert/strict";
import { smallSizes, testDevice } from "../../tests/emulator/device.ts";
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

for (const kind of ["relu", "gelu", "swiglu"] as readonly Activation[]) {
  for (const dtype of ["f32", "bf16"] as readonly Dtype[]) {
    for (const force of [undefined, "fused"] as const) {
      if (force === "fused" && dtype === "f32") continue;
      for (const [starts, R, D, F, shift] of SIZES) {
        Deno.test({
          name: `grouped products with ${kind} of ${starts.length - 1} groups, ${R} rows, ` +
            `${D} to ${F}, ${dtype}, ${force ?? "best"}${shift ? ", not aligned" : ""}`,
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
            const sides = [["cpu", cpu], ["gpu", kernels]] as const;
            for (const [on, k] of sides) {
              const groups = {
                offsets: offsetsPair[on],
                host: on === "cpu" ? offsets : null,
              };
              k.groupedGemmActivation(x[on], each(w1[on], G), groups, kind, up[on], active[on]);
              k.groupedGemmActivationBackward(
                dY[on],
                each(w2[on], G),
                groups,
                kind,
                before[on],
                dUp[on],
              );
            }
            const bound = dtype === "f32" ? 2e-5 : 0.012;
            await test.same("up", up, bound);
            await test.same("active", inside(active, starts), bound);
            await test.same("dUp", inside(dUp, starts), bound);
          },
        });
      }
    }
  }
}

Deno.test({
  name: "the fused kernels write nothing outside the groups",
  ignore: !device || smallSizes,
  async fn() {
    using test = new Case(device!, "bf16");
    const { context } = device!;
    const parts = { ...groupedKernels(context), ...elementwiseKernels(context) };
    const kernels = groupedActivationKernels(context, parts, "fused");
    const starts = Int32Array.of(70, 201, 260), [R, D, F] = [333, 1024, 320];
    const groups = { offsets: test.integers(starts).gpu, host: null };
    const x = test.random(R, D).gpu, before = test.random(R, 2 * F).gpu;
    const w1 = each(test.random(2 * 2 * F, D).gpu, 2), w2 = each(test.random(2 * D, F).gpu, 2);
    const results = [[R, 2 * F], [R, F], [R, 2 * F]].map((shape) => test.result(...shape).gpu);
    kernels.groupedGemmActivation(x, w1, groups, "swiglu", results[0], results[1]);
    kernels.groupedGemmActivationBackward(x, w2, groups, "swiglu", before, results[2]);
    for (const result of results) {
      const values = await result.toArray() as Uint16Array, width = result.shape[1];
      for (let i = 0; i < values.length; i++) {
        const row = Math.floor(i / width), isNaN = (values[i] & 0x7fff) > 0x7f80;
        assert.equal(isNaN, row < 70 || row >= 260, `row ${row}`);
      }
    }
  },
});
