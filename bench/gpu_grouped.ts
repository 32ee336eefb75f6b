// The experts' grouped matrix products alone on one GPU, bf16, every way that the library has beside torch._grouped_mm: the shapes of
// layer.ts and those of the 12-layer model, balanced and Zipf 1.0; forward, gradient of the input, gradient of the weights (bf16, overwritten).
// Random data, the L2 cache cold before each repeat, medians.
//
//   deno run -A bench/gpu_grouped.ts [--shapes E16,E64,E8,12L] [--repeats N] [--peer no] [--json FILE]
//
// FLOPs = 2 · rows · in · out. Zipf: expert e has a share of 1 / (e + 1), the experts in a fixed mixed order, counts in no multiple of a tile.

import { parseArgs } from "node:util";
import type { RowGroups } from "../tensor/device.ts";
import { cudaDevice } from "../tensor/cuda/device.ts";
import { groupedKernels, type GroupedWay } from "../tensor/cuda/grouped.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";
import { GpuTimer, needGpu, origin, peer } from "./_gpu.ts";

const { values } = parseArgs({
  args: Deno.args,
  options: {
    shapes: { type: "string", default: "E16,E64,E8,12L" },
    repeats: { type: "string", default: "7" },
    peer: { type: "string", default: "yes" },
    json: { type: "string" },
  },
});

/** Experts, rows, and the two layers' widths in and out. */
const SHAPES: Readonly<
  Record<string, readonly [number, number, readonly (readonly [number, number])[]]>
> = {
  E16: [16, 32_768, [[1024, 4096], [4096, 1024]]],
  E64: [64, 65_536, [[2048, 1024], [1024, 2048]]],
  E8: [8, 32_768, [[4096, 14_336], [14_336, 4096]]],
  "12L": [16, 32_768, [[1024, 5632], [2816, 1024]]],
};
const WAYS: readonly GroupedWay[] = ["hopper", "loop", "portable"];
const PRODUCTS = ["forward", "input grad", "weight grad"] as const;

function zipf(experts: number, rows: number): number[] {
  const shares = Array.from({ length: experts }, (_, e) => 1 / (1 + (e * 7 + 3) % experts));
  const sum = shares.reduce((a, b) => a + b);
  const counts = shares.map((share) => Math.floor(rows * share / sum));
  counts[experts >> 1] += rows - counts.reduce((a, b) => a + b);
  return counts;
}

interface Case {
  readonly name: string;
  readonly counts: readonly number[];
  readonly from: number;
  readonly to: number;
}

const cases: Case[] = values.shapes.split(",").flatMap((shape) => {
  const [experts, rows, layers] = SHAPES[shape];
  return ["balanced", "zipf"].flatMap((routing) =>
    layers.map(([from, to]) => ({
      name: `${shape} ${routing} ${from} -> ${to}`,
      counts: routing === "zipf"
        ? zipf(experts, rows)
        : Array.from({ length: experts }, () => rows / experts),
      from,
      to,
    }))
  );
});

needGpu();
const device = await cudaDevice(), repeats = Number(values.repeats);
using timer = new GpuTimer(device);
const ways = WAYS.map((way) => groupedKernels(device.context, way));

/** Normal bf16 numbers. */
function random(shape: readonly number[]): Tensor {
  const x = empty(device, shape, "bf16");
  device.kernels.normal(x, [shape[0], shape[1]], 1);
  return x;
}

const peerRows = values.peer === "no"
  ? []
  : await peer("grouped.py", [JSON.stringify(cases), "--repeats", values.repeats]);
const rows: Record<string, unknown>[] = [];
console.log(
  `${"TFLOP/s".padEnd(42)}${[...WAYS, "torch"].map((way) => way.padStart(9)).join("")}  host µs`,
);
for (const { name, counts, from, to } of cases) {
  const R = counts.reduce((a, b) => a + b), starts = new Int32Array(counts.length + 1);
  counts.forEach((count, g) => starts[g + 1] = starts[g] + count);
  using x = random([R, from]);
  using dy = random([R, to]);
  using y = empty(device, [R, to], "bf16");
  using dx = empty(device, [R, from], "bf16");
  using w = random([counts.length * to, from]);
  using dw = empty(device, w.shape, "bf16");
  using offsets = fromArray(device, starts);
  const groups: RowGroups = { offsets, host: starts };
  const each = (stack: Tensor) => counts.map((_, g) => stack.rows(g * to, (g + 1) * to));
  const weights = each(w), grads = each(dw);
  for (const product of PRODUCTS) {
    const line: Record<string, number> = {};
    let host_us = 0;
    for (const [i, kernels] of ways.entries()) {
      const { gpu_ms, host_ms } = await timer.time(() => {
        if (product === "forward") kernels.groupedGemm(x, weights, groups, y);
        else if (product === "input grad") {
          kernels.groupedGemm(dy, weights, groups, dx, { transposeWeight: true });
        } else kernels.groupedGemmWeightGrad(dy, x, groups, grads, { beta: 0 });
      }, repeats);
      line[WAYS[i]] = 2e-9 * R * from * to / gpu_ms;
      if (i === 0) host_us = host_ms * 1000;
    }
    const other = peerRows.find((row) => row.case === name && row.product === product);
    if (other !== undefined) line.torch = other.tflops as number;
    const cells = [...WAYS, "torch"].map((way) => (line[way]?.toFixed(0) ?? "-").padStart(9));
    console.log(`${`${name}, ${product}`.padEnd(42)}${cells.join("")}  ${host_us.toFixed(1)}`);
    rows.push({ case: name, product, ...line, host_us });
  }
}
if (values.json !== undefined) {
  const result = { ...origin(device, "deno run -A bench/gpu_grouped.ts"), rows };
  await Deno.writeTextFile(values.json, JSON.stringify(result, null, 1) + "\n");
}
