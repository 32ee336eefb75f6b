// The SIMD reductions against the plain reference: every dtype and reduction, odd lengths, the result in place.

import assert from "node:assert/strict";
import fc from "fast-check";
import { bytesOf, viewAs } from "../../tensor/dtype.ts";
import { allocate, free, linearBuffer } from "../../tensor/cpu/memory.ts";
import { REDUCE_OPS, REDUCIBLE } from "../types.ts";
import { kernels, reduceLinear } from "./kernels.ts";
import { reduceReference } from "./reduce.ts";

Deno.test("reduceLinear() gives the bits of the reference for all dtypes and reductions", () => {
  fc.assert(
    fc.property(
      fc.constantFrom(...REDUCIBLE),
      fc.constantFrom(...REDUCE_OPS),
      fc.integer({ min: 1, max: 5 }),
      fc.integer({ min: 0, max: 70 }),
      fc.integer({ min: -1, max: 4 }),
      fc.integer(),
      (dtype, op, ranks, length, place, seed) => {
        const bytes = length * bytesOf(dtype);
        const blocks = Array.from({ length: ranks + 3 }, () => allocate(bytes + 64));
        try {
          const sources = blocks.slice(0, ranks);
          sources.forEach((at, s) => fillBits(at, bytes, seed + s));
          const wanted = blocks[ranks], copy = blocks[ranks + 1];
          const out = place >= 0 && place < ranks ? sources[place] : blocks[ranks + 2];
          reduceReference(dtype, op, sources, wanted, length);
          reduceLinear(dtype, op, sources, out, copy, length);
          const read = (at: number) => viewAs(dtype, linearBuffer(), at, length).slice();
          assert.deepEqual(numbers(dtype, read(out)), numbers(dtype, read(wanted)));
          assert.deepEqual(read(copy), read(out));
        } finally {
          blocks.forEach(free);
        }
      },
    ),
    { numRuns: 3000 },
  );
});

/** Random bits: so floats include NaN, infinities, subnormals and both zeros. */
function fillBits(at: number, bytes: number, seed: number): void {
  const view = new Uint8Array(linearBuffer(), at, bytes);
  let state = seed | 1;
  for (let i = 0; i < bytes; i++) {
    state = Math.imul(state, 1664525) + 1013904223 | 0;
    view[i] = state >>> 24;
  }
}

/** One name for all NaNs, because processors choose their bits; else what `deepEqual` tells apart, -0 included. */
function numbers(dtype: string, array: ArrayLike<number | bigint>): unknown[] {
  const nan = (x: number) => (x & 0x7f80) === 0x7f80 && (x & 0x7f) !== 0;
  return Array.from(array, (x) => dtype === "bf16" && nan(Number(x)) ? "NaN" : x);
}

Deno.test("a flag that has not come is missed when the count of rounds wraps around, too", () => {
  const slots = allocate(256), round = allocate(64), sleepers = allocate(64);
  const words = new Int32Array(linearBuffer());
  words.fill(0, sleepers / 4, sleepers / 4 + 16);
  for (const before of [100, 0x7ffffffe, 0x7fffffff, -1]) {
    const flag = (before + 1) | 0;
    for (const [theirs, complete] of [[before, 0], [flag, 1]]) {
      words.set([theirs, 7, 1], slots / 4 + 32); // rank 1's slot: flag, signature, rounds
      words.set([slots, 128, 0, 2, sleepers, 2, flag, 7, 100, round + 52, 1, 0], round / 4);
      assert.equal(kernels().small_barrier(round), complete, `${theirs} for ${flag}`);
    }
  }
});
