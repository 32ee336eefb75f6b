// Schedulers change when gradients are reduced and nothing else: on shm, which adds in the order of ranks, not a bit of what is learned.

import assert from "node:assert/strict";
import { SCHEDULER_NAMES, type SchedulerName } from "../lina/training/schedulers.ts";
import { runRanks } from "./_ranks.ts";
import type { TrainArgs, TrainResult } from "./_train_ranks.ts";

const PROGRAM = new URL("./_train_ranks.ts", import.meta.url);

async function train(schedule: SchedulerName, args: TrainArgs): Promise<TrainResult[]> {
  const ranks = await runRanks<TrainResult>(PROGRAM, 2, { args: { ...args, schedule } });
  return ranks.map(({ result }) => result!);
}

Deno.test("training: every scheduler learns the same bits", async () => {
  const model = { sharedExperts: 1, denseLayers: 1, layers: 3 };
  const common = { steps: 10, parameters: true, model };
  const [fifo, ...others] = await Promise.all(SCHEDULER_NAMES.map((name) => train(name, common)));
  assert.ok(fifo[0].loss[9] < fifo[0].loss[0]);
  for (const results of others) {
    results.forEach((result, rank) => {
      assert.deepEqual(result.loss, fifo[rank].loss);
      assert.deepEqual(result.gradNorm, fifo[rank].gradNorm);
      assert.deepEqual(result.sums, fifo[rank].sums);
      assert.deepEqual(result.valLoss, fifo[rank].valLoss);
    });
  }
});

Deno.test("training: micro-ops with a sharded optimizer and passes learn the same bits, too", async () => {
  const common = { steps: 4, accumulate: 2, parameters: true, shardOptimizer: true };
  const [fifo, lina] = await Promise.all([train("fifo", common), train("lina", common)]);
  lina.forEach((result, rank) => {
    assert.deepEqual(result.loss, fifo[rank].loss);
    assert.deepEqual(result.sums, fifo[rank].sums);
  });
});
