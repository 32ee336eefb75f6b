import assert from "node:assert/strict";
import fc from "fast-check";
import { elementsOf, pieceElements, pieceOf } from "./shards.ts";

const microOps = fc.array(
  fc.record({ gradient: fc.nat(5), start: fc.nat(20), size: fc.integer({ min: 1, max: 30 }) }),
  { minLength: 1, maxLength: 5 },
).map((parts) => ({
  parts: parts.map(({ gradient, start, size }) => ({ gradient, start, end: start + size })),
  bytes: 0,
}));

Deno.test("pieces: every element is one rank's, in order, and none has more than a piece", () => {
  fc.assert(fc.property(microOps, fc.integer({ min: 1, max: 40 }), (microOp, ranks) => {
    const elements = (parts: readonly { gradient: number; start: number; end: number }[]) =>
      parts.flatMap(({ gradient, start, end }) =>
        Array.from({ length: end - start }, (_, i) => `${gradient} ${start + i}`)
      );
    const pieces = Array.from({ length: ranks }, (_, rank) => pieceOf(microOp, rank, ranks));
    assert.deepEqual(elements(pieces.flat()), elements(microOp.parts));
    const most = pieceElements(microOp, ranks);
    pieces.forEach((parts, rank) => {
      assert(parts.every(({ start, end }) => start < end));
      assert.equal(
        elementsOf(parts),
        Math.max(0, Math.min(most, elementsOf(microOp.parts) - rank * most)),
      );
    });
  }));
});
