// A rank of planned_ranks_test.ts: trains, profiles its steps, plans from the profile and the measured links, and goes on by the plan.

import type { Communicator } from "../collectives/types.ts";
import { stepCosts } from "../lina/training/links.ts";
import { measureLinks } from "../lina/training/measure_links.ts";
import { Planned } from "../lina/training/planned.ts";
import { agreeProfile, readProfile, type StepProfile } from "../lina/training/profile.ts";
import { modelConfig } from "../moe/config.ts";
import type { Mark } from "../moe/gradients.ts";
import { replicatedPlacement } from "../moe/placement.ts";
import { Trainer } from "../moe/trainer.ts";
import { trainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { Device } from "../tensor/device.ts";
import { rankMain } from "./_ranks.ts";

/** What a run is asked for. */
export interface PlannedArgs {
  /** Slices; null trains on by fifo. */
  readonly chunks: number | readonly number[] | null;
  /** Replicas of each expert. @default {1} */
  readonly replicas?: number;
}

/** What a run has shown. */
export interface PlannedOutcome {
  /** Of every step. */
  readonly losses: number[];
  /** Digits of what all ranks must have alike: the plan. */
  readonly plan: string;
  /** Time of a step by the plan. */
  readonly predicted_us: number;
}

const TEXT = Uint8Array.from({ length: 5000 }, (_, i) => (i * i + 7 * i) % 31);

async function run(comm: Communicator, device: Device, args: PlannedArgs): Promise<PlannedOutcome> {
  const config = modelConfig({
    vocab: 32,
    width: 16,
    layers: 3,
    denseLayers: 1,
    heads: 2,
    headDim: 8,
    hidden: 24,
    experts: 4,
    router: { kind: "softmax", topK: 2, auxLoss: 0.01 },
    dtype: "f32",
  });
  const placement = replicatedPlacement(args.replicas ?? 1);
  using model = new Transformer({ device, comm, config, seed: 3, placement });
  const data = trainingData(
    { train: TEXT, validation: TEXT, vocabularySize: 32, bytesPerToken: 1 },
    { sequence: 12, batch: 8, accumulate: 2, seed: 1, rank: comm.rank, size: comm.size },
  );
  const learningRate = { peak: 0.01, warmup: 1, steps: 20 };
  await using trainer = await Trainer.create({
    world: comm,
    device,
    model,
    data,
    learningRate,
    accumulate: 2,
  });
  const losses: number[] = [], profiles: StepProfile[] = [];
  for (let i = 0; i < 3; i++) {
    const marks: Mark[] = [];
    losses.push((await trainer.step({ marks })).loss);
    profiles.push(readProfile(trainer.graph, marks));
  }
  let plan = "", predicted_us = 0;
  if (args.chunks !== null) {
    const profile = await agreeProfile(comm, profiles);
    const links = await measureLinks(comm, device, { sizes: [1024, 65536], repeats: 2 });
    const costs = stepCosts(
      { allToAll: links.allToAll, reduction: links.allReduce },
      { ranks: comm.size, replicas: args.replicas ?? 1 },
    );
    const planned = new Planned({ profile, costs, chunks: args.chunks });
    await trainer.reschedule(planned);
    plan = JSON.stringify([trainer.schedule, [...trainer.schedule.chunks]]);
    predicted_us = planned.predict(trainer.graph)!;
  }
  for (let i = 0; i < 4; i++) losses.push((await trainer.step()).loss);
  return { losses, plan, predicted_us };
}

await rankMain(async ({ comm, args, device }) => {
  const outcomes: PlannedOutcome[] = [];
  for (const one of args as PlannedArgs[]) {
    outcomes.push(await run(comm, device ?? cpuDevice(), one));
  }
  return outcomes;
});
