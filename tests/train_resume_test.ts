// Going on from a checkpoint: bit for bit on as many ranks, and the same to rounding on another number.

import assert from "node:assert/strict";
import { runRanks } from "./_ranks.ts";
import type { TrainArgs, TrainResult } from "./_train_ranks.ts";

const PROGRAM = new URL("./_train_ranks.ts", import.meta.url);

async function train(ranks: number, args: TrainArgs): Promise<TrainResult[]> {
  return (await runRanks<TrainResult>(PROGRAM, ranks, { args })).map(({ result }) => result!);
}

Deno.test("resume: same losses, weights and selection bias bit for bit; other ranks alike", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lina-resume-" });
  try {
    const model = { router: { kind: "sigmoid", topK: 2, biasRate: 0.01 } } as const;
    const common = { model, batch: 8, accumulate: 2, parameters: true };
    const through = await train(2, { ...common, steps: 6, saveAt: 3, directory });
    const resumed = await train(2, { ...common, steps: 6, resume: true, directory });
    resumed.forEach((result, rank) => {
      assert.deepEqual(result.loss, through[rank].loss.slice(3));
      assert.deepEqual(result.gradNorm, through[rank].gradNorm.slice(3));
      assert.deepEqual(result.sums, through[rank].sums);
      assert.equal(result.valLoss, through[rank].valLoss);
    });
    assert.ok(
      Object.keys(resumed[0].sums).some((name) => name.endsWith("e_score_correction_bias")),
    );
    // The experts sit elsewhere on four ranks and on one; the next losses are the same to rounding.
    for (const ranks of [1, 4]) {
      const [other] = await train(ranks, {
        ...common,
        accumulate: 1,
        steps: 6,
        resume: true,
        directory,
      });
      other.loss.forEach((x, i) => {
        const y = through[0].loss[3 + i];
        assert.ok(Math.abs(x - y) < 1e-5 * y, `${ranks} ranks, step ${4 + i}: ${x}, not ${y}`);
      });
    }
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

Deno.test("resume: checkpoints of a sharded optimizer are those of a whole one, at any number of ranks", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lina-resume-" });
  try {
    const common = { steps: 5, bucketBytes: 7000 };
    const through = await train(3, {
      ...common,
      batch: 9,
      shardOptimizer: true,
      saveAt: 2,
      directory,
    });
    const expected = through[0].loss.slice(2);
    for (const [ranks, shardOptimizer] of [[3, true], [3, false], [2, true], [1, true]] as const) {
      const [other] = await train(ranks, {
        ...common,
        batch: 9,
        shardOptimizer,
        resume: true,
        directory,
      });
      if (ranks === 3) assert.deepEqual(other.loss, expected);
      other.loss.forEach((x, i) =>
        assert.ok(Math.abs(x - expected[i]) < 1e-5 * x, `${ranks} ranks`)
      );
    }
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

Deno.test("resume: a checkpoint of another model or other data is refused, and the field named", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lina-resume-" });
  try {
    await train(1, { steps: 1, saveAt: 1, directory });
    const refused = async (given: Partial<TrainArgs>, why: RegExp) => {
      const args: TrainArgs = { steps: 2, resume: true, directory, ...given };
      const [other] = await runRanks(PROGRAM, 1, { args, check: false });
      assert.notEqual(other.code, 0);
      assert.match(other.output, why);
    };
    await Promise.all([
      refused({ model: { hidden: 32 } }, /config\.hidden must be 32: current value is 24/),
      refused({ batch: 4 }, /batch must be 8, as in the checkpoint: current value is 4; give/),
      refused({ dataSeed: 6 }, /seed must be 5, as in the checkpoint: current value is 6; give/),
      refused({ sequence: 8 }, /sequence must be 16, as in the checkpoint: current value is 8;/),
    ]);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});
