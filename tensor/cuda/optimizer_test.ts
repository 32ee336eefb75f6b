// Sums, clipping and AdamW against the reference in f64: lists of mixed sizes and dtypes, unaligned tensors, the exactness of the master
// weight's split, and that tables are uploaded only when the list changes.

import assert from "node:assert/strict";
import { cpuDevice } from "../cpu/device.ts";
import { fromBf16, toBf16 } from "../cpu/reference/elementwise.ts";
import { referenceKernels } from "../cpu/reference/mod.ts";
import type { AdamWOptions, AdamWUpdate, Kernels } from "../device.ts";
import type { DType } from "../dtype.ts";
import { fromArray, type Tensor, zeros } from "../tensor.ts";
import { testDevice } from "../../tests/emulator/device.ts";
import {
  assertNear,
  decode,
  encode,
  exact,
  exactNumbers,
  Guarded,
  numbers,
  random,
} from "./_guarded.ts";
import type { CudaContext } from "./context.ts";
import { optimizerKernels, optimizerModule } from "./optimizer.ts";

const device = await testDevice([optimizerModule]);
const ignore = device === null;
const kernels = ignore ? null : optimizerKernels(device.context);
const cpu = cpuDevice();

const SIZES = [1, 3, 0, 8, 17, 0, 129, 2048, 4097, 33000, 0];

async function scalar(x: Tensor): Promise<number> {
  return Number((await x.toArray())[0]);
}

Deno.test({
  name: "sum",
  ignore,
  fn: async () => {
    for (const dtype of ["f32", "bf16"] as const) {
      for (const size of SIZES) {
        for (const offset of [0, 1, 4]) {
          const values = numbers(size, random(size));
          using x = new Guarded(device!, dtype, [size], values, offset);
          using out = new Guarded(device!, "f64", [1], [0.5], 0);
          kernels!.sum(x.tensor, out.tensor);
          const want = decode(dtype, encode(dtype, values)).reduce((a, b) => a + b, 0.5);
          const [got] = await out.read("sum");
          assert(Math.abs(got - want) <= 1e-11 * size, `sum ${dtype} ${size}: ${got}, not ${want}`);
        }
      }
    }
  },
});

Deno.test({
  name: "sumSquares of a list of mixed dtypes",
  ignore,
  fn: async () => {
    const next = random(9);
    for (const offset of [0, 1, 4]) {
      const lists = SIZES.map((size, i) => {
        const dtype = i % 2 ? "bf16" as const : "f32" as const;
        return { dtype, size, values: numbers(size, next) };
      });
      const xs = lists.map(({ dtype, size, values }) =>
        new Guarded(device!, dtype, [size], values, offset)
      );
      using out = new Guarded(device!, "f64", [1], [2], 0);
      const tensors = xs.map(({ tensor }) => tensor);
      kernels!.sumSquares(tensors, out.tensor);
      let want = 2;
      for (const { dtype, values } of lists) {
        for (const x of decode(dtype, encode(dtype, values))) want += x * x;
      }
      const [got] = await out.read("sumSquares");
      assert(Math.abs(got - want) <= 1e-11 * want, `sumSquares: ${got}, not ${want}`);
      kernels!.sumSquares(tensors, out.tensor);
      const [twice] = await out.read("sumSquares");
      assert(Math.abs(twice - (2 * want - 2)) <= 1e-11 * twice, "a second call adds");
      kernels!.sumSquares([], out.tensor);
      kernels!.sumSquares([tensors[2]], out.tensor);
      assert.equal((await out.read("sumSquares"))[0], twice);
      for (const each of xs) each[Symbol.dispose]();
    }
  },
});

Deno.test({
  name: "sums of large and tiny numbers need f64",
  ignore,
  fn: async () => {
    using x = new Guarded(device!, "f32", [3], [1e30, 1e-30, 2e30], 0);
    using out = new Guarded(device!, "f64", [1], [0], 0);
    kernels!.sumSquares([x.tensor], out.tensor);
    assert(Math.abs((await out.read("squares"))[0] / 5e60 - 1) < 1e-6);
    using tiny = new Guarded(device!, "f32", [2], [1e-30, 1e-30], 0);
    using none = new Guarded(device!, "f64", [1], [0], 0);
    kernels!.sumSquares([tiny.tensor], none.tensor);
    assert(Math.abs((await none.read("squares"))[0] / 2e-60 - 1) < 1e-6);
  },
});

Deno.test({
  name: "clipScale",
  ignore,
  fn: async () => {
    // deno-fmt-ignore
    const cases = [[4, 1], [4, 2], [4, 3], [4, 0], [0, 1], [0, 0], [1e60, 0.5], [Infinity, 1], [Infinity, 0], [NaN, 1], [NaN, 0], [-1, 1]];
    for (const [squares, limit] of cases) {
      using from = fromArray(device!, new Float64Array([squares]));
      using out = new Guarded(device!, "f32", [1], [5], 1);
      using wantFrom = fromArray(cpu, new Float64Array([squares]));
      using want = zeros(cpu, [1], "f32");
      kernels!.clipScale(from, limit, out.tensor);
      referenceKernels.clipScale(wantFrom, limit, want);
      const [got] = await out.read("clipScale");
      const expected = squares < 0 ? NaN : await scalar(want);
      assert(Object.is(got, expected) || Math.abs(got - expected) < 1e-7 * expected, `${squares}`);
    }
  },
});

/** The split that optimizer.cu documents, in JavaScript. */
function split(master: number): { value: number; residual: number } {
  const bits = new Uint32Array(new Float32Array([master]).buffer)[0];
  const high = (bits + 0x8000) >>> 16;
  return { value: high, residual: (bits - high * 65536) | 0 };
}

/** Joins what is on the device into master weights. */
async function masters({ parameter, residual }: AdamWUpdate): Promise<number[]> {
  const values = await parameter.toArray();
  if (residual === null) return Array.from(values as Float32Array);
  const low = await residual.toArray(), bits = new Uint32Array(1);
  const real = new Float32Array(bits.buffer);
  return Array.from(values as Uint16Array, (value, i) => {
    bits[0] = value * 65536 + (low[i] as number);
    return real[0];
  });
}

interface Case {
  readonly size: number;
  readonly parameter: "f32" | "bf16";
  readonly gradient: "f32" | "bf16";
  readonly offset: number;
  readonly decay: number;
}

/** A parameter on the device, the same in f64 on the CPU, and the guards. */
function make(c: Case, seed: number) {
  const next = random(seed), { size, offset } = c;
  const master = numbers(size, () => Math.fround(next()));
  const gradient = numbers(size, next), moment1 = numbers(size, next);
  const moment2 = numbers(size, () => Math.abs(next()));
  const on = (dtype: DType, values: number[]) =>
    new Guarded(device!, dtype, [size], values, offset);
  const parts = master.map(split), bf16 = c.parameter === "bf16";
  const guards = {
    parameter: on(c.parameter, bf16 ? parts.map(({ value }) => fromBf16(value)) : master),
    gradient: on(c.gradient, gradient),
    moment1: on("f32", moment1),
    moment2: on("f32", moment2),
    residual: bf16 ? on("i16", parts.map(({ residual }) => residual)) : null,
  };
  const update: AdamWUpdate = {
    parameter: guards.parameter.tensor,
    gradient: guards.gradient.tensor,
    moment1: guards.moment1.tensor,
    moment2: guards.moment2.tensor,
    residual: guards.residual?.tensor ?? null,
    weightDecay: c.decay,
  };
  const host: AdamWUpdate = {
    parameter: exact("f32", [size], master),
    gradient: exact(c.gradient, [size], gradient),
    moment1: exact("f32", [size], moment1),
    moment2: exact("f32", [size], moment2),
    residual: null,
    weightDecay: c.decay,
  };
  const dispose = () => {
    for (const each of Object.values(guards)) each?.[Symbol.dispose]();
    for (const each of Object.values(host)) {
      if (typeof each === "object") each?.[Symbol.dispose]();
    }
  };
  return { update, host, guards, dispose };
}

const CASES: readonly Case[] = [0, 1, 4].flatMap((offset) =>
  SIZES.flatMap((size): Case[] => [
    { size, parameter: "bf16", gradient: "f32", offset, decay: 0.1 },
    { size, parameter: "bf16", gradient: "bf16", offset, decay: 0 },
    { size, parameter: "f32", gradient: "f32", offset, decay: 0.01 },
  ])
);

function options(scale: Tensor, more: Partial<AdamWOptions> = {}): AdamWOptions {
  // deno-fmt-ignore
  return { lr: 0.02, beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 3, zeroGradient: false, gradScale: scale, ...more };
}

async function compareAdamW(cases: readonly Case[], scale: number, zeroGradient: boolean) {
  const made = cases.map(make);
  using gradScale = fromArray(device!, new Float32Array([scale]));
  using hostScale = exact("f32", [1], [scale]);
  for (let step = 3; step < 5; step++) {
    const more = { step, zeroGradient };
    kernels!.adamW(made.map(({ update }) => update), options(gradScale, more));
    referenceKernels.adamW(made.map(({ host }) => host), options(hostScale, more));
  }
  for (const [i, { update, host, guards, dispose }] of made.entries()) {
    const what = JSON.stringify(cases[i]);
    const near = { dtype: "f32" as const, what };
    assertNear(await masters(update), exactNumbers(host.parameter), near);
    assertNear(await guards.moment1.read(what), exactNumbers(host.moment1), near);
    assertNear(await guards.moment2.read(what), exactNumbers(host.moment2), near);
    assert.deepEqual(
      await guards.gradient.read(what),
      Array.from(exactNumbers(host.gradient)),
      what,
    );
    const values = await guards.parameter.read(what);
    if (guards.residual) {
      await guards.residual.read(what);
      // What the model computes with is the master weight rounded.
      for (const [j, master] of (await masters(update)).entries()) {
        assert.equal(values[j], fromBf16(split(master).value), `${what}[${j}]`);
      }
    }
    dispose();
  }
}

Deno.test({
  name: "AdamW of a list of all kinds of parameters",
  ignore,
  fn: async () => {
    await compareAdamW(CASES, 0.7, true);
    await compareAdamW(CASES.slice(0, 12), 1, false);
    await compareAdamW([], 1, false);
    await compareAdamW([CASES[6]], 1, false);
  },
});

Deno.test({
  name: "AdamW changes nothing but gradients if the scale is not finite",
  ignore,
  fn: async () => {
    for (const scale of [NaN, Infinity, -Infinity]) {
      for (const zeroGradient of [false, true]) {
        await compareAdamW(CASES.slice(9, 30), scale, zeroGradient);
      }
    }
  },
});

Deno.test({
  name: "master weights survive splitting and joining to the bit",
  ignore,
  fn: async () => {
    // Ties of both kinds, the ends of a binade, denormal numbers, the largest that are finite, zeros of both signs; and random bits.
    const bits = [
      0x3f808000,
      0x3f818000,
      0xbf808000,
      0xbf818000,
      0x3fffffff,
      0x3f807fff,
      0x3f808001,
    ];
    bits.push(
      0,
      0x80000000,
      1,
      0x00008000,
      0x80018000,
      0x007fffff,
      0x7f7f7fff,
      0x7f7fffff,
      0xff7fffff,
    );
    const next = random(77);
    while (bits.length < 4000) {
      const random = Math.floor((next() + 2) * 2 ** 30) >>> 0;
      if ((random & 0x7f800000) !== 0x7f800000) bits.push(random);
    }
    const before = Array.from(new Float32Array(new Uint32Array(bits).buffer));
    const size = bits.length, none = numbers(size, () => 0), parts = before.map(split);
    const on = (dtype: DType, values: number[]) => new Guarded(device!, dtype, [size], values, 0);
    using parameter = on("bf16", parts.map(({ value }) => fromBf16(value)));
    using residual = on("i16", parts.map(({ residual }) => residual));
    using gradient = on("f32", none);
    using moment1 = on("f32", none);
    using moment2 = on("f32", none);
    using scale = fromArray(device!, new Float32Array([1]));
    const update: AdamWUpdate = {
      parameter: parameter.tensor,
      residual: residual.tensor,
      gradient: gradient.tensor,
      moment1: moment1.tensor,
      moment2: moment2.tensor,
      weightDecay: 0,
    };
    assert.deepEqual(await masters(update), before);
    // The moments are 0, so the master stays and is split anew.
    kernels!.adamW([update], options(scale));
    const after = await masters(update);
    before.forEach((x, i) => assert(Object.is(x, after[i]) || x === after[i], `${x}: ${after[i]}`));
    for (const { residual } of parts) assert(residual >= -0x8000 && residual < 0x8000);
  },
});

Deno.test({
  name: "a master weight that becomes NaN makes the parameter NaN",
  ignore,
  fn: async () => {
    const { update, guards, dispose } = make({ ...CASES[9], size: 9, offset: 0 }, 1);
    using bad = fromArray(device!, new Float32Array(9).fill(NaN));
    using scale = fromArray(device!, new Float32Array([1]));
    kernels!.adamW([{ ...update, gradient: bad }], options(scale));
    for (const x of await guards.parameter.read("NaN")) assert(Number.isNaN(x), `${x}`);
    dispose();
  },
});

Deno.test({
  name: "tables are uploaded when a list is new, and only then",
  ignore,
  fn: async () => {
    let uploads = 0;
    const context: CudaContext = Object.create(device!.context, {
      upload: {
        value(source: ArrayBufferView, address: number) {
          uploads++;
          device!.context.upload(source, address);
        },
      },
    });
    // Methods of the real context keep their own `this`.
    for (const name of ["kernel", "allocate", "free", "clear"] as const) {
      const method = device!.context[name] as (...a: unknown[]) => unknown;
      Object.defineProperty(context, name, { value: method.bind(device!.context) });
    }
    const own: Pick<Kernels, "adamW" | "sumSquares"> = optimizerKernels(context);
    const made = CASES.slice(0, 6).map(make), updates = made.map(({ update }) => update);
    using scale = fromArray(device!, new Float32Array([1]));
    using out = zeros(device!, [1], "f64");
    const step = (list: AdamWUpdate[]) => {
      own.adamW([...list], options(scale));
      own.sumSquares(list.map(({ gradient }) => gradient), out);
    };
    for (let i = 0; i < 3; i++) step(updates);
    assert.equal(uploads, 2);
    const other = [...updates].reverse();
    for (let i = 0; i < 3; i++) {
      step(other);
      step(updates);
    }
    assert.equal(uploads, 4);
    // More lists than tables: the oldest is forgotten, results stay right.
    for (let i = 0; i < 40; i++) own.adamW([{ ...updates[3], weightDecay: i }], options(scale));
    assert.equal(uploads, 44);
    step(updates);
    assert.equal(uploads, 45, "sumSquares has tables of its own");
    await device!.stream.synchronize();
    for (const { dispose } of made) dispose();
  },
});

Deno.test({
  name: "other dtypes are refused",
  ignore,
  fn: () => {
    using x = zeros(cpu, [4], "f64");
    using out = zeros(cpu, [1], "f64");
    using f32 = zeros(cpu, [4], "f32");
    using bf16 = fromArray(cpu, new Uint16Array(4).fill(toBf16(1)));
    assert.throws(() => kernels!.sum(x, out), /Cannot sum as .* f64/);
    assert.throws(() => kernels!.sumSquares([f32, x], out), /Cannot sum squares as .* f64/);
    const good = {
      parameter: f32,
      gradient: f32,
      moment1: f32,
      moment2: f32,
      residual: null,
      weightDecay: 0,
    };
    const step = (wrong: Partial<AdamWUpdate>) => () =>
      kernels!.adamW([{ ...good, ...wrong }], options(f32));
    assert.throws(step({ parameter: x }), /Cannot take an AdamW step as the dtype of parameter/);
    assert.throws(step({ parameter: bf16 }), /must have a residual/);
    assert.throws(step({ parameter: bf16, residual: bf16 }), /residual must be i16/);
    assert.throws(step({ gradient: bf16 }), /gradient must be f32/);
    assert.throws(step({ moment1: x }), /moment1 must be f32/);
    assert.throws(step({ moment2: bf16 }), /moment2 must be f32/);
  },
});
