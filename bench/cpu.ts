// The CPU benchmark: matrix products and kernels of one core, then a MoE layer and a training step of the demo's model on one rank and
// on four, with a profile of the step by operation.
//   deno task bench:cpu [--json FILE]

import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { formatTable } from "../examples/report/table.ts";
import { benchGemm, benchKernels, type KernelRow, printKernels } from "./cpu_gemm.ts";
import type { CpuRow } from "./cpu_step.ts";

/** Ranks that the layer and the step run on. */
const RANKS = [1, 4];

/** Part of the step that must be GEMM or communication. */
const LEAST = 0.6;

function layerAndStep(ranks: number): CpuRow[] {
  const file = Deno.makeTempFileSync({ suffix: ".json" });
  try {
    const path = (name: string) => fileURLToPath(new URL(name, import.meta.url));
    const args = ["-A", path("../launch.ts"), "-n", `${ranks}`, path("cpu_step.ts"), file];
    const { success } = new Deno.Command(Deno.execPath(), {
      args: ["run", ...args],
      stdin: "null",
      stdout: "inherit",
      stderr: "inherit",
    }).outputSync();
    if (!success) throw new Error(`Cannot measure on ${ranks} ranks: a rank has failed`);
    return JSON.parse(Deno.readTextFileSync(file));
  } finally {
    Deno.removeSync(file);
  }
}

function print(rows: readonly CpuRow[]): void {
  console.log(formatTable(
    rows.map(({ name, ranks, gflops, tokens_per_s, gemm_and_comm }) => ({
      name,
      ranks,
      "GFLOP/s": gflops,
      "tokens/s": Math.round(tokens_per_s),
      "GEMM and communication": gemm_and_comm,
    })),
  ));
  for (const { ranks, profile } of rows) {
    if (!profile) continue;
    console.log(
      `\nTraining step on ${ranks} ${ranks === 1 ? "rank" : "ranks"}, parts of its time:`,
    );
    const parts = Object.entries(profile).filter(([, part]) => part >= 0.005);
    console.log(formatTable(parts.map(([operation, part]) => ({ operation, part }))));
  }
}

const { values } = parseArgs({ options: { json: { type: "string" } }, strict: true });
const kernels: KernelRow[] = [...benchGemm(), ...benchKernels()];
printKernels(kernels);
const rows = RANKS.flatMap(layerAndStep);
console.log("");
print(rows);
for (const { ranks, gemm_and_comm } of rows) {
  if (gemm_and_comm !== undefined && gemm_and_comm < LEAST) {
    console.log(`\nMark missed on ${ranks} ranks: ${gemm_and_comm.toFixed(2)} < ${LEAST}`);
  }
}
if (values.json) {
  Deno.writeTextFileSync(values.json, JSON.stringify([...kernels, ...rows], null, 1));
}
