// The MoE layer with tokens that travel in slices: output, losses, load and gradients are those of one slice, for every router, any number of
// ranks and tokens, and with capacity; every choice travels once; what a step is told, and in which order; and nothing leaks when a pass fails
// half-way. The GPU's way is in moe_layer_device_test.ts, real ranks in tests/moe_chunks_test.ts.

import assert from "node:assert/strict";
import fc from "fast-check";
import type { Communicator } from "../collectives/types.ts";
import { loopbackWorld } from "../tests/_loopback.ts";
import {
  alike,
  type Case,
  D,
  inputs,
  join,
  read,
  ROUTERS,
  run,
  runRank,
} from "../tests/_moe_case.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { Device } from "../tensor/device.ts";
import { fromArray, type Tensor } from "../tensor/tensor.ts";
import { normal, random } from "./init.ts";
import { MoeLayer, type RowExchange } from "./moe_layer.ts";
import { replicatedPlacement, staticPlacement } from "./placement.ts";
import { createRouter } from "./router.ts";
import { routeGlobally } from "./router_exchange.ts";
import { RoutingRecorder, RoutingReplay } from "./routing_record.ts";
import { dropShown } from "./shown.ts";
import { sliceBounds } from "./slices.ts";
import { plainStep, type Step } from "./step.ts";

const device = cpuDevice();

for (const [name, router] of Object.entries(ROUTERS)) {
  Deno.test(`slices change nothing but the order of sums: ${name}`, async () => {
    const batch = inputs(12, 21);
    for (const split of [[12], [6, 6], [0, 12], [3, 3, 3, 3], [0, 7, 1, 4]]) {
      for (const more of [{}, { firstPass: true, sharedExperts: 1 }]) {
        const c: Case = { router, ...more };
        const whole = await run(c, batch, split);
        for (const chunks of [2, 3, 5]) {
          const cut = await run({ ...c, chunks }, batch, split);
          alike(cut, whole, 1e-13);
          assert.equal(cut.loss.toPrecision(12), whole.loss.toPrecision(12));
          const travels = split.length > 1 ? 4 * chunks : 0;
          assert.equal(cut.log.filter((what) => what === "allToAllV").length, travels);
          const others = (log: readonly string[]) => log.filter((what) => what !== "allToAllV");
          assert.deepEqual(others(cut.log), others(whole.log), "one exchange of counts");
          const prepare = (layer: MoeLayer) => void (layer.weightGradientsBehind = true);
          const behind = await run({ ...c, chunks, prepare }, batch, split);
          assert.deepEqual(behind, cut, "the same bits in another order");
        }
      }
    }
    const whole = await run({ router, dtype: "f32" }, batch, [5, 7]);
    alike(await run({ router, dtype: "f32", chunks: 3 }, batch, [5, 7]), whole, 1e-6);
    const placement = replicatedPlacement(2);
    alike(
      await run({ router, placement, chunks: 3 }, batch, [2, 5, 4, 1]),
      await run({ router }, batch),
      1e-12,
    );
    for (const split of [[0, 0], [0, 0, 1]]) {
      const few = inputs(split.length - 2, 5), c: Case = { router, firstPass: true };
      alike(await run({ ...c, chunks: 4 }, few, split), await run(c, few, split), 1e-13);
    }
  });
}

for (const name of ["softmax", "sigmoid", "gshard, capacity by probability"]) {
  Deno.test(`gradients in slices are those of finite differences: ${name}`, async () => {
    const batch = inputs(7, 1), c: Case = { router: ROUTERS[name], chunks: 3 }, h = 1e-6;
    const exact = await run(c, batch, [2, 5]);
    const check = async (analytic: number, nudge: (by: number) => Promise<number>) => {
      const slope = (await nudge(h) - await nudge(-h)) / (2 * h);
      assert.ok(Math.abs(slope - analytic) < 1e-6 * (1 + Math.abs(slope)), `${analytic}, ${slope}`);
    };
    for (let i = 0; i < batch.x.length; i += 5) {
      await check(exact.dX[i], async (by) => {
        const x = batch.x.map((v, j) => j === i ? v + by : v);
        return (await run(c, { ...batch, x }, [2, 5])).loss;
      });
    }
    for (const [parameter, grad] of exact.grads) {
      for (let i = 1; i < grad.length; i += 17) {
        await check(grad[i], async (by) => {
          const prepare = async (layer: MoeLayer) => {
            const value = layer.parameters.find((p) => p.name === parameter)?.value;
            if (!value) return;
            const array = await read(value);
            array[i] += by;
            value.device.write(array, value);
          };
          return (await run({ ...c, prepare }, batch, [2, 5])).loss;
        });
      }
    }
  });
}

Deno.test("every choice is in one slice of its rank, and the counts are those of the slices", async () => {
  const cases = fc.record({
    router: fc.constantFrom(...Object.values(ROUTERS)),
    split: fc.array(fc.nat(9), { minLength: 1, maxLength: 4 }),
    slices: fc.integer({ min: 1, max: 6 }),
    seed: fc.nat(),
  });
  await fc.assert(
    fc.asyncProperty(cases, async ({ router, split, slices, seed }) => {
      const E = 6, made = createRouter(router, E);
      const route = (slices: number) =>
        loopbackWorld(split.length).run((comm) => {
          const logits = normal(random(seed, `${comm.rank}`), split[comm.rank] * E, {
            dtype: "f64",
          }) as Float64Array;
          return routeGlobally({
            comm,
            router: made,
            bias_E: new Float64Array(E),
            training: true,
            seeds: { seed: 1, step: 2, layer: 3 },
            replay: null,
            slices,
          }, logits);
        });
      const cut = await route(slices), whole = await route(1);
      cut.forEach((got, rank) => {
        const { kept_NK, routing: { choices }, counts_CRE, ...rest } = got;
        assert.deepEqual(kept_NK, whole[rank].kept_NK, "what is dropped is a matter of the batch");
        assert.deepEqual(rest.chosen_E, whole[rank].chosen_E);
        assert.equal(rest.dropped, whole[rank].dropped);
        assert.deepEqual(rest.sums, whole[rank].sums);
        assert.deepEqual(counts_CRE, cut[0].counts_CRE);
        assert.equal(counts_CRE.length, slices);
        const bounds = sliceBounds(split[rank], slices);
        assert.deepEqual([bounds[0], bounds[slices]], [0, split[rank]]);
        for (let c = 0; c < slices; c++) {
          const counted = new Int32Array(E);
          for (const e of kept_NK.subarray(bounds[c] * choices, bounds[c + 1] * choices)) {
            if (e >= 0) counted[e]++;
          }
          assert.deepEqual(counts_CRE[c].slice(rank * E, (rank + 1) * E), counted);
        }
      });
    }),
    { numRuns: 150 },
  );
});

Deno.test("a routing recorded in one slice replays in any number of them", async () => {
  const batch = inputs(10, 12), router = ROUTERS.softmax;
  const recorders = [new RoutingRecorder(), new RoutingRecorder()];
  const prepare = (layer: MoeLayer, comm: Communicator) => void (layer.tap = recorders[comm.rank]);
  const recorded = await run({ router, prepare, chunks: 2 }, batch, [4, 6]);
  const [record] = await loopbackWorld(2).run((comm) => recorders[comm.rank].gather(comm, 6));
  for (const chunks of [1, 2, 3]) {
    const replay = (layer: MoeLayer) => void (layer.tap = new RoutingReplay(record));
    alike(await run({ router, prepare: replay, chunks }, batch, [4, 6]), recorded, 1e-12);
  }
});

/** A layer of two-layer experts on a rank. */
function makeLayer(comm: Communicator, on: Device = device, behind = false): MoeLayer {
  const layer = new MoeLayer({
    device: on,
    comm,
    layer: 3,
    width: D,
    hidden: 5,
    experts: 4,
    router: { kind: "softmax", topK: 2 },
    sharedExperts: 1,
    seed: 1,
  });
  layer.weightGradientsBehind = behind;
  return layer;
}

/** A step that writes down what it is told. */
function telling(told: string[], chunks: number): Step {
  const plain = plainStep(device, {
    training: true,
    firstPass: true,
    chunks: new Map([[3, chunks]]),
  });
  return {
    ...plain,
    async allToAll(where, start) {
      const what = `${where.phase} ${where.role} ${where.chunk}`;
      told.push(`${what} starts`);
      const ended = await plain.allToAll(where, start);
      return async () => {
        await ended();
        told.push(`${what} ends`);
      };
    },
    combineBackwardStarts: () => told.push("combine's backward starts"),
    layerBackwardEnds: () => told.push("layer's backward ends"),
    gradientReady: (name) =>
      told.push(`ready ${name.replace(/.*experts\.(\d)\.(\w+).*/, "$1 $2")}`),
  };
}

function rowsOf(x: Float64Array, on: Device = device): Tensor {
  return fromArray(on, Float32Array.from(x), [x.length / D, D]);
}

Deno.test("all dispatches start first, each combine behind its experts; gradients are ready with the last", async () => {
  for (const behind of [false, true]) {
    for (const [size, chunks] of [[1, 1], [1, 2], [2, 1], [2, 2], [2, 3]]) {
      const all = await loopbackWorld(size).run(async (comm) => {
        const told: string[] = [], step = telling(told, chunks);
        using layer = makeLayer(comm, device, behind);
        using x = rowsOf(inputs(4 - comm.rank, 1).x);
        const { out_ND, saved, shown } = await layer.forward(x, step);
        dropShown([shown]);
        out_ND[Symbol.dispose]();
        (await layer.backward(x, saved, step))[Symbol.dispose]();
        return { told, experts: layer.store.parameters.length };
      });
      const each = (text: (c: number) => string[]) =>
        Array.from({ length: chunks }, (_, c) => text(c)).flat();
      for (const { told, experts } of all) {
        const half = (phase: string, there: string, back: string, ready: string[]) => [
          ...each((c) => [`${phase} ${there} ${c} starts`]),
          ...each((c) => [
            `${phase} ${there} ${c} ends`,
            ...(c === chunks - 1 && !(behind && chunks > 1) ? ready : []),
            `${phase} ${back} ${c} starts`,
            ...(c === chunks - 1 && behind && chunks > 1 ? ready : []),
          ]),
          ...each((c) => [`${phase} ${back} ${c} ends`]),
        ];
        const ready = told.filter((what) => /^ready \d/.test(what));
        assert.equal(ready.length, experts);
        const all = [
          ...half("forward", "dispatch", "combine", []),
          "combine's backward starts",
          ...half("backward", "combine", "dispatch", ready),
        ];
        assert.deepEqual(told.slice(0, all.length), all);
        assert.equal(told.at(-1), "layer's backward ends");
      }
    }
  }
});

Deno.test("an exchange gets the rows between all ranks, alike on all, and takes the all-to-all's place", async () => {
  const batch = inputs(11, 3), split = [4, 0, 7];
  for (const chunks of [1, 3]) {
    const c: Case = { router: ROUTERS.softmax, chunks };
    const plain = await run(c, batch, split), matrices: (readonly number[])[][] = [[], [], []];
    const parts = await loopbackWorld(3).run((comm) => {
      const exchange: RowExchange = {
        allToAllV(send, counts_RR, recv, options) {
          matrices[comm.rank].push(counts_RR);
          const of = (at: (r: number) => number) => [0, 1, 2].map((r) => counts_RR[at(r)]);
          const sent = of((r) => comm.rank * 3 + r), received = of((r) => r * 3 + comm.rank);
          return comm.allToAllV(send, sent, recv, received, options);
        },
      };
      const prepare = (layer: MoeLayer) => void (layer.exchange = exchange);
      return runRank({ ...c, prepare }, batch, split, comm);
    });
    const { log: _, ...want } = plain;
    assert.deepEqual(join(parts), want);
    assert.deepEqual([matrices[1], matrices[2]], [matrices[0], matrices[0]]);
    assert.equal(matrices[0].length, 4 * chunks);
  }
});

Deno.test("a number of chunks that is none is refused", async () => {
  using layer = makeLayer(loopbackWorld(1).ranks[0]);
  using x = rowsOf(inputs(3, 1).x);
  for (const chunks of [0, 1.5, NaN]) {
    const step = plainStep(device, { chunks: new Map([[3, chunks]]) });
    await assert.rejects(
      layer.forward(x, step),
      /Cannot run layer 3 in chunks as their number must/,
    );
  }
});

Deno.test("experts that move between steps are trained where they sit then", async () => {
  const batch = inputs(8, 6);
  const whole = await run({ router: ROUTERS.softmax, chunks: 2 }, batch, [2, 2, 2, 2]);
  const prepare = async (layer: MoeLayer) => {
    const { parameters } = layer;
    await layer.moveExperts(replicatedPlacement(2));
    assert.notEqual(layer.parameters, parameters);
    assert.deepEqual(layer.store.seats, [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]);
    const held = layer.parameters;
    await layer.moveExperts(replicatedPlacement(2)); // they sit so already
    assert.equal(layer.parameters, held);
  };
  alike(
    await run({ router: ROUTERS.softmax, prepare, chunks: 3 }, batch, [2, 2, 2, 2]),
    whole,
    1e-12,
  );
  const back = async (layer: MoeLayer) => {
    await prepare(layer);
    await layer.moveExperts(staticPlacement());
  };
  alike(await run({ router: ROUTERS.softmax, prepare: back }, batch, [2, 2, 2, 2]), whole, 1e-12);
});

Deno.test("no memory at any point of a pass in slices: the error comes through, nothing leaks", async () => {
  const cpu = cpuDevice();
  let left = Infinity;
  const failing: Device = {
    ...cpu,
    allocate(bytes) {
      if (--left < 0) throw new RangeError("no memory");
      return cpu.allocate(bytes);
    },
  };
  const pass = async (layer: MoeLayer, x: Tensor) => {
    const step = plainStep(failing, { training: true, firstPass: true, chunks: new Map([[3, 3]]) });
    const { out_ND, saved, shown } = await layer.forward(x, step);
    dropShown([shown]);
    out_ND[Symbol.dispose]();
    try {
      (await layer.backward(x, saved, step))[Symbol.dispose]();
    } catch (error) {
      layer.release(saved);
      throw error;
    }
  };
  for (const behind of [false, true]) {
    using layer = makeLayer(loopbackWorld(1).ranks[0], failing, behind);
    using x = rowsOf(inputs(7, 2).x, failing);
    await pass(layer, x); // gradients have their memory now
    const before = cpu.memory().used_bytes;
    let failures = 0;
    for (let first = 0;; first++) {
      left = first;
      const error = await pass(layer, x).then(() => null, (error) => error);
      left = Infinity;
      await new Promise((resolve) => setTimeout(resolve)); // what was dropped arrives
      assert.equal(cpu.memory().used_bytes, before, `allocation ${first}`);
      if (error === null) break;
      assert.match(error.message, /no memory/);
      failures++;
    }
    assert.ok(failures > 40, `${failures} allocations`);
  }
});

Deno.test("among ranks, what travels when a chunk's experts fail is freed once it has arrived", async () => {
  const before = device.memory().used_bytes;
  for (const phase of ["forward", "backward"] as const) {
    for (let chunk = 0; chunk < 3; chunk++) {
      await loopbackWorld(2).run(async (comm) => {
        using layer = makeLayer(comm, device, chunk > 0);
        using x = rowsOf(inputs(9, comm.rank).x);
        const plain = plainStep(device, { training: true, chunks: new Map([[3, 3]]) });
        const step: Step = {
          ...plain,
          async allToAll(where, start) {
            const ended = await plain.allToAll(where, start);
            const fails = where.phase === phase && where.chunk === chunk &&
              where.role === (phase === "forward" ? "dispatch" : "combine");
            return async () => {
              await ended();
              if (fails) throw new Error("no more");
            };
          },
        };
        const forward = layer.forward(x, step);
        if (phase === "forward") await assert.rejects(forward, /no more/);
        else {
          const { out_ND, saved, shown } = await forward;
          dropShown([shown]);
          out_ND[Symbol.dispose]();
          await assert.rejects(layer.backward(x, saved, step), /no more/);
          layer.release(saved);
        }
        await comm.allReduce(new Float64Array(1)); // behind what travels
      });
    }
  }
  await new Promise((resolve) => setTimeout(resolve));
  assert.equal(device.memory().used_bytes, before);
});
