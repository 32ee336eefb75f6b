// Norms and rotary positions on the GPU (or its emulator) against the CPU: all three ways that a row can be taken, odd sizes, no rows.

import assert from "node:assert/strict";
import { smallSizes, testDevice } from "../../tests/emulator/device.ts";
import { cpuDevice } from "../cpu/device.ts";
import { fromArray } from "../tensor.ts";
import { Case, type Dtype } from "./_compare.ts";
import { normsKernels, normsModule } from "./norms.ts";

const device = await testDevice([normsModule]), cpu = cpuDevice().kernels;
const kernels = device && normsKernels(device.context);
const DTYPES: readonly Dtype[] = ["f32", "bf16"];
const BOUND = { f32: 4e-6, bf16: 0.008 };

/** Rows, width, and elements by which addresses are off: warps, blocks, and what fits neither. */
const SIZES: readonly (readonly [number, number, number])[] = [
  [1, 8, 0],
  [3, 5, 0],
  [17, 129, 0],
  [129, 64, 0],
  [33, 1024, 0],
  [5, 1024, 1],
  [7, 1032, 0],
  [3, 4096, 0],
  [2, 8192, 0],
  [0, 64, 0],
  [2, 33000, 0],
  ...smallSizes ? [] : [[3000, 1024, 0], [700, 2048, 0], [401, 4096, 0], [301, 1000, 0]] as const,
];

for (const dtype of DTYPES) {
  for (const [N, D, shift] of SIZES) {
    Deno.test({
      name: `norms [${N}, ${D}] in ${dtype}${shift ? ", not aligned" : ""}`,
      ignore: !kernels,
      async fn() {
        using test = new Case(device!, dtype, shift);
        const bound = BOUND[dtype];
        const x = test.random(N, D), y = test.random(N, D), gain = test.random(D);
        const out = test.result(N, D), inverse = test.resultF32(N), sum = test.result(N, D);
        cpu.rmsNorm(x.cpu, gain.cpu, out.cpu, inverse.cpu, 1e-5);
        kernels!.rmsNorm(x.gpu, gain.gpu, out.gpu, inverse.gpu, 1e-5);
        await test.same("out", out, bound);
        await test.same("invRms", inverse, 1e-5);
        cpu.addRmsNorm(x.cpu, y.cpu, gain.cpu, sum.cpu, out.cpu, inverse.cpu, 1e-5);
        kernels!.addRmsNorm(x.gpu, y.gpu, gain.gpu, sum.gpu, out.gpu, inverse.gpu, 1e-5);
        await test.same("sum", sum, bound);
        await test.same("out of the sum", out, bound);
        await test.same("invRms of the sum", inverse, dtype === "f32" ? 1e-5 : 0.01);

        const dX = test.result(N, D), ones = new Float32Array(D).fill(1);
        cpu.rmsNorm(x.cpu, gain.cpu, out.cpu, inverse.cpu, 1e-5);
        kernels!.rmsNorm(x.gpu, gain.gpu, out.gpu, inverse.gpu, 1e-5);
        for (const wide of [false, true]) {
          const dGain = test.pair([D], ones, wide ? "f32" : dtype);
          cpu.rmsNormBackward(y.cpu, x.cpu, gain.cpu, inverse.cpu, dX.cpu, dGain.cpu);
          kernels!.rmsNormBackward(y.gpu, x.gpu, gain.gpu, inverse.gpu, dX.gpu, dGain.gpu);
          await test.same("dX", dX, bound);
          await test.same("dGain", dGain, wide || dtype === "f32" ? 1e-5 : bound);
        }
        // in place of the residual
        const residual = test.random(N, D), dGain = test.pair([D], ones, "f32");
        // deno-fmt-ignore
        {
          cpu.rmsNormBackward(y.cpu, x.cpu, gain.cpu, inverse.cpu, residual.cpu, dGain.cpu, residual.cpu);
          kernels!.rmsNormBackward(y.gpu, x.gpu, gain.gpu, inverse.gpu, residual.gpu, dGain.gpu, residual.gpu);
        }
        await test.same("dX with a residual", residual, bound);
        await test.same("dGain", dGain, 1e-5);
        // the sum in place of x
        cpu.addRmsNorm(x.cpu, y.cpu, gain.cpu, x.cpu, out.cpu, inverse.cpu, 1e-5);
        kernels!.addRmsNorm(x.gpu, y.gpu, gain.gpu, x.gpu, out.gpu, inverse.gpu, 1e-5);
        await test.same("sum in place", x, bound);
        await test.same("out of it", out, bound);
      },
    });
  }

  for (
    const [N, H, G, C, shift] of [
      [1, 1, 1, 2, 0],
      [17, 3, 1, 16, 0],
      [129, 4, 2, 64, 0],
      [5, 2, 2, 64, 1],
      [3, 2, 1, 40, 0],
      [0, 1, 1, 8, 0],
    ]
  ) {
    Deno.test({
      name: `rotary positions of ${N} rows, ${H} and ${G} heads of ${C} in ${dtype}`,
      ignore: !kernels,
      async fn() {
        using test = new Case(device!, dtype, shift);
        const options = { headDim: C, theta: 10_000 }, bound = dtype === "f32" ? 1e-5 : 0.008;
        const positions = test.integers(Int32Array.from({ length: N }, (_, n) => (n * 37) % 4001));
        const x = test.random(N, H * C), turned = test.pair([N, H * C], await numbersOf(x));
        for (const inverse of [false, true]) {
          cpu.rope(x.cpu, positions.cpu, { ...options, inverse });
          kernels!.rope(x.gpu, positions.gpu, { ...options, inverse });
          await test.same(inverse ? "turned back" : "turned", x, bound);
        }
        await test.same("there and back", { cpu: turned.cpu, gpu: x.gpu }, 2 * bound);
        const qkv = test.random(N, (H + 2 * G) * C), dQkv = test.result(N, (H + 2 * G) * C);
        const q = test.result(N, H * C), k = test.result(N, G * C), v = test.result(N, G * C);
        cpu.splitQkv(qkv.cpu, positions.cpu, options, q.cpu, k.cpu, v.cpu);
        kernels!.splitQkv(qkv.gpu, positions.gpu, options, q.gpu, k.gpu, v.gpu);
        await test.same("q", q, bound);
        await test.same("k", k, bound);
        await test.same("v", v, 0);
        cpu.joinQkv(q.cpu, k.cpu, v.cpu, positions.cpu, options, dQkv.cpu);
        kernels!.joinQkv(q.gpu, k.gpu, v.gpu, positions.gpu, options, dQkv.gpu);
        await test.same("joined", dQkv, 2 * bound);
      },
    });
  }
}

function numbersOf(pair: { cpu: { toArray(): Promise<unknown> } }): Promise<Float32Array> {
  return pair.cpu.toArray() as Promise<Float32Array>;
}

Deno.test({
  name: "a position far out is turned as exactly as a near one",
  ignore: !kernels,
  async fn() {
    using test = new Case(device!, "f32");
    const theta = 10_000, C = 8, position = 1_234_567;
    const x = test.random(1, C), positions = test.integers(Int32Array.of(position));
    const before = await x.cpu.toArray() as Float32Array;
    kernels!.rope(x.gpu, positions.gpu, { headDim: C, theta });
    const after = await x.gpu.toArray() as Float32Array;
    for (let i = 0; i < C / 2; i++) {
      const angle = position * theta ** (-2 * i / C);
      const want = before[i] * Math.cos(angle) - before[i + C / 2] * Math.sin(angle);
      assert.ok(Math.abs(after[i] - want) < 2e-6, `pair ${i}: ${after[i]} instead of ${want}`);
    }
  },
});

Deno.test({
  name: "norms: two runs give equal bits, f64 is refused, nothing is left allocated",
  ignore: !kernels,
  async fn() {
    using test = new Case(device!, "bf16");
    const N = 400, D = 256;
    const x = test.random(N, D), dOut = test.random(N, D), gain = test.random(D);
    const dX = test.result(N, D), inverse = test.pair([N], new Float32Array(N).fill(0.9), "f32");
    const gradients: Float32Array[] = [];
    const before = device!.memory().used_bytes;
    for (let run = 0; run < 2; run++) {
      using dGain = fromArray(device!, new Float32Array(D));
      kernels!.rmsNormBackward(dOut.gpu, x.gpu, gain.gpu, inverse.gpu, dX.gpu, dGain);
      gradients.push(await dGain.toArray() as Float32Array);
    }
    assert.deepEqual(gradients[0], gradients[1]);
    assert.equal(device!.memory().used_bytes, before);
    const wrong = { ...x.gpu, dtype: "f64", shape: [N, D] } as unknown as typeof x.gpu;
    assert.throws(
      () => kernels!.rmsNorm(wrong, gain.gpu, dX.gpu, inverse.gpu, 0),
      /Cannot normalise on the GPU as the dtype must be f32 or bf16: current value is f64/,
    );
  },
});
