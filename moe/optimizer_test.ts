import assert from "node:assert/strict";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { fromArray, zeros } from "../tensor/tensor.ts";
import { AdamW, learningRate } from "./optimizer.ts";
import type { Parameter } from "./parameter.ts";

const device = cpuDevice();

function parameter(name: string, grad: number[], more: Partial<Parameter> = {}): Parameter {
  return {
    name,
    value: fromArray(device, new Float64Array(grad.length).fill(1), [1, grad.length]),
    grad: fromArray(device, Float64Array.from(grad), [1, grad.length]),
    overwrites: false,
    group: "world",
    decay: true,
    ...more,
  };
}

Deno.test("learning rate: warm-up, cosine, floor", () => {
  const course = { peak: 2, warmup: 4, steps: 12, floor: 0.25 };
  assert.deepEqual([1, 2, 3, 4].map((s) => learningRate(s, course)), [0.5, 1, 1.5, 2]);
  assert.ok(Math.abs(learningRate(8, course) - 1.25) < 1e-12);
  assert.equal(learningRate(12, course), 0.5);
  assert.equal(learningRate(99, course), 0.5);
  for (let s = 5; s <= 12; s++) assert.ok(learningRate(s, course) < learningRate(s - 1, course));
  assert.equal(learningRate(1, { peak: 1, warmup: 0, steps: 1 }), 0.1);
});

Deno.test("AdamW: two steps as the formula has them; decay only where asked; gradients are cleared", async () => {
  const [a, b] = [parameter("a", [0.5, -2]), parameter("b", [0.5, -2], { decay: false })];
  using adam = new AdamW(() => [a, b], { beta1: 0.9, beta2: 0.99, eps: 1e-8, weightDecay: 0.1 });
  using half = fromArray(device, Float32Array.of(0.5));
  const expected = [[1, 1], [1, 1]], m = [0, 0], v = [0, 0];
  for (const step of [1, 2]) {
    const grads = [0.5 * step, -2 / step];
    for (const p of [a, b]) device.write(Float64Array.from(grads), p.grad);
    adam.update(0.01, half);
    for (const i of [0, 1]) {
      const g = grads[i] * 0.5;
      m[i] = 0.9 * m[i] + 0.1 * g;
      v[i] = 0.99 * v[i] + 0.01 * g * g;
      const move = m[i] / (1 - 0.9 ** step) / (Math.sqrt(v[i] / (1 - 0.99 ** step)) + 1e-8);
      expected[0][i] -= 0.01 * (move + 0.1 * expected[0][i]);
      expected[1][i] -= 0.01 * move;
    }
  }
  for (const [k, p] of [a, b].entries()) {
    const values = await p.value.toArray() as Float64Array;
    values.forEach((x, i) =>
      assert.ok(Math.abs(x - expected[k][i]) < 1e-12, `${p.name}[${i}] ${x}`)
    );
    assert.deepEqual([...await p.grad.toArray() as Float64Array], [0, 0]);
  }
  assert.equal(adam.steps, 2);
});

Deno.test("norm: each gradient is counted by one rank", async () => {
  const expert = (id: number) => ({ group: "replicas", expert: { layer: 0, id } }) as const;
  const all = [
    parameter("w", [3, 4]),
    parameter("e0", [1, 2], expert(0)),
    parameter("e1", [7, 7], expert(1)),
  ];
  using adam = new AdamW(() => all);
  const norms = async (counts: (parameter: Parameter) => boolean) => {
    using sum = zeros(device, [1], "f64");
    adam.addSquaredNorms(counts, sum);
    return [...await sum.toArray() as Float64Array];
  };
  assert.deepEqual(await norms((p) => p.expert?.id !== 1), [30]);
  assert.deepEqual(await norms((p) => p.expert?.id === 1), [98]);
});

Deno.test("AdamW: a scale that is not finite changes nothing; gradients that are overwritten are left", async () => {
  const [a, b] = [parameter("a", [0.5]), parameter("b", [0.25], { overwrites: true })];
  using adam = new AdamW(() => [a, b]);
  for (const p of [a, b]) device.write(Float64Array.of(1), p.grad);
  using scale = fromArray(device, Float32Array.of(NaN));
  adam.update(0.1, scale);
  const read = async (p: Parameter) => {
    const { moment1, moment2 } = adam.momentsOf(p);
    const arrays = [p.value, p.grad, moment1, moment2].map((x) => x.toArray());
    return (await Promise.all(arrays)).map((x) => x[0]);
  };
  assert.deepEqual(await read(a), [1, 0, 0, 0]);
  assert.deepEqual(await read(b), [1, 1, 0, 0]);
  device.write(Float32Array.of(1), scale);
  adam.update(0.1, scale);
  const [value, grad, moment] = await read(b);
  assert.ok(value < 1 && grad === 1 && moment > 0);
});
