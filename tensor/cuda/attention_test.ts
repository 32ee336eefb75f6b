// Attention on the GPU (or its emulator) against the CPU: packed sequences of odd lengths, grouped heads, every kernel of every width.

import assert from "node:assert/strict";
import fc from "fast-check";
import { smallSizes, testDevice } from "../../tests/emulator/device.ts";
import { cpuDevice } from "../cpu/device.ts";
import type { AttentionShape } from "../device.ts";
import { fromArray } from "../tensor.ts";
import { Case, type Dtype } from "./_compare.ts";
import {
  attentionBackwardModule,
  attentionGeneralModule,
  attentionHopperModule,
  attentionKernels,
  attentionModule,
  attentionTiles,
} from "./attention.ts";

const MODULES = [
  attentionModule,
  attentionBackwardModule,
  attentionGeneralModule,
  attentionHopperModule,
];
const device = await testDevice(MODULES), cpu = cpuDevice().kernels;
const kernels = device && attentionKernels(device.context, true);
const onHopper = device?.context.has(attentionHopperModule);
/** Without Hopper's instructions. */
const plain = device && attentionKernels(device.context, false);
const small = device && attentionKernels({
  ...device.context,
  properties: { ...device.context.properties, sharedMemory_bytes: 99 * 1024 },
}, false);

function shapeOf(lengths: readonly number[], H: number, G: number, C: number): AttentionShape {
  const offsets = new Int32Array(lengths.length + 1);
  lengths.forEach((length, s) => offsets[s + 1] = offsets[s] + length);
  return { offsets, heads: H, kvHeads: G, headDim: C };
}

async function check(
  of: NonNullable<typeof kernels>,
  dtype: Dtype,
  shape: AttentionShape,
  shift = 0,
): Promise<void> {
  using test = new Case(device!, dtype, shift);
  const { heads: H, kvHeads: G, headDim: C } = shape, N = shape.offsets.at(-1)!;
  const q = test.random(N, H * C), k = test.random(N, G * C), v = test.random(N, G * C);
  const out = test.result(N, H * C), lse = test.resultF32(N, H), bf16 = dtype === "bf16";
  cpu.attention(q.cpu, k.cpu, v.cpu, out.cpu, lse.cpu, shape);
  of.attention(q.gpu, k.gpu, v.gpu, out.gpu, lse.gpu, shape);
  await test.same("lse", lse, 1e-5);
  await test.same("out", out, bf16 ? 0.01 : 1e-5);
  const dOut = test.random(N, H * C), dQ = test.result(N, H * C);
  const dK = test.result(N, G * C), dV = test.result(N, G * C);
  // deno-fmt-ignore
  {
    cpu.attentionBackward(dOut.cpu, q.cpu, k.cpu, v.cpu, out.cpu, lse.cpu, shape, dQ.cpu, dK.cpu, dV.cpu);
    of.attentionBackward(dOut.gpu, q.gpu, k.gpu, v.gpu, out.gpu, lse.gpu, shape, dQ.gpu, dK.gpu, dV.gpu);
  }
  const bound = bf16 ? 0.016 : 2e-5;
  await test.same("dV", dV, bound);
  await test.same("dQ", dQ, bound);
  await test.same("dK", dK, bound);
}

/** Lengths, H, G, C: tiles' edges, one row, sequences of no rows, every width of kernel and some between. */
const SHAPES: readonly (readonly [readonly number[], number, number, number])[] = [
  [[1, 3], 1, 1, 64],
  [[64, 1, 0, 17], 2, 1, 64],
  [[129, 63], 2, 2, 64],
  [[130, 3], 1, 1, 32],
  [[65, 128], 2, 1, 128],
  [[150], 1, 1, 96],
  [[70], 2, 2, 8],
  [[70], 1, 1, 48],
  [[33], 3, 1, 80],
  [[35, 2], 2, 1, 20],
  [[40], 1, 1, 136],
  [[19], 1, 1, 256],
  [[], 1, 1, 64],
  ...smallSizes ? [] : [
    [[1000, 1, 24, 777, 2048, 0, 128], 4, 4, 64],
    [[1000, 1, 24, 777, 2048, 0, 128], 8, 2, 128],
    [[515, 64], 4, 2, 96],
    [[515, 64], 4, 1, 32],
    [[300], 2, 2, 256],
  ] as const,
];

for (const dtype of ["f32", "bf16"] as const) {
  for (const [lengths, H, G, C] of SHAPES) {
    Deno.test({
      name: `attention over [${lengths}], ${H} and ${G} heads of ${C} in ${dtype}`,
      ignore: !kernels,
      fn: () => check(kernels!, dtype, shapeOf(lengths, H, G, C)),
    });
    if (dtype === "f32" || C % 64 !== 0 || C > 128 || !onHopper) continue;
    Deno.test({
      name: `the same without Hopper's instructions: [${lengths}], ${H} and ${G} heads of ${C}`,
      fn: () => check(plain!, dtype, shapeOf(lengths, H, G, C)),
    });
  }
}

Deno.test({
  name: "attention with little shared memory",
  ignore: !small,
  async fn() {
    await check(small!, "bf16", shapeOf([66, 9], 2, 1, 128));
    await check(small!, "bf16", shapeOf([70], 1, 1, 96));
  },
});

Deno.test({
  name: "attention at addresses that are not aligned",
  ignore: !kernels,
  fn: () => check(kernels!, "bf16", shapeOf([40, 5], 2, 1, 16), 1),
});

Deno.test({
  name: "attention: large scores neither overflow nor lose the maximum",
  ignore: !kernels,
  async fn() {
    using test = new Case(device!, "bf16");
    const shape = shapeOf([100], 1, 1, 32), N = 100, C = 32;
    const big = Float32Array.from({ length: N * C }, (_, i) => ((i * 31) % 97 - 48) * 8);
    const q = test.pair([N, C], big), k = test.pair([N, C], big), v = test.random(N, C);
    const out = test.result(N, C), lse = test.resultF32(N, 1);
    cpu.attention(q.cpu, k.cpu, v.cpu, out.cpu, lse.cpu, shape);
    kernels!.attention(q.gpu, k.gpu, v.gpu, out.gpu, lse.gpu, shape);
    await test.same("lse", lse, 1e-5);
    await test.same("out", out, 0.01);
  },
});

Deno.test({
  name: "attention: two runs give equal bits; a neighbour's NaN does not come over",
  ignore: !kernels,
  async fn() {
    using test = new Case(device!, "bf16");
    const shape = shapeOf([70, 50], 1, 1, 64), N = 120, C = 64, poison = new Float32Array(N * C);
    poison.fill(NaN, 70 * C);
    for (let i = 0; i < 70 * C; i++) poison[i] = Math.sin(i);
    const q = test.pair([N, C], poison), dOut = test.pair([N, C], poison);
    const runs: unknown[] = [];
    for (let run = 0; run < 2; run++) {
      const out = test.result(N, C), lse = test.resultF32(N, 1);
      const gradients = [test.result(N, C), test.result(N, C), test.result(N, C)];
      const [dQ, dK, dV] = gradients.map(({ gpu }) => gpu);
      kernels!.attention(q.gpu, q.gpu, q.gpu, out.gpu, lse.gpu, shape);
      // deno-fmt-ignore
      kernels!.attentionBackward(dOut.gpu, q.gpu, q.gpu, q.gpu, out.gpu, lse.gpu, shape, dQ, dK, dV);
      const all = [];
      for (const tensor of [out.gpu, lse.gpu, dQ, dK, dV]) all.push(await tensor.toArray());
      runs.push(all);
      for (const tensor of [dQ, dK, dV]) {
        const own = (await tensor.toArray()).subarray(0, 70 * C) as Uint16Array;
        assert.ok(own.every((bits) => (bits & 0x7f80) !== 0x7f80), "all of the first are finite");
      }
    }
    assert.deepEqual(runs[0], runs[1]);
  },
});

Deno.test({
  name: "attention: equal offsets share their tables, many lists do not fill the memory",
  ignore: !kernels,
  async fn() {
    using x = fromArray(device!, new Float32Array(12 * 4)),
      lse = fromArray(device!, new Float32Array(12));
    using out = fromArray(device!, new Float32Array(12 * 4));
    const q = x.reshape(12, 4), to = out.reshape(12, 4);
    const held: number[] = [];
    for (let i = 0; i < 60; i++) {
      const first = 1 + i % 11, second = Math.floor(i / 11) % (12 - first);
      kernels!.attention(
        q,
        q,
        q,
        to,
        lse.reshape(12, 1),
        shapeOf([first, second, 12 - first - second], 1, 1, 4),
      );
      held.push(device!.memory().used_bytes);
    }
    await device!.stream.synchronize();
    assert.ok(held[59] <= held[20], `${held[59]} bytes after 60 lists, ${held[20]} after 20`);
    assert.throws(
      () => kernels!.attention(q, q, q, to, lse, shapeOf([12], 1, 1, 300)),
      /Cannot attend on the GPU as headDim must be <= 256: current value is 300/,
    );
  },
});

Deno.test("tiles cover every row of every sequence once, those with most work first", () => {
  fc.assert(fc.property(
    fc.array(fc.nat(400), { maxLength: 6 }),
    fc.constantFrom(32, 64, 128),
    fc.boolean(),
    (lengths, rows, keys) => {
      const { offsets } = shapeOf(lengths, 1, 1, 1), table = attentionTiles(offsets, rows, keys);
      const seen = new Set<number>(), slots = new Set<number>();
      let before = Infinity;
      for (let i = 0; i < table.length; i += 4) {
        const [start, length, first, slot] = table.subarray(i, i + 4);
        const work = keys ? Math.ceil(length / rows) - first / rows : first / rows + 1;
        assert.ok(work <= before && first % rows === 0);
        before = work;
        for (let r = first; r < Math.min(first + rows, length); r++) {
          assert.ok(!seen.has(start + r) && !slots.has(slot + r - first));
          seen.add(start + r);
          slots.add(slot + r - first);
        }
      }
      assert.equal(seen.size, offsets.at(-1));
    },
  ));
});
