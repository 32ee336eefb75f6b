import assert from "node:assert/strict";
import { normal, normalKey, random } from "./init.ts";

Deno.test("random: uniform, and other for other seeds and names", () => {
  const next = random(5, "w"), counts = new Array(10).fill(0);
  for (let i = 0; i < 50_000; i++) counts[Math.floor(next() * 10)]++;
  for (const count of counts) assert.ok(Math.abs(count - 5000) < 300, String(counts));
  const first = new Set([
    random(5, "w")(),
    random(5, "v")(),
    random(6, "w")(),
    random(5 + 2 ** 32, "w")(),
  ]);
  assert.equal(first.size, 4);
});

Deno.test("normalKey: other for other seeds and names", () => {
  const keys = [normalKey(1, "a"), normalKey(1, "b"), normalKey(2, "a")].map(String);
  assert.equal(new Set(keys).size, 3);
  assert.deepEqual(normalKey(1, "a"), normalKey(1, "a"));
});

Deno.test("normal: mean, spread, odd sizes", () => {
  const x = normal(random(1, "x"), 40_001, { std: 0.5, dtype: "f64" }) as Float64Array;
  const mean = x.reduce((a, b) => a + b) / x.length;
  const variance = x.reduce((a, b) => a + (b - mean) ** 2, 0) / x.length;
  assert.ok(Math.abs(mean) < 0.01 && Math.abs(Math.sqrt(variance) - 0.5) < 0.01);
  assert.ok(x.every(Number.isFinite));
});
