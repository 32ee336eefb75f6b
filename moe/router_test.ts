// Routers on hand-made numbers and as properties; their gradients are tested through the layer (moe_layer_test.ts).

import assert from "node:assert/strict";
import fc from "fast-check";
import { normal, random } from "./init.ts";
import {
  chooseExperts,
  createRouter,
  type RouterOptions,
  scoreExperts,
  weighExperts,
} from "./router.ts";
import {
  capacityOf,
  dropByPosition,
  dropByProbability,
  keptByPosition,
  scoresOverCapacity,
} from "./router_capacity.ts";
import { chooseByExpert } from "./router_expert_choice.ts";
import { balanceLossBackward, routerLosses, sumNormalisedScores } from "./router_losses.ts";
import { addGaussian, noiseSource } from "./router_noise.ts";
import { groupLimitedTopK, sigmoidScores, updateBias } from "./router_sigmoid.ts";
import { softmaxScores, topK, topTwo } from "./router_softmax.ts";

function route(options: RouterOptions, logits: number[], experts: number, bias?: Float64Array) {
  const router = createRouter(options, experts);
  const scores = scoreExperts(router, Float64Array.from(logits), null);
  return weighExperts(
    router,
    scores,
    chooseExperts(router, scores, bias ?? new Float64Array(experts)),
  );
}

function near(actual: Iterable<number>, expected: readonly number[], tolerance = 1e-12): void {
  const values = [...actual];
  assert.equal(values.length, expected.length);
  values.forEach((v, i) => assert.ok(Math.abs(v - expected[i]) <= tolerance, `${values}`));
}

// Two tokens over four experts; e^logits are 1, 2, 4, 1 and 3, 1, 1, 3.
const LOGITS = [1, 2, 4, 1, 3, 1, 1, 3].map(Math.log);

Deno.test("switch: the best expert with its softmax score", () => {
  const { experts_NK, weights_NK } = route({ kind: "switch" }, LOGITS, 4);
  assert.deepEqual([...experts_NK], [2, 0]); // of equal ones the lower
  near(weights_NK, [4 / 8, 3 / 8]);
});

Deno.test("gshard: two experts whose weights sum to 1", () => {
  const { experts_NK, weights_NK } = route({ kind: "gshard" }, LOGITS, 4);
  assert.deepEqual([...experts_NK], [2, 1, 0, 3]);
  near(weights_NK, [4 / 6, 2 / 6, 1 / 2, 1 / 2]);
});

Deno.test("softmax: top-3 with and without renormalisation", () => {
  const with_ = route({ kind: "softmax", topK: 3 }, LOGITS, 4);
  assert.deepEqual([...with_.experts_NK], [2, 1, 0, 0, 3, 1]);
  near(with_.weights_NK, [4 / 7, 2 / 7, 1 / 7, 3 / 7, 3 / 7, 1 / 7]);
  const without = route({ kind: "softmax", topK: 3, renormalise: false }, LOGITS, 4);
  near(without.weights_NK, [4 / 8, 2 / 8, 1 / 8, 3 / 8, 3 / 8, 1 / 8]);
});

Deno.test("sigmoid: the bias chooses, the score weighs", () => {
  const logits = [0, 1, 2, 3].map((s) => Math.log((s + 1) / (9 - s))); // scores 0.1, 0.2, 0.3, 0.4
  const options = { kind: "sigmoid", topK: 2, scale: 2 } as const;
  const plain = route(options, logits, 4);
  assert.deepEqual([...plain.experts_NK], [3, 2]);
  near(plain.weights_NK, [2 * 0.4 / 0.7, 2 * 0.3 / 0.7]);
  const biased = route(options, logits, 4, Float64Array.of(0.25, 0, 0, 0));
  assert.deepEqual([...biased.experts_NK], [3, 0]);
  near(biased.weights_NK, [2 * 0.4 / 0.5, 2 * 0.1 / 0.5]);
});

Deno.test("sigmoid: a token reaches only the groups with the two best experts together", () => {
  // Groups {0,1}, {2,3}, {4,5}: the best single expert is in the group with the least sum of two.
  const scores = Float64Array.of(0.5, 0.4, 0.7, 0.0, 0.45, 0.4);
  const choose = (groupLimit: number) => [...groupLimitedTopK(scores, new Float64Array(6), {
    experts: 6,
    choices: 2,
    groups: 3,
    groupLimit,
  })];
  assert.deepEqual(choose(1), [0, 1]);
  assert.deepEqual(choose(2), [0, 4]);
  assert.deepEqual(choose(3), [2, 0]);
});

Deno.test("the selection bias moves by the sign of the load's difference from the mean", () => {
  const bias = Float64Array.of(0, 0.5, 0, 0);
  updateBias(bias, Float64Array.of(1, 9, 5, 5), 0.01);
  near(bias, [0.01, 0.49, 0, 0]);
});

Deno.test("expert choice: every expert takes its best tokens of the global batch", () => {
  const scores_TE = Float64Array.of(0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.7, 0.3); // 4 tokens, 2 experts
  const choose = (firstToken: number, tokens: number) =>
    chooseByExpert(scores_TE, { experts: 2, capacity: 3, firstToken, tokens });
  assert.deepEqual(choose(0, 4), {
    choices: 2,
    experts_NK: new Int32Array([0, -1, 0, 1, 0, 1, 1, -1]), // of tokens 2 and 3 the first
  });
  assert.deepEqual(choose(3, 1), { choices: 1, experts_NK: new Int32Array([1]) });
  assert.deepEqual(choose(4, 0), { choices: 1, experts_NK: new Int32Array(0) });
});

Deno.test("losses: balance is the coefficient when load is even, and grows with skew", () => {
  const sums = (choices: number[]) => ({
    choices_E: Float64Array.from(choices),
    scores_E: Float64Array.from(choices, (c) => c / 2), // mean score follows load
    squaredLse: 18,
    tokens: 4,
  });
  const coefficients = { auxLoss: 0.5, zLoss: 0.1 };
  near(Object.values(routerLosses(sums([2, 2, 2, 2]), coefficients)), [0.5, 0.45]);
  near(Object.values(routerLosses(sums([8, 0, 0, 0]), coefficients)), [2, 0.45]);
  near(Object.values(routerLosses({ ...sums([0, 0]), tokens: 0 }, coefficients)), [0, 0]);
});

Deno.test("capacity: rounded up, and never 0", () => {
  const size = (tokens: number) => ({ tokens, choices: 2, experts: 8 });
  assert.equal(capacityOf(1, size(16)), 4);
  assert.equal(capacityOf(1.25, size(16)), 5);
  assert.equal(capacityOf(1.1, size(40)), 11); // 1.1 · 10 is 11.000000000000002
  assert.equal(capacityOf(1, size(0)), 1);
});

Deno.test("drop by position: first choices of all ranks before second ones", () => {
  // 2 ranks, 2 places, 1 expert of interest with capacity 3: rank 0 has 1 first and 2 second choices, rank 1 has 1 and 1.
  const kept = keptByPosition(Int32Array.of(1, 2, 1, 1), { ranks: 2, choices: 2, experts: 1 }, 3);
  assert.deepEqual([...kept], [1, 1, 1, 0]);
  const experts_NK = Int32Array.of(-1, 0, 0, -1, -1, 0);
  assert.deepEqual(
    [...dropByPosition(experts_NK, kept.subarray(0, 2), 1)],
    [-1, 0, 0, -1, -1, -1],
  );
});

Deno.test("drop by probability: the larger score, of equal ones the earlier token", () => {
  const experts_NK = Int32Array.of(0, 0, 1, 0);
  const scores_NE = Float64Array.of(0.5, 0, 0.9, 0, 0, 1, 0.5, 0);
  const counts_RE = Int32Array.of(3, 1, 1, 0);
  const own = scoresOverCapacity(experts_NK, scores_NE, [0], { choices: 1, experts: 2 });
  assert.deepEqual([...own], [0.5, 0.9, 0.5]);
  const gathered = Float64Array.of(...own, 0.5);
  const drop = (rank: number, experts: Int32Array) =>
    dropByProbability(experts, counts_RE, gathered, { experts: 2, rank, capacity: 2, over: [0] });
  assert.deepEqual([...drop(0, experts_NK).experts_NK], [0, 0, 1, -1]);
  assert.deepEqual([...drop(1, Int32Array.of(0)).experts_NK], [-1]);
  assert.deepEqual([...drop(1, Int32Array.of(0)).kept_RE], [2, 1, 0, 0]);
});

const batches = fc.record({
  ranks: fc.integer({ min: 1, max: 4 }),
  experts: fc.integer({ min: 1, max: 6 }),
  capacity: fc.integer({ min: 1, max: 8 }),
  seed: fc.nat(),
}).chain((c) =>
  fc.record({
    ...Object.fromEntries(Object.entries(c).map(([k, v]) => [k, fc.constant(v)])) as {
      [K in keyof typeof c]: fc.Arbitrary<number>;
    },
    split: fc.array(fc.nat(9), { minLength: c.ranks, maxLength: c.ranks }),
  })
);

Deno.test("both drop rules keep min(count, capacity) rows per expert, alike for any split over ranks", () => {
  fc.assert(
    fc.property(batches, ({ ranks, experts, capacity, seed, split }) => {
      const choices = Math.min(2, experts), tokens = split.reduce((a, b) => a + b, 0);
      // Coarse scores, so that ties happen.
      const next = random(seed, "scores");
      const scores = Float64Array.from({ length: tokens * experts }, () => Math.floor(next() * 4));
      const chosen = topK(scores, experts, choices);
      const parts = (sizes: readonly number[]) => {
        let at = 0;
        return sizes.map((n) => {
          const part = {
            experts_NK: chosen.slice(at * choices, (at + n) * choices),
            scores_NE: scores.slice(at * experts, (at + n) * experts),
          };
          at += n;
          return part;
        });
      };
      const positions = (sizes: readonly number[]) => {
        const all = parts(sizes), length = choices * experts;
        const counts = new Int32Array(sizes.length * length);
        all.forEach(({ experts_NK }, r) =>
          experts_NK.forEach((e, i) => counts[r * length + i % choices * experts + e]++)
        );
        const size = { ranks: sizes.length, choices, experts };
        const kept = keptByPosition(counts, size, capacity);
        return all.flatMap(({ experts_NK }, r) => [
          ...dropByPosition(experts_NK, kept.subarray(r * length, (r + 1) * length), experts),
        ]);
      };
      const probabilities = (sizes: readonly number[]) => {
        const all = parts(sizes), counts_RE = new Int32Array(sizes.length * experts);
        all.forEach(({ experts_NK }, r) => experts_NK.forEach((e) => counts_RE[r * experts + e]++));
        const over = Array.from({ length: experts }, (_, e) => e).filter((e) =>
          sizes.reduce((sum, _, r) => sum + counts_RE[r * experts + e], 0) > capacity
        );
        const gathered = Float64Array.from(
          all.flatMap(({ experts_NK, scores_NE }) => [
            ...scoresOverCapacity(experts_NK, scores_NE, over, { choices, experts }),
          ]),
        );
        return all.flatMap(({ experts_NK }, rank) => [
          ...dropByProbability(experts_NK, counts_RE, gathered, { experts, rank, capacity, over })
            .experts_NK,
        ]);
      };
      for (const rule of [positions, probabilities]) {
        const kept = rule(split);
        assert.equal(split.length, ranks);
        assert.deepEqual(kept, rule([tokens]));
        for (let e = 0; e < experts; e++) {
          const count = chosen.filter((x) => x === e).length;
          assert.equal(kept.filter((x) => x === e).length, Math.min(count, capacity));
        }
        kept.forEach((e, i) => assert.ok(e === -1 || e === chosen[i]));
      }
    }),
    { numRuns: 300 },
  );
});

Deno.test("expert choice does not depend on the split, and fills every expert", () => {
  fc.assert(fc.property(batches, ({ experts, capacity, seed, split }) => {
    const tokens = split.reduce((a, b) => a + b, 0), next = random(seed, "scores");
    const scores = Float64Array.from({ length: tokens * experts }, () => Math.floor(next() * 4));
    const chosen = (firstToken: number, n: number) => {
      const { choices, experts_NK } = chooseByExpert(scores, {
        experts,
        capacity,
        firstToken,
        tokens: n,
      });
      return Array.from({ length: n }, (_, i) => {
        return [...experts_NK.subarray(i * choices, (i + 1) * choices)].filter((e) => e >= 0);
      });
    };
    let at = 0;
    const parts = split.flatMap((n) => chosen((at += n) - n, n));
    assert.deepEqual(parts, chosen(0, tokens));
    for (let e = 0; e < experts; e++) {
      assert.equal(parts.flat().filter((x) => x === e).length, Math.min(capacity, tokens));
    }
  }));
});

Deno.test("noise depends on the place in the global batch, not on the rank", () => {
  const key = { seed: 7, step: 3, layer: 1, firstToken: 0 };
  const all = normal(random(1), 40, { dtype: "f64" }) as Float64Array;
  const whole = all.slice(), part = all.slice(16);
  addGaussian(whole, { experts: 4, std: 1, key });
  addGaussian(part, { experts: 4, std: 1, key: { ...key, firstToken: 4 } });
  assert.deepEqual(part, whole.slice(16));
  for (const other of [{ seed: 8 }, { step: 4 }, { layer: 2 }]) {
    const changed = all.slice();
    addGaussian(changed, { experts: 4, std: 1, key: { ...key, ...other } });
    changed.forEach((v, i) => assert.notEqual(v, whole[i]));
  }
});

Deno.test("noise is uniform, and its neighbours are uncorrelated", () => {
  const uniform = noiseSource({ seed: 1, step: 1, layer: 0, firstToken: 0 });
  const n = 20_000;
  let sum = 0, squares = 0, acrossTokens = 0, acrossExperts = 0;
  for (let t = 0; t < n; t++) {
    const u = uniform(t, 0) - 0.5;
    sum += u;
    squares += u * u;
    acrossTokens += u * (uniform(t + 1, 0) - 0.5);
    acrossExperts += u * (uniform(t, 1) - 0.5);
  }
  near([sum / n, squares / n], [0, 1 / 12], 0.01);
  near([acrossTokens / n * 12, acrossExperts / n * 12], [0, 0], 0.03);
});

Deno.test("a sampled second expert follows the softmax of the rest, and is never the first", () => {
  const n = 20_000, logits = new Float64Array(4 * n);
  for (let i = 0; i < logits.length; i++) logits[i] = Math.log([6, 3, 2, 1][i % 4]);
  const uniform = noiseSource({ seed: 2, step: 1, layer: 0, firstToken: 0 });
  const seconds = topTwo(logits, 4, "sample", uniform).filter((_, i) => i % 2 === 1);
  const share = (e: number) => seconds.filter((s) => s === e).length / n;
  near([0, 1, 2, 3].map(share), [0, 3 / 6, 2 / 6, 1 / 6], 0.02);
});

Deno.test("large logits neither overflow nor underflow", () => {
  const { weights_NK } = route({ kind: "softmax", topK: 2 }, [1e4, -1e4, 1e4 - 1, 0], 4);
  near(weights_NK, [1 / (1 + Math.exp(-1)), 1 / (1 + Math.E)]);
  near(softmaxScores(Float64Array.of(-1e300, -1e300), 2).scores_NE, [0.5, 0.5]);
});

Deno.test("routers refuse what they cannot do", () => {
  const make = (options: object, experts = 4) => () =>
    createRouter(options as RouterOptions, experts);
  assert.throws(make({ kind: "softmax", topK: 5 }), {
    message: "Cannot make a router as experts per token must be a whole number in 1..4, " +
      "the number of experts: current value is 5",
  });
  assert.throws(make({ kind: "gshard" }, 1), /in 1..1, the number of experts: current value is 2/);
  assert.throws(make({ kind: "softmax", topK: 0 }), /current value is 0/);
  assert.throws(make({ kind: "sigmoid", topK: 2, groups: 3 }), /a divisor of 4 experts/);
  assert.throws(
    make({ kind: "sigmoid", topK: 3, groups: 2, groupLimit: 1 }),
    /groupLimit must be a whole number in 1..2 whose groups hold 3 experts: current value is 1/,
  );
  assert.throws(make({ kind: "switch", capacityFactor: 0 }), /capacityFactor must be/);
  assert.throws(make({ kind: "expertChoice" }), /capacityFactor must be a number > 0/);
  assert.throws(make({ kind: "switch", auxLoss: NaN }), /auxLoss must be a number >= 0/);
  assert.throws(make({ kind: "switch", jitter: 1 }), /jitter must be/);
  assert.throws(make({ kind: "top1" }), /kind must be one of/);
  for (const kind of ["switch", "sigmoid"] as const) {
    const options = kind === "switch" ? { kind } : { kind, topK: 1 };
    assert.throws(() => route(options, [0, NaN], 2), /logits must be finite/);
    assert.throws(() => route(options, [0, Infinity], 2), /logits must be finite/);
  }
});

Deno.test("balance loss: sigmoid scores that all underflow give 0, not NaN", () => {
  const scores = sigmoidScores(new Float64Array([-800, -900]), 2), dLogits = new Float64Array(2);
  assert.deepEqual([...sumNormalisedScores(scores, 2, "sigmoid")], [0, 0]);
  balanceLossBackward(scores, new Float64Array([1, 2]), "sigmoid", dLogits);
  assert.deepEqual([...dLogits], [0, 0]);
});
