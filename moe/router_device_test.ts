// Routing kernels of the GPU (or its emulator) against the host's router, whose formulas they share: generated shapes, ties, groups, losses,
// placing with starts and with pieces, and the orders of rows.

import assert from "node:assert/strict";
import fc from "fast-check";
import type { Device } from "../tensor/device.ts";
import type { RouteOptions } from "../tensor/routing_kernels.ts";
import * as ops from "../tensor/ops.ts";
import * as routing from "../tensor/ops/routing.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";
import { smallSizes, testDevice } from "../tests/emulator/device.ts";
import { placeOutline } from "./dispatch.ts";
import { normal, random } from "./init.ts";
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

/** Elements as f64; a `Uint16Array` holds bf16. */
async function read(x: Tensor): Promise<Float64Array> {
  if (x.dtype !== "bf16") return Float64Array.from(await x.toArray() as Float64Array);
  using wide = empty(x.device, x.shape, "f32");
  ops.copy(x, wide);
  return Float64Array.from(await wide.toArray() as Float32Array);
}

function close(
  got: ArrayLike<number>,
  want: ArrayLike<number>,
  bound: number,
  what: string,
  least = 1e-30,
): void {
  assert.equal(got.length, want.length, what);
  let most = least;
  for (let i = 0; i < want.length; i++) most = Math.max(most, Math.abs(want[i]));
  for (let i = 0; i < want.length; i++) {
    assert.ok(
      Math.abs(got[i] - want[i]) <= bound * most,
      `${what}[${i}]: ${got[i]} instead of ${want[i]}, the largest is ${most}`,
    );
  }
}

/** bf16 bits of numbers, and what they stand for. */
function rounded(x: Float32Array): { bits: Uint16Array; values: Float64Array } {
  const bits = Uint16Array.from(new Uint32Array(x.slice().buffer), (b) => {
    return (b + 0x7fff + (b >>> 16 & 1)) >>> 16;
  });
  return {
    bits,
    values: Float64Array.from(new Float32Array(Uint32Array.from(bits, (b) => b << 16).buffer)),
  };
}

const numbers = (seed: number, name: string, size: number) =>
  normal(random(seed, name), size, { dtype: "f32" }) as Float32Array;

const SHAPES: readonly (readonly [N: number, D: number, E: number])[] = [
  [1, 8, 1],
  [3, 24, 3],
  [65, 72, 8],
  [129, 200, 16],
  [70, 136, 20],
  [64, 264, 64],
  [33, 64, 100],
  [17, 33, 6],
  [0, 16, 4],
  // Several slices in a block, and shares of a sum.
  [20, 2056, 64],
  [1300, 3080, 4],
  ...smallSizes
    ? []
    : [[1031, 1024, 16], [131, 2048, 64], [259, 4096, 8], [19, 3584, 256], [50, 999, 40]] as const,
];

for (const dtype of ["bf16", "f32"] as const) {
  for (const [N, D, E] of SHAPES) {
    if (dtype === "f32" && N * D > 2 ** 20) continue; // the plain kernels know no slices
    Deno.test(
      `gate [${N}, ${D}] of ${E} experts in ${dtype}: logits and gradients`,
      options,
      async () => {
        const wide = numbers(1, "x", N * D), half = rounded(wide);
        const x = dtype === "bf16" ? half.values : Float64Array.from(wide);
        const g = Float64Array.from(numbers(2, "gate", E * D));
        const dL = Float64Array.from(numbers(3, "dLogits", N * E));
        const old = rounded(numbers(4, "dX", N * D));
        using x_ND = fromArray(device!, dtype === "bf16" ? half.bits : wide, [N, D]);
        using gate_ED = fromArray(device!, Float32Array.from(g), [E, D]);
        using logits_NE = empty(device!, [N, E]);
        routing.gate(x_ND, gate_ED, logits_NE);
        const logits = new Float64Array(N * E), dX = new Float64Array(N * D);
        const dGate = new Float64Array(E * D), sizes = new Float64Array(N * E);
        const first = Float64Array.from(numbers(5, "dGate", E * D));
        for (let n = 0; n < N; n++) {
          for (let e = 0; e < E; e++) {
            let sum = 0, size = 0;
            const l = dL[n * E + e];
            for (let d = 0; d < D; d++) {
              const product = x[n * D + d] * g[e * D + d];
              sum += product;
              size += Math.abs(product);
              dX[n * D + d] += l * g[e * D + d];
              dGate[e * D + d] += l * x[n * D + d];
            }
            logits[n * E + e] = sum;
            sizes[n * E + e] = size;
          }
        }
        const got = await read(logits_NE);
        for (let i = 0; i < got.length; i++) {
          // Rounding of f32 sums; products of bf16 operands would be 2⁻⁹ off.
          const bound = 2 ** -22 * sizes[i];
          assert.ok(
            Math.abs(got[i] - logits[i]) <= bound,
            `logits[${i}]: ${got[i]}, not ${logits[i]}`,
          );
        }
        for (let i = 0; i < dX.length; i++) dX[i] += old.values[i];
        for (let i = 0; i < dGate.length; i++) dGate[i] += first[i];
        const oldWide = Float32Array.from(old.values);
        const outcomes: Float64Array[] = [];
        for (let beta = 1; beta >= 0; beta--) {
          using dX_ND = fromArray(device!, dtype === "bf16" ? old.bits : oldWide, [N, D]);
          using dLogits_NE = fromArray(device!, Float32Array.from(dL), [N, E]);
          using dGate_ED = fromArray(device!, Float32Array.from(first), [E, D]);
          routing.gateBackward(dLogits_NE, x_ND, gate_ED, dX_ND, dGate_ED, { beta: beta as 0 | 1 });
          const want = beta === 1 ? dX : dX.map((v, i) => v - old.values[i]);
          close(
            await read(dX_ND),
            want,
            dtype === "bf16" ? 2 ** -8 * Math.ceil(E / 64) : 2e-6,
            "dX",
          );
          outcomes.push(await read(dGate_ED));
        }
        close(outcomes[0], dGate, 3e-6, "dGate");
        assert.deepEqual(outcomes[0], outcomes[1], "dGate is the same every time");
      },
    );
  }
}

for (const dtype of ["bf16", "f32"] as const) {
  Deno.test(`rows and the gate's part are the input's gradient in ${dtype}`, options, async () => {
    const shapes: readonly (readonly [N: number, D: number, E: number, K: number])[] = [
      [1, 8, 1, 1],
      [65, 72, 8, 2],
      [300, 264, 16, 2],
      [77, 520, 12, 4],
      [43, 264, 16, 16],
      [39, 96, 20, 3],
      [50, 304, 32, 8],
      [50, 264, 50, 4],
      [135, 520, 64, 8],
      [21, 64, 100, 9],
      [5, 40, 3, 20],
      [17, 33, 6, 2],
      [0, 16, 4, 2],
      ...smallSizes ? [] : [[1100, 1024, 16, 2], [530, 2048, 64, 8]] as const,
    ];
    for (const [N, D, E, K] of shapes) {
      const next = random(N, "slots");
      const slots = Int32Array.from(
        { length: N * K },
        () => Math.floor(next() * (N * K + 1)) - 1,
      );
      const y = rounded(numbers(1, "y", N * K * D)), old = rounded(numbers(2, "out", N * D));
      const g = numbers(3, "gate", E * D), dL = numbers(4, "dLogits", N * E);
      const bits = dtype === "bf16";
      using y_SD = fromArray(device!, bits ? y.bits : Float32Array.from(y.values), [N * K, D]);
      using slots_NK = fromArray(device!, slots, [N, K]);
      using gate_ED = fromArray(device!, g, [E, D]);
      using dLogits_NE = fromArray(device!, dL, [N, E]);
      for (const beta of [undefined, 1] as const) {
        using out = fromArray(device!, bits ? old.bits : Float32Array.from(old.values), [N, D]);
        routing.combineRowsGate(y_SD, slots_NK, dLogits_NE, gate_ED, out, beta && { beta });
        const got = await read(out), rows = N > 400 ? [0, 1, 257, N - 1] : Array(N).keys();
        for (const n of rows) {
          for (let d = 0; d < D; d++) {
            let want = beta ? old.values[n * D + d] : 0, size = Math.abs(want);
            for (let k = 0; k < K; k++) {
              const slot = slots[n * K + k], value = slot < 0 ? 0 : y.values[slot * D + d];
              want += value;
              size += Math.abs(value);
            }
            for (let e = 0; e < E; e++) {
              const value = dL[n * E + e] * g[e * D + d];
              want += value;
              size += Math.abs(value);
            }
            // More than 64 experts: what is stored in between is rounded, too.
            const rounding = E > 64 ? 2 ** -8 : 2 ** -14;
            const bound = bits ? 2 ** -8 * Math.abs(want) + rounding * size : 1e-6 * size;
            assert.ok(
              Math.abs(got[n * D + d] - want) <= bound,
              `[${n}, ${d}] of [${N}, ${D}], ${E} experts, ${K}: ${got[n * D + d]}, not ${want}`,
            );
          }
        }
      }
    }
  });
}

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
        using records = fromArray(device!, Float64Array.from([...all, ...all]), [2, 3 * E + 2]);
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
        using placed = placeOutline(experts_NK, experts, outlinePlan(input));
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
