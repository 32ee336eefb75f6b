// A controller packs and plans a training that runs, and changes nothing of what is learned beyond rounding; all ranks decide alike.

import assert from "node:assert/strict";
import { gpuRanksEnv } from "./_gpu_env.ts";
import type { ControllerArgs, ControllerResult } from "./_controller_ranks.ts";
import { runRanks } from "./_ranks.ts";

const PROGRAM = new URL("./_controller_ranks.ts", import.meta.url);
const gpu = await gpuRanksEnv();

async function train(
  args: ControllerArgs,
  env: Readonly<Record<string, string>> = {},
): Promise<ControllerResult[]> {
  const results = await runRanks<ControllerResult>(PROGRAM, 4, { args, env: { ...env } });
  return results.map(({ result }) => result!);
}

/** What all ranks must say alike: not how long planning took. */
const decided = (log: readonly string[]) => log.map((line) => line.replace(/in [\d.]+ ms/, ""));

function assertAlike(results: readonly ControllerResult[], alone: ControllerResult): void {
  for (const { loss, log, packed } of results) {
    assert.deepEqual(decided(log), decided(results[0].log));
    assert.deepEqual(packed, results[0].packed);
    loss.forEach((x, i) => assert.ok(Math.abs(x - alone.loss[i]) < 2e-5 * x, `step ${i}: ${x}`));
  }
}

Deno.test("controller: packs experts of a running training, in steps of two, and learns the same", async () => {
  const common = { policy: "lina", steps: 14 } as const;
  const [alone] = await train({ ...common, alone: true });
  for (const args of [{}, { shardOptimizer: true }]) {
    const results = await train({ ...common, ...args, packing: "auto" });
    assertAlike(results, alone);
    const [{ packed, log }] = results;
    // Four ranks with two of them as the least leave 1 and 2; what is measured here decides.
    assert.ok(packed.every((count) => count === 1 || count === 2), `${packed}`);
    assert.deepEqual(packed.slice(0, 5), [1, 1, 1, 1, 1], "before anything was measured");
    assert.equal(packed.at(-1) !== 1 || packed.includes(2), log.length > 0);
  }
  const fixed = await train({ ...common, packing: 2 });
  assertAlike(fixed, alone);
  assert.ok(fixed[0].packed.every((count) => count === 2));
});

Deno.test("controller: experts that do not fit have their moments in host memory; what fits nowhere stays", async () => {
  const common = { policy: "lina", steps: 8 } as const;
  const [alone] = await train({ ...common, alone: true });
  // An expert's weights and gradient take 6144 bytes, its moments as many; 18,432 more must be had with two in host memory.
  for (const [free_bytes, offloaded] of [[1e6, 0], [21_000, 2]] as const) {
    const results = await train({ ...common, packing: 2, offloadExperts: "auto", free_bytes });
    assertAlike(results, alone);
    assert.deepEqual(results.map((result) => result.offloaded), Array(4).fill(offloaded));
  }
  const fixed = await train({ ...common, offloadExperts: 1 });
  assertAlike(fixed, alone);
  assert.equal(fixed[0].offloaded, 1);
  const full = await train({ ...common, packing: "auto", leastRanks: 1, free_bytes: 100 });
  assertAlike(full, alone);
  assert.ok(full[0].packed.every((count) => count === 1));
});

Deno.test("controller: plans a running training, and learns the same", async () => {
  const [alone] = await train({ policy: "outside", steps: 9, alone: true });
  for (const policy of ["planned", "planned+pipeline"] as const) {
    const results = await train({ policy, steps: 9, packing: 2 });
    assertAlike(results, alone);
    assert.match(
      results[0].log.join("\n"),
      /^planned in [\d.]+ ms: the passes took [\d.]+ ms, [\d.]+ ms predicted/,
    );
  }
});

Deno.test({
  name: "controller: the same on GPUs",
  ignore: gpu === null,
  async fn() {
    const common = { policy: "lina+pipeline", steps: 10 } as const;
    const env = { ...gpu, LINA_EMULATOR_STREAMS: "asynchronous" };
    const [alone] = await train({ ...common, alone: true }, env);
    const results = await train({ ...common, packing: "auto", leastRanks: 1 }, env);
    assertAlike(results, alone);
    assert.equal(results[0].chunks, 2);
  },
});
