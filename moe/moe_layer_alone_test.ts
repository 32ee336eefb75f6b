// The MoE layer alone on a GPU (or its emulator), where weights meet the hidden rows: how much memory that takes, what a step is told and in
// which order, and what is released. That results are the CPU's is moe_layer_device_test.ts.

import assert from "node:assert/strict";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { CudaDevice } from "../tensor/cuda/device.ts";
import type { Activation, Device } from "../tensor/device.ts";
import { fromArray, type Tensor } from "../tensor/tensor.ts";
import { loopbackWorld } from "../tests/_loopback.ts";
import { testDevice } from "../tests/emulator/device.ts";
import { normal, random } from "./init.ts";
import { MoeLayer } from "./moe_layer.ts";
import type { MoeLayerOptions } from "./moe_types.ts";
import { dropShown } from "./shown.ts";
import { plainStep, type Step } from "./step.ts";

const gpu: CudaDevice | null = await testDevice();
const options = { ignore: !gpu };

function makeLayer(device: Device, more: Partial<MoeLayerOptions> = {}): MoeLayer {
  return new MoeLayer({
    device,
    comm: loopbackWorld(1).ranks[0],
    layer: 2,
    width: 512,
    hidden: 32,
    experts: 8,
    router: { kind: "softmax", topK: 4 },
    activation: "gelu",
    seed: 5,
    initStd: 0.2,
    ...more,
  });
}

function numbers(device: Device, name: string, rows: number, width: number): Tensor {
  const array = normal(random(9, name), rows * width, { dtype: "f64" }) as Float64Array;
  return fromArray(device, Float32Array.from(array), [rows, width]);
}

Deno.test(
  "rows in the model width are kept once, and are never there more than twice",
  options,
  async () => {
    const N = 64,
      D = 512,
      F = 32,
      S = 4 * N,
      wide = 4 * S * D,
      narrow = 4 * S * F,
      tokens = 4 * N * D;
    for (const activation of ["gelu", "swiglu"] as Activation[]) {
      for (const recompute of [false, true]) {
        using layer = makeLayer(gpu!, { activation, recompute });
        using x = numbers(gpu!, "x", N, D), dOut = numbers(gpu!, "dOut", N, D);
        const step = plainStep(gpu!, { training: true, firstPass: true });
        for (const measured of [false, true]) {
          gpu!.resetPeak();
          const before = gpu!.memory().used_bytes;
          const { out_ND, saved, shown } = await layer.forward(x, step);
          dropShown([shown]);
          out_ND[Symbol.dispose]();
          const kept = gpu!.memory().used_bytes - before;
          (await layer.backward(dOut, saved, step))[Symbol.dispose]();
          const { used_bytes, peak_bytes } = gpu!.memory(), peak = peak_bytes - before;
          if (!measured) continue; // the first pass makes what the layer keeps
          assert.equal(used_bytes, before);
          // Rows, before the activation, after it; indices, weights and logits are small.
          const up = activation === "swiglu" ? 2 * narrow : narrow, small = 32 * 1024;
          const rows = wide + up + (recompute ? 0 : narrow);
          assert.ok(kept <= rows + small, `${kept} bytes are kept, not ${rows}`);
          // Rows and their outputs, or the gradient of those; or the gradient of rows. Besides hidden rows and tokens.
          const most = 2 * wide + tokens + 2 * up + narrow + small;
          assert.ok(most < 3 * wide, "or this says nothing");
          assert.ok(peak <= most, `${peak} bytes at most, not ${most}`);
        }
      }
    }
  },
);

Deno.test(
  "a step is told of the same on one rank of a GPU as on the CPU, in the same order",
  options,
  async () => {
    for (const sharedExperts of [0, 1]) {
      const [onGpu, onCpu] = await Promise.all([gpu!, cpuDevice()].map(async (device) => {
        const told: string[] = [], plain = plainStep(device, { training: true, firstPass: true });
        const step: Step = {
          ...plain,
          allToAll(where, start) {
            told.push(`${where.phase} ${where.role} ${where.layer}`);
            return plain.allToAll(where, start);
          },
          combineBackwardStarts: (layer) => told.push(`combine's backward ${layer}`),
          layerBackwardEnds: (layer) => told.push(`end ${layer}`),
          gradientReady: (name) => told.push(name),
        };
        using layer = makeLayer(device, { sharedExperts });
        using x = numbers(device, "x", 5, 512);
        const { out_ND, saved, shown } = await layer.forward(x, step);
        dropShown([shown]);
        out_ND[Symbol.dispose]();
        (await layer.backward(x, saved, step))[Symbol.dispose]();
        assert.deepEqual(
          told.filter((what) => what.startsWith("model.")),
          layer.parameters.map(({ name }) => name),
        );
        return told;
      }));
      assert.deepEqual(onGpu, onCpu);
      const at = (what: string) => onGpu.indexOf(what),
        expert = (name: string) => /experts\.\d/.test(name);
      assert.ok(at("backward combine 2") < onGpu.findIndex(expert));
      assert.ok(onGpu.findLastIndex(expert) < at("backward dispatch 2"));
    }
  },
);

Deno.test(
  "what a pass keeps can be released, and a pass that was not trained keeps nothing",
  options,
  async () => {
    using layer = makeLayer(gpu!, { sharedExperts: 1 });
    using x = numbers(gpu!, "x", 9, 512);
    for (const training of [true, false]) {
      const used: number[] = [];
      for (let i = 0; i < 3; i++) {
        const { out_ND, saved, shown } = await layer.forward(x, plainStep(gpu!, { training }));
        dropShown([shown]);
        out_ND[Symbol.dispose]();
        if (training) layer.release(saved);
        assert.ok(!x.disposed, "the input stays the caller's");
        used.push(gpu!.memory().used_bytes);
      }
      assert.equal(used[2], used[1]);
    }
  },
);
