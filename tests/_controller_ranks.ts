// One rank of the controller's tests: trains under a controller and returns losses and what was decided.

import { TrainingController } from "../lina/training/controller.ts";
import { createScheduler, type SchedulerName } from "../lina/training/schedulers.ts";
import { modelConfig } from "../moe/config.ts";
import { Trainer } from "../moe/trainer.ts";
import { trainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { rankMain } from "./_ranks.ts";
import { SMALL, smallText } from "./_train_ranks.ts";

/** What a test asks for. */
export interface ControllerArgs {
  readonly policy: SchedulerName;
  readonly packing?: number | "auto";
  readonly steps: number;
  readonly hidden?: number;
  readonly shardOptimizer?: boolean;
  /** Ranks that hold all experts between them, at least. */
  readonly leastRanks?: number;
  readonly offloadExperts?: number | "auto";
  /** What the device says is free. */
  readonly free_bytes?: number;
  /** Trains without a controller. */
  readonly alone?: boolean;
}

/** What a rank has seen. */
export interface ControllerResult {
  readonly loss: readonly number[];
  /** Experts of this rank after each step. */
  readonly packed: readonly number[];
  readonly log: readonly string[];
  readonly decisions: readonly object[];
  readonly offloaded: number;
  readonly chunks: number;
  readonly microOps: number;
}

await rankMain(async ({ comm, args: given, device: found }) => {
  const args = given as ControllerArgs, device = found ?? cpuDevice();
  const { policy, steps, hidden = 16 } = args;
  const sizes = { experts: 4, width: 16, heads: 2, headDim: 8, hidden, sharedExperts: 1 };
  const config = modelConfig({ ...SMALL, ...sizes });
  const text = smallText(2000);
  const data = trainingData(
    { train: text, validation: text, vocabularySize: 64, bytesPerToken: 1 },
    { sequence: 8, batch: 8, accumulate: 1, seed: 5, rank: comm.rank, size: comm.size },
  );
  using model = new Transformer({ device, comm, config, seed: 11 });
  const options = { microOpBytes: 1500, bucketBytes: 7000 };
  await using trainer = await Trainer.create({
    world: comm,
    device,
    model,
    data,
    learningRate: { peak: 1e-2, warmup: 2, steps: 2 * steps },
    scheduler: createScheduler(policy, options),
    shardOptimizer: args.shardOptimizer,
  });
  const { free_bytes } = args, { memory } = device;
  if (free_bytes !== undefined) device.memory = () => ({ ...memory.call(device), free_bytes });
  const decisions: object[] = [];
  const log: string[] = [], loss: number[] = [], packed: number[] = [];
  const controller = args.alone ? null : await TrainingController.create({
    ...options,
    trainer,
    world: comm,
    device,
    policy,
    packing: args.packing,
    leastRanks: args.leastRanks,
    from: 3,
    offloadExperts: args.offloadExperts,
    log(line, decision) {
      log.push(line);
      decisions.push(decision);
    },
  });
  for (let step = 0; step < steps; step++) {
    const row = await trainer.step();
    loss.push(row.loss);
    await controller?.afterStep(row);
    packed.push(model.moeLayers[0].store.seats[comm.rank].length);
  }
  const { chunks, offloaded } = controller?.state ?? { chunks: 1, offloaded: 0 };
  return {
    loss,
    packed,
    log,
    decisions,
    offloaded,
    chunks,
    microOps: trainer.schedule.microOps.length,
  };
});
