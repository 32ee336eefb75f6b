// Routing kernels of the GPU (or its emulator) against the host's router, whose formulas they share: generated shapes, ties, groups, losses,
// placing with starts and with pieces, and the orders of rows. The gate's products are in gate_device_test.ts.

import assert from "node:assert/strict";
import fc from "fast-check";
import type { Device } from "../tensor/device.ts";
import type { RouteOptions } from "../tensor/routing_kernels.ts";
import * as ops from "../tensor/ops.ts";
import * as routing from "../tensor/ops/routing.ts";
import { empty, fromArray } from "../tensor/tensor.ts";
import { smallSizes, testDevice } from "../tests/emulator/device.ts";
import { close, numbers, read, rounded } from "./_device_numbers.ts";
import { placeOutlines } from "./dispatch.ts";
import { random } from "./init.ts";
import { makePlan, outlinePlan } from "./plan.ts";
import {
  chooseExperts,
  createRouter,
  routeBackward,
  type Router,
  type RouterOptions,
  scoreExperts,
  weighExperts,
} from "./router.ts";
import { routeOptionsOf } from "./router_device.ts";
import { sumNormalisedScores } from "./router_losses.ts";

const device = await testDevice() as Device | null;
const options = { ignore: !device };
const runs = smallSizes ? 25 : 60;

/** A router of any kind that the device runs, and a number of experts. */
const anyRouter: fc.Arbitrary<Router> = fc.oneof(
  fc.constantFrom(1, 2, 3, 4, 6, 8, 12, 16),
  fc.constantFrom(20, 33, 64, 96, 160, 256, 300),
).chain((experts) => {
  const divisors = [1, 2, 3, 4, 8].filter((g) => experts % g === 0);
  const kind = experts === 1
    ? fc.constantFrom("switch", "softmax", "sigmoid")
    : fc.constantFrom("switch", "gshard", "softmax", "sigmoid", "sigmoid");
  return fc.record({
    kind,
    topK: fc.integer({ min: 1, max: Math.min(experts, 16) }),
    groups: fc.constantFrom(...divisors),
    limit: fc.double({ min: 0, max: 1, noNaN: true }),
    renormalise: fc.boolean(),
    losses: fc.boolean(),
  }).map(({ kind, topK, groups, limit, renormalise, losses }) => {
    const groupLimit = Math.max(
      Math.ceil(topK / (experts / groups)),
      Math.ceil(limit * groups),
    );
    const own = kind === "sigmoid"
      ? { topK, groups, groupLimit, scale: 2.5 }
      : kind === "softmax"
      ? { topK }
      : {};
    return createRouter(
      {
        kind,
        ...own,
        ...(kind === "switch" || kind === "gshard" ? {} : { renormalise }),
        auxLoss: losses ? 0.7 : 0,
        zLoss: losses ? 0.3 : 0,
      } as RouterOptions,
      experts,
    );
  });
});

Deno.test("choices, weights, record and gradient are the host's", options, async () => {
  await fc.assert(
    fc.asyncProperty(
      anyRouter,
      fc.oneof(fc.nat(9), fc.nat(300)),
      fc.nat(),
      fc.boolean(),
      async (router, N, seed, ties) => {
        const { experts: E, topK: K } = router;
        const logits = numbers(seed, "logits", N * E);
        // Quarters have ties; no two sigmoid scores are near each other but equal.
        if (ties) logits.forEach((v, i) => logits[i] = Math.round(v * 4) / 4);
        const bias = Float64Array.from({ length: E }, (_, e) => (e * 7 % 5) / 16);
        const scores = scoreExperts(router, Float64Array.from(logits), null);
        const want = weighExperts(router, scores, chooseExperts(router, scores, bias));
        const o: RouteOptions = routeOptionsOf(router);
        using logits_NE = fromArray(device!, logits, [N, E]);
        using bias_E = fromArray(device!, Float32Array.from(bias));
        using experts = empty(device!, [N, K], "i32");
        using weights = empty(device!, [N, K]);
        using lse = empty(device!, [N]);
        using record = empty(device!, [3 * E + 2], "f64");
        routing.route(logits_NE, router.kind === "sigmoid" ? bias_E : null, o, {
          experts,
          weights,
          lse,
          record,
        });
        const chosen = Int32Array.from(await read(experts));
        // f32 may order scores, and groups, otherwise that are equal to f32 rounding: then they must be.
        for (let n = 0; n < N; n++) {
          const k = want.experts_NK.subarray(n * K, (n + 1) * K).findIndex((w, k) => {
            return w !== chosen[n * K + k];
          });
          if (k < 0) continue;
          const e = chosen[n * K + k], w = want.experts_NK[n * K + k];
          const what = `choice ${k} of token ${n} is ${e}, not ${w}`;
          assert.equal(router.kind, "sigmoid", what);
          const values = bias.map((b, j) => scores.scores_NE[n * E + j] + b);
          const per = E / router.groups;
          const sums = Array.from({ length: router.groups }, (_, g) => {
            const [first, second = 0] = values.slice(g * per, (g + 1) * per).sort().reverse();
            return first + second;
          });
          const tied = [e, w].some((j) => {
            const group = Math.floor(j / per);
            return sums.some((sum, g) => g !== group && Math.abs(sum - sums[group]) < 1e-6);
          });
          assert.ok(tied || Math.abs(values[e] - values[w]) < 1e-6, what);
        }
        if (chosen.some((e, i) => e !== want.experts_NK[i])) return;
        close(await read(weights), want.weights_NK, 2e-6, "weights");
        const all = await read(record), counts = new Float64Array(2 * E);
        chosen.forEach((e, i) => {
          counts[e]++;
          if (i % K === 0 || router.kind !== "gshard") counts[E + e]++;
        });
        assert.deepEqual(all.subarray(0, 2 * E), counts);
        const kind = router.kind === "sigmoid" ? "sigmoid" : "softmax";
        close(
          all.subarray(2 * E, 3 * E),
          sumNormalisedScores(scores.scores_NE, E, kind),
          2e-6,
          "scores",
        );
        assert.equal(all[3 * E + 1], N);
        if (router.zLoss > 0) {
          close([all[3 * E]], [scores.lse_N.reduce((s, v) => s + v * v, 0)], 2e-6, "squared lse");
        }
        // The gradient, as one of two ranks whose records are alike.
        const dWeights = numbers(seed, "dWeights", N * K);
        const sums = {
          choices_E: all.slice(E, 2 * E).map((v) => 2 * v),
          scores_E: all.slice(2 * E, 3 * E).map((v) => 2 * v),
          squaredLse: 2 * all[3 * E],
          tokens: 2 * N,
        };
        const dLogits = routeBackward(router, want, Float64Array.from(dWeights), {
          sums,
          scale: 0.5,
        });
        using dWeights_NK = fromArray(device!, dWeights, [N, K]);
        // What ranks show each other behind their records is not read.
        const shown = [...all, ...new Array<number>(seed % 3).fill(NaN)];
        using records = fromArray(device!, Float64Array.from([...shown, ...shown]), [
          2,
          shown.length,
        ]);
        using dLogits_NE = empty(device!, [N, E]);
        routing.routeBackward(
          dWeights_NK,
          { logits: logits_NE, lse, experts, records },
          { ...o, auxLoss: router.auxLoss * 0.5, zLoss: router.zLoss * 0.5, ranks: 2 },
          dLogits_NE,
        );
        // Differences of weights' gradients near 1: what is left of them may be far smaller.
        close(await read(dLogits_NE), dLogits, 5e-6, "dLogits", 0.3);
        // The same weights' gradients by row, those of every third choice being 0.
        const left = dWeights.map((value, i) => i % 3 === 0 ? 0 : value);
        const slots = Int32Array.from(left.keys(), (i) => i % 3 === 0 ? -1 : left.length - 1 - i);
        using slots_NK = fromArray(device!, slots, [N, K]);
        using rows = fromArray(device!, dWeights.slice().reverse());
        using choices = fromArray(device!, left, [N, K]);
        const results: Float64Array[] = [];
        const saved = { logits: logits_NE, lse, experts, records };
        const more = { ...o, auxLoss: router.auxLoss, zLoss: router.zLoss, ranks: 2 };
        for (const way of [{ dWeights: rows, slots: slots_NK }, { dWeights: choices }]) {
          const { dWeights, ...by } = way;
          routing.routeBackward(dWeights, { ...saved, ...by }, more, dLogits_NE);
          results.push(await read(dLogits_NE));
        }
        assert.deepEqual(results[0], results[1]);
      },
    ),
    { numRuns: runs },
  );
});

Deno.test(
  "logits that are no numbers choose some experts, and the record tells",
  options,
  async () => {
    const E = 5, o = routeOptionsOf(createRouter({ kind: "softmax", topK: 3 }, E));
    for (const bad of [NaN, Infinity, -Infinity]) {
      const logits = new Float32Array(4 * E).fill(0.5);
      logits.fill(bad, E, 2 * E);
      using logits_NE = fromArray(device!, logits, [4, E]);
      using experts = empty(device!, [4, 3], "i32");
      using weights = empty(device!, [4, 3]);
      using lse = empty(device!, [4]);
      using record = empty(device!, [3 * E + 2], "f64");
      routing.route(logits_NE, null, o, { experts, weights, lse, record });
      assert.deepEqual(
        await read(experts),
        Float64Array.from([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]),
      );
      assert.ok(!Number.isFinite((await read(record))[3 * E]));
    }
  },
);

/** Choices of N tokens; a share of −1. */
const anyChoices = fc.record({
  experts: fc.oneof(fc.integer({ min: 1, max: 9 }), fc.integer({ min: 10, max: 700 })),
  choices: fc.integer({ min: 1, max: 5 }),
  tokens: fc.oneof(fc.nat(40), fc.nat(smallSizes ? 900 : 60_000)),
  seed: fc.nat(),
  holes: fc.boolean(),
  skew: fc.boolean(),
}).map(({ experts, choices, tokens, seed, holes, skew }) => {
  const next = random(seed, "choices");
  const experts_NK = Int32Array.from({ length: tokens * choices }, () => {
    if (holes && next() < 0.2) return -1;
    return Math.floor((skew ? next() ** 8 : next()) * experts);
  });
  return { experts, choices, tokens, experts_NK };
});

Deno.test("a token's row is spread to its choices", options, async () => {
  for (const [N, K, D] of [[1, 1, 1], [17, 3, 5], [40, 2, 24], [9, 8, 1032], [0, 2, 8]] as const) {
    for (const dtype of ["f32", "bf16"] as const) {
      const wide = numbers(N, "x", N * D), half = rounded(wide);
      using x = fromArray(device!, dtype === "bf16" ? half.bits : wide, [N, D]);
      const order = Array.from({ length: N * K }, (_, i) => i * 7 % (N * K));
      const slots = order.map((_, i) => order.indexOf(i)).map((slot) => slot < 0 ? -1 : slot);
      const all = slots.every((slot) => slot >= 0) ? slots : slots.map((_, i) => i - 1);
      using slots_NK = fromArray(device!, Int32Array.from(all), [N, K]);
      using out = empty(device!, [N * K, D], dtype);
      ops.fill(out, 0);
      routing.spreadRows(x, slots_NK, out);
      const from = await read(x), want = new Float64Array(N * K * D);
      all.forEach((slot, i) => {
        if (slot < 0) return;
        const n = Math.floor(i / K);
        want.set(from.subarray(n * D, (n + 1) * D), slot * D);
      });
      assert.deepEqual(await read(out), want);
    }
  }
});

Deno.test("choices are counted in slices of the tokens", options, async () => {
  await fc.assert(
    fc.asyncProperty(anyChoices, fc.integer({ min: 1, max: 7 }), fc.nat(7), async (c, C, left) => {
      const { tokens: N, choices: K, experts: E } = c, n = Math.max(0, C - left);
      const want = new Float64Array(n * E);
      for (let slice = 0; slice < n; slice++) {
        const end = Math.floor((slice + 1) * N / C) * K;
        for (let i = Math.floor(slice * N / C) * K; i < end; i++) {
          if (c.experts_NK[i] >= 0) want[slice * E + c.experts_NK[i]]++;
        }
      }
      using experts_NK = fromArray(device!, c.experts_NK, [N, K]);
      using counts = fromArray(device!, want.map(() => NaN), [n, E]);
      routing.countSlices(experts_NK, C, counts);
      assert.deepEqual(await counts.toArray(), want);
    }),
    { numRuns: runs },
  );
  using experts_NK = fromArray(device!, new Int32Array(4), [4, 1]);
  using counts = empty(device!, [3, 2], "f64");
  assert.throws(() => routing.countSlices(experts_NK, 2, counts), /counts must have shape \[2,2\]/);
  assert.throws(() => routing.countSlices(experts_NK, 0.5, counts), /must be a whole number >= 1/);
});

Deno.test("rows are placed in a stable order, with and without starts", options, async () => {
  await fc.assert(
    fc.asyncProperty(anyChoices, fc.boolean(), async (c, given) => {
      const counts = new Int32Array(c.experts), starts = new Int32Array(c.experts);
      for (const e of c.experts_NK) if (e >= 0) counts[e]++;
      const order = Array.from(counts.keys());
      if (given) order.reverse();
      let rows = 0;
      for (const e of order) {
        starts[e] = rows;
        rows += counts[e];
      }
      const next = starts.slice(), slots = new Int32Array(c.experts_NK.length).fill(-1);
      const tokens = new Int32Array(rows);
      c.experts_NK.forEach((e, i) => {
        if (e < 0) return;
        tokens[next[e]] = Math.floor(i / c.choices);
        slots[i] = next[e]++;
      });
      using experts = fromArray(device!, c.experts_NK, [c.tokens, c.choices]);
      using starts_E = fromArray(device!, starts);
      using slots_NK = empty(device!, [c.tokens, c.choices], "i32");
      using tokens_S = empty(device!, [rows], "i32");
      using offsets = empty(device!, [c.experts + 1], "i32");
      const weighed = c.tokens % 2 === 1;
      const weights = numbers(c.tokens, "weights", c.experts_NK.length);
      using weights_NK = fromArray(device!, weights, [c.tokens, c.choices]);
      using scales_S = empty(device!, [rows]);
      const layout = { experts: c.experts, starts: given ? starts_E : null };
      routing.placeRows(experts, weighed ? { ...layout, weights: weights_NK } : layout, {
        slots: slots_NK,
        tokens: tokens_S,
        offsets: given ? null : offsets,
        ...weighed ? { scales: scales_S } : {},
      });
      if (weighed) {
        const scales = new Float32Array(rows);
        slots.forEach((slot, i) => slot >= 0 && (scales[slot] = weights[i]));
        assert.deepEqual(await scales_S.toArray(), scales);
      }
      assert.deepEqual(await slots_NK.toArray(), slots);
      assert.deepEqual(await tokens_S.toArray(), tokens);
      if (!given) assert.deepEqual(await offsets.toArray(), Int32Array.of(...starts, rows));
    }),
    { numRuns: runs },
  );
});

Deno.test(
  "replicas: pieces place rows, and orders turn them, as the plan says",
  options,
  async () => {
    const cases = fc.integer({ min: 1, max: 4 }).chain((ranks) =>
      fc.record({
        ranks: fc.constant(ranks),
        rank: fc.nat(ranks - 1),
        homes: fc.array(fc.uniqueArray(fc.nat(ranks - 1), { minLength: 1 }), {
          minLength: 1,
          maxLength: 9,
        }),
        tokens: fc.array(fc.nat(30), { minLength: ranks, maxLength: ranks }),
        seed: fc.nat(),
      })
    );
    await fc.assert(
      fc.asyncProperty(cases, async ({ ranks, rank, homes, tokens, seed }) => {
        const experts = homes.length, choices = Math.min(2, experts);
        const seats = Array.from(
          { length: ranks },
          (_, r) => homes.flatMap((on, e) => on.includes(r) ? [e] : []),
        );
        const next = random(seed, "replicas");
        const chosen = tokens.map((n) =>
          Int32Array.from({ length: n * choices }, () => Math.floor(next() * experts))
        );
        const counts_RE = new Int32Array(ranks * experts);
        chosen.forEach((all, r) => all.forEach((e) => counts_RE[r * experts + e]++));
        const placement = {
          seats,
          split: (source: number, e: number, count: number) => {
            const rows = new Array<number>(homes[e].length).fill(0);
            for (let i = 0; i < count; i++) rows[(i + source + e) % rows.length]++;
            return rows;
          },
        };
        const input = { rank, ranks, experts, choices, counts_RE, placement };
        const want = makePlan({ ...input, experts_NK: chosen[rank] });
        using experts_NK = fromArray(device!, chosen[rank], [tokens[rank], choices]);
        using plans = placeOutlines(experts_NK, experts, [outlinePlan(input)]);
        const [placed] = plans.slices;
        assert.deepEqual(placed.sendCounts, want.sendCounts);
        assert.deepEqual(placed.recvCounts, want.recvCounts);
        assert.deepEqual(await placed.groups.offsets.toArray(), want.offsets);
        assert.deepEqual(await placed.slots_NK.toArray(), want.slots_NK);
        assert.deepEqual(await placed.tokens_S.toArray(), want.tokens_S);
        assert.deepEqual(await placed.toExpertMajor?.toArray() ?? null, want.toExpertMajor);
        assert.deepEqual(await placed.toRankMajor?.toArray() ?? null, want.toRankMajor);
      }),
      { numRuns: runs },
    );
  },
);
