// Schedules where collectives are others': MPI and NCCL (a GPU's, or the emulator's) add in an order of their own, which the size of a
// message may change. So losses are those of `fifo` to rounding in f32: 2e-5 after a few steps, copies that move included.

import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { SCHEDULER_NAMES } from "../lina/training/schedulers.ts";
import { gpuRanksEnv } from "./_gpu_env.ts";
import { runRanks } from "./_ranks.ts";
import type { TrainArgs, TrainResult } from "./_train_ranks.ts";
import { Folder, launch } from "./launch_support.ts";

const PROGRAM = new URL("./_schedule_ranks.ts", import.meta.url);
const TOLERANCE = 2e-5;
const COMMON: TrainArgs = {
  steps: 3,
  batch: 4,
  sequence: 8,
  clip: 0,
  model: { experts: 4, width: 16, headDim: 8, heads: 2, hidden: 16, sharedExperts: 1 },
};
const PACKS = [{ after: 1, replicas: 2 }, { after: 2, replicas: 1 }] as const;
const CASES: readonly TrainArgs[] = [
  ...SCHEDULER_NAMES.map((schedule) => ({ ...COMMON, schedule })),
  { ...COMMON, schedule: "lina", shardOptimizer: true },
  { ...COMMON, schedule: "lina+pipeline", chunks: 3, packs: PACKS },
  { ...COMMON, schedule: "planned+pipeline", packs: PACKS, recompute: "block" },
];
/** Emulated GPUs are slow: policies that differ in what the engine does. */
const FEW: readonly TrainArgs[] = [
  { ...COMMON, schedule: "fifo" },
  { ...COMMON, schedule: "outside" },
  ...CASES.slice(-3),
];

function assertNear([fifo, ...others]: readonly TrainResult[], cases: readonly TrainArgs[]): void {
  assert.equal(1 + others.length, cases.length);
  others.forEach(({ loss }, i) =>
    loss.forEach((x, step) => {
      const gap = Math.abs(x / fifo.loss[step] - 1);
      assert.ok(gap < TOLERANCE, `${JSON.stringify(cases[i + 1])}, step ${step + 1}: ${gap}`);
    })
  );
}

/** Whether mpirun is there; with LINA_CI set it has to be. */
function hasMpi(): boolean {
  try {
    return new Deno.Command("mpirun", { args: ["--version"] }).outputSync().success;
  } catch {
    assert.ok(!Deno.env.has("LINA_CI"), "mpirun must be installed");
    console.log("skipped: mpirun is not installed");
    return false;
  }
}

Deno.test({
  name: "schedules: every policy on MPI",
  ignore: !hasMpi(),
  async fn() {
    using folder = new Folder();
    const file = `${folder.path}/results.json`;
    const { code, stderr } = await launch(
      ["-n", "2", "--backend", "mpi", fileURLToPath(PROGRAM), JSON.stringify(CASES), file],
    );
    assert.equal(code, 0, stderr);
    assertNear(JSON.parse(await Deno.readTextFile(file)), CASES);
  },
});

const gpu = await gpuRanksEnv();
for (const ranks of [2, 4]) {
  Deno.test({
    name: `schedules: every policy on NCCL (${ranks} ranks)`,
    ignore: gpu === null,
    async fn() {
      // All of a GPU's streams run on their own, as they do on a real one: the order is what events say.
      const env = { ...gpu, LINA_EMULATOR_STREAMS: "asynchronous" };
      const args = ranks === 2 ? FEW : [FEW[0], ...FEW.slice(-2)];
      const results = await runRanks<TrainResult[]>(PROGRAM, ranks, {
        args,
        env,
        timeout_ms: 120_000,
      });
      for (const { result } of results) assertNear(result!, args);
    },
  });
}
