// The MoE layer on the GPU (or its emulator), where the router runs on the device, against the CPU's in f64 with the same weights: output,
// losses, load and all gradients, in f32 and bf16; that one rank's host never waits; and that nothing depends on the number of ranks.

import assert from "node:assert/strict";
import fc from "fast-check";
import type { Communicator } from "../collectives/types.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { CudaDevice } from "../tensor/cuda/device.ts";
import type { Activation, Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";
import { loopbackWorld } from "../tests/_loopback.ts";
import { emulated, testDevice } from "../tests/emulator/device.ts";
import type { ExpertPlacement } from "./hooks.ts";
import { normal, random } from "./init.ts";
import { MoeLayer } from "./moe_layer.ts";
import { replicatedPlacement, staticPlacement } from "./placement.ts";
import type { RouterOptions } from "./router.ts";
import { RoutingRecorder, RoutingReplay } from "./routing_record.ts";
import { dropShown, type MoeShown, readShown } from "./shown.ts";
import { plainStep } from "./step.ts";

const gpu: CudaDevice | null = await testDevice();
const options = { ignore: !gpu };
const onRanks = { ignore: !gpu || !emulated };
const LOSSES = { auxLoss: 0.7, zLoss: 0.3 };

/** Routers that run on the device. */
const PLAIN: Readonly<Record<string, RouterOptions>> = {
  switch: { kind: "switch", ...LOSSES },
  gshard: { kind: "gshard", ...LOSSES },
  softmax: { kind: "softmax", topK: 3, ...LOSSES },
  "softmax, not renormalised": { kind: "softmax", topK: 3, renormalise: false, ...LOSSES },
  sigmoid: { kind: "sigmoid", topK: 2, scale: 2.5, ...LOSSES },
  "sigmoid, groups": { kind: "sigmoid", topK: 2, groups: 3, groupLimit: 2, ...LOSSES },
};
/** Routers that run on the host wherever the layer is. */
const HOST: Readonly<Record<string, RouterOptions>> = {
  "capacity by position": { kind: "switch", capacityFactor: 0.8, ...LOSSES },
  "capacity by probability": {
    kind: "gshard",
    capacityFactor: 0.7,
    drop: "probability",
    ...LOSSES,
  },
  noise: { kind: "softmax", topK: 2, noise: 0.5, jitter: 0.1 },
  "expert choice": { kind: "expertChoice", capacityFactor: 1.5, zLoss: 0.3 },
};

interface Case {
  readonly router: RouterOptions;
  readonly dtype?: "f32" | "bf16";
  readonly width?: number;
  readonly hidden?: number;
  readonly experts?: number;
  readonly activation?: Activation;
  readonly sharedExperts?: number;
  readonly placement?: ExpertPlacement;
  readonly residual?: boolean;
  readonly firstPass?: boolean;
  readonly recompute?: boolean;
  readonly chunks?: number;
  readonly prepare?: (layer: MoeLayer, comm: Communicator) => void;
}

interface Outcome {
  readonly out: Float64Array;
  readonly dX: Float64Array;
  readonly grads: ReadonlyMap<string, Float64Array>;
  readonly shown: MoeShown;
}

function bits(x: Float64Array): Uint16Array {
  return Uint16Array.from(new Uint32Array(Float32Array.from(x).buffer), (b) => {
    return (b + 0x7fff + (b >>> 16 & 1)) >>> 16;
  });
}

/** Numbers that bf16 has. */
function numbers(seed: number, name: string, size: number): Float64Array {
  const wide = normal(random(seed, name), size, { dtype: "f64" }) as Float64Array;
  return Float64Array.from(new Float32Array(Uint32Array.from(bits(wide), (b) => b << 16).buffer));
}

function upload(device: Device, x: Float64Array, shape: number[], dtype: string): Tensor {
  const array = dtype === "bf16" ? bits(x) : dtype === "f32" ? Float32Array.from(x) : x;
  return fromArray(device, array, shape);
}

async function read(x: Tensor): Promise<Float64Array> {
  if (x.dtype !== "bf16") return Float64Array.from(await x.toArray() as Float64Array);
  using wide = empty(x.device, x.shape, "f32");
  ops.copy(x, wide);
  return Float64Array.from(await wide.toArray() as Float32Array);
}

function makeLayer(device: Device, comm: Communicator, c: Case): MoeLayer {
  return new MoeLayer({
    device,
    comm,
    layer: 3,
    width: c.width ?? 16,
    hidden: c.hidden ?? 24,
    experts: c.experts ?? 6,
    router: c.router,
    activation: c.activation ?? "swiglu",
    sharedExperts: c.sharedExperts ?? 0,
    recompute: c.recompute ?? false,
    placement: c.placement ?? staticPlacement(),
    seed: 11,
    initStd: 0.4,
    dtype: device.kind === "cpu" ? "f64" : c.dtype ?? "f32",
  });
}

/** One forward and backward pass of a rank's tokens. */
async function pass(
  layer: MoeLayer,
  comm: Communicator,
  c: Case,
  tokens: { readonly first: number; readonly count: number },
): Promise<Outcome> {
  const D = c.width ?? 16, { device } = layer.gate.value;
  const dtype = device.kind === "cpu" ? "f64" : c.dtype ?? "f32";
  const part = (name: string) => {
    const all = numbers(4, name, 64 * D).subarray(
      tokens.first * D,
      (tokens.first + tokens.count) * D,
    );
    return upload(device, all, [tokens.count, D], dtype);
  };
  using x = part("x");
  using dOut = part("dOut");
  using residual = part("residual");
  const step = plainStep(device, {
    training: true,
    number: 5,
    firstPass: c.firstPass,
    chunks: new Map([[3, c.chunks ?? 1]]),
  });
  layer.auxScale = 0.5;
  const forward = await layer.forward(x, step, c.residual ? residual : undefined);
  using out = forward.out_ND;
  using dX = await layer.backward(dOut, forward.saved, step);
  await layer.reduceReplicas();
  const [shown] = await readShown([forward.shown]);
  const grads = new Map<string, Float64Array>();
  for (const { name, grad, group } of layer.parameters) {
    if (group === "world" && comm.size > 1) await comm.allReduce(grad).wait(device.stream);
    grads.set(name, await read(grad));
  }
  return { out: await read(out), dX: await read(dX), grads, shown };
}

/** A layer on the GPU and one on the CPU with its weights, over the same tokens. */
async function both(
  c: Case,
  tokens: number,
): Promise<{ gpu: Outcome; cpu: Outcome; waits: number }> {
  const comm = loopbackWorld(1).ranks[0];
  using layer = makeLayer(gpu!, comm, c);
  using reference = makeLayer(cpuDevice(), comm, c);
  c.prepare?.(layer, comm);
  c.prepare?.(reference, comm);
  for (const { name, value } of layer.parameters) {
    const twin = reference.parameters.find((p) => p.name === name)!.value;
    const values = await read(value);
    twin.device.write(twin.dtype === "f64" ? values : Float32Array.from(values), twin);
  }
  if (c.firstPass) {
    for (const { grad, overwrites } of layer.parameters) if (overwrites) ops.fill(grad, 3);
  }
  const cpu = await pass(reference, comm, c, { first: 0, count: tokens });
  const before = gpu!.hostWaits;
  const device = await pass(layer, comm, c, { first: 0, count: tokens });
  // The test's own waits: record, one read per gradient, output and input's gradient.
  const waits = gpu!.hostWaits - before - layer.parameters.length - 3;
  return { gpu: device, cpu, waits };
}

function close(got: Float64Array, want: Float64Array, bound: number, what: string): void {
  assert.equal(got.length, want.length, what);
  let most = 1e-3;
  for (const v of want) most = Math.max(most, Math.abs(v));
  for (let i = 0; i < got.length; i++) {
    assert.ok(
      Math.abs(got[i] - want[i]) <= bound * most,
      `${what}[${i}]: ${got[i]} instead of ${want[i]}, the largest is ${most}`,
    );
  }
}

function alike(got: Outcome, want: Outcome, bound: number): void {
  close(got.out, want.out, bound, "out");
  close(got.dX, want.dX, bound, "dX");
  assert.deepEqual([...got.grads.keys()].sort(), [...want.grads.keys()].sort());
  for (const [name, grad] of got.grads) close(grad, want.grads.get(name)!, bound, name);
  const { auxLoss } = want.shown;
  assert.ok(Math.abs(got.shown.auxLoss - auxLoss) <= 1e-5 * (1 + auxLoss), "auxLoss");
  assert.deepEqual(got.shown.stats.counts, want.shown.stats.counts);
  assert.equal(got.shown.stats.dropped, want.shown.stats.dropped);
}

const BOUND = { f32: 2e-5, bf16: 0.03 };

for (const [name, router] of Object.entries({ ...PLAIN, ...HOST })) {
  for (const dtype of ["f32", "bf16"] as const) {
    Deno.test(`output and gradients are the CPU's: ${name}, ${dtype}`, options, async () => {
      for (
        const more of [{}, { sharedExperts: 1 }, { residual: true, recompute: true }, {
          sharedExperts: 2,
          residual: true,
          firstPass: true,
        }, { sharedExperts: 1, firstPass: true, chunks: 3 }]
      ) {
        for (const tokens of name === "softmax" ? [33, 1, 0] : [21]) {
          const { gpu: got, cpu, waits } = await both({ router, dtype, ...more }, tokens);
          alike(got, cpu, BOUND[dtype]);
          if (name in PLAIN) assert.equal(waits, 0, "the host waits for nothing");
        }
      }
      // One layer, pass after pass: every tensor is freed.
      const comm = loopbackWorld(1).ranks[0], c: Case = { router, dtype, sharedExperts: 1 };
      using layer = makeLayer(gpu!, comm, c);
      const used: number[] = [];
      for (let i = 0; i < 4; i++) {
        await pass(layer, comm, c, { first: 0, count: 9 });
        used.push(gpu!.memory().used_bytes);
      }
      assert.equal(used[3], used[1]);
    });
  }
}

for (const activation of ["relu", "gelu", "swiglu"] as const) {
  Deno.test(`odd widths, experts without rows: ${activation}, on the device`, options, async () => {
    // Weights meet the hidden rows if those are narrow, else the experts' outputs.
    for (const hidden of [7, 50]) {
      const c: Case = { router: PLAIN.gshard, activation, width: 10, hidden, experts: 5 };
      for (const dtype of ["f32", "bf16"] as const) {
        for (const recompute of [false, true]) {
          const { gpu: got, cpu } = await both({ ...c, dtype, recompute, sharedExperts: 1 }, 19);
          alike(got, cpu, BOUND[dtype]);
          const few = await both({ ...c, dtype, recompute, experts: 40, firstPass: true }, 3);
          alike(few.gpu, few.cpu, BOUND[dtype]);
        }
      }
    }
  });
}

/** A case on several ranks of this process, joined. */
async function ranks(c: Case, split: readonly number[]): Promise<Outcome> {
  const world = loopbackWorld(split.length);
  const parts = await world.run(async (comm) => {
    using layer = makeLayer(gpu!, comm, c);
    c.prepare?.(layer, comm);
    const first = split.slice(0, comm.rank).reduce((a, b) => a + b, 0);
    return await pass(layer, comm, c, { first, count: split[comm.rank] });
  });
  const grads = new Map<string, Float64Array>();
  for (const part of parts) {
    assert.deepEqual(part.shown, parts[0].shown);
    for (const [name, grad] of part.grads) {
      if (grads.has(name)) {
        assert.deepEqual(grad, grads.get(name), `${name} is alike wherever it is held`);
      }
      grads.set(name, grad);
    }
  }
  const join = (of: (part: Outcome) => Float64Array) =>
    Float64Array.from(parts.flatMap((p) => [...of(p)]));
  return { out: join((p) => p.out), dX: join((p) => p.dX), grads, shown: parts[0].shown };
}

for (const [name, router] of Object.entries(PLAIN)) {
  Deno.test(
    `nothing depends on the number of ranks or on replicas, on the device: ${name}`,
    onRanks,
    async () => {
      const c: Case = { router, sharedExperts: 1 };
      const one = await ranks(c, [12]);
      for (const split of [[6, 6], [3, 3, 3, 3], [0, 7, 5], [0, 0, 12]]) {
        const whole = await ranks(c, split);
        alike(whole, one, BOUND.f32);
        for (const chunks of [2, 3, 5]) {
          const cut = await ranks({ ...c, chunks, firstPass: true }, split);
          alike(cut, whole, 2e-6);
          assert.deepEqual(cut.shown, whole.shown);
          assert.deepEqual(await ranks({ ...c, chunks, firstPass: true }, split), cut);
        }
      }
      for (const replicas of [2, 4]) {
        alike(
          await ranks({ ...c, placement: replicatedPlacement(replicas), chunks: replicas - 1 }, [
            2,
            5,
            4,
            1,
          ]),
          one,
          BOUND.f32,
        );
      }
    },
  );
}

Deno.test(
  "any seats, replicas and splits give one rank's gradients, on the device",
  onRanks,
  async () => {
    const cases = fc.integer({ min: 2, max: 4 }).chain((size) =>
      fc.record({
        router: fc.constantFrom(...Object.values(PLAIN)),
        homes: fc.array(fc.uniqueArray(fc.nat(size - 1), { minLength: 1 }), {
          minLength: 6,
          maxLength: 6,
        }),
        split: fc.array(fc.nat(9), { minLength: size, maxLength: size }),
        chunks: fc.integer({ min: 1, max: 4 }),
      })
    );
    await fc.assert(
      fc.asyncProperty(cases, async ({ router, homes, split, chunks }) => {
        const placement: ExpertPlacement = {
          name: "any",
          plan: () => ({
            seats: split.map((_, r) =>
              homes.flatMap((on, e) => on.includes(r) ? [e] : []).reverse()
            ),
            split: (source, expert, count) => {
              const rows = new Array<number>(homes[expert].length).fill(0);
              for (let i = 0; i < count; i++) rows[(i + source + expert) % rows.length]++;
              return rows;
            },
          }),
        };
        const all = split.reduce((a, b) => a + b, 0);
        const whole = await ranks({ router }, [all]);
        alike(await ranks({ router, placement, chunks }, split), whole, BOUND.f32);
      }),
      { numRuns: 12 },
    );
  },
);

Deno.test("a routing recorded on the device replays on the host's way", options, async () => {
  const recorder = new RoutingRecorder();
  const comm = loopbackWorld(1).ranks[0];
  using layer = makeLayer(gpu!, comm, { router: PLAIN.softmax });
  layer.tap = recorder;
  const tokens = { first: 0, count: 15 };
  const recorded = await pass(layer, comm, { router: PLAIN.softmax }, tokens);
  using again = makeLayer(gpu!, comm, { router: PLAIN.softmax });
  again.tap = new RoutingReplay(await recorder.gather(comm, 6));
  alike(await pass(again, comm, { router: PLAIN.softmax }, tokens), recorded, BOUND.f32);
});

Deno.test("the selection bias follows the load, and the device sees it", options, async () => {
  const comm = loopbackWorld(1).ranks[0];
  const c: Case = { router: { kind: "sigmoid", topK: 2, biasRate: 0.25 } };
  using layer = makeLayer(gpu!, comm, c);
  const tokens = { first: 0, count: 40 };
  const before = await pass(layer, comm, c, tokens);
  layer.endStep();
  const { counts } = before.shown.stats, mean = 80 / 6;
  layer.bias.forEach((b, e) => assert.equal(b, 0.25 * Math.sign(mean - counts[e])));
  const after = await pass(layer, comm, c, tokens);
  assert.notDeepEqual(after.shown.stats.counts, counts);
  assert.ok(after.shown.stats.imbalance >= 1);
});

Deno.test("logits that are not finite are told when the losses are read", options, async () => {
  const comm = loopbackWorld(1).ranks[0];
  using layer = makeLayer(gpu!, comm, { router: PLAIN.softmax });
  using x = upload(gpu!, numbers(1, "x", 48).fill(NaN, 3, 4), [3, 16], "f32");
  const { out_ND, shown } = await layer.forward(x, plainStep(gpu!));
  out_ND[Symbol.dispose]();
  await assert.rejects(readShown([shown]), /Cannot route tokens as their logits must be finite/);
  const second = await layer.forward(x, plainStep(gpu!));
  second.out_ND[Symbol.dispose]();
  dropShown([second.shown]);
});

Deno.test("in slices, host and device route alike", onRanks, async () => {
  for (const router of Object.values(PLAIN)) {
    for (const chunks of [1, 3]) {
      // A replay goes the host's way; one of the device's own choices changes nothing else.
      const recorders = [new RoutingRecorder(), new RoutingRecorder()];
      const c: Case = { router, chunks };
      const watch = (layer: MoeLayer, comm: Communicator) =>
        void (layer.tap = recorders[comm.rank]);
      const onDevice = await ranks({ ...c, prepare: watch }, [5, 8]);
      const [record] = await loopbackWorld(2).run((comm) => recorders[comm.rank].gather(comm, 6));
      const replay = (layer: MoeLayer) => void (layer.tap = new RoutingReplay(record));
      const onHost = await ranks({ ...c, prepare: replay }, [5, 8]);
      alike(onHost, onDevice, BOUND.f32);
      assert.deepEqual(onHost.shown.stats, onDevice.shown.stats);
    }
  }
});

Deno.test(
  "rows that travel when a pass fails are freed once they have arrived",
  onRanks,
  async () => {
    const { ranks } = loopbackWorld(2), before = gpu!.memory().used_bytes;
    await Promise.all(ranks.map(async (comm) => {
      using layer = makeLayer(gpu!, comm, { router: PLAIN.softmax, sharedExperts: 1 });
      Object.defineProperty(layer, "auxScale", {
        get: () => {
          throw new Error("no scale");
        },
      });
      using x = upload(gpu!, numbers(comm.rank, "x", 20 * 16), [20, 16], "f32");
      const step = plainStep(gpu!, { training: true, chunks: new Map([[3, 3]]) });
      const { out_ND, saved, shown } = await layer.forward(x, step);
      await assert.rejects(layer.backward(x, saved, step), /no scale/);
      layer.release(saved);
      dropShown([shown]);
      out_ND[Symbol.dispose]();
      await comm.allReduce(x).wait(gpu!.stream); // behind what travels
    }));
    await gpu!.stream.synchronize();
    assert.equal(gpu!.memory().used_bytes, before);
  },
);
