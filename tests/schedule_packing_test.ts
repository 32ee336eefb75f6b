// Slices of MoE layers and copies of experts, under every policy, also where both change in the middle of a training: losses are those of
// the plain training to rounding, and those of all policies to the bit where slices and seats are alike.

import assert from "node:assert/strict";
import { SCHEDULER_NAMES, type SchedulerName } from "../lina/training/schedulers.ts";
import { runRanks } from "./_ranks.ts";
import type { TrainArgs, TrainResult } from "./_train_ranks.ts";

const PROGRAM = new URL("./_schedule_ranks.ts", import.meta.url);
const PIPELINED = SCHEDULER_NAMES.filter((name) => name.endsWith("+pipeline"));
const WHOLE = SCHEDULER_NAMES.filter((name) => !name.endsWith("+pipeline"));
/** Without clipping: the squares of the gradient are added up rank by rank, so packing changes the last bits of its norm. */
const COMMON: TrainArgs = { steps: 12, batch: 8, sequence: 4, clip: 0, parameters: true };

/** Trainings in turn on the same ranks: `[rank][training]`. */
async function trainAll(ranks: number, all: readonly TrainArgs[]): Promise<TrainResult[][]> {
  const results = await runRanks<TrainResult[]>(PROGRAM, ranks, { args: all, timeout_ms: 120_000 });
  return results.map(({ result }) => result!);
}

function assertNear(actual: readonly number[], expected: readonly number[], what: string): void {
  assert.equal(actual.length, expected.length);
  actual.forEach((x, step) => {
    const gap = Math.abs(x / expected[step] - 1);
    assert.ok(gap < 1e-6, `${what}, step ${step + 1}: ${x}, not ${expected[step]}`);
  });
}

for (const ranks of [2, 4]) {
  Deno.test(`schedules: pipelined policies learn the same in 2 and 3 slices (${ranks} ranks)`, async () => {
    const cases = [2, 3].flatMap((chunks): TrainArgs[] => [
      { ...COMMON, chunks, schedule: "fifo" },
      ...PIPELINED.map((schedule) => ({ ...COMMON, chunks, schedule })),
    ]);
    const each = 1 + PIPELINED.length;
    const results = await trainAll(ranks, [{ ...COMMON, schedule: "fifo" }, ...cases]);
    results.forEach(([plain, ...all]) => {
      all.forEach((sliced, i) => {
        const first = all[i - i % each], what = JSON.stringify(cases[i]);
        assert.deepEqual(sliced.loss, first.loss, what);
        assert.deepEqual(sliced.sums, first.sums, what);
        assertNear(sliced.loss, plain.loss, what);
        // Each layer's all-to-alls run once per slice, four times a step.
        const count = sliced.boundaries.filter(([kind]) => kind === "allToAllStarts").length;
        assert.equal(count, 4 * 2 * cases[i].chunks!, what);
      });
    });
  });
}

Deno.test("schedules: copies of experts 1 -> 2 -> 4 -> 1 in a training, under every policy", async () => {
  const packs = [[3, 2], [6, 4], [9, 1]].map(([after, replicas]) => ({ after, replicas }));
  const cases = SCHEDULER_NAMES.map((schedule): TrainArgs => ({ ...COMMON, packs, schedule }));
  const results = await trainAll(4, [{ ...COMMON, schedule: "fifo" }, ...cases, {
    ...COMMON,
    packs,
    schedule: "lina",
    accumulate: 2,
    recompute: "block",
  }, { ...COMMON, schedule: "lina", accumulate: 2 }]);
  results.forEach(([plain, ...all]) => {
    cases.forEach(({ schedule }, i) => assertNear(all[i].loss, plain.loss, schedule!));
    const first = all[SCHEDULER_NAMES.indexOf(WHOLE[0])];
    for (const name of WHOLE) {
      assert.deepEqual(all[SCHEDULER_NAMES.indexOf(name)].loss, first.loss, name);
      assert.deepEqual(all[SCHEDULER_NAMES.indexOf(name)].sums, first.sums, name);
    }
    const [recomputed, twoPasses] = all.slice(cases.length);
    assertNear(recomputed.loss, twoPasses.loss, "two passes, blocks computed again");
  });
});

Deno.test("schedules: another policy takes over in the middle of a training", async () => {
  const reschedules = SCHEDULER_NAMES.map((schedule, i) => ({ after: i + 2, schedule }));
  const whole = reschedules.filter(({ schedule }) => !schedule.endsWith("+pipeline"));
  const results = await trainAll(2, [
    { ...COMMON, schedule: "fifo" },
    { ...COMMON, schedule: "lina", reschedules: whole },
    { ...COMMON, schedule: "lina", reschedules },
  ]);
  for (const [plain, changed, sliced] of results) {
    assert.deepEqual(changed.loss, plain.loss);
    assert.deepEqual(changed.sums, plain.sums);
    assertNear(sliced.loss, plain.loss, "with slices");
  }
});

Deno.test("schedules: a checkpoint goes on under another policy, other slices and other seats", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lina-schedule-" });
  try {
    const goesOn = (schedule: SchedulerName, more: Partial<TrainArgs> = {}): TrainArgs => {
      return { ...COMMON, ...more, schedule, resume: true, directory };
    };
    const [[through, same, packed, sliced, spread]] = await trainAll(4, [
      { ...COMMON, schedule: "lina", saveAt: 5, directory },
      goesOn("outside"),
      goesOn("lina", { replicas: 2 }),
      goesOn("lina+pipeline", { chunks: 3, replicas: 4 }),
      goesOn("planned", { shardOptimizer: true }),
    ]);
    const expected = through.loss.slice(5);
    assert.deepEqual(same.loss, expected);
    assert.deepEqual(same.sums, through.sums);
    assertNear(packed.loss, expected, "two copies");
    assertNear(sliced.loss, expected, "three slices, four copies");
    assert.deepEqual(spread.loss, expected);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});
