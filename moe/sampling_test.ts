import assert from "node:assert/strict";
import fc from "fast-check";
import { random } from "./init.ts";
import { sampleToken } from "./sampling.ts";

Deno.test("sampling: greedy takes the first of the best", () => {
  assert.equal(sampleToken([0, 5, 5, -Infinity], 0.99, { temperature: 0 }), 1);
});

Deno.test("sampling: frequencies follow the softmax at the temperature", () => {
  const next = random(1), logits = [0, 1, 2], counts = [0, 0, 0], draws = 20_000, temperature = 2;
  for (let i = 0; i < draws; i++) counts[sampleToken(logits, next(), { temperature })]++;
  const weights = logits.map((x) => Math.exp(x / temperature));
  const total = weights.reduce((a, b) => a + b);
  weights.forEach((w, i) =>
    assert.ok(Math.abs(counts[i] / draws - w / total) < 0.015, `${counts}`)
  );
});

Deno.test("sampling: top-p keeps the smallest set that reaches p", () => {
  const scores = fc.array(fc.double({ min: -5, max: 5, noNaN: true }), {
    minLength: 1,
    maxLength: 20,
  });
  fc.assert(fc.property(
    scores,
    fc.double({ min: 0.01, max: 1, noNaN: true }),
    fc.double({ min: 0, max: 0.999999, noNaN: true }),
    (logits, topP, uniform) => {
      const chosen = sampleToken(logits, uniform, { topP });
      const weights = logits.map(Math.exp), total = weights.reduce((a, b) => a + b);
      const above = weights.reduce((sum, w) => w > weights[chosen] ? sum + w : sum, 0);
      assert.ok(above < topP * total + 1e-9, "a token outside the set was chosen");
    },
  ));
});

Deno.test("sampling: bad options are errors", () => {
  assert.throws(() => sampleToken([1], 0, { temperature: -1 }), /temperature must be >= 0/);
  assert.throws(() => sampleToken([1], 0, { topP: 0 }), /top-p must lie in \(0, 1\]/);
  assert.throws(() => sampleToken([NaN, -Infinity], 0), /one score must be finite/);
});
