// Two schedules of the same training: `fifo` reduces a bucket of gradients as soon as it is full, `lina` one micro-op at a time while no
// all-to-all runs or is about to. The model learns the same under both, to the last bit. Times differ from machine to machine, and inside one
// machine links are fast: so the last two lines put the step that was measured on links of 1 Gbit/s, on a virtual clock. All-to-alls are
// shorter under `lina`; but each of the many small gradients of so small a model is a reduction of its own there, which costs a latency.
//
//   deno run -A launch.ts -n 2 examples/07_schedule.ts
//
//   [0] fifo: loss 5.590 → 3.080 in 12 steps of 84 ms; 7 reductions a step
//   [0] lina: loss 5.590 → 3.080 in 12 steps of 49 ms; 31 reductions a step
//   [0] same bits: true
//   [0] fifo on 1 Gbit/s: 57.0 ms a step, all-to-alls backward 11.4 ms; no schedule of these reductions below 54.1 ms
//   [0] lina on 1 Gbit/s: 58.9 ms a step, all-to-alls backward 10.1 ms; no schedule of these reductions below 53.7 ms

import {
  createScheduler,
  init,
  loadText,
  type Mark,
  modelConfig,
  readProfile,
  type SchedulerName,
  stepBounds,
  stepCosts,
  timeline,
  Trainer,
  trainingData,
  Transformer,
} from "../mod.ts";

const STEPS = 12, BATCH = 8, SEQUENCE = 64;
const router = { kind: "softmax", topK: 2, auxLoss: 0.01 } as const;
const sizes = { vocab: 256, width: 128, heads: 4, layers: 4, hidden: 256, experts: 8 };
const config = modelConfig({ ...sizes, router });
/** A link of 1 Gbit/s, and what is reduced at once: buckets as small as the model, micro-ops of 2.4 ms of the link. */
const LINK = { alpha_us: 20, bytes_per_us: 125 };
const SIZES = { bucketBytes: 1 << 18, linkBytesPerSecond: 1e6 * LINK.bytes_per_us };

await using world = await init({ device: "cpu" });
const { rank, size, device } = world;
const say = (line: string) => rank === 0 && console.log(line);
const text = await loadText(`${import.meta.dirname}/data/austen.txt`, { sequence: SEQUENCE });

/** Trains. @returns The losses, the step's graph, and how long each of its computations took in the last one. */
async function train(name: SchedulerName) {
  const scheduler = createScheduler(name, SIZES);
  using model = new Transformer({ device, comm: world, config, seed: 1 });
  await using trainer = await Trainer.create({
    world,
    device,
    model,
    data: trainingData(text, { sequence: SEQUENCE, batch: BATCH, seed: 1, rank, size }),
    learningRate: { peak: 0.003, warmup: 4, steps: STEPS },
    scheduler,
  });
  const rows = [], marks: Mark[] = [];
  while (trainer.steps < STEPS) {
    if (trainer.steps === STEPS - 1) trainer.marks = marks; // when the last step came to what
    rows.push(await trainer.step());
  }
  const loss = rows.map((row) => row.loss),
    times = rows.map((row) => row.step_ms).sort((a, b) => a - b);
  const { graph, schedule } = trainer;
  say(
    `${name}: loss ${loss[0].toFixed(3)} → ${loss[STEPS - 1].toFixed(3)} in ${STEPS} steps of ${
      times[STEPS / 2].toFixed(0)
    } ms; ${schedule.microOps.length} reductions a step`,
  );
  return { name, loss, graph, schedule, ...readProfile(graph, marks) };
}

const trainings = [await train("fifo"), await train("lina")];
const [fifo, lina] = trainings;
say(`same bits: ${lina.loss.every((loss, step) => loss === fifo.loss[step])}`);

const ms = (us: number) => `${(us / 1000).toFixed(1)} ms`;
const options = {
  compute_us: ({ id }: { readonly id: number }) => fifo.compute_us.get(id) ?? 0,
  costs: stepCosts(LINK, { ranks: size }),
};
for (const { name, graph, schedule } of trainings) {
  const { spans, end_us } = timeline(graph, createScheduler(name, SIZES), options);
  const backward_us = spans
    .filter(({ lane, name }) => lane === "allToAll" && name.includes("backward"))
    .reduce((sum, { asked_us, end_us }) => sum + end_us - asked_us, 0);
  const { bound_us } = stepBounds(graph, schedule, options);
  say(
    `${name} on 1 Gbit/s: ${ms(end_us)} a step, all-to-alls backward ${
      ms(backward_us)
    }; no schedule of these reductions below ${ms(bound_us)}`,
  );
}
