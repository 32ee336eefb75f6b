// Training on several ranks, each with the emulator of CUDA and of NCCL: losses are those of one rank on the CPU, a sharded optimizer
// changes nothing, and its checkpoints go on.

import assert from "node:assert/strict";
import { runRanks } from "./_ranks.ts";
import type { TrainArgs, TrainResult } from "./_train_ranks.ts";
import { buildEmulator } from "./emulator/build.ts";
import { buildNccl } from "./emulator/nccl.ts";

const PROGRAM = new URL("./_train_ranks.ts", import.meta.url);
const library = await buildEmulator() && await buildNccl(false);
if (!library) {
  const message = "Cannot emulate NCCL as there must be clang on Linux";
  if (Deno.env.get("LINA_CI")) throw new Error(message);
  console.warn(`skipped: ${message}`);
}
const ignore = !library;
const ENV = {
  LINA_TEST_BACKEND: "nccl",
  LINA_EMULATOR: "1",
  LINA_NCCL_LIB: library || "",
  LINA_EMULATOR_MEMORY_MIB: "256",
};

async function train(
  where: "cpu" | "cuda",
  ranks: number,
  args: TrainArgs,
): Promise<TrainResult[]> {
  const env = where === "cuda" ? ENV : {};
  const results = await runRanks<TrainResult>(PROGRAM, ranks, { args, env, timeout_ms: 120_000 });
  return results.map(({ result }) => result!);
}

function assertNear(actual: TrainResult, expected: TrainResult, tolerance: number): void {
  for (const key of ["loss", "gradNorm", "auxLoss"] as const) {
    for (const [i, x] of actual[key].entries()) {
      const y = expected[key][i];
      assert(Math.abs(x - y) <= tolerance * Math.abs(y), `${key}[${i}]: ${x}, not ${y}`);
    }
  }
}

const COMMON: TrainArgs = {
  steps: 2,
  batch: 4,
  sequence: 8,
  bucketBytes: 7000,
  // Without clipping, so that the norm's last bits cannot matter.
  clip: 0,
  model: { experts: 4, width: 16, headDim: 8, heads: 2, hidden: 16, sharedExperts: 1 },
};

Deno.test({
  name: "cuda ranks: loss and gradients are those of one rank on the CPU, sharded or not",
  ignore,
  async fn() {
    const [alone] = await train("cpu", 1, COMMON);
    for (const [ranks, shardOptimizer] of [[2, false], [2, true], [4, true]] as const) {
      const args = { ...COMMON, shardOptimizer, validations: shardOptimizer ? 0 : 2 };
      for (const result of await train("cuda", ranks, args)) {
        assertNear(result, alone, 5e-5);
        // By the device's clock: what the host sees of them overlaps, and adds up to several steps. Validation's are not counted.
        assert(result.a2aShare.every((share) => share > 0 && share < 1), `${result.a2aShare}`);
      }
    }
  },
});

Deno.test({
  name: "cuda ranks: a sharded bf16 run goes on from its checkpoint, on other ranks too",
  ignore,
  async fn() {
    const directory = await Deno.makeTempDir({ prefix: "lina-cuda-resume-" });
    try {
      const common: TrainArgs = { ...COMMON, steps: 3, model: { ...COMMON.model, dtype: "bf16" } };
      const sharded = { ...common, shardOptimizer: true, parameters: true };
      const [through] = await train("cuda", 2, { ...sharded, saveAt: 2, directory });
      const resume = { ...sharded, resume: true, directory };
      const [again] = await train("cuda", 2, resume);
      assert.deepEqual(again.loss, through.loss.slice(2));
      assert.deepEqual(again.sums, through.sums);
      const [alone] = await train("cuda", 1, { ...resume, shardOptimizer: false });
      assert(Math.abs(alone.loss[0] - again.loss[0]) < 0.01 * again.loss[0]);
    } finally {
      await Deno.remove(directory, { recursive: true });
    }
  },
});
