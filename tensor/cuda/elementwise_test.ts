// The element-wise kernels against the reference in f64: odd sizes, none, several blocks, unaligned tensors, aliases.

import assert from "node:assert/strict";
import { cpuDevice } from "../cpu/device.ts";
import { referenceKernels } from "../cpu/reference/mod.ts";
import type { Activation } from "../device.ts";
import type { DType } from "../dtype.ts";
import { fromArray, type Shape, sizeOf, type Tensor, zeros } from "../tensor.ts";
import { testDevice } from "../../tests/emulator/device.ts";
import { assertNear, encode, exact, exactNumbers, Guarded, numbers, random } from "./_guarded.ts";
import { elementwiseKernels, elementwiseModule } from "./elementwise.ts";

const device = await testDevice([elementwiseModule]);
const ignore = device === null;
const kernels = ignore ? null : elementwiseKernels(device.context);

/** Around packs of 4 and 8, warps, and one block's share of elements. */
const SIZES = [0, 1, 3, 4, 7, 8, 17, 129, 2048, 4099, 9001];
/** Elements by which the tensors of a call are off an aligned address. */
const OFFSETS = [[0, 0, 0], [1, 1, 1], [0, 1, 3], [4, 0, 0]];

type Run = (kernels: ReturnType<typeof elementwiseKernels>, xs: Tensor[]) => void;

/** Runs the kernel on tensors of these shapes, of which all are compared afterwards. */
async function compare(
  what: string,
  dtype: DType,
  shapes: readonly Shape[],
  run: Run,
  options: { offsets?: readonly number[]; tolerance?: number; range?: number } = {},
  dtypes: readonly DType[] = [],
): Promise<void> {
  const { offsets = [0, 0, 0], range = 1 } = options;
  const next = random(sizeOf(shapes[0]) + 1), of = (i: number) => dtypes[i] ?? dtype;
  const values = shapes.map((shape) => numbers(sizeOf(shape), () => range * next()));
  const ours = shapes.map((s, i) => new Guarded(device!, of(i), s, values[i], offsets[i] ?? 0));
  const theirs = shapes.map((s, i) => exact(of(i), s, values[i]));
  run(kernels!, ours.map((each) => each.tensor));
  run(referenceKernels, theirs);
  for (const [i, each] of ours.entries()) {
    const name = `${what} ${dtype} [${shapes[i]}] at ${offsets} tensor ${i}`;
    const result = await each.read(name);
    assertNear(result, exactNumbers(theirs[i]), { dtype: of(i), what: name, ...options });
    each[Symbol.dispose]();
    theirs[i][Symbol.dispose]();
  }
}

async function everywhere(
  test: (dtype: "f32" | "bf16", offsets: number[], size: number) => Promise<void>,
) {
  for (const dtype of ["f32", "bf16"] as const) {
    for (const offsets of OFFSETS) for (const size of SIZES) await test(dtype, offsets, size);
  }
}

Deno.test({
  name: "add, axpy, scale",
  ignore,
  fn: () =>
    everywhere(async (dtype, offsets, size) => {
      const one: Shape[] = [[size], [size], [size]];
      await compare("add", dtype, one, (k, [x, y, out]) => k.add(x, y, out), { offsets });
      await compare("axpy", dtype, one, (k, [x, y]) => k.axpy(-1.5, x, y), { offsets });
      await compare("scale", dtype, one, (k, [x]) => k.scale(x, 0.3), { offsets });
    }),
});

Deno.test({
  name: "add in place",
  ignore,
  fn: async () => {
    for (const size of [9, 5000]) {
      const one: Shape[] = [[size], [size]];
      await compare("x += y", "bf16", one, (k, [x, y]) => k.add(x, y, x));
      await compare("y += x", "f32", one, (k, [x, y]) => k.add(x, y, y));
      await compare("x += x", "f32", one, (k, [x]) => k.add(x, x, x));
    }
  },
});

Deno.test({
  name: "activations and their gradients",
  ignore,
  fn: () =>
    everywhere(async (dtype, offsets, size) => {
      for (const kind of ["relu", "gelu"] as Activation[]) {
        const one: Shape[] = [[size], [size], [size]];
        const options = { offsets, range: 3 };
        await compare(kind, dtype, one, (k, [x, out]) => k.activation(kind, x, out), options);
        const back: Run = (k, [d, x, dX]) => k.activationBackward(kind, d, x, dX);
        await compare(`${kind} gradient`, dtype, one, back, options);
      }
    }),
});

Deno.test({
  name: "swiglu and its gradient",
  ignore,
  fn: async () => {
    const shapes = [[0, 8], [1, 1], [3, 3], [5, 8], [2, 17], [17, 16], [129, 40], [9, 520]];
    for (const dtype of ["f32", "bf16"] as const) {
      for (const offsets of OFFSETS) {
        for (const [N, F] of shapes) {
          const options = { offsets, range: 3 };
          const forward: Run = (k, [x, out]) => k.activation("swiglu", x, out);
          await compare("swiglu", dtype, [[N, 2 * F], [N, F]], forward, options);
          const backward: Run = (k, [d, x, dX]) => k.activationBackward("swiglu", d, x, dX);
          await compare(
            "swiglu gradient",
            dtype,
            [[N, F], [N, 2 * F], [N, 2 * F]],
            backward,
            options,
          );
        }
      }
    }
  },
});

Deno.test({
  name: "activations of rows with factors, and the factors' gradient",
  ignore,
  fn: async () => {
    // Around packs, a warp's share of a row with one and with several packs in flight, and a block's rows.
    const shapes = [[0, 8], [1, 1], [3, 3], [5, 8], [9, 17], [8, 256], [17, 264], [2, 1040], [
      3,
      2304,
    ]];
    for (const kind of ["relu", "gelu", "swiglu"] as const) {
      for (const dtype of ["f32", "bf16"] as const) {
        for (const offsets of [[0, 0, 0], [1, 1, 1], [0, 0, 3]]) {
          for (const [N, F] of shapes) {
            const options = { offsets, range: 2 }, wide = [N, kind === "swiglu" ? 2 * F : F];
            await compare(
              `${kind} of rows`,
              dtype,
              [wide, [N, F], [N]],
              (k, [x, out, scales]) => k.activation(kind, x, out, scales),
              options,
              [dtype, dtype, "f32"],
            );
            for (const given of ["both", "scales", "dScales"]) {
              await compare(
                `${kind} gradient of rows, ${given}`,
                dtype,
                [[N, F], wide, wide, [N], [N]],
                (k, [d, x, dX, scales, dScales]) =>
                  k.activationBackward(kind, d, x, dX, {
                    scales: given === "dScales" ? undefined : scales,
                    dScales: given === "scales" ? undefined : dScales,
                  }),
                options,
                [dtype, dtype, dtype, "f32", "f32"],
              );
            }
          }
        }
      }
    }
  },
});

Deno.test({
  name: "factors of 1 leave an activation's bits as they are; no columns, no gradient of factors",
  ignore,
  fn: async () => {
    for (const kind of ["relu", "gelu", "swiglu"] as const) {
      const H = kind === "swiglu" ? 80 : 40, next = random(3);
      using x = new Guarded(device!, "bf16", [7, H], numbers(7 * H, () => 3 * next()), 0);
      using d = new Guarded(device!, "bf16", [7, 40], numbers(7 * 40, next), 0);
      using ones = new Guarded(device!, "f32", [7], numbers(7, () => 1), 0);
      const results = [];
      for (const scales of [undefined, ones.tensor]) {
        using out = new Guarded(device!, "bf16", [7, 40], [], 0);
        using dX = new Guarded(device!, "bf16", [7, H], [], 0);
        kernels!.activation(kind, x.tensor, out.tensor, scales);
        kernels!.activationBackward(kind, d.tensor, x.tensor, dX.tensor, { scales });
        results.push([await out.read(kind), await dX.read(kind)]);
      }
      assert.deepEqual(results[0], results[1]);
      using none = new Guarded(device!, "bf16", [7, 0], [], 0);
      kernels!.activationBackward(kind, none.tensor, none.tensor, none.tensor, {
        dScales: ones.tensor,
      });
      assert.deepEqual(await ones.read("dScales"), numbers(7, () => 0));
    }
  },
});

Deno.test({
  name: "activations of very large and very small numbers",
  ignore,
  fn: async () => {
    const extremes = [-1e30, -1e4, -100, -89, -20, -1e-30, 0, 1e-30, 20, 89, 100, 1e4, 1e30];
    for (const kind of ["gelu", "swiglu"] as Activation[]) {
      const values = kind === "gelu" ? extremes : [...extremes, ...extremes.map(() => 1)];
      const shape = [1, values.length], out = [1, extremes.length];
      using x = new Guarded(device!, "f32", shape, values, 0);
      using y = new Guarded(device!, "f32", out, values, 0);
      using d = new Guarded(device!, "f32", out, extremes.map(() => 1), 0);
      using dX = new Guarded(device!, "f32", shape, values, 0);
      kernels!.activation(kind, x.tensor, y.tensor);
      kernels!.activationBackward(kind, d.tensor, x.tensor, dX.tensor);
      (await y.read(kind)).forEach((result, i) => {
        const want = extremes[i] > 10 ? extremes[i] : extremes[i] < -50 ? 0 : null;
        if (want !== null) assert(Math.abs(result - want) <= 1e-6 * Math.abs(want), `${kind} ${i}`);
        assert(Number.isFinite(result), `${kind}(${extremes[i]}) = ${result}`);
      });
      const slopes = await dX.read(kind);
      for (let i = 0; i < extremes.length; i++) {
        const want = extremes[i] > 50 ? 1 : extremes[i] < -100 ? 0 : slopes[i];
        assert(Math.abs(slopes[i] - want) < 1e-6, `${kind}'(${extremes[i]}) = ${slopes[i]}`);
      }
    }
  },
});

Deno.test({
  name: "fill, every dtype",
  ignore,
  fn: async () => {
    const dtypes: DType[] = ["f32", "f64", "f16", "bf16", "i32", "u8", "i64", "i16"];
    for (const dtype of dtypes) {
      for (const value of dtype === "u8" ? [0, 200] : [0, -3, 1.5]) {
        if (value === 1.5 && dtype.startsWith("i")) continue;
        for (const [size, offset] of [[0, 0], [1, 3], [7, 1], [129, 0], [2051, 5]]) {
          using x = new Guarded(device!, dtype, [size], numbers(size, () => 1), offset);
          kernels!.fill(x.tensor, value);
          assert.deepEqual(await x.read(`fill ${dtype}`), numbers(size, () => value));
        }
      }
    }
  },
});

Deno.test({
  name: "copy within every dtype",
  ignore,
  fn: async () => {
    const dtypes: DType[] = ["f32", "f64", "f16", "bf16", "i32", "u8", "i64", "i16"];
    for (const dtype of dtypes) {
      for (const offsets of OFFSETS) {
        for (const size of [0, 1, 5, 129, 2051]) {
          const values = numbers(size, () => 0).map((_, i) => i % 100);
          using x = new Guarded(device!, dtype, [size], values, offsets[0]);
          using out = new Guarded(device!, dtype, [size], numbers(size, () => 1), offsets[1]);
          kernels!.copy(x.tensor, out.tensor);
          assert.deepEqual(await out.read(`copy ${dtype}`), values);
        }
      }
    }
  },
});

Deno.test({
  name: "copy converts: nearest, ties to even; integers toward zero",
  ignore,
  fn: async () => {
    const cpu = cpuDevice(), next = random(5), dtypes = ["f32", "bf16", "f64", "i32"] as const;
    // 1 + 2^-8 and 1 + 3·2^-8 are ties between neighbours of bf16.
    const special = [0, -0, 1.00390625, 1.01171875, -1.00390625, 0.999, -0.999, 12345.75, 3e-39];
    for (const from of dtypes) {
      for (const to of dtypes) {
        if (from === to) continue;
        for (const [size, a, b] of [[9, 0, 0], [1, 0, 0], [131, 1, 0], [5003, 0, 0], [77, 3, 3]]) {
          const values = numbers(size, () => 1000 * next()).map((x, i) => special[i] ?? x);
          using x = new Guarded(device!, from, [size], values, a);
          using out = new Guarded(device!, to, [size], values, b);
          using hostX = fromArray(cpu, encode(from, values));
          using hostOut = zeros(cpu, [size], to);
          kernels!.copy(x.tensor, out.tensor);
          referenceKernels.copy(hostX, hostOut);
          const want = await hostOut.toArray(), got = await out.read(`${from} to ${to}`);
          assert.deepEqual(encode(to, got), want, `${from} to ${to}, ${size}`);
        }
      }
    }
    using x = zeros(cpu, [1], "f32");
    const odd = { ...x, dtype: "f16", size: 1 } as unknown as Tensor;
    assert.throws(() => kernels!.copy(odd, x), /Cannot copy as the dtypes .* f16 and f32/);
  },
});

Deno.test({
  name: "other dtypes are refused",
  ignore,
  fn: () => {
    using x = zeros(cpuDevice(), [4], "f64");
    for (
      const call of [
        () => kernels!.add(x, x, x),
        () => kernels!.axpy(1, x, x),
        () => kernels!.scale(x, 2),
        () => kernels!.activation("relu", x, x),
        () => kernels!.activationBackward("gelu", x, x, x),
      ]
    ) assert.throws(call, /Cannot .* as the dtype of x must be f32 or bf16: current value is f64/);
  },
});
