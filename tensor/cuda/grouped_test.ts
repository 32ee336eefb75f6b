// Grouped products on the GPU (or its emulator) against the CPU: every way that serves a call, all three products, uneven and empty groups,
// rows outside the groups, odd sizes, addresses that are not aligned, gradients in bf16 and f32.

import { smallSizes, testDevice } from "../../tests/emulator/device.ts";
import { cpuDevice } from "../cpu/device.ts";
import type { Tensor } from "../tensor.ts";
import { Case, type Dtype, type Pair } from "./_compare.ts";
import { groupedKernels, groupedModule, type GroupedWay } from "./grouped.ts";
import { hopperModule } from "./grouped_hopper.ts";

const device = await testDevice([groupedModule, hopperModule]), cpu = cpuDevice().kernels;

/** First rows of the groups and the end, the batch's rows, width in and out, elements by which addresses are off. */
const SIZES: readonly (readonly [readonly number[], number, number, number, number])[] = [
  [[0, 1], 1, 1, 1, 0],
  [[0, 3, 3, 20], 20, 17, 9, 0],
  [[0, 0, 129, 130, 130], 130, 8, 136, 0],
  [[2, 5, 69, 133], 140, 72, 40, 0],
  [[0, 65], 65, 40, 24, 1],
  [[0, 0, 0], 5, 16, 8, 0],
  [[0, 0], 0, 16, 8, 0],
  // deno-fmt-ignore
  ...smallSizes ? [] : [
    [[0, 128, 384], 384, 256, 512, 0],
    [[0, 300, 301, 302, 1000, 1001, 1001, 1064, 1192, 1500], 1501, 264, 520, 0],
    [[7, 231, 500], 600, 301, 215, 0],
    [[0, 2048, 4096, 4100], 4100, 128, 256, 0],
    [[0, 0, 5000], 5003, 72, 1032, 0],
  ] as const,
];
const WAYS: readonly (GroupedWay | undefined)[] = [undefined, "portable", "loop"];

/** The matrices of a stack, one below the other. */
function each(stack: Tensor, groups: number): Tensor[] {
  const rows = stack.shape[0] / groups;
  return Array.from({ length: groups }, (_, g) => stack.rows(g * rows, (g + 1) * rows));
}

for (const way of WAYS) {
  for (const dtype of ["f32", "bf16"] as readonly Dtype[]) {
    for (const [starts, R, from, to, shift] of SIZES) {
      Deno.test({
        name: `grouped products of ${starts.length - 1} groups, ${R} rows, ${from} to ${to}, ` +
          `${dtype}, ${way ?? "best"}${shift ? ", not aligned" : ""}`,
        ignore: !device,
        async fn() {
          using test = new Case(device!, dtype, shift);
          const kernels = groupedKernels(device!.context, way);
          const G = starts.length - 1, offsets = Int32Array.from(starts);
          const offsetsPair = test.integers(offsets);
          const host = way === "loop" ? offsets : null;
          const x = test.random(R, from), dy = test.random(R, to), w = test.random(G * to, from);
          const rows = (pair: Pair, on: "cpu" | "gpu") => ({
            offsets: pair[on],
            host: on === "cpu" ? offsets : host,
          });
          for (const beta of [0, 1]) {
            const y = test.random(R, to), dx = test.random(R, from);
            for (const [on, k] of [["cpu", cpu], ["gpu", kernels]] as const) {
              const groups = rows(offsetsPair, on), weights = each(w[on], G);
              k.groupedGemm(x[on], weights, groups, y[on], { beta });
              k.groupedGemm(dy[on], weights, groups, dx[on], { transposeWeight: true, beta });
            }
            const bound = dtype === "f32" ? 1e-5 : 0.008;
            await test.same(`y, beta ${beta}`, y, bound);
            await test.same(`dx, beta ${beta}`, dx, bound);
            for (const wide of dtype === "f32" ? ["f32"] as const : ["bf16", "f32"] as const) {
              const noise = test.random(G * to, from),
                old = Float32Array.from(await noise.cpu.toArray() as Float32Array);
              const dw = test.pair([G * to, from], old, wide);
              for (const [on, k] of [["cpu", cpu], ["gpu", kernels]] as const) {
                const grads = each(dw[on], G);
                k.groupedGemmWeightGrad(dy[on], x[on], rows(offsetsPair, on), grads, { beta });
              }
              await test.same(`dw in ${wide}, beta ${beta}`, dw, wide === "f32" ? 1e-5 : 0.008);
            }
          }
        },
      });
    }
  }
}

Deno.test({
  name: "an infinity in a group does not reach its neighbours' weights' gradients",
  ignore: !device,
  async fn() {
    using test = new Case(device!, "bf16");
    const kernels = groupedKernels(device!.context);
    const starts = Int32Array.of(0, 5, 70, 75), [R, from, to] = [75, 24, 16];
    const values = Float32Array.from(
      { length: R * from },
      (_, i) => i / from >= 5 && i / from < 70 ? Infinity : 1,
    );
    const x = test.pair([R, from], values), dy = test.random(R, to), dw = test.result(3 * to, from);
    const offsets = test.integers(starts);
    for (const [on, k] of [["cpu", cpu], ["gpu", kernels]] as const) {
      k.groupedGemmWeightGrad(
        dy[on],
        x[on],
        { offsets: offsets[on], host: on === "cpu" ? starts : null },
        each(dw[on], 3),
        { beta: 0 },
      );
    }
    for (const g of [0, 2]) {
      const part = { cpu: each(dw.cpu, 3)[g], gpu: each(dw.gpu, 3)[g] };
      await test.same(`group ${g}`, part, 0.008);
    }
  },
});
