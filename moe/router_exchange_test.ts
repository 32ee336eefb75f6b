import assert from "node:assert/strict";
import type { Communicator } from "../collectives/types.ts";
import { createRouter, routeBackward, type RouterOptions } from "./router.ts";
import { routeGlobally, type RoutingContext } from "./router_exchange.ts";

const E = 4;

function context(options: RouterOptions, more: Partial<RoutingContext> = {}): RoutingContext {
  return {
    comm: { rank: 0, size: 1 } as Communicator,
    router: createRouter(options, E),
    bias_E: new Float64Array(E),
    training: true,
    seeds: { seed: 2, step: 1, layer: 0 },
    replay: null,
    ...more,
  };
}

/** Every token has probabilities in the ratio 6 : 3 : 2 : 1. */
function logits(tokens: number): Float64Array {
  return Float64Array.from({ length: tokens * E }, (_, i) => Math.log([6, 3, 2, 1][i % E]));
}

Deno.test("gshard: a second expert that is not kept at random leaves the first its weight", async () => {
  const n = 20_000, random = { kind: "gshard", second: "random" } as const;
  const all = await routeGlobally(context(random), logits(n));
  const { routing, kept_NK } = all;
  for (let i = 0; i < kept_NK.length; i++) {
    assert.ok(kept_NK[i] === i % 2 || (i % 2 === 1 && kept_NK[i] === -1));
    assert.ok(Math.abs(routing.weights_NK[i] - [6 / 9, 3 / 9][i % 2]) < 1e-12);
  }
  const kept = kept_NK.filter((e) => e === 1).length;
  assert.ok(Math.abs(kept / n - 2 * 3 / 9) < 0.02, `${kept}`); // 2 · weight
  assert.deepEqual([...all.counts_CRE[0]], [n, kept, 0, 0]);
  assert.equal(all.dropped, 0);
  // The first expert's weight falls as the second's logit rises, whether the second is kept or not.
  const dWeights = Float64Array.from(kept_NK, (e, i) => e < 0 || i % 2 === 1 ? 0 : 1);
  const dLogits = routeBackward(context(random).router, routing, dWeights, {
    sums: all.sums,
    scale: 1,
  });
  dLogits.forEach((d, i) => assert.ok(Math.abs(d - [2 / 9, -2 / 9, 0, 0][i % E]) < 1e-12));
  const inference = await routeGlobally(context(random, { training: false }), logits(9));
  assert.ok(inference.kept_NK.every((e, i) => e === i % 2));
});

Deno.test("capacity is for training: inference drops nothing", async () => {
  for (const drop of ["position", "probability"] as const) {
    const router = { kind: "softmax", topK: 2, capacityFactor: 1, drop } as const;
    const training = await routeGlobally(context(router), logits(8));
    assert.equal(training.dropped, 8);
    const inference = await routeGlobally(context(router, { training: false }), logits(8));
    assert.equal(inference.dropped, 0);
    assert.deepEqual([...inference.counts_CRE[0]], [8, 8, 0, 0]);
  }
});

Deno.test("a replayed routing must give a token an expert once", async () => {
  const replay = (...experts: number[]) => () => ({
    choices: 2,
    experts_NK: Int32Array.from(experts),
  });
  const router = { kind: "softmax", topK: 2 } as const;
  const run = (...experts: number[]) =>
    routeGlobally(context(router, { replay: replay(...experts) }), logits(2));
  assert.deepEqual([...(await run(1, 0, 1, -1)).kept_NK], [1, 0, 1, -1]);
  assert.deepEqual([...(await run(-1, -1, 0, 1)).kept_NK], [-1, -1, 0, 1]);
  await assert.rejects(
    run(1, 0, 2, 2),
    /must have an expert once: current value is expert 2 twice for token 1/,
  );
});
