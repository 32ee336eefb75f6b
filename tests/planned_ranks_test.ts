// Training by a plan from measured steps and links, on real ranks: every rank plans the same, losses are those of fifo, to the bit where only the order
// of communication changes, and the engine takes the plan whatever the times were.

import assert from "node:assert/strict";
import { gpuRanksEnv, Mps } from "./_gpu_env.ts";
import type { PlannedArgs, PlannedOutcome } from "./_planned_ranks.ts";
import { type RunOptions, runRanks } from "./_ranks.ts";

const CASES: readonly PlannedArgs[] = [{ chunks: null }, { chunks: 1 }, { chunks: 3 }, {
  chunks: [1, 2, 4],
}];

async function check(
  size: number,
  cases: readonly PlannedArgs[],
  options: { readonly exact: boolean; readonly env: RunOptions["env"] },
): Promise<void> {
  const ranks = await runRanks<PlannedOutcome[]>(
    new URL("./_planned_ranks.ts", import.meta.url),
    size,
    { args: cases, env: { LINA_DEBUG: "1", ...options.env } },
  );
  const [first] = ranks.map(({ result }) => result!);
  for (const { result } of ranks) assert.deepEqual(result, first, "alike on all ranks");
  const fifo = first[0].losses;
  first.forEach(({ losses, predicted_us }, i) => {
    const { chunks } = cases[i];
    if (chunks !== null) assert.ok(predicted_us > 0 && predicted_us < Infinity, `${predicted_us}`);
    if (options.exact && (chunks === null || chunks === 1)) return assert.deepEqual(losses, fifo);
    losses.forEach((loss, step) => {
      assert.ok(Math.abs(loss - fifo[step]) < 2e-6 * fifo[step], `step ${step}: ${loss}, ${fifo}`);
    });
  });
}

for (const size of [2, 4]) {
  Deno.test(`planned on ${size} ranks trains as fifo does`, async () => {
    await check(size, CASES, { exact: true, env: {} });
  });
}

Deno.test("planned with replicas, whose gradients are in the plan, trains as fifo does", async () => {
  const cases = CASES.map((one) => ({ ...one, replicas: 2 }));
  await check(4, cases, { exact: true, env: {} });
});

const gpuEnv = await gpuRanksEnv();

Deno.test({
  name: "planned on GPUs that talk by NCCL trains as fifo does",
  ignore: gpuEnv === null,
  async fn() {
    await using mps = await Mps.start();
    const env = { ...gpuEnv, ...mps.env };
    await check(2, [{ chunks: null }, { chunks: 2 }], { exact: false, env });
  },
});
