// What training must not depend on: number of ranks, replicas of experts, passes of a step, buckets of gradients.

import assert from "node:assert/strict";
import { runRanks } from "./_ranks.ts";
import type { TrainArgs, TrainResult } from "./_train_ranks.ts";

const PROGRAM = new URL("./_train_ranks.ts", import.meta.url);

async function train(ranks: number, args: TrainArgs): Promise<TrainResult[]> {
  return (await runRanks<TrainResult>(PROGRAM, ranks, { args })).map(({ result }) => result!);
}

function assertAlike(actual: TrainResult, expected: TrainResult, tolerance: number): void {
  for (const key of ["loss", "gradNorm", "auxLoss"] as const) {
    assert.equal(actual[key].length, expected[key].length);
    actual[key].forEach((x, i) => {
      const y = expected[key][i];
      assert.ok(Math.abs(x - y) <= tolerance * Math.abs(y), `${key}[${i}]: ${x}, not ${y}`);
    });
  }
  assert.ok(Math.abs(actual.valLoss - expected.valLoss) <= tolerance * expected.valLoss);
}

const ROUTERS: Readonly<Record<string, TrainArgs["model"]>> = {
  "softmax, top-2": {},
  "switch with capacity": {
    router: { kind: "switch", auxLoss: 0.02, capacityFactor: 1, drop: "probability" },
  },
  "sigmoid with noise, shared expert": {
    sharedExperts: 1,
    denseLayers: 1,
    router: { kind: "sigmoid", topK: 2, jitter: 0.1, biasRate: 0.01 },
  },
};

for (const [name, model] of Object.entries(ROUTERS)) {
  Deno.test(`training: loss and gradients are those of one rank at 2 and 4 (${name})`, async () => {
    const [alone] = await train(1, { steps: 3, model });
    assert.ok(alone.loss[2] < alone.loss[0]);
    for (const ranks of [2, 4]) {
      const results = await train(ranks, { steps: 3, model });
      for (const result of results) assertAlike(result, alone, 1e-5);
    }
  });
}

Deno.test("training: replicas of experts change nothing but rounding", async () => {
  const [alone] = await train(1, { steps: 3 });
  for (const replicas of [2, 4]) {
    assertAlike((await train(4, { steps: 3, replicas }))[3], alone, 1e-5);
  }
});

Deno.test("training: experts that move between steps take all with them that the optimizer knows", async () => {
  // Without clipping: the squares of the gradient are added up rank by rank, so its norm is another in the last bits.
  const common = { steps: 5, clip: 0, parameters: true };
  const [still, moving, replicated] = await Promise.all([
    train(3, common),
    train(3, { ...common, moves: "turn" }),
    train(2, { ...common, moves: "replicate" }),
  ]);
  assert.deepEqual(moving[0].loss, still[0].loss);
  const all = (results: readonly TrainResult[]) => Object.assign({}, ...results.map((r) => r.sums));
  assert.deepEqual(all(moving), all(still));
  assertAlike(replicated[1], still[0], 1e-5);
});

Deno.test("training: three passes of a third are one whole step", async () => {
  // Without the balance loss: it is one of the whole batch, and the mean over passes is another.
  const model = { router: { kind: "softmax", topK: 2, zLoss: 0.01 } } as const;
  const [whole] = await train(2, { steps: 3, batch: 6, model });
  const [parts] = await train(2, { steps: 3, batch: 6, accumulate: 3, model });
  assertAlike(parts, whole, 1e-5);
});

Deno.test("training: a pass of several is that of one rank, its balance loss and drops too", async () => {
  const model = { router: { kind: "switch", auxLoss: 0.1, capacityFactor: 1 } } as const;
  const common = { steps: 3, batch: 9, accumulate: 2, model };
  const [alone] = await train(1, common);
  for (const result of await train(3, common)) assertAlike(result, alone, 1e-5);
});

Deno.test("training: ranks may have unequal shares of the batch", async () => {
  const [alone] = await train(1, { steps: 2, batch: 7 });
  for (const result of await train(3, { steps: 2, batch: 7 })) assertAlike(result, alone, 1e-5);
});

Deno.test("training: what only reorders communication changes no bit", async () => {
  const [plain, ...others] = await Promise.all([
    train(2, { steps: 3, bucketBytes: 1e9, parameters: true }),
    train(2, { steps: 3, bucketBytes: 100, parameters: true }),
    train(2, { steps: 3, policy: "parts", parameters: true }),
    train(2, { steps: 3, policy: "deferred", parameters: true }),
  ]);
  for (const other of others) {
    other.forEach((result, rank) => {
      assert.deepEqual(result.loss, plain[rank].loss);
      assert.deepEqual(result.gradNorm, plain[rank].gradNorm);
      assert.deepEqual(result.sums, plain[rank].sums);
    });
  }
});

Deno.test("training: the step graph is the order in which things happen, on every rank", async () => {
  const model = { denseLayers: 1, layers: 3, sharedExperts: 1 };
  const results = await train(2, { steps: 1, batch: 7, model });
  for (const { boundaries, nodes } of results) {
    assert.deepEqual(nodes, results[0].nodes);
    const begun = boundaries.filter(([kind]) =>
      kind === "gradientReady" || kind === "allToAllStarts"
    );
    const ids = begun.map(([, id]) => id);
    assert.deepEqual(ids, ids.toSorted((a, b) => a - b));
    const expected = nodes.filter((node) =>
      node.startsWith("allToAll") || node.endsWith(".weight")
    );
    assert.deepEqual(ids.map((id) => nodes[id]), expected);
    const backward = boundaries.filter(([kind]) => /combineBackward|layerBackward/.test(kind));
    assert.deepEqual(backward, [
      ["combineBackwardStarts", 2],
      ["layerBackwardEnds", 2],
      ["combineBackwardStarts", 1],
      ["layerBackwardEnds", 1],
    ]);
    assert.equal(boundaries.at(-1)![0], "stepEnds");
  }
});

Deno.test("training: a low limit clips the update, not the norm that is shown", async () => {
  const [free] = await train(2, { steps: 2, clip: 0 });
  const [clipped] = await train(2, { steps: 2, clip: 1e-3 });
  assert.equal(free.gradNorm[0], clipped.gradNorm[0]);
  assert.notEqual(free.loss[1], clipped.loss[1]);
});

for (const ranks of [2, 4]) {
  Deno.test(`training: a sharded optimizer changes no loss and holds less (${ranks} ranks)`, async () => {
    const model = { sharedExperts: 1, denseLayers: 1, experts: 4 };
    // Buckets of several gradients that no number of ranks divides, large gradients alone, parts of gradients, and some of fewer elements than
    // ranks.
    const tiny = { ...model, width: 2, heads: 1, kvHeads: 1, headDim: 2, hidden: 3 };
    for (
      const more of [{ bucketBytes: 7000 }, { policy: "parts" }, {
        bucketBytes: 1,
        model: tiny,
      }] as const
    ) {
      const common = { steps: 4, accumulate: 2, clip: 0.1, model, parameters: true, ...more };
      const [whole, sharded] = await Promise.all([
        train(ranks, common),
        train(ranks, { ...common, shardOptimizer: true }),
      ]);
      sharded.forEach((result, rank) => {
        assert.deepEqual(result.loss, whole[rank].loss);
        result.gradNorm.forEach((x, i) => {
          assert.ok(Math.abs(x - whole[rank].gradNorm[i]) <= 1e-12 * x);
        });
        assert.deepEqual(result.sums, whole[rank].sums);
        assert.ok(result.used_bytes < whole[rank].used_bytes);
      });
    }
  });
}

Deno.test("training: whole blocks computed again give the same bits, on several ranks too", async () => {
  const model = { router: { kind: "sigmoid", topK: 2, jitter: 0.1, biasRate: 0.01 } } as const;
  const common = { steps: 3, accumulate: 2, parameters: true, model };
  const [kept, again] = await Promise.all([
    train(2, common),
    train(2, { ...common, recompute: "block" }),
  ]);
  again.forEach((result, rank) => {
    assert.deepEqual(result.loss, kept[rank].loss);
    assert.deepEqual(result.gradNorm, kept[rank].gradNorm);
    assert.deepEqual(result.sums, kept[rank].sums);
  });
});
