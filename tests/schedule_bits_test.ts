// A schedule decides when gradients are reduced and never what is learned: on shm, which adds in the order of ranks, every policy and
// every size of micro-op gives the same bits, with whatever else a step may have.

import assert from "node:assert/strict";
import { SCHEDULER_NAMES, type SchedulerName } from "../lina/training/schedulers.ts";
import { runRanks } from "./_ranks.ts";
import type { TrainArgs, TrainResult } from "./_train_ranks.ts";

const PROGRAM = new URL("./_schedule_ranks.ts", import.meta.url);
/** Policies that leave all-to-alls whole. */
const WHOLE = SCHEDULER_NAMES.filter((name) => !name.endsWith("+pipeline"));

/** Trainings in turn on the same ranks: `[rank][training]`. */
async function trainAll(ranks: number, all: readonly TrainArgs[]): Promise<TrainResult[][]> {
  const results = await runRanks<TrainResult[]>(PROGRAM, ranks, { args: all, timeout_ms: 120_000 });
  return results.map(({ result }) => result!);
}

/** Fails unless all trainings are alike; the norm, which is added up piece by piece where the optimizer is sharded, to rounding in f64. */
function assertSameBits(results: readonly TrainResult[][], names: readonly string[]): void {
  results.forEach(([first, ...others], rank) => {
    others.forEach((other, i) => {
      const where = `of ${names[i + 1]} on rank ${rank}`;
      for (const key of ["loss", "auxLoss", "valLoss", "sums"] as const) {
        assert.deepEqual(other[key], first[key], `${key} ${where}`);
      }
      other.gradNorm.forEach((x, step) => {
        const gap = Math.abs(x - first.gradNorm[step]) / x;
        assert.ok(gap <= (names[i + 1].includes("sharded") ? 1e-12 : 0), `norm ${where}: ${gap}`);
      });
    });
  });
}

for (const ranks of [2, 4]) {
  Deno.test(`schedules: every policy learns the same bits in 50 steps (${ranks} ranks)`, async () => {
    const common: TrainArgs = { steps: 50, batch: 4, sequence: 8, parameters: true };
    const results = await trainAll(ranks, WHOLE.map((schedule) => ({ ...common, schedule })));
    assertSameBits(results, WHOLE);
    const [{ loss }] = results[0];
    assert.ok(loss[49] < 0.8 * loss[0], `${loss[0]} to ${loss[49]}`);
  });
}

/** A model whose gradients have from 2 to some 200 elements. */
const TINY = { width: 4, hidden: 6, heads: 2, kvHeads: 1, headDim: 2, experts: 4 } as const;

Deno.test("schedules: micro-ops of 16 bytes and more learn the same bits", async () => {
  const sizes = [16, 36, 64, 1000, 1e9];
  const common: TrainArgs = { steps: 5, batch: 4, sequence: 4, parameters: true, model: TINY };
  const names = ["fifo", ...sizes.map((size) => `lina with ${size} bytes`)];
  const results = await trainAll(2, [
    { ...common, schedule: "fifo" },
    ...sizes.map((microOpBytes) => ({ ...common, schedule: "lina", microOpBytes } as const)),
  ]);
  assertSameBits(results, names);
  const counts = results[0].slice(1).map(({ launched }) => launched.reduce((a, b) => a + b, 0));
  assert.deepEqual(counts, counts.toSorted((a, b) => b - a));
  assert.ok(counts[0] > 9 * counts[4], `${counts}`);
});

const CASES: Readonly<Record<string, Partial<TrainArgs>>> = {
  "a rank without tokens": { idleRank: 1, batch: 3 },
  "all tokens on one expert": {
    crowded: true,
    model: { router: { kind: "switch", auxLoss: 0.02 } },
  },
  "unequal shares": { batch: 7 },
  "passes that are summed": { accumulate: 2 },
  "a sharded optimizer": { shardOptimizer: true, accumulate: 2 },
  "activations computed again": { recompute: "activation" },
  "blocks computed again": { recompute: "block", accumulate: 2 },
  "replicas of experts": { replicas: 2 },
  "shared experts and a dense layer": { model: { sharedExperts: 1, denseLayers: 1, layers: 3 } },
  "one MoE layer": { model: { layers: 1 } },
  "no MoE layer": { model: { experts: 0 } },
};

for (const ranks of [2, 4]) {
  Deno.test(`schedules: the same bits in every case (${ranks} ranks)`, async () => {
    const cases = Object.entries(CASES).flatMap(([name, more]) =>
      WHOLE.map((schedule: SchedulerName) => ({
        name: `${schedule}, ${name}`,
        args: { steps: 3, batch: 8, sequence: 4, parameters: true, ...more, schedule },
      }))
    );
    const results = await trainAll(ranks, cases.map(({ args }) => args));
    for (let i = 0; i < cases.length; i += WHOLE.length) {
      const names = cases.slice(i, i + WHOLE.length).map(({ name }) => name);
      assertSameBits(results.map((of) => of.slice(i, i + WHOLE.length)), names);
    }
  });
}

Deno.test("schedules: slices and two levels of all-to-alls (4 ranks)", async () => {
  const common: TrainArgs = { steps: 10, batch: 8, sequence: 4, parameters: true };
  const ways: readonly (readonly [string, Partial<TrainArgs>])[] = [
    ["whole", {}],
    ["two levels", { perHost: 2 }],
    ["2 slices", { chunks: 2 }],
    ["2 slices on two levels", { chunks: 2, perHost: 2 }],
    ["5 slices", { chunks: 5 }],
  ];
  const cases = ways.flatMap(([way, more]) =>
    WHOLE.map((schedule: SchedulerName) => ({
      name: `${schedule}, ${way}`,
      args: { ...common, ...more, schedule },
    }))
  );
  const results = await trainAll(4, cases.map(({ args }) => args));
  const n = WHOLE.length;
  const of = (first: number, count: number) => {
    const names = cases.slice(first * n, (first + count) * n).map(({ name }) => name);
    assertSameBits(results.map((all) => all.slice(first * n, (first + count) * n)), names);
  };
  of(0, 2); // the way of rows changes no bit
  of(2, 2);
  of(4, 1);
  // Slices change the shapes of products, and with them what is rounded.
  for (const all of results) {
    for (const sliced of [all[2 * n], all[4 * n]]) {
      sliced.loss.forEach((loss, step) => {
        const gap = Math.abs(loss / all[0].loss[step] - 1);
        assert.ok(gap < 1e-6, `step ${step}: ${gap}`);
      });
    }
  }
});
