import assert from "node:assert/strict";
import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { modelConfig, type ModelOptions } from "./config.ts";
import { Fifo } from "./fifo.ts";
import type { Boundary, CollectiveScheduler } from "./hooks.ts";
import { recorder } from "../trace/mod.ts";
import { run } from "./run.ts";
import { Trainer } from "./trainer.ts";
import { trainingData } from "./training_data.ts";
import { Transformer } from "./transformer.ts";

const device = cpuDevice();
const TEXT = new TextEncoder().encode(
  "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.",
);
const SEQUENCE = TEXT.length - 1;

async function train<T>(
  more: {
    readonly model?: Partial<ModelOptions>;
    readonly peak?: number;
    readonly scheduler?: CollectiveScheduler;
  },
  use: (trainer: Trainer, model: Transformer) => Promise<T>,
): Promise<T> {
  const world = createCommunicator(openSelf(), { rank: 0, size: 1, name: "alone", device });
  const config = modelConfig({
    vocab: 128,
    width: 32,
    layers: 2,
    heads: 2,
    hidden: 48,
    experts: 4,
    ...more.model,
  });
  using model = new Transformer({ device, comm: world, config, seed: 1 });
  const text = { train: TEXT, validation: TEXT, vocabularySize: 128, bytesPerToken: 1 };
  const data = trainingData(text, { sequence: SEQUENCE, batch: 1, seed: 1, rank: 0, size: 1 });
  await using trainer = await Trainer.create({
    world,
    device,
    model,
    data,
    learningRate: { peak: more.peak ?? 0.02, warmup: 10, steps: 120 },
    adamW: { weightDecay: 0 },
    scheduler: more.scheduler ?? new Fifo(),
  });
  return await use(trainer, model);
}

for (const experts of [0, 4]) {
  Deno.test(`trainer: learns a sentence by heart (${experts} experts)`, async () => {
    await train({ model: { experts } }, async (trainer) => {
      const first = await trainer.step();
      assert.ok(Math.abs(first.loss - Math.log(128)) < 0.3, `first loss ${first.loss}`);
      while (trainer.steps < 120) await trainer.step();
      const loss = await trainer.validate();
      assert.ok(loss < 0.1, `loss ${loss}`);
      assert.equal(trainer.optimizer.steps, 120);
    });
  });
}

Deno.test("trainer: a step frees what it has allocated", async () => {
  await train({}, async (trainer) => {
    await trainer.step();
    const before = device.memory().used_bytes;
    for (let i = 0; i < 3; i++) await trainer.step();
    await trainer.validate();
    assert.equal(device.memory().used_bytes, before);
  });
});

Deno.test("trainer: a scheduler hears of all-to-alls in a world of one, too", async () => {
  const fifo = new Fifo(), kinds: Boundary["kind"][] = [];
  let imminent: boolean | undefined;
  const scheduler: CollectiveScheduler = {
    name: "curious",
    plan: (graph) => fifo.plan(graph),
    launch: (boundary, state) => {
      kinds.push(boundary.kind);
      imminent = state.imminent;
      return fifo.launch(boundary, state);
    },
  };
  await train({ scheduler }, (trainer) => trainer.step());
  assert.equal(kinds.filter((kind) => kind === "allToAllStarts").length, 4 * 2);
  assert.equal(kinds.filter((kind) => kind === "allToAllEnds").length, 4 * 2);
  assert.equal(imminent, false);
});

Deno.test("trainer: a loss that is not finite is an error, and the weights stay", async () => {
  await train({}, async (trainer, model) => {
    await trainer.step();
    const [embedding] = model.parameters;
    const healthy = await embedding.value.toArray() as Float32Array;
    const poisoned = healthy.slice();
    poisoned[TEXT[0] * 32] = NaN;
    device.write(poisoned, embedding.value);
    await assert.rejects(trainer.step(), /must be finite/);
    assert.deepEqual(await embedding.value.toArray(), poisoned);
    device.write(healthy, embedding.value);
    await assert.rejects(
      trainer.step(),
      /the last step must have succeeded: current value is a failed step 2; go on from a checkpoint/,
    );
  });
});

Deno.test("run: one line of metrics per step; lines of undone steps go", async () => {
  const directory = Deno.makeTempDirSync({ prefix: "lina-run-" });
  try {
    const path = `${directory}/metrics.jsonl`;
    Deno.writeTextFileSync(path, '{"step":7,"loss":1}\n{"step":8,"lo');
    const world = createCommunicator(openSelf(), { rank: 0, size: 1, name: "alone", device });
    const options = {
      world,
      directory,
      steps: () => 4,
      validateEvery: 2,
      validationBatches: 1,
      checkpointEvery: 3,
    };
    const told: string[] = [];
    const deviceTrace = {
      begin: () => void told.push(`begin, capturing ${recorder.capturing}`),
      end: () => Promise.resolve(told.push("end")).then(() => {}),
    };
    const before = recorder.spans.length;
    const trace = (): [number, number] => [2, 4];
    await train({}, (trainer) => run(trainer, { ...options, trace, deviceTrace }));
    assert.deepEqual(told, Array(2).fill(["begin, capturing true", "end"]).flat());
    assert(recorder.spans.length > before && !recorder.capturing);
    const rows = Deno.readTextFileSync(path).trim().split("\n").map((line) => JSON.parse(line));
    assert.deepEqual(rows.map((row) => row.step), [1, 2, 3, 4]);
    assert.deepEqual(rows.map((row) => typeof row.val_loss), [
      "undefined",
      "number",
      "undefined",
      "number",
    ]);
    for (
      const key of [
        "loss",
        "lr",
        "tokens_per_s",
        "step_ms",
        "a2a_share",
        "load_imbalance",
        "grad_norm",
      ]
    ) {
      assert.ok(rows.every((row) => Number.isFinite(row[key])), key);
    }
    const saved = [...Deno.readDirSync(`${directory}/checkpoint`)].map(({ name }) => name).sort();
    assert.deepEqual(saved, ["step-00000003", "step-00000004"]);
  } finally {
    Deno.removeSync(directory, { recursive: true });
  }
});
