// One rank of the pump's tests: trains by one policy after the other, each from the same weights, and returns what its scheduler was told in
// the last step.

import { createScheduler, type SchedulerName } from "../lina/training/schedulers.ts";
import { modelConfig } from "../moe/config.ts";
import type { Boundary, CollectiveScheduler } from "../moe/hooks.ts";
import { microOpName } from "../moe/graph.ts";
import { replicatedPlacement } from "../moe/placement.ts";
import { Trainer } from "../moe/trainer.ts";
import { trainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import type { CudaDevice } from "../tensor/cuda/device.ts";
import { rankMain } from "./_ranks.ts";
import { SMALL, smallText } from "./_train_ranks.ts";

/** What a test asks for. */
export interface PumpArgs {
  readonly ranks: number;
  readonly policies: readonly SchedulerName[];
  readonly chunks: number;
  /** Copies of each expert. */
  readonly replicas: number;
  readonly steps: number;
  /** What ends in the middle of the second step: the step, on all ranks, or the last rank. */
  readonly ends?: "step" | "rank";
}

/** What a rank has seen of a policy. */
export interface PumpResult {
  readonly loss: readonly number[];
  /** Boundaries of the last step, as the scheduler heard of them: kind, node or layer, chunk. */
  readonly told: readonly string[];
  /** How many micro-ops the scheduler launched at each of them. */
  readonly launched: readonly number[];
  readonly microOps: number;
  /** Names of all micro-ops. */
  readonly names: readonly string[];
  /** Waits of threads in the last step. */
  readonly eventWaits: number;
  /** What ended the step. */
  readonly error?: string;
  readonly launchedAfterwards?: number;
}

function nameOf(boundary: Boundary): string {
  const { kind } = boundary;
  if (kind === "gradientReady") return `${kind} ${boundary.gradient}`;
  if (kind === "allToAllStarts" || kind === "allToAllEnds") {
    return `${kind} ${boundary.node} ${boundary.chunk}`;
  }
  return "layer" in boundary ? `${kind} ${boundary.layer}` : kind;
}

/** Tells what a scheduler is told. */
function watched(inner: CollectiveScheduler, chunks: number) {
  const told: string[] = [], launched: number[] = [];
  const scheduler: CollectiveScheduler = {
    name: inner.name,
    pace: inner.pace,
    plan(graph) {
      const layers = graph.nodes.flatMap((node) => node.kind === "allToAll" ? [node.layer] : []);
      return { ...inner.plan(graph), chunks: new Map(layers.map((layer) => [layer, chunks])) };
    },
    launch(boundary, state) {
      const count = inner.launch(boundary, state);
      told.push(nameOf(boundary));
      launched.push(count);
      return count;
    },
  };
  return { scheduler, told, launched };
}

await rankMain(async ({ comm, args: given, device: found }) => {
  const args = given as PumpArgs, device = found as CudaDevice;
  const text = smallText(2000);
  const results: PumpResult[] = [];
  for (const policy of args.policies) {
    const config = modelConfig({
      ...SMALL,
      experts: 4,
      width: 16,
      heads: 2,
      headDim: 8,
      hidden: 16,
      sharedExperts: 1,
    });
    using model = new Transformer({
      device,
      comm,
      config,
      seed: 11,
      placement: replicatedPlacement(args.replicas),
    });
    const sources = { train: text, validation: text, vocabularySize: 64, bytesPerToken: 1 };
    const data = trainingData(sources, {
      sequence: 8,
      batch: 4,
      accumulate: 1,
      seed: 5,
      rank: comm.rank,
      size: comm.size,
    });
    const inner = createScheduler(policy, { bucketBytes: 7000, microOpBytes: 300 });
    const { scheduler, told, launched } = watched(inner, args.chunks);
    await using trainer = await Trainer.create({
      world: comm,
      device,
      model,
      data,
      learningRate: { peak: 1e-2, warmup: 2, steps: 10 },
      scheduler,
    });
    const loss: number[] = [];
    let eventWaits = 0, error: string | undefined, launchedAfterwards: number | undefined;
    for (let step = 0; step < args.steps; step++) {
      told.length = launched.length = 0;
      const before = device.eventWaits;
      if (step === 1) {
        afterBackward(model, () => {
          if (args.ends === "step") throw new Error("the test ends this step");
          if (args.ends === "rank" && comm.rank === comm.size - 1) Deno.exit(3);
        });
      }
      try {
        loss.push((await trainer.step()).loss);
      } catch (cause) {
        error = (cause as Error).message;
        const now = launched.reduce((a, b) => a + b, 0);
        // What the device still passes is told to nobody.
        await new Promise((resolve) => setTimeout(resolve, 300));
        launchedAfterwards = launched.reduce((a, b) => a + b, 0) - now;
        // The ranks have not launched the same, so their communicators cannot be closed in good order.
        console.log(`ended: ${JSON.stringify({ error, launchedAfterwards })}`);
        if (args.ends === "step") Deno.exit(4);
        break;
      }
      eventWaits = device.eventWaits - before;
    }
    const { microOps } = trainer.schedule;
    results.push({
      loss,
      told: [...told],
      launched: [...launched],
      microOps: microOps.length,
      names: microOps.map((microOp) => microOpName(trainer.graph, microOp)),
      eventWaits,
      error,
      launchedAfterwards,
    });
  }
  return results;
});

/** Has something happen once the backward pass of the last layer has been enqueued. */
function afterBackward(model: Transformer, happens: () => void): void {
  const layer = model.moeLayers.at(-1)!, backward = layer.backward.bind(layer);
  layer.backward = async (...args) => {
    const result = await backward(...args);
    happens();
    return result;
  };
}
