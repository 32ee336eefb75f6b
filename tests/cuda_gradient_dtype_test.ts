// Gradients in the weights' dtype (`ModelConfig.gradientDtype`) on the CUDA device, a GPU or its emulator: which gradients have it, what is
// rounded and how often, training beside gradients in f32, checkpoints from one to the other. Several ranks are in cuda_train_ranks_test.ts.

import assert from "node:assert/strict";
import fc from "fast-check";
import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import { modelConfig, type ModelOptions } from "../moe/config.ts";
import { linearBackward } from "../moe/linear.ts";
import { createParameter, freeParameter } from "../moe/parameter.ts";
import { readShown } from "../moe/shown.ts";
import { plainStep } from "../moe/step.ts";
import { Trainer } from "../moe/trainer.ts";
import { trainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import * as ops from "../tensor/ops.ts";
import { empty, fromArray, type Tensor, zeros } from "../tensor/tensor.ts";
import { emulated, testDevice } from "./emulator/device.ts";

const device = await testDevice();
const ignore = device === null;

/** Half a unit in the last place of bf16, relative. */
const HALF = 2 ** -8;

const SIZES: ModelOptions = {
  vocab: 128,
  width: 32,
  layers: 2,
  heads: 2,
  hidden: 24,
  experts: 4,
  router: { kind: "softmax", topK: 2, auxLoss: 0.02 },
  initStd: 0.1,
  dtype: "bf16",
};
const CASES: readonly Partial<ModelOptions>[] = [
  {},
  { sharedExperts: 1, denseLayers: 1 },
  { tied: true, experts: 0, activation: "gelu" },
];

function modelOf(sizes: Partial<ModelOptions>): Transformer {
  const comm = createCommunicator(openSelf(), {
    rank: 0,
    size: 1,
    name: "alone",
    device: device!,
  });
  const config = modelConfig({ ...SIZES, ...sizes });
  return new Transformer({ device: device!, comm, config, seed: 3 });
}

/** The elements as f32. */
async function numbers(x: Tensor): Promise<Float32Array> {
  using wide = empty(x.device, x.shape);
  ops.copy(x, wide);
  return await wide.toArray() as Float32Array;
}

/** Loss and gradients of a pass over new rows. */
async function gradients(model: Transformer) {
  using sum = zeros(device!, [1], "f64");
  const step = plainStep(device!, { training: true, firstPass: true });
  const tokens = Int32Array.from({ length: 40 }, (_, i) => (i * 17 + i * i) % 128);
  const batch = {
    tokens,
    targets: tokens.map((t) => (t * 3 + 1) % 128),
    offsets: Int32Array.of(0, 15, 40),
  };
  await readShown(await model.pass(batch, step, { lossSum: sum, gradScale: 1 / 40 }));
  const [loss] = await sum.toArray() as Float64Array;
  const found = new Map<string, Float32Array>();
  for (const { name, grad } of model.parameters) found.set(name, await numbers(grad));
  return { loss, found };
}

Deno.test({
  name: "bf16 gradients: those of matrices are f32's, rounded once; gains and gates have f32",
  ignore,
  async fn() {
    for (const sizes of CASES) {
      using wide = modelOf(sizes);
      using narrow = modelOf({ ...sizes, gradientDtype: "bf16" });
      const want = await gradients(wide), got = await gradients(narrow);
      assert.equal(got.loss, want.loss);
      for (const { name, value, grad } of narrow.parameters) {
        const matrix = value.shape.length > 1 && value.dtype === "bf16";
        assert.equal(grad.dtype, matrix ? "bf16" : "f32", name);
        using exact = fromArray(device!, want.found.get(name)!);
        using rounded = empty(device!, [exact.size], grad.dtype);
        ops.copy(exact, rounded);
        const expected = await numbers(rounded), given = got.found.get(name)!;
        // A tied embedding's rows are added to the head's gradient, which was rounded; on a GPU other products of cuBLAS add in another order.
        if (emulated && !(sizes.tied && name.includes("embed"))) {
          assert.deepEqual(given, expected, name);
        } else {
          let apart = 0, norm = 0;
          expected.forEach((x, i) => (apart += (x - given[i]) ** 2, norm += x * x));
          assert(apart <= HALF ** 2 * norm, `${name}: ${Math.sqrt(apart / norm)} apart`);
        }
      }
      for (const { name, grad } of wide.parameters) assert.equal(grad.dtype, "f32", name);
    }
  },
});

Deno.test({
  name:
    "bf16 gradients: a sum over passes is within two roundings a pass, and begins anew in the first",
  ignore,
  async fn() {
    const options = { dtype: "bf16", init: { std: 1, seed: 1 }, overwrites: true } as const;
    await fc.assert(
      fc.asyncProperty(
        fc.integer({ min: 1, max: 40 }),
        fc.integer({ min: 1, max: 40 }),
        fc.integer({ min: 0, max: 30 }),
        fc.integer({ min: 1, max: 6 }),
        async (outputs, inputs, rows, passes) => {
          const shape = [outputs, inputs];
          const [one, wide, narrow] = [undefined, undefined, "bf16" as const].map((gradientDtype) =>
            createParameter(device!, "w", { ...options, shape, gradientDtype })
          );
          device!.kernels.fill(narrow.grad, NaN); // the first pass does not read it
          const size = outputs * inputs, bound = new Float64Array(size);
          const whole = new Float64Array(size);
          for (let pass = 0; pass < passes; pass++) {
            using x = empty(device!, [rows, inputs], "bf16");
            using dOut = empty(device!, [rows, outputs], "bf16");
            device!.kernels.normal(x, [pass, 1], 1);
            device!.kernels.normal(dOut, [pass, 2], 1);
            const step = { firstPass: pass === 0 };
            for (const weight of [wide, narrow]) {
              linearBackward(dOut, x, weight, { step })[Symbol.dispose]();
            }
            linearBackward(dOut, x, one, { step: { firstPass: true } })[Symbol.dispose]();
            const part = await numbers(one.grad);
            part.forEach((g, i) => {
              whole[i] += g;
              // cuBLAS may round the product, too, before it adds.
              bound[i] += 2 * HALF * (Math.abs(whole[i]) + Math.abs(g)) + HALF * bound[i] + 1e-5;
            });
          }
          const sums = await numbers(wide.grad), got = await numbers(narrow.grad);
          got.forEach((g, i) => {
            assert(Math.abs(sums[i] - whole[i]) <= 1e-4 * (1 + Math.abs(whole[i])));
            assert(Math.abs(g - whole[i]) <= bound[i], `${g}, not ${whole[i]} within ${bound[i]}`);
          });
          for (const each of [one, wide, narrow]) freeParameter(each);
        },
      ),
      { numRuns: emulated ? 40 : 100 },
    );
  },
});

const TEXT = new TextEncoder().encode(
  "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.",
);

async function train<T>(
  options: {
    readonly dtype?: "f32" | "bf16";
    readonly gradientDtype?: "f32" | "bf16";
    readonly accumulate?: number;
    readonly recompute?: "block";
  },
  use: (trainer: Trainer, model: Transformer) => Promise<T>,
): Promise<T> {
  const { dtype = "bf16", gradientDtype, accumulate = 1 } = options;
  const world = createCommunicator(openSelf(), {
    rank: 0,
    size: 1,
    name: "alone",
    device: device!,
  });
  const config = modelConfig({ ...SIZES, dtype, gradientDtype });
  using model = new Transformer({
    device: device!,
    comm: world,
    config,
    seed: 3,
    recompute: options.recompute,
  });
  const text = { train: TEXT, validation: TEXT, vocabularySize: 128, bytesPerToken: 1 };
  const shape = { sequence: 19, batch: 4, accumulate, seed: 1, rank: 0, size: 1 };
  await using trainer = await Trainer.create({
    world,
    device: device!,
    model,
    data: trainingData(text, shape),
    learningRate: { peak: 0.005, warmup: 2, steps: 40 },
    accumulate,
  });
  return await use(trainer, model);
}

for (const accumulate of [1, 2]) {
  Deno.test({
    name: `bf16 gradients: twenty steps of ${accumulate} passes lose what those in f32 lose`,
    ignore,
    async fn() {
      const run = (dtype: "f32" | "bf16", gradientDtype: "f32" | "bf16") =>
        train({ dtype, gradientDtype, accumulate }, async (trainer) => {
          const { used_bytes } = device!.memory(), rows = [];
          while (trainer.steps < 20) rows.push(await trainer.step());
          return { rows, losses: rows.map(({ loss }) => loss), used_bytes };
        });
      const exact = await run("f32", "f32");
      const wide = await run("bf16", "f32"), narrow = await run("bf16", "bf16");
      assert.equal(narrow.losses[0], wide.losses[0]); // before the first update
      const [norm, other] = [wide, narrow].map(({ rows }) => rows[0].grad_norm);
      assert(Math.abs(other - norm) <= HALF * norm, `${other}, ${norm}`);
      // bf16 noise: what all else that is bf16 in the model changes, against f32.
      const apart = (a: number[], b: number[]) =>
        a.reduce((sum, x, i) => sum + Math.abs(x - b[i]), 0) / a.length;
      const noise = apart(wide.losses, exact.losses);
      const added = apart(narrow.losses, wide.losses);
      assert(added <= 3 * noise, `${added} apart, noise ${noise}`);
      for (const { losses } of [exact, wide, narrow]) assert(losses[19] < 0.8 * losses[0]);
      assert(narrow.used_bytes < wide.used_bytes);
    },
  });
}

Deno.test({
  name: "bf16 gradients: what is computed again has the same bits",
  ignore,
  async fn() {
    const runs = [];
    for (const recompute of [undefined, "block"] as const) {
      runs.push(
        await train({ gradientDtype: "bf16", accumulate: 2, recompute }, async (trainer) => {
          const { loss } = await trainer.step();
          const { loss: next, grad_norm } = await trainer.step();
          return [loss, next, grad_norm];
        }),
      );
    }
    assert.deepEqual(runs[1], runs[0]);
  },
});

Deno.test({
  name: "bf16 gradients: checkpoints know nothing of them, and a run goes on with others",
  ignore,
  async fn() {
    const directory = await Deno.makeTempDir();
    try {
      for (const [from, to] of [["f32", "bf16"], ["bf16", "f32"]] as const) {
        const folder = `${directory}/${from}`;
        const next = await train({ gradientDtype: from }, async (trainer, model) => {
          assert(!JSON.stringify(model.description).includes("gradientDtype"));
          await trainer.step();
          await trainer.save(folder);
          return await trainer.step();
        });
        const resumed = await train({ gradientDtype: to }, async (trainer) => {
          assert.equal((await trainer.resume(folder))?.step, 1);
          return await trainer.step();
        });
        assert.equal(resumed.loss, next.loss);
        assert(Math.abs(resumed.grad_norm - next.grad_norm) <= 2 * HALF * next.grad_norm);
      }
    } finally {
      await Deno.remove(directory, { recursive: true });
    }
  },
});
