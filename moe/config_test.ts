import assert from "node:assert/strict";
import { modelConfig, modelDescription } from "./config.ts";

const good = { vocab: 256, width: 64, layers: 2, heads: 4 };

Deno.test("config: defaults", () => {
  const config = modelConfig({ ...good, experts: 8 });
  assert.deepEqual([config.kvHeads, config.headDim, config.hidden, config.tied], [
    4,
    16,
    256,
    false,
  ]);
});

Deno.test("config: what is impossible is named", () => {
  const bad: [object, RegExp][] = [
    [{ heads: 5 }, /"heads" must be a divisor of the width 64: current value is 5/],
    [{ kvHeads: 3 }, /"kvHeads" must be a divisor of the 4 heads: current value is 3/],
    [{ headDim: 7 }, /"headDim" must be an even/],
    [{ width: 0 }, /"width" must be a whole number >= 1/],
    [{ layers: 1.5 }, /"layers" must be a whole number/],
    [{ experts: -1 }, /"experts" must be a whole number >= 0/],
    [{ denseLayers: 3 }, /"denseLayers" must be at most 2/],
    [{ activation: "tanh" }, /"activation" must be swiglu, relu or gelu/],
    [{ dtype: "i32" }, /"dtype" must be/],
    [
      { gradientDtype: "bf16" },
      /"gradientDtype" must be f32 for f32 weights: current value is bf16/,
    ],
    [
      { dtype: "bf16", gradientDtype: "f64" },
      /"gradientDtype" must be f32 or bf16 for bf16 weights/,
    ],
    [{ experts: 4, router: { kind: "softmax", topK: 5 } }, /experts per token must be .* 1\.\.4/],
    [{ sharedExperts: 0.5 }, /"sharedExperts" must be a whole number >= 0/],
    [{ initStd: 0 }, /"initStd" must be a number > 0/],
  ];
  for (const [change, message] of bad) {
    assert.throws(() => modelConfig({ ...good, ...change }), message);
  }
});

Deno.test("config: gradients are f32 unless bf16 is chosen, and no part of what a checkpoint must be of", () => {
  const wide = modelConfig({ ...good, dtype: "bf16", gradientDtype: undefined });
  const narrow = modelConfig({ ...good, dtype: "bf16", gradientDtype: "bf16" });
  assert.equal(wide.gradientDtype, "f32");
  assert.equal(narrow.gradientDtype, "bf16");
  assert.equal(modelConfig({ ...good, dtype: "f64" }).gradientDtype, "f64");
  assert.deepEqual(modelDescription(narrow), modelDescription(wide));
});
