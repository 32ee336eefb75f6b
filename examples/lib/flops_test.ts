import assert from "node:assert/strict";
import { modelConfig } from "../../moe/config.ts";
import { peakTflops, stepFlops } from "./flops.ts";

Deno.test("FLOPs: of a dense model as counted by hand, tied or not", () => {
  const sizes = { vocab: 100, width: 8, layers: 2, heads: 2, hidden: 16 };
  // Per layer: q, k, v, o 4·64, three matrices 3·8·16, two gains; the head 800 and the last gain 8.
  const met = 2 * (256 + 384 + 16) + 800 + 8;
  const attention = 2 * 3.5 * 4 * 3 * 8 * 5 ** 2 / 2;
  for (const tied of [false, true]) {
    const flops = stepFlops(modelConfig({ ...sizes, tied }), 3, 5);
    assert.equal(flops, 6 * met * 15 + attention);
  }
});

Deno.test("FLOPs: peaks of GPUs by name", () => {
  assert.equal(peakTflops("NVIDIA H200"), 989);
  assert.equal(peakTflops("NVIDIA H100 80GB HBM3"), 989);
  assert.equal(peakTflops("NVIDIA A100-SXM4-80GB"), 312);
  assert.equal(peakTflops("Some CPU"), undefined);
});
