// Softmax and cross-entropy against the reference in f64: widths around packs and blocks, unaligned and ragged rows, rows that do not fit
// into shared memory, ignored targets, masked logits.

import assert from "node:assert/strict";
import { cpuDevice } from "../cpu/device.ts";
import { referenceKernels } from "../cpu/reference/mod.ts";
import type { DType } from "../dtype.ts";
import { fromArray, zeros } from "../tensor.ts";
import { testDevice } from "../../tests/emulator/device.ts";
import { assertNear, exact, exactNumbers, Guarded, numbers, random } from "./_guarded.ts";
import { lossKernels, lossModule } from "./loss.ts";

const device = await testDevice([lossModule]);
const ignore = device === null;
const kernels = ignore ? null : lossKernels(device.context);

const SHAPES = [[0, 5], [1, 1], [3, 2], [17, 3], [2, 7], [5, 16], [3, 129], [2, 1000], [3, 4099]];
const OFFSETS = [[0, 0], [1, 1], [3, 2], [0, 1]];

interface Loss {
  readonly rows: number;
  readonly width: number;
  readonly dtype: DType;
  readonly offset: number;
  /** Of each row. */
  readonly targets: (row: number) => number;
  /** Of each element; else random. */
  readonly logits?: (i: number) => number;
}

async function compareLoss({ rows, width, dtype, offset, targets, logits }: Loss): Promise<void> {
  const size = rows * width, shape = [rows, width], next = random(size + 3), scale = 0.37;
  const values = logits
    ? numbers(size, () => 0).map((_, i) => logits(i))
    : numbers(size, () => 5 * next());
  const places = numbers(rows, () => 0).map((_, n) => targets(n));
  using x = new Guarded(device!, dtype, shape, values, offset);
  using t = new Guarded(device!, "i32", [rows], places, 0);
  using losses = new Guarded(device!, "f32", [rows], numbers(rows, () => NaN), 1);
  kernels!.crossEntropy(x.tensor, t.tensor, losses.tensor, scale);
  using wantX = exact(dtype, shape, values);
  using wantT = fromArray(cpuDevice(), new Int32Array(places));
  using wantLosses = zeros(cpuDevice(), [rows], "f64");
  referenceKernels.crossEntropy(wantX, wantT, wantLosses, scale);
  const what = `cross-entropy ${dtype} [${shape}] at ${offset}`;
  const [gotLosses, gotX] = [await losses.read(what), await x.read(what)];
  assertNear(gotLosses, exactNumbers(wantLosses), { dtype: "f32", what: `${what} loss`, scale: 1 });
  assertNear(gotX, exactNumbers(wantX), { dtype, what, scale, tolerance: 1e-5 });
}

Deno.test({
  name: "cross-entropy",
  ignore,
  fn: async () => {
    for (const dtype of ["f32", "bf16"] as const) {
      for (const [rows, width] of SHAPES) {
        for (const offset of [0, 1, 5]) {
          const targets = (row: number) => row % 4 === 2 ? -1 : (row * 31 + 7) % width;
          await compareLoss({ rows, width, dtype, offset, targets });
        }
      }
    }
  },
});

Deno.test({
  name: "cross-entropy: a target at every place of a ragged row",
  ignore,
  fn: async () => {
    const width = 43;
    for (const dtype of ["f32", "bf16"] as const) {
      await compareLoss({ rows: width, width, dtype, offset: 3, targets: (row) => row });
    }
  },
});

Deno.test({
  name: "cross-entropy: rows that fill shared memory, and rows that do not fit",
  ignore,
  fn: async () => {
    for (const [dtype, width] of [["bf16", 60001], ["bf16", 130003], ["f32", 200000]] as const) {
      const targets = (row: number) => [width - 3, -7, 5, width >> 1][row];
      await compareLoss({ rows: 4, width, dtype, offset: 1, targets });
    }
  },
});

Deno.test({
  name: "cross-entropy: masked and large logits",
  ignore,
  fn: async () => {
    const rows = 3, width = 300;
    for (const dtype of ["f32", "bf16"] as const) {
      // The first thousand masked in turn; the largest late, so that sums are scaled down.
      const masked = (i: number) => i % 3 ? -Infinity : (i % width) / 8;
      await compareLoss({ rows, width, dtype, offset: 1, targets: () => 297, logits: masked });
      const large = (i: number) => (i % width) * 300;
      await compareLoss({ rows, width, dtype, offset: 0, targets: () => 299, logits: large });
      const only = (i: number) => i % width === 7 ? 2 : -Infinity;
      await compareLoss({ rows, width, dtype, offset: 0, targets: () => 7, logits: only });
    }
  },
});

Deno.test({
  name: "softmax and its gradient, also in place",
  ignore,
  fn: async () => {
    for (const dtype of ["f32", "bf16"] as const) {
      for (const shape of SHAPES) {
        for (const offsets of OFFSETS) {
          const size = shape[0] * shape[1], next = random(size);
          const values = numbers(size, () => 4 * next()), gradient = numbers(size, next);
          using x = new Guarded(device!, dtype, shape, values, offsets[0]);
          using out = new Guarded(device!, dtype, shape, values, offsets[1]);
          using d = new Guarded(device!, dtype, shape, gradient, offsets[1]);
          using dX = new Guarded(device!, dtype, shape, gradient, offsets[0]);
          kernels!.softmax(x.tensor, out.tensor);
          const what = `softmax ${dtype} [${shape}] at ${offsets}`, y = await out.read(what);
          kernels!.softmaxBackward(d.tensor, out.tensor, dX.tensor);
          kernels!.softmaxBackward(d.tensor, out.tensor, d.tensor);
          kernels!.softmax(x.tensor, x.tensor);
          using wantX = exact(dtype, shape, values);
          using wantD = exact(dtype, shape, gradient);
          // The gradient is taken at the rounded output.
          using wantY = exact(dtype, shape, y);
          referenceKernels.softmax(wantX, wantX);
          referenceKernels.softmaxBackward(wantD, wantY, wantD);
          assertNear(y, exactNumbers(wantX), { dtype, what });
          assertNear(await x.read(what), exactNumbers(wantX), { dtype, what: `${what} in place` });
          const back = { dtype, what: `${what} gradient`, scale: 1 };
          assertNear(await dX.read(what), exactNumbers(wantD), back);
          assertNear(await d.read(what), exactNumbers(wantD), {
            ...back,
            what: `${what} in place`,
          });
        }
      }
    }
  },
});

Deno.test({
  name: "masked elements before and behind the packs of a row add nothing; a NaN makes the row NaN",
  ignore,
  fn: async () => {
    for (const dtype of ["f32", "bf16"] as const) {
      for (const width of [2, 3, 9, 43]) {
        for (let masked = 0; masked < width; masked++) {
          const values = numbers(width, () => 0).map((_, i) => i === masked ? -Infinity : -i / 16);
          using x = new Guarded(device!, dtype, [1, width], values, 1);
          kernels!.softmax(x.tensor, x.tensor);
          using want = exact(dtype, [1, width], values);
          referenceKernels.softmax(want, want);
          const what = `softmax ${dtype} [1, ${width}] masked at ${masked}`;
          assertNear(await x.read(what), exactNumbers(want), { dtype, what });
          const logits = (i: number) => values[i];
          const targets = () => (masked + 1) % width;
          await compareLoss({ rows: 1, width, dtype, offset: 1, targets, logits });
          values[masked] = NaN;
          using y = new Guarded(device!, dtype, [1, width], values, 1);
          kernels!.softmax(y.tensor, y.tensor);
          assert((await y.read(what)).every(Number.isNaN), what);
        }
      }
    }
  },
});

Deno.test({
  name: "cross-entropy: a target that is no column makes its row NaN, and only that",
  ignore,
  fn: async () => {
    for (const width of [3, 300]) {
      for (const target of [width, 2 ** 31 - 1]) {
        using x = new Guarded(device!, "f32", [2, width], numbers(2 * width, () => 1), 1);
        using t = new Guarded(device!, "i32", [2], [target, 1], 0);
        using losses = new Guarded(device!, "f32", [2], [0, 0], 1);
        kernels!.crossEntropy(x.tensor, t.tensor, losses.tensor, 1);
        const what = `target ${target} of ${width}`;
        const got = await losses.read(what), gradient = await x.read(what);
        assert(Number.isNaN(got[0]) && Math.abs(got[1] - Math.log(width)) < 1e-5, what);
        assert(gradient.slice(0, width).every(Number.isNaN), what);
        assert(gradient.slice(width).every(Number.isFinite), what);
      }
    }
  },
});

Deno.test({
  name: "other dtypes are refused",
  ignore,
  fn: () => {
    using x = zeros(cpuDevice(), [2, 2], "f64");
    assert.throws(() => kernels!.softmax(x, x), /Cannot take the softmax as .* f64/);
    assert.throws(() => kernels!.softmaxBackward(x, x, x), /gradient as .* f64/);
    assert.throws(
      () => kernels!.crossEntropy(x, x, x, 1),
      /Cannot take the cross-entropy as .* f64/,
    );
  },
});
