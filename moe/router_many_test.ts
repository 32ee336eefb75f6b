// Routing kernels of the GPU (or its emulator) with more tokens than a launch has threads for, or a tile of the sort has threads: what each token
// gets must not depend on how many there are. That it is right for few is router_device_test.ts.

import assert from "node:assert/strict";
import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import * as routing from "../tensor/ops/routing.ts";
import { empty, fromArray, zeros } from "../tensor/tensor.ts";
import { testDevice } from "../tests/emulator/device.ts";
import { normal, random } from "./init.ts";
import { createRouter } from "./router.ts";
import { routeOptionsOf } from "./router_device.ts";

const device = await testDevice() as Device | null;
const options = { ignore: !device };

/** Equal bits. Not `deepEqual`, which takes minutes to describe long arrays that differ. */
function same(got: ArrayLike<number>, want: ArrayLike<number>, what: string): void {
  assert.equal(got.length, want.length, what);
  for (let i = 0; i < want.length; i++) {
    if (!Object.is(got[i], want[i])) assert.fail(`${what}[${i}] is ${got[i]}, not ${want[i]}`);
  }
}

const numbers = (name: string, size: number) =>
  normal(random(7, name), size, { dtype: "f32" }) as Float32Array;

Deno.test(
  "tokens beyond the blocks of a launch are routed as they are alone",
  options,
  async () => {
    // So many experts take a warp for a token: 8 tokens a block, 256 blocks forward and 1024 backward.
    const N = 8300, E = 136, K = 8, part = 4150;
    const router = createRouter({ kind: "softmax", topK: K, renormalise: true }, E);
    const o = { ...routeOptionsOf(router), auxLoss: 0.7, zLoss: 0.3, ranks: 1 };
    using logits_NE = fromArray(device!, numbers("logits", N * E), [N, E]);
    using dWeights_NK = fromArray(device!, numbers("dWeights", N * K), [N, K]);
    using all = empty(device!, [3 * E + 2], "f64");
    const pass = async (from: number, to: number) => {
      const n = to - from;
      using experts = empty(device!, [n, K], "i32");
      using weights = empty(device!, [n, K]);
      using lse = empty(device!, [n]);
      using own = empty(device!, [3 * E + 2], "f64");
      using dLogits_NE = empty(device!, [n, E]);
      const logits = logits_NE.rows(from, to), record = n === N ? all : own;
      routing.route(logits, null, o, { experts, weights, lse, record });
      const saved = { logits, lse, experts, records: all.reshape(1, all.size) };
      routing.routeBackward(dWeights_NK.rows(from, to), saved, o, dLogits_NE);
      const results = [experts, weights, lse, dLogits_NE, record].map((x) => x.toArray());
      return (await Promise.all(results)).map((x) => Float64Array.from(x as Float32Array));
    };
    const whole = await pass(0, N), parts = [await pass(0, part), await pass(part, N)];
    for (const [i, what] of ["experts", "weights", "lse", "gradient"].entries()) {
      same(whole[i], parts.flatMap((p) => [...p[i]]), what);
    }
    const counts = (record: Float64Array) => record.slice(0, 2 * E);
    const sum = counts(parts[0][4]).map((n, i) => n + parts[1][4][i]);
    same(counts(whole[4]), sum, "record");
  },
);

Deno.test("rows are placed in a stable order from tiles of any size", options, async () => {
  const E = 11, K = 4;
  for (const N of [8200, 17_001, 35_001]) { // tiles of 512, 768 and 1280 choices
    const next = random(N, "choices"), weights = numbers("weights", N * K);
    const chosen = Int32Array.from(weights, () => Math.floor(next() * (E + 1)) - 1);
    const starts = new Int32Array(E + 1);
    for (const e of chosen) if (e >= 0) starts[e + 1]++;
    for (let e = 0; e < E; e++) starts[e + 1] += starts[e];
    const places = starts.slice(), slots = new Int32Array(N * K).fill(-1);
    const tokens = new Int32Array(starts[E]), scales = new Float32Array(starts[E]);
    chosen.forEach((e, i) => {
      if (e < 0) return;
      slots[i] = places[e]++;
      tokens[slots[i]] = Math.floor(i / K);
      scales[slots[i]] = weights[i];
    });
    using experts = fromArray(device!, chosen, [N, K]);
    using weights_NK = fromArray(device!, weights, [N, K]);
    using slots_NK = empty(device!, [N, K], "i32");
    using tokens_S = empty(device!, [tokens.length], "i32");
    using scales_S = empty(device!, [tokens.length]);
    using offsets = empty(device!, [E + 1], "i32");
    const out = { slots: slots_NK, tokens: tokens_S, offsets, scales: scales_S };
    routing.placeRows(experts, { experts: E, starts: null, weights: weights_NK }, out);
    const results = [slots_NK, tokens_S, scales_S, offsets].map((x) => x.toArray());
    const got = (await Promise.all(results)) as Int32Array[];
    [slots, tokens, scales, starts].forEach((want, i) => {
      same(got[i], want, `${["slots", "tokens", "scales", "offsets"][i]} of ${N} tokens`);
    });
  }
});

Deno.test("a sort of many rows by their numbers loses none", options, async () => {
  const N = 140_000, V = 1500, next = random(3, "rows");
  const keys = Int32Array.from({ length: N }, () => Math.floor(next() * (V + 1)) - 1);
  const values = Float32Array.from(keys, () => Math.floor(next() * 64)); // sums are exact
  const want = new Float32Array(V);
  keys.forEach((key, i) => key >= 0 && (want[key] += values[i]));
  using x = fromArray(device!, values, [N, 1]);
  using rows = fromArray(device!, keys);
  using sums = zeros(device!, [V, 1]);
  ops.scatterAddRows(x, rows, sums);
  same(await sums.toArray() as Float32Array, want, "sums");
});
