import assert from "node:assert/strict";
import { fillNormal } from "./random.ts";

Deno.test("fillNormal: mean, spread, tails, no neighbour in common with other keys", () => {
  const n = 200_000, x = new Float64Array(n), y = new Float64Array(n), z = new Float64Array(n);
  fillNormal(x, [1, 2], 0.5);
  fillNormal(y, [1, 3], 0.5);
  fillNormal(z, [2, 2], 0.5);
  const moments = (a: Float64Array, b: Float64Array) => a.reduce((s, v, i) => s + v * b[i], 0) / n;
  assert.ok(Math.abs(x.reduce((a, b) => a + b) / n) < 0.005);
  assert.ok(Math.abs(moments(x, x) - 0.25) < 0.004);
  const fourth = x.reduce((s, v) => s + v ** 4, 0) / n;
  assert.ok(Math.abs(fourth / (3 * 0.25 ** 2) - 1) < 0.05);
  assert.ok(Math.abs(moments(x, y)) < 0.003 && Math.abs(moments(x, z)) < 0.003);
  assert.ok(Math.abs(moments(x.subarray(0, n - 1), x.subarray(1))) < 0.003);
  assert.ok(x.every(Number.isFinite));
});
