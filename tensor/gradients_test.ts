// The gradient of every operation against finite differences in f64, over random shapes: for L = Σ out ⊙ w with random w,
// the directional derivative along a random direction must equal the gradient's component along it.

import assert from "node:assert/strict";
import fc from "fast-check";
import { cpuDevice, hostView } from "./cpu/device.ts";
import { fromArray, type Shape, sizeOf, type Tensor, zeros } from "./tensor.ts";
import * as ops from "./ops.ts";

const device = cpuDevice();
const f64 = (shape: Shape) => zeros(device, shape, "f64");

/** Tensors that a case makes are disposed of when it ends. */
class Scope implements Disposable {
  #tensors: Tensor[] = [];
  #state: number;
  constructor(seed: number) {
    this.#state = seed | 0;
  }
  /** A number in [−1, 1). */
  next(): number {
    this.#state = Math.imul(this.#state ^ (this.#state >>> 15), 0x2c1b3c6d) + 0x6d2b79f5 | 0;
    const bits = Math.imul(this.#state ^ (this.#state >>> 13), 0x297a2d39);
    return ((bits ^ (bits >>> 15)) >>> 0) / 2 ** 31 - 1;
  }
  random(shape: Shape): Tensor {
    const x = fromArray(
      device,
      Float64Array.from({ length: sizeOf(shape) }, () => this.next()),
      shape,
    );
    this.#tensors.push(x);
    return x;
  }
  zeros(shape: Shape): Tensor {
    const x = f64(shape);
    this.#tensors.push(x);
    return x;
  }
  indices(values: number[], shape?: Shape): Tensor {
    const x = fromArray(device, Int32Array.from(values), shape ?? [values.length]);
    this.#tensors.push(x);
    return x;
  }
  [Symbol.dispose](): void {
    for (const x of this.#tensors) x[Symbol.dispose]();
  }
}

function dot(x: Tensor, y: Tensor): number {
  const a = hostView(x) as Float64Array, b = hostView(y) as Float64Array;
  return a.reduce((sum, value, i) => sum + value * b[i], 0);
}

interface Case {
  /** Inputs that are differentiated. */
  readonly inputs: readonly Tensor[];
  readonly out: Tensor;
  forward(): void;
  /** Writes the gradients of the inputs for the gradient dOut of out. */
  backward(dOut: Tensor, gradients: readonly Tensor[]): void;
}

/** Central differences along a random direction through all inputs at once. */
function checkGradient(scope: Scope, c: Case): void {
  const weights = scope.random(c.out.shape);
  const directions = c.inputs.map((x) => scope.random(x.shape));
  const gradients = c.inputs.map((x) => scope.zeros(x.shape));
  c.forward();
  c.backward(weights, gradients);
  const predicted = gradients.reduce((sum, g, i) => sum + dot(g, directions[i]), 0);
  const loss = (step: number) => {
    c.inputs.forEach((x, i) => ops.axpy(step, directions[i], x));
    c.forward();
    const value = dot(c.out, weights);
    c.inputs.forEach((x, i) => ops.axpy(-step, directions[i], x));
    return value;
  };
  // Fourth-order differences: the error is of order h⁴.
  const h = 1e-3;
  const measured = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h);
  const scale = 1 + Math.abs(measured) + Math.sqrt(dot(weights, weights));
  assert(
    Math.abs(measured - predicted) < 1e-7 * scale,
    `gradient gives ${predicted}, differences give ${measured}`,
  );
}

const rows = fc.integer({ min: 1, max: 9 }), columns = fc.integer({ min: 1, max: 12 });

function gradientTest(name: string, make: (scope: Scope, n: number, d: number) => Case): void {
  Deno.test(`${name}: gradient equals finite differences`, () => {
    fc.assert(
      fc.property(rows, columns, fc.integer(), (n, d, seed) => {
        using scope = new Scope(seed);
        checkGradient(scope, make(scope, n, d));
      }),
      { numRuns: 30 },
    );
  });
}

gradientTest("gemm", (scope, n, d) => {
  const k = 1 + (n * d) % 7, a = scope.random([n, k]), b = scope.random([d, k]);
  const out = scope.zeros([n, d]);
  return {
    inputs: [a, b],
    out,
    forward: () => ops.gemm(a, b, out, { transposeB: true }),
    backward(dOut, [dA, dB]) {
      ops.gemm(dOut, b, dA);
      ops.gemm(dOut, a, dB, { transposeA: true });
    },
  };
});

gradientTest("groupedGemm", (scope, n, d) => {
  const to = 1 + (n * d) % 5, x = scope.random([n, d]), out = scope.zeros([n, to]);
  const weights = [scope.random([to, d]), scope.random([to, d]), scope.random([to, d])];
  const starts = [0, Math.floor(n / 3), Math.floor(n / 3), n];
  const groups = { offsets: scope.indices(starts), host: Int32Array.from(starts) };
  return {
    inputs: [x, ...weights],
    out,
    forward: () => ops.groupedGemm(x, weights, groups, out),
    backward(dOut, [dX, ...dWeights]) {
      ops.groupedGemm(dOut, weights, groups, dX, { transposeWeight: true });
      ops.groupedGemmWeightGrad(dOut, x, groups, dWeights);
    },
  };
});

gradientTest("gatherRows and scatterAddRows", (scope, n, d) => {
  const x = scope.random([n, d]), out = scope.zeros([2 * n, d]);
  const picks = scope.indices(
    Array.from({ length: 2 * n }, () => Math.floor(scope.next() * n * 0.999)),
  );
  return {
    inputs: [x],
    out,
    forward: () => ops.gatherRows(x, picks, out),
    backward: (dOut, [dX]) => ops.scatterAddRows(dOut, picks, dX),
  };
});

gradientTest("combineRows", (scope, n, d) => {
  const K = 1 + d % 3, R = n * K + 1, y = scope.random([R, d]), weights = scope.random([n, K]);
  const slots = scope.indices(
    Array.from({ length: n * K }, (_, i) => scope.next() < -0.5 ? -1 : n * K - i),
    [n, K],
  );
  const out = scope.zeros([n, d]);
  return {
    inputs: [y, weights],
    out,
    forward: () => ops.combineRows(y, slots, weights, out),
    backward: (dOut, [dY, dWeights]) =>
      ops.combineRowsBackward(dOut, y, slots, weights, dY, dWeights),
  };
});

gradientTest("rmsNorm", (scope, n, d) => {
  const x = scope.random([n, d]), gain = scope.random([d]);
  const out = scope.zeros([n, d]), invRms = scope.zeros([n]);
  return {
    inputs: [x, gain],
    out,
    forward: () => ops.rmsNorm(x, gain, out, invRms, 0.1),
    backward: (dOut, [dX, dGain]) => ops.rmsNormBackward(dOut, x, gain, invRms, dX, dGain),
  };
});

gradientTest("addRmsNorm, with the residual's gradient", (scope, n, d) => {
  const x = scope.random([n, d]), y = scope.random([n, d]), gain = scope.random([d]);
  const out = scope.zeros([n, d]), sum = scope.zeros([n, d]), invRms = scope.zeros([n]);
  const normed = scope.zeros([n, d]);
  return {
    inputs: [x, y, gain],
    out, // sum + norm(sum), as at a residual connection
    forward() {
      ops.addRmsNorm(x, y, gain, sum, normed, invRms, 0.1);
      ops.add(sum, normed, out);
    },
    backward(dOut, [dX, dY, dGain]) {
      ops.rmsNormBackward(dOut, sum, gain, invRms, dX, dGain, dOut);
      ops.copy(dX, dY);
    },
  };
});

gradientTest("splitQkv", (scope, n, d) => {
  const headDim = 2 * d, H = 2, G = 1, options = { headDim, theta: 1000 };
  const qkv = scope.random([n, (H + 2 * G) * headDim]);
  const out = scope.zeros([n * (H + 2 * G) * headDim]); // q, then k, then v
  const parts = (x: Tensor) => {
    const ends = [n * H * headDim, n * (H + G) * headDim];
    return [
      x.rows(0, ends[0]).reshape(n, H * headDim),
      x.rows(ends[0], ends[1]).reshape(n, G * headDim),
      x.rows(ends[1], x.size).reshape(n, G * headDim),
    ];
  };
  const positions = scope.indices(Array.from({ length: n }, (_, i) => 37 * i));
  return {
    inputs: [qkv],
    out,
    forward() {
      const [q, k, v] = parts(out);
      ops.splitQkv(qkv, positions, options, q, k, v);
    },
    backward(dOut, [dQkv]) {
      const [dQ, dK, dV] = parts(dOut);
      ops.joinQkv(dQ, dK, dV, positions, options, dQkv);
    },
  };
});

gradientTest("rope", (scope, n, d) => {
  const x = scope.random([n, 4 * d]), out = scope.zeros([n, 4 * d]);
  const positions = scope.indices(Array.from({ length: n }, (_, i) => 37 * i));
  const options = { headDim: 2 * d, theta: 1000 };
  return {
    inputs: [x],
    out,
    forward() {
      ops.copy(x, out);
      ops.rope(out, positions, options);
    },
    backward(dOut, [dX]) {
      ops.copy(dOut, dX);
      ops.rope(dX, positions, { ...options, inverse: true });
    },
  };
});

gradientTest("attention", (scope, n, d) => {
  const kvHeads = 1 + n % 2, heads = kvHeads * (1 + d % 3), headDim = d, total = 3 * n;
  const shape = { offsets: Int32Array.from([0, n, n, total]), heads, kvHeads, headDim };
  const q = scope.random([total, heads * headDim]);
  const k = scope.random([total, kvHeads * headDim]), v = scope.random([total, kvHeads * headDim]);
  const out = scope.zeros(q.shape), lse = scope.zeros([total, heads]);
  return {
    inputs: [q, k, v],
    out,
    forward: () => ops.attention(q, k, v, out, lse, shape),
    backward: (dOut, [dQ, dK, dV]) =>
      ops.attentionBackward(dOut, q, k, v, out, lse, shape, dQ, dK, dV),
  };
});

for (const kind of ["swiglu", "gelu"] as const) {
  gradientTest(`activation ${kind}`, (scope, n, d) => {
    const x = scope.random([n, kind === "swiglu" ? 2 * d : d]), out = scope.zeros([n, d]);
    ops.scale(x, 3);
    return {
      inputs: [x],
      out,
      forward: () => ops.activation(kind, x, out),
      backward: (dOut, [dX]) => ops.activationBackward(kind, dOut, x, dX),
    };
  });
}

for (const kind of ["swiglu", "gelu"] as const) {
  gradientTest(`activation ${kind} of rows with factors`, (scope, n, d) => {
    const x = scope.random([n, kind === "swiglu" ? 2 * d : d]), out = scope.zeros([n, d]);
    const scales = scope.random([n]);
    return {
      inputs: [x, scales],
      out,
      forward: () => ops.activation(kind, x, out, scales),
      backward: (dOut, [dX, dScales]) =>
        ops.activationBackward(kind, dOut, x, dX, { scales, dScales }),
    };
  });

  gradientTest(`experts with ${kind} and factors`, (scope, n, d) => {
    const F = 1 + (n * d) % 5, H = kind === "swiglu" ? 2 * F : F;
    const x = scope.random([n, d]), scales = scope.random([n]), out = scope.zeros([n, d]);
    const ups = [scope.random([H, d]), scope.random([H, d])];
    const downs = [scope.random([d, F]), scope.random([d, F])];
    const starts = [0, Math.floor(n / 3), n];
    const groups = { offsets: scope.indices(starts), host: Int32Array.from(starts) };
    const up = scope.zeros([n, H]), active = scope.zeros([n, F]), dUp = scope.zeros([n, H]);
    return {
      inputs: [x, scales, ...ups, ...downs],
      out,
      forward() {
        ops.groupedGemmActivation(x, ups, groups, kind, up, active, scales);
        ops.groupedGemm(active, downs, groups, out);
      },
      backward(dOut, [dX, dScales, ...dWeights]) {
        const back = { scales, dScales };
        ops.groupedGemmActivationBackward(dOut, downs, groups, kind, up, dUp, back);
        ops.groupedGemmWeightGrad(dOut, active, groups, dWeights.slice(2));
        ops.groupedGemmWeightGrad(dUp, x, groups, dWeights.slice(0, 2));
        ops.groupedGemm(dUp, ups, groups, dX, { transposeWeight: true });
      },
    };
  });
}

gradientTest("activation relu", (scope, n, d) => {
  const x = scope.random([n, d]), out = scope.zeros([n, d]);
  const view = hostView(x) as Float64Array;
  // Finite differences say nothing at the corner.
  view.forEach((value, i) => view[i] = Math.abs(value) < 0.01 ? 0.5 : value);
  return {
    inputs: [x],
    out,
    forward: () => ops.activation("relu", x, out),
    backward: (dOut, [dX]) => ops.activationBackward("relu", dOut, x, dX),
  };
});

gradientTest("softmax", (scope, n, d) => {
  const x = scope.random([n, d]), out = scope.zeros([n, d]);
  return {
    inputs: [x],
    out,
    forward: () => ops.softmax(x, out),
    backward(dOut, [dX]) {
      ops.softmax(x, out);
      ops.softmaxBackward(dOut, out, dX);
    },
  };
});

Deno.test("crossEntropy: gradient equals finite differences, ignored rows have none", () => {
  fc.assert(
    fc.property(rows, columns, fc.integer(), (n, d, seed) => {
      using scope = new Scope(seed);
      const x = scope.random([n, d]), work = scope.zeros([n, d]), out = scope.zeros([n]);
      const targets = scope.indices(
        Array.from({ length: n }, (_, i) => i % 4 === 3 ? -1 : (7 * i) % d),
      );
      const forward = (scale: number) => {
        ops.copy(x, work);
        ops.crossEntropy(work, targets, out, scale);
      };
      // The kernel scales every row alike, so the loss is the plain sum.
      const direction = scope.random([n, d]);
      forward(1);
      const predicted = dot(work, direction);
      const loss = (step: number) => {
        ops.axpy(step, direction, x);
        forward(0);
        ops.axpy(-step, direction, x);
        return (hostView(out) as Float64Array).reduce((a, b) => a + b, 0);
      };
      const h = 1e-3;
      const measured = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h);
      assert(Math.abs(measured - predicted) < 1e-7 * (1 + n), `${predicted}, ${measured}`);
      for (let i = 3; i < n; i += 4) assert.equal(hostView(out)[i], 0);
    }),
    { numRuns: 30 },
  );
});

Deno.test("attention does not look ahead nor into other sequences", () => {
  using scope = new Scope(1);
  const shape = { offsets: Int32Array.from([0, 70, 400]), heads: 2, kvHeads: 1, headDim: 4 };
  const q = scope.random([400, 8]), k = scope.random([400, 4]), v = scope.random([400, 4]);
  const out = scope.zeros([400, 8]), lse = scope.zeros([400, 2]);
  ops.attention(q, k, v, out, lse, shape);
  const before = hostView(out).slice() as Float64Array;
  for (const changed of [20, 300]) {
    using last = k.rows(changed, changed + 1), value = v.rows(changed, changed + 1);
    ops.fill(last, 1e3);
    ops.fill(value, 1e3);
  }
  ops.attention(q, k, v, out, lse, shape);
  const after = hostView(out) as Float64Array;
  for (let row = 0; row < 400; row++) {
    const same = before.slice(row * 8, row * 8 + 8).every((x, i) => x === after[row * 8 + i]);
    assert.equal(same, row < 20 || (row >= 70 && row < 300), `row ${row}`);
  }
});
