// Grouped products with an activation on the CPU have the bits of the product and the activation in turn; and what they refuse.

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
    const up = empty(device, [R, H]), active = empty(device, [R, F]), dUp = empty(device, [R, H]);
    ops.groupedGemmActivation(x, w1, groups, kind, up, active);
    ops.groupedGemmActivationBackward(dY, w2, groups, kind, up, dUp);
    const up2 = empty(device, [R, H]), dActive = empty(device, [R, F]);
    const active2 = empty(device, [R, F]), dUp2 = empty(device, [R, H]);
    ops.groupedGemm(x, w1, groups, up2);
    ops.activation(kind, up2, active2);
    ops.groupedGemm(dY, w2, groups, dActive, { transposeWeight: true });
    ops.activationBackward(kind, dActive, up2, dUp2);
    for (const [a, b] of [[up, up2], [active, active2], [dUp, dUp2]]) {
      assert.deepEqual(await a.toArray(), await b.toArray());
    }
  });
}

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
