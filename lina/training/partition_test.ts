import assert from "node:assert/strict";
import fc from "fast-check";
import type { GradientNode } from "../../moe/hooks.ts";
import { checkSchedule } from "../../moe/schedule.ts";
import { PART_ALIGNMENT, partition } from "./partition.ts";

function gradientOf(id: number, elements: number, elementBytes: number): GradientNode {
  const bytes = elements * elementBytes;
  return { kind: "gradient", id, name: `g${id}`, elements, bytes, group: "world", after: [] };
}

const list: fc.Arbitrary<GradientNode[]> = fc.array(
  fc.tuple(
    fc.oneof(fc.integer({ min: 0, max: 5000 }), fc.integer({ min: 2 ** 31, max: 2 ** 40 })),
    fc.constantFrom(2, 4, 8),
  ),
  { maxLength: 6 },
).map((sizes) => sizes.map(([elements, bytes], id) => gradientOf(id, elements, bytes)));

Deno.test("partition: every element once, in order, aligned, none too large, parts of a gradient alike", () => {
  fc.assert(fc.property(list, fc.integer({ min: 16, max: 20_000 }), (gradients, size) => {
    // Large gradients in as few parts as small ones, or the test would not end.
    const largest = Math.max(0, ...gradients.map(({ bytes }) => bytes));
    const most = largest > 1e6 ? size * 2 ** 30 : size;
    const microOps = partition(gradients, most);
    checkSchedule({ nodes: gradients }, { microOps, chunks: new Map() }, "device");
    const byGradient = Map.groupBy(microOps, ({ parts }) => parts[0].gradient);
    assert.deepEqual(
      [...byGradient.keys()],
      gradients.filter(({ elements }) => elements > 0).map(({ id }) => id),
    );
    for (const [id, ops] of byGradient) {
      const { elements, bytes } = gradients[id], elementBytes = bytes / elements;
      ops.forEach((op, i) => {
        const [{ start, end }] = op.parts;
        assert.ok(Number.isInteger(start) && Number.isInteger(end));
        assert.equal(op.bytes, (end - start) * elementBytes);
        assert.ok(op.bytes <= most);
        assert.equal(start * elementBytes % PART_ALIGNMENT, 0);
        assert.equal(start, i === 0 ? 0 : ops[i - 1].parts[0].end);
        if (i < ops.length - 1) assert.equal(op.bytes, ops[0].bytes);
      });
      assert.ok(ops.length <= Math.ceil(bytes / (most - most % PART_ALIGNMENT)));
    }
    assert.deepEqual(partition(gradients, most), microOps);
  }));
});

Deno.test("partition: sizes at their limits", () => {
  const sizes = (elements: number, elementBytes: number, most: number) =>
    partition([gradientOf(0, elements, elementBytes)], most).map(({ bytes }) => bytes);
  assert.deepEqual(sizes(100, 4, Infinity), [400]);
  assert.deepEqual(sizes(100, 4, 400), [400]);
  assert.deepEqual(sizes(100, 4, 399), [208, 192]);
  assert.deepEqual(sizes(9, 4, 16), [16, 16, 4]);
  assert.deepEqual(sizes(9, 4, 31.5), [16, 16, 4]);
  assert.deepEqual(sizes(17, 2, 32), [32, 2]);
  assert.deepEqual(sizes(0, 4, 16), []);
  for (const most of [15, 0, -1, NaN, -Infinity]) {
    assert.throws(
      () => sizes(1, 4, most),
      new RangeError(
        `Cannot cut gradients as a micro-op must have at least 16 bytes: current value is ${most}`,
      ),
    );
  }
});
