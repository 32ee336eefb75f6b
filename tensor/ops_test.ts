// Wrong arguments of the operations: each is refused before anything is computed, with a message that names the operation,
// what it wants and what it got. And: equal inputs give equal bits.

import assert from "node:assert/strict";
import { recorder } from "../trace/mod.ts";
import { cpuDevice, hostView } from "./cpu/device.ts";
import type { AdamWUpdate, Device } from "./device.ts";
import { empty, fromArray, type Tensor, zeros } from "./tensor.ts";
import * as ops from "./ops.ts";

const device = cpuDevice();
const f32 = (...shape: number[]) => zeros(device, shape);
const i32 = (...values: number[]) => fromArray(device, Int32Array.from(values));
const attentionShape = { offsets: Int32Array.of(0, 4), heads: 4, kvHeads: 2, headDim: 3 };
const adam = {
  lr: 0.1,
  beta1: 0.9,
  beta2: 0.99,
  eps: 1e-8,
  step: 1,
  gradScale: fromArray(device, Float32Array.of(1)),
  zeroGradient: false,
};
const update = (changes: Partial<AdamWUpdate> = {}) => ({
  parameter: f32(2),
  gradient: f32(2),
  moment1: f32(2),
  moment2: f32(2),
  residual: null,
  weightDecay: 0,
  ...changes,
});
const groups = (...starts: number[]) => ({
  offsets: i32(...starts),
  host: Int32Array.from(starts),
});
const bf16 = (...shape: number[]) => zeros(device, shape, "bf16");

/** Gradients before an activation of which one tensor is a part of another. */
const overlapping = [
  ["scales", "dX"],
  ["dScales", "scales"],
  ["dScales", "dX"],
  ["dScales", "dOut"],
  ["dScales", "x"],
].flatMap(([part, whole]): [string, () => void, RegExp][] => {
  const tensors = () => {
    const [x, dX, dOut] = [f32(4, 8), f32(4, 8), f32(4, 8)], [scales, dScales] = [f32(4), f32(4)];
    const all: Record<string, Tensor> = { x, dX, dOut, scales, dScales };
    const { size } = all[whole];
    all[part] = all[whole].reshape(size).rows(size - 4, size);
    return all;
  };
  const message = new RegExp(`out must not overlap ${whole === "scales" ? whole : part}:`);
  return [
    [`activation gradient, ${part} in ${whole}`, () => {
      const { x, dX, dOut, scales, dScales } = tensors();
      ops.activationBackward("gelu", dOut, x, dX, { scales, dScales });
    }, message],
    [`grouped activation gradient, ${part} in ${whole}`, () => {
      const { x, dX, dOut, ...options } = tensors(), weights = [f32(8, 8)];
      ops.groupedGemmActivationBackward(dOut, weights, groups(0, 4), "gelu", x, dX, options);
    }, message],
  ];
});

const refused: [string, () => void, RegExp][] = [
  [
    "gemm shapes",
    () => ops.gemm(f32(2, 3), f32(2, 3), f32(2, 3)),
    /multiply as b .*\[3,3\].*\[2,3\]/,
  ],
  [
    "gemm transposed shapes",
    () => ops.gemm(f32(2, 3), f32(4, 2), f32(2, 4), { transposeB: true }),
    /b must have shape \[4,3\]/,
  ],
  ["gemm out", () => ops.gemm(f32(2, 3), f32(3, 4), f32(3, 4)), /out must have shape \[2,4\]/],
  ["gemm vectors", () => ops.gemm(f32(3), f32(3, 4), f32(1, 4)), /a must be a matrix/],
  [
    "gemm dtypes",
    () => ops.gemm(f32(2, 2), zeros(device, [2, 2], "f64"), f32(2, 2)),
    /dtype of b must be f32: current value is f64/,
  ],
  [
    "gemm integers",
    () => ops.gemm(i32(1).reshape(1, 1), i32(1).reshape(1, 1), i32(1).reshape(1, 1)),
    /dtype of a must be floating: current value is i32/,
  ],
  [
    "gemm in bf16",
    () => {
      const x = () => empty(device, [2, 2], "bf16");
      ops.gemm(x(), x(), x());
    },
    /on the CPU as the dtype must be f32 or f64: current value is bf16/,
  ],
  [
    "gemm overlap",
    () => {
      const x = f32(2, 2);
      ops.gemm(x, f32(2, 2), x);
    },
    /out must not overlap a/,
  ],
  ["add sizes", () => ops.add(f32(3), f32(4), f32(3)), /y must have 3 elements/],
  [
    "add partial overlap",
    () => {
      const x = f32(4);
      ops.add(x.rows(0, 3), f32(3), x.rows(1, 4));
    },
    /out must not overlap x/,
  ],
  ["copy sizes", () => ops.copy(f32(3), f32(4)), /out must have 3 elements/],
  ["axpy sizes", () => ops.axpy(1, f32(3), f32(4)), /y must have 3 elements/],
  ["scale integers", () => ops.scale(i32(1), 2), /floating/],
  ["sum of f32", () => ops.sum(f32(3), f32(1)), /out must be f64/],
  ["sum wide", () => ops.sumSquares([f32(3)], zeros(device, [2], "f64")), /one element/],
  ["swiglu width", () => ops.activation("swiglu", f32(2, 4), f32(2, 4)), /gate and up/],
  ["gelu size", () => ops.activation("gelu", f32(2, 4), f32(2, 3)), /must have shape \[2,4\]/],
  [
    "gelu gradient",
    () => ops.activationBackward("gelu", f32(2, 4), f32(2, 4), f32(2, 3)),
    /dX must have 8 elements/,
  ],
  ...overlapping,
  [
    "activation over its scales",
    () => {
      const out = f32(4, 2);
      ops.activation("gelu", f32(4, 2), out, out.reshape(8).rows(0, 4));
    },
    /out must not overlap scales/,
  ],
  ...["up", "active"].map((over): [string, () => void, RegExp] => [
    `grouped activation: ${over} over the scales`,
    () => {
      const up = f32(4, 2), active = f32(4, 2);
      const scales = (over === "up" ? up : active).reshape(8).rows(2, 6);
      const weights = [f32(2, 3)];
      ops.groupedGemmActivation(f32(4, 3), weights, groups(0, 4), "gelu", up, active, scales);
    },
    /out must not overlap scales/,
  ]),
  [
    "clip's limit",
    () => ops.clipScale(zeros(device, [1], "f64"), -1, f32(1)),
    /limit must be >= 0/,
  ],
  ["clip's squares", () => ops.clipScale(f32(1), 1, f32(1)), /squares must be f64/],
  ["adamW step", () => ops.adamW([update()], { ...adam, step: 0 }), /step/],
  ["adamW moments", () => ops.adamW([update({ moment2: f32(3) })], adam), /moment2 must have 2/],
  [
    "adamW residual of f32",
    () => ops.adamW([update({ residual: zeros(device, [2], "i16") })], adam),
    /residual must be that of a bf16 parameter/,
  ],
  [
    "adamW without a residual in bf16",
    () => ops.adamW([update({ parameter: bf16(2), gradient: bf16(2) })], adam),
    /residual must be that of a bf16 parameter/,
  ],
  [
    "adamW residual's dtype",
    () => ops.adamW([update({ parameter: bf16(2), residual: i32(1, 2) })], adam),
    /dtype of residual must be i16/,
  ],
  [
    "adamW scale",
    () => ops.adamW([update()], { ...adam, gradScale: f32(2) }),
    /gradScale must have one element/,
  ],
  [
    "gemm's wide result",
    () => ops.gemm(bf16(2, 2), bf16(2, 2), zeros(device, [2, 2], "f64")),
    /dtype of out must be bf16: current value is f64/,
  ],
  [
    "gradients of two dtypes",
    () =>
      ops.groupedGemmWeightGrad(bf16(4, 3), bf16(4, 2), groups(0, 2, 4), [f32(3, 2), bf16(3, 2)]),
    /dtype of all gradients must be f32: current value is bf16/,
  ],
  [
    "added norm",
    () => ops.addRmsNorm(f32(2, 3), f32(2, 2), f32(3), f32(2, 3), f32(2, 3), f32(2), 0),
    /y must/,
  ],
  [
    "norm's residual",
    () => ops.rmsNormBackward(f32(2, 3), f32(2, 3), f32(3), f32(2), f32(2, 3), f32(3), f32(3, 2)),
    /residual must have shape \[2,3\]/,
  ],
  [
    "qkv width",
    () =>
      ops.splitQkv(f32(1, 16), i32(0), { headDim: 4, theta: 10 }, f32(1, 8), f32(1, 8), f32(1, 8)),
    /qkv must have 24 columns/,
  ],
  [
    "qkv heads",
    () =>
      ops.joinQkv(f32(1, 6), f32(1, 5), f32(1, 5), i32(0), { headDim: 4, theta: 10 }, f32(1, 16)),
    /multiples of 4: current value is 6, 5/,
  ],
  [
    "gather indices' dtype",
    () => ops.gatherRows(f32(2, 3), f32(2), f32(2, 3)),
    /dtype of rows must be i32: current value is f32/,
  ],
  ["gather shapes", () => ops.gatherRows(f32(2, 3), i32(0), f32(2, 3)), /shape \[1,3\]/],
  ["gather range", () => ops.gatherRows(f32(2, 3), i32(1, 2), f32(2, 3)), /< 2: .* 2 at 1/],
  ["scatter range", () => ops.scatterAddRows(f32(2, 3), i32(1, 5), f32(2, 3)), /< 2: .* 5 at 1/],
  ["scatter shapes", () => ops.scatterAddRows(f32(2, 3), i32(1), f32(2, 3)), /x must have 3/],
  [
    "combine range",
    () => ops.combineRows(f32(2, 3), i32(0, 2).reshape(2, 1), f32(2, 1), f32(2, 3)),
    /< 2: .* 2 at 1/,
  ],
  [
    "combine gradient range",
    () => {
      const slots = i32(0, 2).reshape(2, 1);
      ops.combineRowsBackward(f32(2, 3), f32(2, 3), slots, f32(2, 1), f32(2, 3), f32(2, 1));
    },
    /< 2: .* 2 at 1/,
  ],
  [
    "combine weights",
    () => ops.combineRows(f32(2, 3), i32(0, 1).reshape(2, 1), f32(1, 2), f32(2, 3)),
    /weights must have shape \[2,1\]/,
  ],
  ["rmsNorm gain", () => ops.rmsNorm(f32(2, 3), f32(2), f32(2, 3), f32(2), 0), /gain must have 3/],
  [
    "combine residual",
    () => ops.combineRows(f32(2, 3), i32(0, 1).reshape(2, 1), null, f32(2, 3), f32(2, 2)),
    /residual must have shape \[2,3\]/,
  ],
  [
    "rmsNorm statistics",
    () => ops.rmsNorm(f32(2, 3), f32(3), f32(2, 3), zeros(device, [2], "f64"), 0),
    /dtype of invRms must be f32/,
  ],
  [
    "rope odd",
    () => ops.rope(f32(2, 6), i32(0, 1), { headDim: 3, theta: 10 }),
    /headDim must be even/,
  ],
  ["rope width", () => ops.rope(f32(2, 6), i32(0, 1), { headDim: 4, theta: 10 }), /multiple of 4/],
  [
    "rope rows",
    () => ops.rope(f32(2, 4), i32(0), { headDim: 4, theta: 10 }),
    /positions must have 2/,
  ],
  ["rope negative", () => ops.rope(f32(1, 4), i32(-1), { headDim: 4, theta: 10 }), />= 0: .* -1/],
  ["softmax shape", () => ops.softmax(f32(2, 3), f32(3, 2)), /out must have shape \[2,3\]/],
  ["softmax gradient", () => ops.softmaxBackward(f32(2, 3), f32(2, 3), f32(2, 2)), /dX must/],
  ["targets' range", () => ops.crossEntropy(f32(2, 3), i32(0, 3), f32(2), 1), /< 3: .* 3 at 1/],
  ["targets' count", () => ops.crossEntropy(f32(2, 3), i32(0), f32(2), 1), /targets must have 2/],
  [
    "groups",
    () => ops.groupedGemm(f32(4, 2), [f32(3, 2)], groups(0, 2, 4), f32(4, 3)),
    /offsets must have 2 entries/,
  ],
  [
    "groups descending",
    () => ops.groupedGemm(f32(4, 2), [f32(3, 2), f32(3, 2)], groups(0, 3, 2), f32(4, 3)),
    /offsets must ascend/,
  ],
  [
    "groups beyond",
    () => ops.groupedGemm(f32(4, 2), [f32(3, 2)], groups(0, 5), f32(4, 3)),
    /offsets must end at 4/,
  ],
  [
    "group weights",
    () => ops.groupedGemm(f32(4, 2), [f32(2, 3)], groups(0, 4), f32(4, 3)),
    /a weight must have shape \[3,2\]/,
  ],
  [
    "group gradients",
    () => ops.groupedGemmWeightGrad(f32(4, 3), f32(4, 2), groups(0, 4), [f32(2, 3)]),
    /a gradient must have shape \[3,2\]/,
  ],
  [
    "attention heads",
    () =>
      ops.attention(f32(4, 12), f32(4, 6), f32(4, 6), f32(4, 12), f32(4, 4), {
        ...attentionShape,
        kvHeads: 3,
      }),
    /heads must be a multiple of kvHeads/,
  ],
  [
    "attention keys",
    () => ops.attention(f32(4, 12), f32(4, 12), f32(4, 6), f32(4, 12), f32(4, 4), attentionShape),
    /k must have shape \[4,6\]/,
  ],
  [
    "attention sequences",
    () =>
      ops.attention(f32(4, 12), f32(4, 6), f32(4, 6), f32(4, 12), f32(4, 4), {
        ...attentionShape,
        offsets: Int32Array.of(0, 3),
      }),
    /offsets must run from 0 to 4/,
  ],
];

for (const [name, call, message] of refused) {
  Deno.test(`refused: ${name}`, () => {
    assert.throws(call, (error: Error) => {
      assert.match(error.message, message);
      assert.match(error.message, /^Cannot .* as .*: current value is /);
      return true;
    });
  });
}

Deno.test("refused: a disposed tensor, and a view of one", () => {
  const x = f32(2, 2), view = x.rows(0, 1), out = f32(1, 2);
  x[Symbol.dispose]();
  assert.throws(() => ops.scale(x, 2), /x must be alive: current value is a disposed tensor/);
  assert.throws(() => ops.copy(view, out), /x must be alive/);
  assert.throws(() => hostView(view), /must be alive/);
});

Deno.test("refused: tensors of two devices", () => {
  const other: Device = { ...device, name: "another" };
  assert.throws(() => ops.add(f32(2), zeros(other, [2]), f32(2)), /y must be on .*: .* another/);
});

Deno.test("an operation adds to its category's total, and a span while capturing", () => {
  recorder.resetTotals();
  const spans = recorder.spans.length;
  ops.gemm(f32(64, 64), f32(64, 64), f32(64, 64));
  assert(recorder.total("gemm") > 0);
  assert.equal(recorder.spans.length, spans);
  recorder.capturing = true;
  ops.scale(f32(64), 2);
  recorder.capturing = false;
  const { name, category, start, end } = recorder.spans.at(-1)!;
  assert.deepEqual([name, category], ["scale", "compute"]);
  assert(end >= start);
});

function randomMatrix(rows: number, columns: number): Tensor {
  const values = Float32Array.from({ length: rows * columns }, (_, i) => Math.sin(i * 12.9898));
  return fromArray(device, values, [rows, columns]);
}

Deno.test("a group of groupedGemm has the bits of gemm of that group, and every run has the same", () => {
  const x = randomMatrix(97, 65),
    weights = [1, 2, 3].map((n) => randomMatrix(33 * n, 65).rows(0, 33));
  const offsets = [0, 5, 90, 97], y = f32(97, 33), again = f32(97, 33);
  ops.groupedGemm(x, weights, groups(...offsets), y);
  ops.groupedGemm(x, weights, groups(...offsets), again);
  assert.deepEqual(hostView(y), hostView(again));
  for (let g = 0; g < 3; g++) {
    const alone = f32(offsets[g + 1] - offsets[g], 33);
    ops.gemm(x.rows(offsets[g], offsets[g + 1]), weights[g], alone, { transposeB: true });
    assert.deepEqual(hostView(y.rows(offsets[g], offsets[g + 1])), hostView(alone));
  }
});

Deno.test("beta 0 never reads the old contents", () => {
  const x = randomMatrix(40, 30), w = randomMatrix(20, 30), out = f32(40, 20);
  ops.fill(out, NaN);
  ops.gemm(x, w, out, { transposeB: true });
  assert(hostView(out).every((value) => !Number.isNaN(value)));
  const empty = f32(40, 0), none = f32(0, 20);
  ops.fill(out, NaN);
  ops.gemm(empty, none, out);
  assert(hostView(out).every((value) => value === 0));
});

Deno.test("attention takes no memory that grows with the sequence", () => {
  const run = (rows: number) => {
    const shape = { offsets: Int32Array.of(0, rows), heads: 1, kvHeads: 1, headDim: 8 };
    const [q, k, v, out, dOut, dQ, dK, dV] = Array.from({ length: 8 }, () => f32(rows, 8));
    const lse = f32(rows, 1);
    device.resetPeak();
    const before = device.memory().used_bytes;
    ops.attention(q, k, v, out, lse, shape);
    ops.attentionBackward(dOut, q, k, v, out, lse, shape, dQ, dK, dV);
    assert(hostView(dQ).every(Number.isFinite));
    return device.memory().peak_bytes - before;
  };
  run(10); // takes the room of its tiles
  assert.equal(run(3000), 0);
});
