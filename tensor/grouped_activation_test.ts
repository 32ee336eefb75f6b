// Grouped products with an activation on the CPU have the bits of the product and the activation in turn, with and without scales; and what they
// refuse.

import assert from "node:assert/strict";
import { cpuDevice } from "./cpu/device.ts";
import type { Activation } from "./device.ts";
import * as ops from "./ops.ts";
import { empty, fromArray, type Tensor } from "./tensor.ts";

const device = cpuDevice();
let seed = 7;

function random(rows: number, columns: number): Tensor {
  const values = Float32Array.from({ length: rows * columns }, () => {
    seed = Math.imul(seed, 1664525) + 1013904223 | 0;
    return seed / 2 ** 30;
  });
  return fromArray(device, values, [rows, columns]);
}

for (const kind of ["relu", "gelu", "swiglu"] as readonly Activation[]) {
  Deno.test(`grouped products with ${kind} have the bits of the two kernels in turn`, async () => {
    const [R, D, F] = [23, 9, 14], H = kind === "swiglu" ? 2 * F : F;
    const offsets = Int32Array.of(0, 5, 5, 23);
    const groups = { offsets: fromArray(device, offsets), host: offsets };
    const x = random(R, D), dY = random(R, D);
    const w1 = [random(H, D), random(H, D), random(H, D)];
    const w2 = [random(D, F), random(D, F), random(D, F)];
    for (const scales of [undefined, random(R, 1).reshape(R)]) {
      const up = empty(device, [R, H]), active = empty(device, [R, F]);
      const dUp = empty(device, [R, H]), dScales = empty(device, [R]);
      ops.groupedGemmActivation(x, w1, groups, kind, up, active, scales);
      ops.groupedGemmActivationBackward(dY, w2, groups, kind, up, dUp, { scales, dScales });
      const up2 = empty(device, [R, H]), dActive = empty(device, [R, F]);
      const active2 = empty(device, [R, F]), dUp2 = empty(device, [R, H]);
      const dScales2 = empty(device, [R]);
      ops.groupedGemm(x, w1, groups, up2);
      ops.activation(kind, up2, active2, scales);
      ops.groupedGemm(dY, w2, groups, dActive, { transposeWeight: true });
      ops.activationBackward(kind, dActive, up2, dUp2, { scales, dScales: dScales2 });
      for (const [a, b] of [[up, up2], [active, active2], [dUp, dUp2], [dScales, dScales2]]) {
        assert.deepEqual(await a.toArray(), await b.toArray());
      }
    }
  });
}

Deno.test("scales that do not fit are refused", () => {
  const offsets = Int32Array.of(0, 4);
  const groups = { offsets: fromArray(device, offsets), host: offsets };
  const x = random(4, 3), weight = random(3, 3), up = random(4, 3), out = random(4, 3);
  const scales = random(4, 1).reshape(4), short = scales.rows(0, 3);
  const f64 = fromArray(device, new Float64Array(4)), i32 = fromArray(device, offsets).rows(0, 1);
  const forward = (given: Tensor) => () =>
    ops.groupedGemmActivation(x, [weight], groups, "relu", up, out, given);
  forward(scales)();
  assert.throws(forward(short), /scales must have 4 elements/);
  assert.throws(forward(f64), /dtype of scales must be f32/);
  assert.throws(forward(i32), /dtype of scales must be f32/);
  const backward = (given: Parameters<typeof ops.groupedGemmActivationBackward>[6]) => () =>
    ops.groupedGemmActivationBackward(x, [weight], groups, "relu", up, out, given);
  backward({ scales, dScales: random(4, 1).reshape(4) })();
  assert.throws(backward({ scales: short }), /scales must have 4 elements/);
  assert.throws(backward({ scales, dScales: short }), /dScales must have 4 elements/);
  assert.throws(backward({ dScales: f64 }), /dtype of dScales must be f32/);
  assert.throws(
    () => ops.activation("relu", scales, scales.reshape(4), scales),
    /x must be a matrix/,
  );
});

Deno.test("grouped products with an activation refuse what does not fit", () => {
  const offsets = Int32Array.of(0, 4),
    groups = { offsets: fromArray(device, offsets), host: offsets };
  const x = random(4, 3), weight = random(6, 3), up = random(4, 6), active = random(4, 3);
  ops.groupedGemmActivation(x, [weight], groups, "swiglu", up, active);
  assert.throws(
    () => ops.groupedGemmActivation(x, [weight], groups, "gelu", up, active),
    RangeError,
  );
  assert.throws(() => ops.groupedGemmActivation(x, [weight], groups, "gelu", up, up), RangeError);
  assert.throws(
    () => ops.groupedGemmActivation(x, [random(3, 3)], groups, "swiglu", random(4, 3), active),
    /columns of up must be gate and up: current value is 3/,
  );
  const down = random(3, 3);
  ops.groupedGemmActivationBackward(x, [down], groups, "swiglu", up, random(4, 6));
  assert.throws(
    () => ops.groupedGemmActivationBackward(x, [down], groups, "swiglu", up, up),
    RangeError,
  );
  assert.throws(
    () => ops.groupedGemmActivationBackward(x, [weight], groups, "swiglu", up, random(4, 6)),
    RangeError,
  );
});
