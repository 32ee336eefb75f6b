// The layer's gradients against finite differences in f64, and that neither loss nor gradients depend on the number of ranks, on where
// experts sit, or on the order of tokens. Ranks are async functions in this process (tests/_loopback.ts).

import assert from "node:assert/strict";
import fc from "fast-check";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { Activation, Device } from "../tensor/device.ts";
import { fromArray, type Tensor } from "../tensor/tensor.ts";
import { loopbackWorld } from "../tests/_loopback.ts";
import type { ExpertPlacement } from "./hooks.ts";
import { normal, random } from "./init.ts";
import { MoeLayer, type MoeLayerOptions } from "./moe_layer.ts";
import { replicatedPlacement, staticPlacement } from "./placement.ts";
import type { RouterOptions } from "./router.ts";
import { plainStep } from "./step.ts";

const D = 6, F = 5;
let warm = false;

interface Case {
  readonly router: RouterOptions;
  readonly experts?: number;
  readonly activation?: Activation;
  readonly sharedExperts?: number;
  readonly placement?: ExpertPlacement;
  readonly device?: Device;
  readonly dtype?: "f32" | "f64";
  readonly training?: boolean;
}

/** Σ out ⊙ mix + auxiliary losses of the global batch, gradients by name, and what else is compared. */
interface Outcome {
  readonly loss: number;
  readonly out: Float64Array;
  readonly dX: Float64Array;
  readonly grads: ReadonlyMap<string, Float64Array>;
  readonly counts: readonly number[];
  readonly dropped: number;
  readonly log: readonly string[];
}

/** Changes a weight of the named parameter before the run. */
type Nudge = { readonly name: string; readonly index: number; readonly by: number };

function inputs(tokens: number, seed: number): { x: Float64Array; mix: Float64Array } {
  return {
    x: Float64Array.from(normal(random(seed, "x"), tokens * D, { dtype: "f64" })),
    mix: Float64Array.from(normal(random(seed, "mix"), tokens * D, { dtype: "f64" })),
  };
}

function optionsOf(c: Case, comm: MoeLayerOptions["comm"]): MoeLayerOptions {
  return {
    device: c.device ?? cpuDevice(),
    comm,
    layer: 3,
    width: D,
    hidden: F,
    experts: c.experts ?? 6,
    router: c.router,
    activation: c.activation ?? "swiglu",
    sharedExperts: c.sharedExperts ?? 0,
    placement: c.placement ?? staticPlacement(),
    seed: 11,
    initStd: 0.7,
    dtype: c.dtype ?? "f64",
  };
}

async function read(tensor: Tensor): Promise<Float64Array> {
  return Float64Array.from(await tensor.toArray() as Float64Array);
}

/** One forward and backward pass; rank r has the next `split[r]` tokens of x. */
async function run(
  c: Case,
  x: Float64Array,
  mix: Float64Array,
  split: readonly number[],
  nudge?: Nudge,
): Promise<Outcome> {
  const world = loopbackWorld(split.length);
  const device = c.device ?? cpuDevice();
  const before = device.memory().used_bytes;
  const make = (a: Float64Array, rank: number) => {
    const first = split.slice(0, rank).reduce((s, n) => s + n, 0);
    const part = a.slice(first * D, (first + split[rank]) * D);
    return fromArray(device, c.dtype === "f32" ? Float32Array.from(part) : part, [split[rank], D]);
  };
  const parts = await world.run(async (comm) => {
    using layer = new MoeLayer(optionsOf(c, comm));
    for (const { name, value } of layer.parameters) {
      if (name !== nudge?.name) continue;
      const array = await read(value);
      array[nudge.index] += nudge.by;
      device.write(array, value);
    }
    using x_ND = make(x, comm.rank);
    using mix_ND = make(mix, comm.rank);
    const step = plainStep(device, { training: c.training ?? true, number: 5 });
    const { out_ND, saved, auxLoss, stats } = await layer.forward(x_ND, step);
    using out = out_ND;
    const o = await read(out), m = await read(mix_ND);
    const loss = o.reduce((sum, v, i) => sum + v * m[i], 0);
    const grads = new Map<string, Float64Array>();
    let dX: Float64Array = new Float64Array();
    if (step.training) {
      using dX_ND = await layer.backward(mix_ND, saved, step);
      dX = await read(dX_ND);
      await layer.reduceReplicas();
      for (const { name, grad, group } of layer.parameters) {
        if (group === "world") await comm.allReduce(grad);
        grads.set(name, await read(grad));
      }
    }
    return { loss, auxLoss, out: o, dX, grads, stats };
  });
  // The first run makes the kernels' own workspace.
  if (warm) assert.equal(device.memory().used_bytes, before, "every tensor is freed");
  warm = true;
  const grads = new Map<string, Float64Array>();
  for (const part of parts) {
    assert.equal(part.auxLoss, parts[0].auxLoss);
    assert.deepEqual(part.stats, parts[0].stats);
    for (const [name, grad] of part.grads) {
      const other = grads.get(name);
      if (other) assert.deepEqual(grad, other, `${name} is alike wherever it is held`);
      grads.set(name, grad);
    }
  }
  return {
    loss: parts.reduce((sum, { loss }) => sum + loss, 0) + parts[0].auxLoss,
    out: Float64Array.from(parts.flatMap(({ out }) => [...out])),
    dX: Float64Array.from(parts.flatMap(({ dX }) => [...dX])),
    grads,
    counts: [...parts[0].stats.counts],
    dropped: parts[0].stats.dropped,
    log: world.log,
  };
}

function close(a: Float64Array, b: Float64Array, tolerance: number, what: string): void {
  assert.equal(a.length, b.length, what);
  let scale = 1e-3;
  for (const v of b) scale = Math.max(scale, Math.abs(v));
  for (let i = 0; i < a.length; i++) {
    assert.ok(Math.abs(a[i] - b[i]) <= tolerance * scale, `${what}[${i}]: ${a[i]} and ${b[i]}`);
  }
}

function alike(a: Outcome, b: Outcome, tolerance: number): void {
  assert.ok(Math.abs(a.loss - b.loss) <= tolerance * (1 + Math.abs(b.loss)), "loss");
  close(a.out, b.out, tolerance, "out");
  close(a.dX, b.dX, tolerance, "dX");
  assert.deepEqual([...a.grads.keys()].sort(), [...b.grads.keys()].sort());
  for (const [name, grad] of a.grads) close(grad, b.grads.get(name)!, tolerance, name);
  assert.deepEqual(a.counts, b.counts);
  assert.equal(a.dropped, b.dropped);
}

const LOSSES = { auxLoss: 0.7, zLoss: 0.3 };

const ROUTERS: Readonly<Record<string, RouterOptions>> = {
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

for (const [name, router] of Object.entries(ROUTERS)) {
  Deno.test(`gradients are those of finite differences: ${name}`, async () => {
    const { x, mix } = inputs(7, 1);
    const c: Case = { router, sharedExperts: name === "softmax" ? 2 : 0 };
    const exact = await run(c, x, mix, [7]);
    const h = 1e-6;
    const check = (analytic: number, above: Outcome, below: Outcome, what: string) => {
      const slope = (above.loss - below.loss) / (2 * h);
      const tolerance = 1e-6 * (1 + Math.abs(slope));
      assert.ok(Math.abs(slope - analytic) < tolerance, `${what}: ${analytic}, not ${slope}`);
    };
    for (let i = 0; i < x.length; i += 3) {
      const shifted = (by: number) => run(c, x.map((v, j) => j === i ? v + by : v), mix, [7]);
      check(exact.dX[i], await shifted(h), await shifted(-h), `dX[${i}]`);
    }
    for (const [parameter, grad] of exact.grads) {
      const stride = parameter.includes("gate.weight") ? 5 : 13;
      for (let index = 1; index < grad.length; index += stride) {
        const shifted = (by: number) => run(c, x, mix, [7], { name: parameter, index, by });
        check(grad[index], await shifted(h), await shifted(-h), `${parameter}[${index}]`);
      }
    }
  });

  Deno.test(`loss and gradients do not depend on the number of ranks: ${name}`, async () => {
    const { x, mix } = inputs(12, 2);
    const c: Case = { router, sharedExperts: 1 };
    const one = await run(c, x, mix, [12]);
    alike(await run(c, x, mix, [6, 6]), one, 1e-12);
    alike(await run(c, x, mix, [3, 3, 3, 3]), one, 1e-12);
    alike(await run(c, x, mix, [0, 7, 1, 4]), one, 1e-12);
    alike(await run({ ...c, placement: replicatedPlacement(2) }, x, mix, [2, 5, 4, 1]), one, 1e-12);
    alike(await run({ ...c, placement: replicatedPlacement(4) }, x, mix, [3, 3, 3, 3]), one, 1e-12);
  });
}
