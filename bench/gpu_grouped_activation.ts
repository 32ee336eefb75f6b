// The experts' first product with its activation, and the gradient back to before it, on one GPU, bf16: as two kernels in turn and as one
// (tensor/cuda/grouped_fused.cu). Random data, the L2 cache cold before each repeat, medians.
//
//   deno run -A bench/gpu_grouped_activation.ts [--repeats N] [--json FILE]

import { parseArgs } from "node:util";
import { cudaDevice } from "../tensor/cuda/device.ts";
import { groupedActivationKernels } from "../tensor/cuda/grouped_fused.ts";
import type { Activation } from "../tensor/device.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";
import { GpuTimer, needGpu, origin } from "./_gpu.ts";

const { values } = parseArgs({
  args: Deno.args,
  options: { repeats: { type: "string", default: "9" }, json: { type: "string" } },
});

/** Name, experts, rows, D, F, activation. */
const CASES: readonly (readonly [string, number, number, number, number, Activation])[] = [
  ["E16", 16, 32_768, 1024, 4096, "gelu"],
  ["E16", 16, 32_768, 1024, 4096, "relu"],
  ["E64", 64, 65_536, 2048, 1024, "gelu"],
  ["12 layers", 16, 32_768, 1024, 2816, "swiglu"],
  ["E8", 8, 32_768, 4096, 14_336, "gelu"],
];
const WAYS = ["separate", "fused"] as const;

needGpu();
const device = await cudaDevice(), repeats = Number(values.repeats);
using timer = new GpuTimer(device);
const ways = WAYS.map((way) => groupedActivationKernels(device.context, device.kernels, way));

/** Normal bf16 numbers. */
function random(rows: number, columns: number): Tensor {
  const x = empty(device, [rows, columns], "bf16");
  device.kernels.normal(x, [rows, columns], 1);
  return x;
}

const rows: Record<string, unknown>[] = [];
for (const [name, G, R, D, F, kind] of CASES) {
  const H = kind === "swiglu" ? 2 * F : F;
  const starts = Int32Array.from({ length: G + 1 }, (_, g) => g * R / G);
  using offsets = fromArray(device, starts);
  const groups = { offsets, host: null };
  using x = random(R, D);
  using up = random(R, H);
  using active = empty(device, [R, F], "bf16");
  using dUp = empty(device, [R, H], "bf16");
  using stack1 = random(G * H, D);
  using stack2 = random(G * D, F);
  const into = Array.from({ length: G }, (_, g) => stack1.rows(g * H, (g + 1) * H));
  const outOf = Array.from({ length: G }, (_, g) => stack2.rows(g * D, (g + 1) * D));
  for (const direction of ["backward", "forward"] as const) {
    const times: Record<string, number> = {};
    for (const [i, way] of WAYS.entries()) {
      const { gpu_ms } = await timer.time(() => {
        if (direction === "forward") {
          ways[i].groupedGemmActivation(x, into, groups, kind, up, active);
        } else ways[i].groupedGemmActivationBackward(x, outOf, groups, kind, up, dUp);
      }, repeats);
      times[way] = gpu_ms;
    }
    const cells = WAYS.map((way) => `${way} ${times[way].toFixed(3)} ms`).join("  ");
    console.log(`${`${name} ${kind} ${direction}`.padEnd(30)}${cells}`);
    rows.push({ case: name, kind, direction, ...times });
  }
}
if (values.json !== undefined) {
  const result = { ...origin(device, "deno run -A bench/gpu_grouped_activation.ts"), rows };
  await Deno.writeTextFile(values.json, JSON.stringify(result, null, 1) + "\n");
}
