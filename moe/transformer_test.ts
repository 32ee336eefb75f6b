import assert from "node:assert/strict";
import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import type { Communicator } from "../collectives/types.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { zeros } from "../tensor/tensor.ts";
import { checkGradients } from "../tests/lib/finite_difference.ts";
import { modelConfig, type ModelOptions } from "./config.ts";
import { random } from "./init.ts";
import type { Recompute } from "./block.ts";
import { dropShown, readShown } from "./shown.ts";
import { plainStep } from "./step.ts";
import { type Batch, summaryOf, Transformer } from "./transformer.ts";

const device = cpuDevice();

function worldOfOne(): Communicator {
  return createCommunicator(openSelf(), { rank: 0, size: 1, name: "alone", device });
}

function batchOf(vocab: number, lengths: readonly number[]): Batch {
  const next = random(7, "batch");
  const offsets = Int32Array.from([0, ...lengths]);
  for (let i = 1; i < offsets.length; i++) offsets[i] += offsets[i - 1];
  const draw = () => Math.floor(next() * vocab);
  const size = offsets[lengths.length];
  const targets = Int32Array.from({ length: size }, draw);
  targets[2] = -1;
  return { tokens: Int32Array.from({ length: size }, draw), targets, offsets };
}

const SMALL: ModelOptions = {
  vocab: 11,
  width: 12,
  layers: 2,
  heads: 4,
  headDim: 6,
  kvHeads: 2,
  hidden: 10,
  initStd: 0.3,
  dtype: "f64",
};

const CHANGES: readonly Partial<ModelOptions>[] = [
  {},
  { tied: true, activation: "gelu" },
  { kvHeads: 4, activation: "relu" },
  { experts: 4, router: { kind: "softmax", topK: 2, auxLoss: 0.3, zLoss: 0.1 } },
  { experts: 3, denseLayers: 1, sharedExperts: 1, router: { kind: "sigmoid", topK: 2 } },
  { experts: 4, activation: "gelu", router: { kind: "switch", auxLoss: 0.1, capacityFactor: 1 } },
];

for (const change of CHANGES) {
  Deno.test(`model: gradients are those of the loss ${JSON.stringify(change)}`, async () => {
    const config = modelConfig({ ...SMALL, ...change });
    // The device keeps some scratch memory from the first use on.
    let before = 0;
    for (const round of ["warms up", "counts"]) {
      if (round === "counts") before = device.memory().used_bytes;
      using model = new Transformer({ device, config, seed: 3, comm: worldOfOne() });
      const batch = batchOf(config.vocab, [5, 1, 4]);
      const ready: string[] = [];
      const step = {
        ...plainStep(device, { training: true }),
        gradientReady: (name: string) => ready.push(name),
      };
      const loss = async () => {
        using sum = zeros(device, [1], "f64");
        const shown = await model.pass(batch, plainStep(device, { training: true }), {
          lossSum: sum,
        });
        const { auxLoss } = summaryOf(await readShown(shown));
        return (await sum.toArray())[0] as number / 10 + auxLoss;
      };
      const start = await loss();
      {
        using sum = zeros(device, [1], "f64");
        const shown = await model.pass(batch, step, { lossSum: sum, gradScale: 1 / 10 });
        const { auxLoss } = summaryOf(await readShown(shown));
        assert.equal((await sum.toArray())[0] as number / 10 + auxLoss, start);
      }
      await checkGradients(loss, model.parameters);
      assert.deepEqual(ready.toSorted(), model.parameters.map((p) => p.name).toSorted());
    }
    assert.equal(device.memory().used_bytes, before, "memory is freed");
  });
}

Deno.test("model: logits of the last rows are those of the whole pass", async () => {
  const config = modelConfig(SMALL);
  using model = new Transformer({ device, config, seed: 3, comm: worldOfOne() });
  const { tokens, offsets } = batchOf(config.vocab, [5, 1, 4]);
  using together = await model.logits(tokens, offsets, plainStep(device));
  const all = await together.toArray() as Float64Array;
  using alone = await model.logits(tokens.slice(6), Int32Array.of(0, 4), plainStep(device));
  const last = await alone.toArray() as Float64Array;
  assert.equal(all.length, 3 * 11);
  last.forEach((x, i) => assert.ok(Math.abs(x - all[22 + i]) < 1e-12));
});

Deno.test("model: passes of many shapes may run side by side", async () => {
  const before = device.memory().used_bytes;
  {
    const config = modelConfig({ ...SMALL, ...CHANGES[1] });
    using model = new Transformer({ device, config, seed: 3, comm: worldOfOne() });
    const logits = async (length: number) => {
      const tokens = Int32Array.from({ length }, (_, i) => i % config.vocab);
      using out = await model.logits(tokens, Int32Array.of(0, length), plainStep(device));
      return await out.toArray();
    };
    const lengths = [1, 2, 3, 4, 5, 2, 1];
    const together = await Promise.all(lengths.map(logits));
    for (const [i, length] of lengths.entries()) {
      assert.deepEqual(together[i], await logits(length));
    }
  }
  assert.equal(device.memory().used_bytes, before);
});

for (
  const change of [CHANGES[1], { ...CHANGES[4], experts: 4, router: { kind: "gshard" } as const }]
) {
  Deno.test(`model: what is computed again has the same bits ${JSON.stringify(change)}`, async () => {
    const config = modelConfig({ ...SMALL, layers: 4, ...change });
    const run = async (recompute: Recompute, slices: number) => {
      const chunks = new Map([0, 1, 2, 3].map((layer) => [layer, slices]));
      const options = { device, config, seed: 3, comm: worldOfOne(), recompute };
      using model = new Transformer(options), sum = zeros(device, [1], "f64");
      const batch = batchOf(config.vocab, [5, 100, 4]);
      device.resetPeak();
      const before = device.memory().used_bytes;
      for (const firstPass of [true, false]) {
        const step = plainStep(device, { training: true, number: 7, firstPass, chunks });
        dropShown(await model.pass(batch, step, { lossSum: sum, gradScale: 1 / 100 }));
      }
      const peak = device.memory().peak_bytes - before;
      model.endStep();
      const biases = model.moeLayers.map(({ bias }) => [...bias]);
      const arrays = await Promise.all(
        [sum, ...model.parameters.map((p) => p.grad)].map((x) => x.toArray()),
      );
      return { peak, biases, arrays };
    };
    let whole = 0;
    for (const slices of "experts" in change ? [1, 3] : [1]) {
      const kept = await run("none", slices);
      for (const recompute of ["activation", "block"] as const) {
        const again = await run(recompute, slices);
        assert.deepEqual(again.arrays, kept.arrays, recompute);
        assert.deepEqual(again.biases, kept.biases);
        assert.ok(again.peak < kept.peak, `${again.peak} bytes, ${kept.peak} kept`);
      }
      if (slices === 1) whole = kept.peak;
      // Index arrays and rows to tensors of their own: a few hundred bytes each.
      else assert.ok(kept.peak < 1.02 * whole, `${kept.peak} bytes in slices, ${whole} without`);
    }
  });
}

Deno.test("model: the first pass of a step overwrites what gradients held before", async () => {
  for (const change of [CHANGES[1], CHANGES[3]]) {
    const config = modelConfig({ ...SMALL, ...change });
    using model = new Transformer({ device, config, seed: 3, comm: worldOfOne() });
    using sum = zeros(device, [1], "f64");
    const run = async (stale: number, slices = 1) => {
      const chunks = new Map([0, 1].map((layer) => [layer, slices]));
      for (const { grad, overwrites } of model.parameters) {
        device.kernels.fill(grad, overwrites ? stale : 0);
      }
      for (const firstPass of [true, false]) {
        const step = plainStep(device, { training: true, firstPass, chunks });
        const batch = batchOf(config.vocab, [5, 1, 4]);
        dropShown(await model.pass(batch, step, { lossSum: sum, gradScale: 1 / 10 }));
      }
      return await Promise.all(model.parameters.map(({ grad }) => grad.toArray()));
    };
    assert.ok(model.parameters.filter(({ overwrites }) => overwrites).length >= 6);
    assert.deepEqual(await run(NaN), await run(0));
    assert.deepEqual(await run(NaN, 20), await run(0, 20)); // more slices than tokens
  }
});
