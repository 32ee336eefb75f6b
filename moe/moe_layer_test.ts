// The layer's gradients against finite differences in f64, and its invariants: nothing depends on the number of ranks, on where experts
// sit or on the order of tokens. Ranks are async functions in this process; tests/moe_ranks_test.ts runs processes.

import assert from "node:assert/strict";
import fc from "fast-check";
import { loopbackWorld } from "../tests/_loopback.ts";
import {
  alike,
  type Case,
  D,
  type Inputs,
  inputs,
  read,
  ROUTERS,
  run,
} from "../tests/_moe_case.ts";
import { linearBuffer } from "../tensor/cpu/memory.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { Device } from "../tensor/device.ts";
import { empty, fromArray } from "../tensor/tensor.ts";
import { ExpertStore } from "./expert_store.ts";
import type { ExpertPlacement, PlacementPlan } from "./hooks.ts";
import { MoeLayer } from "./moe_layer.ts";
import { replicatedPlacement, staticPlacement } from "./placement.ts";
import { type RoutingRecord, RoutingRecorder, RoutingReplay } from "./routing_record.ts";
import { plainStep } from "./step.ts";

/** Adds to one weight wherever the parameter is held. */
function nudged(c: Case, name: string, index: number, by: number): Case {
  const prepare = async (layer: MoeLayer) => {
    const value = layer.parameters.find((p) => p.name === name)?.value;
    if (!value) return;
    const array = await read(value);
    array[index] += by;
    value.device.write(array, value);
  };
  return { ...c, prepare };
}

for (const [name, router] of Object.entries(ROUTERS)) {
  Deno.test(`gradients are those of finite differences: ${name}`, async () => {
    const batch = inputs(7, 1);
    const c: Case = { router, sharedExperts: name === "softmax" ? 2 : 0 };
    const exact = await run(c, batch), h = 1e-6;
    const check = (analytic: number, above: number, below: number, what: string) => {
      const slope = (above - below) / (2 * h), tolerance = 1e-6 * (1 + Math.abs(slope));
      assert.ok(Math.abs(slope - analytic) < tolerance, `${what}: ${analytic}, not ${slope}`);
    };
    for (let i = 0; i < batch.x.length; i += 3) {
      const loss = async (by: number) => {
        const x = batch.x.map((v, j) => j === i ? v + by : v);
        return (await run(c, { ...batch, x })).loss;
      };
      check(exact.dX[i], await loss(h), await loss(-h), `dX[${i}]`);
    }
    for (const [parameter, grad] of exact.grads) {
      const stride = parameter.includes("gate.weight") ? 5 : 13;
      for (let i = 1; i < grad.length; i += stride) {
        const loss = async (by: number) => (await run(nudged(c, parameter, i, by), batch)).loss;
        check(grad[i], await loss(h), await loss(-h), `${parameter}[${i}]`);
      }
    }
  });

  Deno.test(`nothing depends on the number of ranks or on replicas: ${name}`, async () => {
    const batch = inputs(12, 2), c: Case = { router, sharedExperts: 1 };
    const one = await run(c, batch);
    for (const split of [[6, 6], [3, 3, 3, 3], [0, 7, 1, 4], [0, 0, 12]]) {
      alike(await run(c, batch, split), one, 1e-12);
    }
    for (const replicas of [2, 4]) {
      const replicated = { ...c, placement: replicatedPlacement(replicas) };
      alike(await run(replicated, batch, [2, 5, 4, 1]), one, 1e-12);
    }
  });
}

for (const activation of ["relu", "gelu"] as const) {
  Deno.test(`two-layer experts with ${activation}: gradients, and ranks`, async () => {
    const batch = inputs(6, 3), c: Case = { router: ROUTERS.gshard, activation, sharedExperts: 1 };
    const exact = await run(c, batch), h = 1e-6;
    alike(await run(c, batch, [2, 4]), exact, 1e-12);
    for (const [parameter, grad] of exact.grads) {
      assert.ok(!parameter.includes("w3"));
      for (let i = 2; i < grad.length; i += 7) {
        const loss = async (by: number) => (await run(nudged(c, parameter, i, by), batch)).loss;
        const slope = (await loss(h) - await loss(-h)) / (2 * h);
        assert.ok(Math.abs(slope - grad[i]) < 1e-6 * (1 + Math.abs(slope)), `${parameter}[${i}]`);
      }
    }
  });
}

/** Seats of any kind, replicas that overlap included; rows are split by a rule of (source, expert). */
const anyPlacement = (ranks: number, experts: number): fc.Arbitrary<ExpertPlacement> =>
  fc.array(fc.uniqueArray(fc.nat(ranks - 1), { minLength: 1, maxLength: ranks }), {
    minLength: experts,
    maxLength: experts,
  }).map((homes) => ({
    name: "any",
    plan: (): PlacementPlan => ({
      seats: Array.from({ length: ranks }, (_, r) => {
        return homes.flatMap((on, e) => on.includes(r) ? [e] : []).reverse();
      }),
      split: (source, expert, count) => {
        const rows = new Array<number>(homes[expert].length).fill(0);
        for (let i = 0; i < count; i++) rows[(i + source + expert) % rows.length]++;
        return rows;
      },
    }),
  }));

Deno.test("any seats, replicas and splits give one rank's loss and gradients", async () => {
  const cases = fc.integer({ min: 1, max: 5 }).chain((ranks) =>
    fc.record({
      router: fc.constantFrom(...Object.values(ROUTERS)),
      placement: anyPlacement(ranks, 6),
      split: fc.array(fc.nat(5), { minLength: ranks, maxLength: ranks }),
      seed: fc.nat(),
    })
  );
  await fc.assert(
    fc.asyncProperty(cases, async ({ router, placement, split, seed }) => {
      const batch = inputs(split.reduce((a, b) => a + b, 0), seed);
      const one = await run({ router }, batch);
      alike(await run({ router, placement }, batch, split), one, 1e-11);
    }),
    { numRuns: 100 },
  );
});

Deno.test("nothing depends on the order of tokens but which of them are dropped by position", async () => {
  const batch = inputs(10, 4);
  const order = [3, 9, 0, 6, 1, 8, 2, 5, 7, 4];
  const rows = (a: Float64Array) =>
    Float64Array.from(order.flatMap((n) => [...a.subarray(n * D, (n + 1) * D)]));
  for (const [name, router] of Object.entries(ROUTERS)) {
    if (/position|jitter|noise|second/.test(name)) continue;
    const straight = await run({ router }, batch, [4, 6]);
    const mixed = await run({ router }, { x: rows(batch.x), mix: rows(batch.mix) }, [4, 6]);
    const expected = { ...straight, out: rows(straight.out), dX: rows(straight.dX) };
    alike(mixed, expected, 1e-12);
  }
});

Deno.test("with identity experts and weights that sum to 1, output is input, and so is its gradient", async () => {
  // relu(x) − relu(−x) = x: the hidden width is 2D, up is [1; −1], down is [1, −1].
  const prepare = (layer: MoeLayer) => {
    for (const { name, value } of layer.parameters) {
      const array = new Float64Array(value.size);
      for (let d = 0; d < D; d++) {
        if (name.includes("w1")) [array[d * D + d], array[(d + D) * D + d]] = [1, -1];
        else if (name.includes("w2")) [array[d * 2 * D + d], array[d * 2 * D + d + D]] = [1, -1];
        else array.set([Math.sin(d)], d);
      }
      value.device.write(array, value);
    }
  };
  const identity: Case = {
    router: { kind: "softmax", topK: 3 },
    activation: "relu",
    hidden: 2 * D,
    prepare,
  };
  await fc.assert(
    fc.asyncProperty(fc.array(fc.nat(6), { minLength: 1, maxLength: 4 }), async (split) => {
      const batch = inputs(split.reduce((a, b) => a + b, 0), split.length);
      const { out, dX } = await run(identity, batch, split);
      out.forEach((v, i) => assert.ok(Math.abs(v - batch.x[i]) < 1e-14));
      dX.forEach((v, i) => assert.ok(Math.abs(v - batch.mix[i]) < 1e-12));
    }),
    { numRuns: 40 },
  );
});

Deno.test("a capacity that nobody reaches is dropless, to the bit", async () => {
  const batch = inputs(9, 5);
  for (const drop of ["position", "probability"] as const) {
    const router = { kind: "softmax", topK: 2 } as const;
    const ample = { ...router, capacityFactor: 3, drop }; // E / K rows per token
    const { log: _, ...dropless } = await run({ router }, batch, [4, 5]);
    const { log: __, ...roomy } = await run({ router: ample }, batch, [4, 5]);
    assert.deepEqual(roomy, dropless);
  }
});

Deno.test("a dropped choice adds nothing to the output and gets no gradient", async () => {
  const batch = inputs(8, 6);
  const router = { kind: "switch", capacityFactor: 0.01 } as const; // one row per expert
  const { out, counts, dropped, dX } = await run({ router }, batch, [3, 5]);
  const kept = counts.filter((n) => n > 0).length;
  assert.equal(dropped, 8 - kept);
  const silent = (a: Float64Array) =>
    Array.from({ length: 8 }, (_, n) => a.subarray(n * D, (n + 1) * D).every((v) => v === 0))
      .filter(Boolean).length;
  assert.equal(silent(out), dropped);
  assert.equal(silent(dX), dropped);
});

Deno.test("memory poisoned with NaN changes no bit", async () => {
  const cpu = cpuDevice();
  const poisoned: Device = {
    ...cpu,
    allocate(bytes) {
      const at = cpu.allocate(bytes);
      new Uint8Array(linearBuffer(), at, Math.ceil(bytes / 64) * 64).fill(0xff);
      return at;
    },
  };
  const batch = inputs(11, 7);
  for (const router of Object.values(ROUTERS)) {
    for (const split of [[11], [5, 0, 6]]) {
      const c: Case = { router, sharedExperts: 1, dtype: "f32" };
      assert.deepEqual(
        await run({ ...c, device: poisoned }, batch, split),
        await run(c, batch, split),
      );
    }
  }
});

Deno.test("all ranks call the same collectives wherever the tokens are", async () => {
  // All tokens alike: every choice of a top-1 router falls on one expert.
  const same = (n: number): Inputs => ({
    x: new Float64Array(n * D).fill(1),
    mix: inputs(n, 8).mix,
  });
  for (const router of Object.values(ROUTERS)) {
    const { log } = await run({ router, experts: 6 }, inputs(8, 8), [2, 2, 4]);
    assert.equal(log.filter((name) => name === "allToAllV").length, 4);
    const capped = "capacityFactor" in router && router.kind !== "expertChoice";
    for (const split of [[8, 0, 0], [0, 0, 8], [0, 8, 0], [0, 0, 0]]) {
      const n = split.reduce((a, b) => a + b, 0);
      for (const batch of [inputs(n, 9), same(n)]) {
        const again = await run({ router, experts: 6 }, batch, split);
        // Drops by probability ask for scores only if an expert is over its capacity, which all ranks know.
        if (!capped) assert.deepEqual(again.log, log);
      }
    }
  }
  const { counts } = await run({ router: { kind: "switch" } }, same(8), [8, 0]);
  assert.deepEqual(counts.toSorted(), [0, 0, 0, 0, 0, 8]);
  const alone = await run({ router: { kind: "softmax", topK: 2 } }, inputs(8, 8), [8]);
  assert.ok(!alone.log.includes("allToAllV") && !alone.log.includes("allGather"));
});

Deno.test("experts that move keep their weights, and the layer its output", async () => {
  const seats = fc.array(fc.uniqueArray(fc.nat(2), { minLength: 1 }), {
    minLength: 4,
    maxLength: 4,
  }).map((homes) => [0, 1, 2].map((r) => homes.flatMap((on, e) => on.includes(r) ? [e] : [])));
  await fc.assert(
    fc.asyncProperty(fc.array(seats, { minLength: 1, maxLength: 4 }), async (moves) => {
      let step = 0;
      const placement: ExpertPlacement = {
        name: "moving",
        plan: (context) => {
          const plan = staticPlacement().plan(context);
          if (context.counts === null) return plan; // at construction
          const even = (source: number, e: number, count: number) => {
            const on = moves[step].filter((held) => held.includes(e)).length;
            return Array.from({ length: on }, (_, i) => {
              return Math.floor((count + (i + source) % on) / on);
            });
          };
          return { seats: moves[step], split: even };
        },
      };
      const batch = inputs(6, 10), router = { kind: "softmax", topK: 2 } as const;
      const still = await run({ router, experts: 4, training: false }, batch);
      const world = loopbackWorld(3);
      const device = cpuDevice();
      const layers = world.ranks.map((comm) =>
        new MoeLayer({
          device,
          comm,
          layer: 3,
          width: D,
          hidden: 5,
          experts: 4,
          router,
          placement,
          seed: 11,
          initStd: 0.7,
          dtype: "f64",
        })
      );
      const first = new Map<string, Float64Array>();
      const parameters = () => layers.flatMap((layer) => layer.store.parameters);
      for (const { name, value } of parameters()) first.set(name, await read(value));
      for (step = 0; step < moves.length; step++) {
        const parts = await Promise.all(layers.map(async (layer, rank) => {
          using x = fromArray(device, batch.x.slice(rank * 2 * D, (rank + 1) * 2 * D), [2, D]);
          using out = (await layer.forward(x, plainStep(device))).out_ND;
          return [...await read(out)];
        }));
        parts.flat().forEach((v, i) => assert.ok(Math.abs(v - still.out[i]) < 1e-12));
        layers.forEach(({ store }, r) => {
          assert.deepEqual(store.seats, moves[step]);
          assert.equal(store.parameters.length, 3 * moves[step][r].length);
        });
        for (const { name, value } of parameters()) {
          assert.deepEqual(await read(value), first.get(name));
        }
      }
      for (const layer of layers) layer[Symbol.dispose]();
    }),
    { numRuns: 40 },
  );
});

Deno.test("experts take memory for gradients only once training asks for them", async () => {
  const device = cpuDevice(), size = 2 * 5 * D;
  const used = () => device.memory().used_bytes;
  const before = used(), one = empty(device, [size], "f32"), bytes = used() - before;
  one[Symbol.dispose]();
  await loopbackWorld(2).run(async (comm) => {
    using store = new ExpertStore({
      device,
      comm,
      layer: 0,
      experts: 2,
      width: D,
      hidden: 5,
      activation: "relu",
      dtype: "f32",
      seats: [[0], [1]],
      seed: 1,
      initStd: 1,
      downStd: 1,
    });
    const meet = () => comm.allReduce(new Float64Array(1));
    await store.moveTo([[0, 1], [0, 1]]);
    await meet();
    assert.equal(used() - before, 4 * bytes);
    await meet();
    for (const { grad } of store.parameters) assert.ok((await read(grad)).every((g) => g === 0));
    await meet();
    assert.equal(used() - before, 8 * bytes);
    await meet();
  });
  assert.equal(used(), before);
});

Deno.test("in training, experts do not move within a step", async () => {
  const placement: ExpertPlacement = {
    name: "restless",
    plan: ({ counts }) => ({ seats: [counts ? [1, 0] : [0, 1]], split: (_s, _e, n) => [n] }),
  };
  await assert.rejects(
    run({ router: { kind: "switch" }, experts: 2, placement }, inputs(3, 1)),
    /Cannot train layer 3 as experts must stay in their seats within a step.*"restless"/,
  );
});

Deno.test("a recorded routing replays on any number of ranks, with the same loss and gradients", async () => {
  const batch = inputs(10, 12);
  for (const name of ["gshard, second sampled", "softmax", "sigmoid", "expert choice"]) {
    const router = ROUTERS[name];
    const recorders = [new RoutingRecorder(), new RoutingRecorder()];
    const recorded = await run(
      { router, prepare: (layer, comm) => void (layer.tap = recorders[comm.rank]) },
      batch,
      [4, 6],
    );
    const [record] = await loopbackWorld(2).run((comm) => recorders[comm.rank].gather(comm, 6));
    for (const split of [[10], [4, 6], [1, 2, 7]]) {
      const prepare = (layer: MoeLayer) => void (layer.tap = new RoutingReplay(record));
      alike(await run({ router, prepare }, batch, split), recorded, 1e-12);
    }
  }
  const reversed: RoutingRecord = {
    experts: 6,
    choices: 1,
    blocks: [{ pass: 0, layer: 3, experts_NK: new Uint16Array([5, 4, 3, 2, 1, 0, 0, 0, 0, 0]) }],
  };
  const prepare = (layer: MoeLayer) => void (layer.tap = new RoutingReplay(reversed));
  const { counts } = await run({ router: { kind: "switch" }, prepare }, batch, [5, 5]);
  assert.deepEqual(counts, [5, 1, 1, 1, 1, 1]);
  await assert.rejects(
    run({ router: { kind: "switch" }, experts: 5, prepare }, batch, [5, 5]),
    /Cannot replay a routing as its experts must be in 0..4, or -1 for none: current value is 5/,
  );
});

Deno.test("the selection bias follows the load of all ranks and passes of a step", async () => {
  const router = { kind: "sigmoid", topK: 2, biasRate: 0.1 } as const;
  const biases: Float64Array[] = [];
  for (const split of [[8], [3, 5]]) {
    const layers: MoeLayer[] = [];
    const total = new Float64Array(6);
    const { counts } = await run(
      { router, prepare: (layer) => void layers.push(layer) },
      inputs(8, 13),
      split,
    );
    counts.forEach((n, e) => total[e] += n);
    for (const layer of layers) layer.endStep();
    const mean = total.reduce((a, b) => a + b, 0) / 6;
    for (const { bias } of layers) {
      assert.deepEqual([...bias], [...total].map((n) => 0.1 * Math.sign(mean - n)));
    }
    layers[0].endStep(); // nothing has been counted since
    assert.deepEqual(layers[0].bias, layers[layers.length - 1].bias);
    biases.push(layers[0].bias);
  }
  assert.deepEqual(biases[0], biases[1]);
});

Deno.test("the auxiliary losses' gradient is scaled by auxScale, and by nothing else", async () => {
  const router = { ...ROUTERS.softmax }, batch = inputs(6, 14);
  const gate = "model.layers.3.block_sparse_moe.gate.weight";
  const gateAt = async (auxScale: number) => {
    const prepare = (layer: MoeLayer) => void (layer.auxScale = auxScale);
    return (await run({ router, prepare }, batch, [2, 4])).grads.get(gate)!;
  };
  const [none, half, whole] = [await gateAt(0), await gateAt(0.5), await gateAt(1)];
  half.forEach((v, i) => assert.ok(Math.abs(v - (none[i] + whole[i]) / 2) < 1e-12));
  assert.notDeepEqual(none, whole);
});

Deno.test("layers refuse what they cannot do, saying what to do", async () => {
  const make = (ranks: number, options: object) => () => {
    using _ = new MoeLayer({
      device: cpuDevice(),
      comm: loopbackWorld(ranks).ranks[0],
      layer: 0,
      width: 4,
      hidden: 4,
      experts: 4,
      router: { kind: "switch" },
      ...options,
    });
  };
  assert.doesNotThrow(make(4, {}));
  assert.throws(make(8, {}), {
    message: "Cannot place experts as every rank must hold one, so 8 ranks need at least 8 " +
      "experts: current value is 4; use fewer ranks, more experts or replicas",
  });
  assert.throws(make(1, { router: { kind: "softmax", topK: 5 } }), /in 1..4.*current value is 5/);
  assert.throws(make(1, { width: 0 }), /width must be a whole number >= 1: current value is 0/);
  assert.throws(make(1, { sharedExperts: 0.5 }), /sharedExperts must be a whole number >= 0/);
  assert.throws(make(1, { experts: 1.5 }), /experts must be a whole number >= 1/);
  const bad = (seats: number[][]) => ({ name: "bad", plan: () => ({ seats, split: () => [] }) });
  assert.throws(
    make(2, { placement: bad([[0, 1, 2, 3]]) }),
    /must have 2 ranks: current value is 1/,
  );
  assert.throws(make(2, { placement: bad([[0, 1], [2]]) }), /current value is none for expert 3/);
  using layer = new MoeLayer({
    device: cpuDevice(),
    comm: loopbackWorld(1).ranks[0],
    layer: 0,
    width: 4,
    hidden: 4,
    experts: 4,
    router: { kind: "switch" },
  });
  using narrow = fromArray(cpuDevice(), new Float32Array(6), [2, 3]);
  await assert.rejects(
    layer.forward(narrow, plainStep(cpuDevice())),
    /Cannot run layer 0 as its input must be f32 \[N,4\]: current value is f32 \[2,3\]/,
  );
});
