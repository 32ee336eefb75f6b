// Grouped products with an activation on the CPU have the bits of the product and the activation in turn, those of rows by index the bits of
// rows that were copied; and what they refuse.

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

Deno.test("rows by index have the bits of rows that were copied, scales those of rows that were scaled", async () => {
  const [N, R, D, F] = [6, 23, 9, 14], offsets = Int32Array.of(0, 5, 5, 23);
  const groups = { offsets: fromArray(device, offsets), host: offsets };
  const tokens = fromArray(device, Int32Array.from({ length: R }, (_, i) => i * 5 % N));
  const x = random(N, D), dY = random(N, D), scales = random(R, 1).reshape(R);
  const w1 = [random(F, D), random(F, D), random(F, D)];
  const w2 = [random(D, F), random(D, F), random(D, F)];
  const ones = fromArray(device, new Float32Array(R).fill(1));
  const results = [];
  for (const byIndex of [true, false]) {
    const up = empty(device, [R, F]), active = empty(device, [R, F]), dUp = empty(device, [R, F]);
    const dScales = empty(device, [R]), dUps = [random(F, D), random(F, D), random(F, D)];
    for (const each of dUps) ops.fill(each, 0);
    if (byIndex) {
      const options = { rows: tokens, scales };
      ops.groupedGemmActivation(x, w1, groups, "gelu", up, active, options);
      const back = { ...options, dScales };
      ops.groupedGemmActivationBackward(dY, w2, groups, "gelu", up, dUp, back);
      ops.groupedGemmWeightGrad(dUp, x, groups, dUps, { xRows: tokens });
    } else {
      const copied = empty(device, [R, D]), dCopied = empty(device, [R, D]);
      const dActive = empty(device, [R, F]);
      ops.gatherRows(x, tokens, copied);
      ops.gatherRows(dY, tokens, dCopied);
      ops.groupedGemm(copied, w1, groups, up);
      ops.activation("gelu", up, active, scales);
      ops.groupedGemm(dCopied, w2, groups, dActive, { transposeWeight: true });
      ops.activationBackward("gelu", dActive, up, dUp, { scales, dScales });
      ops.groupedGemmWeightGrad(dUp, copied, groups, dUps);
    }
    results.push(await Promise.all([up, active, dUp, dScales, ...dUps].map((t) => t.toArray())));
  }
  assert.deepEqual(results[0], results[1]);
  // The scales' gradient does not depend on them, and scales of 1 are none.
  const up = empty(device, [R, F]), active = empty(device, [R, F]), plain = empty(device, [R, F]);
  ops.groupedGemmActivation(x, w1, groups, "gelu", up, active, { rows: tokens, scales: ones });
  ops.groupedGemmActivation(x, w1, groups, "gelu", up, plain, { rows: tokens });
  assert.deepEqual(await active.toArray(), await plain.toArray());
});

Deno.test("rows by index and scales that do not fit are refused", () => {
  const offsets = Int32Array.of(0, 4);
  const groups = { offsets: fromArray(device, offsets), host: offsets };
  const x = random(2, 3), weight = random(3, 3), out = random(4, 3), two = random(4, 3);
  const rows = fromArray(device, Int32Array.of(0, 1, 1, 0)), few = rows.rows(0, 3);
  const scales = random(4, 1).reshape(4), short = scales.rows(0, 3);
  const f64 = fromArray(device, new Float64Array(4)), indices = scales;
  ops.groupedGemm(x, [weight], groups, out, { rows });
  assert.throws(
    () => ops.groupedGemm(x, [weight], groups, out),
    /out must have shape \[2,3\]: current value is \[4,3\]/,
  );
  assert.throws(() => ops.groupedGemm(x, [weight], groups, out, { rows: few }), RangeError);
  assert.throws(
    () => ops.groupedGemm(x, [weight], groups, out, { rows: indices }),
    /dtype of rows must be i32/,
  );
  const grad = random(3, 3);
  ops.groupedGemmWeightGrad(out, x, groups, [grad], { xRows: rows });
  ops.groupedGemmWeightGrad(x, out, groups, [grad], { dyRows: rows });
  ops.groupedGemmWeightGrad(x, x, groups, [grad], { dyRows: rows, xRows: rows });
  assert.throws(() => ops.groupedGemmWeightGrad(out, x, groups, [grad]), RangeError);
  assert.throws(
    () => ops.groupedGemmWeightGrad(out, x, groups, [grad], { xRows: few }),
    /dy must have 3 rows: current value is 4/,
  );
  const call = (options: Parameters<typeof ops.groupedGemmActivationBackward>[6]) => () =>
    ops.groupedGemmActivationBackward(x, [weight], groups, "relu", out, two, options);
  call({ rows, scales, dScales: scales.reshape(4) })();
  assert.throws(call({ rows, scales: short }), /scales must have 4 elements/);
  assert.throws(call({ rows, dScales: short }), /dScales must have 4 elements/);
  assert.throws(call({ rows, scales: f64 }), /dtype of scales must be f32/);
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
