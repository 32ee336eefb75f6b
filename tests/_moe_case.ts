// One forward and backward pass of a MoE layer on some ranks, and everything that must not depend on how many there are: for tests of the
// layer in one process (moe/moe_layer_test.ts) and on real ranks (moe_ranks_test.ts).

import assert from "node:assert/strict";
import type { Communicator } from "../collectives/types.ts";
import type { ExpertPlacement } from "../moe/hooks.ts";
import { normal, random } from "../moe/init.ts";
import { MoeLayer, type MoeStats } from "../moe/moe_layer.ts";
import { staticPlacement } from "../moe/placement.ts";
import type { RouterOptions } from "../moe/router.ts";
import { readShown } from "../moe/shown.ts";
import { plainStep } from "../moe/step.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { Activation, Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { fromArray, type Tensor } from "../tensor/tensor.ts";
import { loopbackWorld } from "./_loopback.ts";

/** Model width of every case. */
export const D = 6;

/** A layer and how it is run. */
export interface Case {
  readonly router: RouterOptions;
  readonly experts?: number;
  readonly hidden?: number;
  readonly activation?: Activation;
  readonly sharedExperts?: number;
  readonly placement?: ExpertPlacement;
  readonly device?: Device;
  readonly dtype?: "f32" | "f64";
  readonly training?: boolean;
  /** Slices that tokens travel in. @default {1} */
  readonly chunks?: number;
  /** Whether gradients are overwritten, of which rubbish is left. @default {false} */
  readonly firstPass?: boolean;
  /** Called once the layer is made: changes its weights, sets its tap. */
  readonly prepare?: (layer: MoeLayer, comm: Communicator) => void | Promise<void>;
}

/** Tokens and the gradient of the output, [N, D] each. */
export interface Inputs {
  readonly x: Float64Array;
  readonly mix: Float64Array;
}

/** What one rank has computed. */
export interface RankOutcome {
  /** Σ out ⊙ mix of its tokens. */
  readonly loss: number;
  /** Of the global batch. */
  readonly auxLoss: number;
  readonly out: number[];
  readonly dX: number[];
  /** Reduced over the ranks that hold the parameter. */
  readonly grads: Record<string, number[]>;
  readonly stats: MoeStats;
}

/** What all ranks have computed together. */
export interface Outcome {
  /** Σ out ⊙ mix + auxiliary losses. */
  readonly loss: number;
  readonly out: Float64Array;
  readonly dX: Float64Array;
  readonly grads: ReadonlyMap<string, Float64Array>;
  readonly counts: readonly number[];
  readonly dropped: number;
}

/** Random inputs. */
export function inputs(tokens: number, seed: number): Inputs {
  const make = (name: string) =>
    Float64Array.from(normal(random(seed, name), tokens * D, { dtype: "f64" }));
  return { x: make("x"), mix: make("mix") };
}

/** A tensor's elements as f64. */
export async function read(tensor: Tensor): Promise<Float64Array> {
  return Float64Array.from(await tensor.toArray() as Float64Array);
}

/** Runs one rank, which has the next `split[rank]` tokens. */
export async function runRank(
  c: Case,
  { x, mix }: Inputs,
  split: readonly number[],
  comm: Communicator,
): Promise<RankOutcome> {
  const device = c.device ?? cpuDevice(), dtype = c.dtype ?? "f64";
  using layer = new MoeLayer({
    device,
    comm,
    layer: 3,
    width: D,
    hidden: c.hidden ?? 5,
    experts: c.experts ?? 6,
    router: c.router,
    activation: c.activation ?? "swiglu",
    sharedExperts: c.sharedExperts ?? 0,
    placement: c.placement ?? staticPlacement(),
    seed: 11,
    initStd: 0.7,
    dtype,
  });
  await c.prepare?.(layer, comm);
  const first = split.slice(0, comm.rank).reduce((s, n) => s + n, 0), tokens = split[comm.rank];
  const part = (all: Float64Array) => {
    const own = all.slice(first * D, (first + tokens) * D);
    return fromArray(device, dtype === "f32" ? Float32Array.from(own) : own, [tokens, D]);
  };
  using x_ND = part(x);
  using mix_ND = part(mix);
  const step = plainStep(device, {
    training: c.training ?? true,
    number: 5,
    firstPass: c.firstPass ?? false,
    chunks: new Map([[3, c.chunks ?? 1]]),
  });
  if (c.firstPass) {
    for (const { grad, overwrites } of layer.parameters) if (overwrites) ops.fill(grad, 3);
  }
  const { out_ND, saved, shown } = await layer.forward(x_ND, step);
  const [{ auxLoss, stats }] = await readShown([shown]);
  using out = out_ND;
  const o = await read(out), m = await read(mix_ND);
  const loss = o.reduce((sum, v, i) => sum + v * m[i], 0);
  if (!step.training) return { loss, auxLoss, out: [...o], dX: [], grads: {}, stats };
  using dX_ND = await layer.backward(mix_ND, saved, step);
  await layer.reduceReplicas();
  const grads: Record<string, number[]> = {};
  for (const { name, grad, group } of layer.parameters) {
    if (group === "world") await comm.allReduce(grad);
    grads[name] = [...await read(grad)];
  }
  return { loss, auxLoss, out: [...o], dX: [...await read(dX_ND)], grads, stats };
}

/** What the ranks have computed, as one; checks that they agree where they must. */
export function join(parts: readonly RankOutcome[]): Outcome {
  const grads = new Map<string, Float64Array>();
  for (const part of parts) {
    assert.equal(part.auxLoss, parts[0].auxLoss);
    assert.deepEqual(part.stats, parts[0].stats);
    for (const [name, grad] of Object.entries(part.grads)) {
      const other = grads.get(name);
      if (other) assert.deepEqual(grad, [...other], `${name} is alike wherever it is held`);
      grads.set(name, Float64Array.from(grad));
    }
  }
  const { auxLoss, stats } = parts[0];
  return {
    loss: parts.reduce((sum, { loss }) => sum + loss, 0) + auxLoss,
    out: Float64Array.from(parts.flatMap(({ out }) => out)),
    dX: Float64Array.from(parts.flatMap(({ dX }) => dX)),
    grads,
    counts: Array.from(Object.values(stats.counts)),
    dropped: stats.dropped,
  };
}

const warm = new Set<string>();

/** Runs a case on as many ranks in this process as `split` has parts. */
export async function run(
  c: Case,
  batch: Inputs,
  split: readonly number[] = [batch.x.length / D],
): Promise<Outcome & { readonly log: readonly string[] }> {
  const world = loopbackWorld(split.length), device = c.device ?? cpuDevice();
  const before = device.memory().used_bytes;
  const parts = await world.run((comm) => runRank(c, batch, split, comm));
  // The first run of a dtype makes the kernels' own workspace.
  const dtype = c.dtype ?? "f64";
  if (warm.has(dtype)) {
    assert.equal(device.memory().used_bytes, before, "every tensor is freed");
  }
  warm.add(dtype);
  return { ...join(parts), log: world.log };
}

function close(a: Float64Array, b: Float64Array, tolerance: number, what: string): void {
  assert.equal(a.length, b.length, what);
  let scale = 1e-3;
  for (const v of b) scale = Math.max(scale, Math.abs(v));
  for (let i = 0; i < a.length; i++) {
    assert.ok(Math.abs(a[i] - b[i]) <= tolerance * scale, `${what}[${i}]: ${a[i]} and ${b[i]}`);
  }
}

/** Checks that two outcomes are the same to a relative tolerance. */
export function alike(a: Outcome, b: Outcome, tolerance: number): void {
  assert.ok(Math.abs(a.loss - b.loss) <= tolerance * (1 + Math.abs(b.loss)), "loss");
  close(a.out, b.out, tolerance, "out");
  close(a.dX, b.dX, tolerance, "dX");
  assert.deepEqual([...a.grads.keys()].sort(), [...b.grads.keys()].sort());
  for (const [name, grad] of a.grads) close(grad, b.grads.get(name)!, tolerance, name);
  assert.deepEqual(a.counts, b.counts);
  assert.equal(a.dropped, b.dropped);
}

const LOSSES = { auxLoss: 0.7, zLoss: 0.3 };

/** Every router, with every option that has a path of its own; for 6 experts. */
export const ROUTERS: Readonly<Record<string, RouterOptions>> = {
  switch: { kind: "switch", ...LOSSES },
  "switch, jitter": { kind: "switch", jitter: 0.3, ...LOSSES },
  "switch, capacity by position": { kind: "switch", capacityFactor: 0.8, ...LOSSES },
  gshard: { kind: "gshard", ...LOSSES },
  "gshard, second sampled": { kind: "gshard", second: "sample", ...LOSSES },
  "gshard, second at random": { kind: "gshard", second: "random", ...LOSSES },
  "gshard, capacity by probability": {
    kind: "gshard",
    capacityFactor: 0.7,
    drop: "probability",
    ...LOSSES,
  },
  softmax: { kind: "softmax", topK: 3, ...LOSSES },
  "softmax, not renormalised": { kind: "softmax", topK: 3, renormalise: false, ...LOSSES },
  "softmax, noise, capacity by position": {
    kind: "softmax",
    topK: 2,
    noise: 0.5,
    capacityFactor: 0.9,
    ...LOSSES,
  },
  sigmoid: { kind: "sigmoid", topK: 2, scale: 2.5, ...LOSSES },
  "sigmoid, groups, not renormalised": {
    kind: "sigmoid",
    topK: 2,
    groups: 3,
    groupLimit: 2,
    renormalise: false,
    ...LOSSES,
  },
  "expert choice": { kind: "expertChoice", capacityFactor: 1.5, zLoss: 0.3 },
};

/** Checks that ranks over some backend have what one rank on the CPU has. @param outcomes What moe_program.ts gave each rank. */
export async function likeOneRank(
  outcomes: readonly Readonly<Record<string, RankOutcome>>[],
  splits: readonly (readonly number[])[],
  seed: number,
  tolerance: number,
): Promise<void> {
  for (const [name, router] of Object.entries(ROUTERS)) {
    if (!(`${name} ${splits[0]} 1` in outcomes[0])) continue; // it was not asked for
    const tokens = splits[0].reduce((a, b) => a + b, 0);
    const one = await run({ router, sharedExperts: 1 }, inputs(tokens, seed));
    for (const split of splits) {
      for (const replicas of [1, 2]) {
        alike(join(outcomes.map((own) => own[`${name} ${split} ${replicas}`])), one, tolerance);
      }
    }
  }
}
