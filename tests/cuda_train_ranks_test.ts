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

Deno.test({
  name: "cuda ranks: gradients of a bf16 model in f32 or bf16, whole, sharded or of replicas",
  ignore,
  async fn() {
    const args = (gradientDtype: "f32" | "bf16"): TrainArgs => ({
      ...COMMON,
      steps: 3,
      accumulate: 2,
      parameters: true,
      model: { ...COMMON.model, dtype: "bf16", gradientDtype },
    });
    const narrow = args("bf16");
    const [[wide], [alone], whole, sharded, [replicas]] = [
      await train("cuda", 2, args("f32")),
      await train("cuda", 1, narrow),
      await train("cuda", 2, narrow),
      await train("cuda", 2, { ...narrow, shardOptimizer: true }),
      await train("cuda", 2, { ...narrow, replicas: 2 }),
    ];
    sharded.forEach((result, rank) => {
      assert.deepEqual(result.loss, whole[rank].loss);
      assert.deepEqual(result.sums, whole[rank].sums);
    });
    for (const other of [alone, wide, replicas]) assertNear(whole[0], other, 0.01);
    // Half the bytes, but for the gains and gates, which stay f32: two gates of 4 x 16, five gains of 16, once in and once out.
    const small = 4 * (2 * 4 * 16 + 5 * 16);
    const [bytes, all] = [whole[0], wide].map(({ bytes }) => bytes.gradients - small);
    assert.equal(2 * bytes, all);
  },
});
