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

/** Micro-ops launched between two kinds of boundary, with the first, without the second. */
function between({ boundaries, launched }: TrainResult, from: string, to: string): number {
  let inside = false, count = 0;
  boundaries.forEach(([kind], i) => {
    if (kind === from) inside = true;
    if (kind === to) inside = false;
    if (inside) count += launched[i];
  });
  return count;
}

Deno.test("training: every scheduler launches where it may and learns the same bits", async () => {
  const model = { sharedExperts: 1, denseLayers: 1, layers: 3 };
  const common = { steps: 10, parameters: true, model };
  const names = SCHEDULER_NAMES.filter((name) => !name.endsWith("+pipeline"));
  const [fifo, ...others] = await Promise.all(names.map((name) => train(name, common)));
  assert.ok(fifo[0].loss[9] < fifo[0].loss[0]);
  const totals = [fifo, ...others].map(([result]) => {
    return result.launched.reduce((sum, count) => sum + count, 0);
  });
  // `outside` has the buckets of `fifo`, and `lina` cuts what `priority` leaves whole.
  assert.ok(totals[0] === totals[1] && totals[1] < totals[2] && totals[2] < totals[3]);
  const [outside, priority, lina] = others;
  for (const result of outside) {
    assert.equal(between(result, "combineBackwardStarts", "layerBackwardEnds"), 0);
  }
  for (const result of lina) {
    assert.equal(between(result, "combineBackwardStarts", "allToAllStarts"), 0);
  }
  for (const result of [...priority, ...lina]) {
    assert.equal(between(result, "allToAllStarts", "allToAllEnds"), 0);
    assert.ok(result.launched.slice(0, -1).every((count) => count <= 1));
    assert.ok(result.launched.slice(0, -1).some((count) => count === 1), "all wait for the end");
  }
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
