// A rank of gpu_invariance_test.ts: one forward and backward pass of a whole model per case, on this rank's share of the same global batch.

import type { Communicator } from "../collectives/types.ts";
import type { Recompute } from "../moe/block.ts";
import { modelConfig, type ModelOptions } from "../moe/config.ts";
import type { ExpertPlacement } from "../moe/hooks.ts";
import { replicatedPlacement } from "../moe/placement.ts";
import { readShown } from "../moe/shown.ts";
import { plainStep } from "../moe/step.ts";
import { summaryOf, Transformer } from "../moe/transformer.ts";
import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor, zeros } from "../tensor/tensor.ts";
import { rankMain } from "./_ranks.ts";

/** A model, and who computes what of its batch. */
export interface InvarianceCase {
  readonly name: string;
  readonly model: ModelOptions;
  /** Tokens of each sequence of the global batch. */
  readonly lengths: readonly number[];
  /** Sequences of each rank; on one rank all. */
  readonly shares: readonly number[];
  /** Copies of each expert, or expert 0 everywhere and all others on the last rank. @default {1} */
  readonly seats?: number | "lopsided";
  /** What is computed again in the backward pass. */
  readonly recompute?: Recompute;
}

/** What must not depend on the ranks. */
export interface InvarianceResult {
  readonly loss: number;
  readonly auxLoss: number;
  readonly imbalance: number;
  /** Experts of this rank's tokens [N, K], before drops, per MoE layer. */
  readonly chosen: readonly (readonly number[])[];
  /** Gradients that this rank holds, f32 in base 64: its experts' and, on rank 0, all others. */
  readonly grads: Readonly<Record<string, string>>;
}

function lopsided(): ExpertPlacement {
  return {
    name: "lopsided",
    plan({ experts, ranks }) {
      const others = Array.from({ length: experts - 1 }, (_, i) => experts - 1 - i);
      const seats = Array.from(
        { length: ranks },
        (_, rank) => rank === ranks - 1 ? [...others, 0] : [0],
      );
      const split = (source: number, expert: number, count: number) =>
        expert > 0 ? [count] : Array.from(
          { length: ranks },
          (_, holder) => Math.floor((count + (holder + source) % ranks) / ranks),
        );
      return { seats, split };
    },
  };
}

async function pass(
  c: InvarianceCase,
  comm: Communicator,
  device: Device,
): Promise<InvarianceResult> {
  const placement = c.seats === "lopsided" ? lopsided() : replicatedPlacement(c.seats ?? 1);
  const config = modelConfig(c.model);
  const { recompute } = c;
  using model = new Transformer({ device, comm, config, seed: 11, placement, recompute });
  const sum = (numbers: readonly number[]) => numbers.reduce((a, b) => a + b, 0);
  const first = sum(c.shares.slice(0, comm.rank));
  const own = c.lengths.slice(first, first + c.shares[comm.rank]);
  const start = sum(c.lengths.slice(0, first)), length = sum(own), total = sum(c.lengths);
  const token = (i: number) => (i * i * 7 + i * 13 + 5) % config.vocab;
  const offsets = Int32Array.from({ length: own.length + 1 }, (_, i) => sum(own.slice(0, i)));
  const batch = {
    tokens: Int32Array.from({ length }, (_, i) => token(start + i)),
    targets: Int32Array.from({ length }, (_, i) => token(start + i + 1)),
    offsets,
  };
  using lossSum = zeros(device, [1], "f64");
  const step = plainStep(device, { training: true, number: 3, firstPass: true });
  const chosen: number[][] = [];
  for (const layer of model.moeLayers) {
    layer.tap = { record: (_, { experts_NK }) => void chosen.push([...experts_NK]) };
  }
  const shown = await model.pass(batch, step, { lossSum, gradScale: 1 / total });
  await model.reduceReplicas();
  const world = model.parameters.filter(({ group }) => group === "world");
  for (const { grad } of world) await comm.allReduce(grad).wait(device.stream);
  await comm.allReduce(lossSum).wait(device.stream);
  const { auxLoss, imbalance } = summaryOf(await readShown(shown));
  const [loss] = await lossSum.toArray() as Float64Array;
  const grads: Record<string, string> = {};
  for (const { name, grad, group } of model.parameters) {
    if (group === "replicas" || comm.rank === 0) grads[name] = await numbers(grad);
  }
  return { loss: loss / total, auxLoss, imbalance, chosen, grads };
}

async function numbers(x: Tensor): Promise<string> {
  using wide = empty(x.device, x.shape);
  if (x.dtype !== "f32") ops.copy(x, wide);
  const array = await (x.dtype === "f32" ? x : wide).toArray();
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength).toBase64();
}

await rankMain(async ({ comm, args, device }) => {
  const results: Record<string, InvarianceResult> = {};
  for (const c of args as InvarianceCase[]) results[c.name] = await pass(c, comm, device!);
  return results;
});
