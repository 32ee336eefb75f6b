// The pool's bookkeeping on a fake source of memory: blocks never overlap, freed neighbours join, statistics add up.

import assert from "node:assert/strict";
import fc from "fast-check";
import { OutOfMemoryError } from "../memory_error.ts";
import { Arena, Blocks, type MemorySource } from "./arena.ts";

const MIB = 2 ** 20;

/** Memory that is a number: `limit` bytes, in one range or in slabs with gaps between them. */
function fakeSource(limit: number, contiguous: boolean): MemorySource & { taken: number } {
  let next = 2 ** 45;
  return {
    contiguous,
    granularity_bytes: 2 * MIB,
    taken: 0,
    grow(bytes) {
      assert.equal(bytes % (2 * MIB), 0);
      if (this.taken + bytes > limit) return null;
      this.taken += bytes;
      const address = next;
      next += contiguous ? bytes : bytes + 4 * MIB;
      return address;
    },
    free_bytes() {
      return limit - this.taken;
    },
  };
}

/** Steps of a program: a positive number allocates so many bytes, a fraction frees the allocation at that place of the list. */
const program = fc.array(
  fc.oneof(
    { weight: 3, arbitrary: fc.integer({ min: 0, max: 4096 }) },
    { weight: 2, arbitrary: fc.integer({ min: 1, max: 40 * MIB }) },
    { weight: 4, arbitrary: fc.double({ min: -1, max: 0, maxExcluded: true, noNaN: true }) },
  ),
  { maxLength: 120, size: "max" },
);

for (const contiguous of [true, false]) {
  Deno.test(`arena: no overlap, exact statistics, all joined at the end (${contiguous ? "one range" : "slabs"})`, () => {
    fc.assert(
      fc.property(program, (steps) => {
        const source = fakeSource(2 ** 40, contiguous);
        const arena = new Arena(source);
        const live: { address: number; bytes: number }[] = [];
        let used = 0, peak = 0;
        const rounded = (bytes: number) => Math.max(512, Math.ceil(bytes / 512) * 512);
        for (const step of steps) {
          if (step >= 0) {
            const address = arena.allocate(step);
            assert.equal(address % 512, 0);
            for (const other of live) {
              const apart = address + rounded(step) <= other.address ||
                other.address + rounded(other.bytes) <= address;
              assert.ok(apart, `${address} + ${step} overlaps ${other.address} + ${other.bytes}`);
            }
            live.push({ address, bytes: step });
            used += rounded(step);
            peak = Math.max(peak, used);
          } else if (live.length > 0) {
            const [gone] = live.splice(Math.floor(-step * (live.length - 1)), 1);
            arena.free(gone.address);
            used -= rounded(gone.bytes);
          }
          assert.equal(arena.used_bytes, used);
          assert.equal(arena.peak_bytes, peak);
          assert.equal(arena.reserved_bytes, source.taken);
          const sizes = live.map((entry) => rounded(entry.bytes)).sort((a, b) => b - a);
          assert.deepEqual(arena.largest(5), sizes.slice(0, 5));
        }
        for (const { address } of live) arena.free(address);
        assert.equal(arena.used_bytes, 0);
        if (contiguous && arena.reserved_bytes > 0) {
          // Everything is one block again: all of it can be had without growth.
          arena.allocate(arena.reserved_bytes);
          assert.equal(arena.reserved_bytes, source.taken);
        }
      }),
      { numRuns: 150 },
    );
  });
}

Deno.test("blocks: the smallest that fits is taken; neighbours join", () => {
  fc.assert(
    fc.property(
      fc.array(fc.integer({ min: 1, max: 5000 }), { minLength: 1, maxLength: 60, size: "max" }),
      fc.integer({ min: 1, max: 5000 }),
      (sizes, wanted) => {
        const blocks = new Blocks();
        // Used blocks of one unit keep the free ones apart.
        const starts = sizes.map((size) => {
          blocks.grow(size + 1);
          const start = blocks.take(size);
          assert.ok(blocks.take(1) >= 0);
          return start;
        });
        for (const start of starts) assert.ok(blocks.give(start) > 0);
        assert.deepEqual(blocks.free().sort((a, b) => a - b), sizes.toSorted((a, b) => a - b));
        const best = Math.min(...sizes.filter((size) => size >= wanted));
        const start = blocks.take(wanted);
        if (best === Infinity) assert.equal(start, -1);
        else assert.equal(sizes[starts.indexOf(start)], best);
        if (start >= 0) assert.equal(blocks.give(start), wanted);
        assert.equal(blocks.give(starts[0]), 0, "free already");
        for (const [used] of [...blocks.used()]) blocks.give(used);
        assert.deepEqual(blocks.free(), [blocks.extent]);
        assert.equal(blocks.freeAtEnd, blocks.extent);
      },
    ),
  );
});

Deno.test("arena: a freed block is used again at once", () => {
  const arena = new Arena(fakeSource(2 ** 30, true));
  const first = arena.allocate(MIB);
  arena.free(first);
  assert.equal(arena.allocate(MIB), first);
});

Deno.test("arena: growth takes only what the free end lacks", () => {
  const source = fakeSource(2 ** 40, true);
  const arena = new Arena(source);
  const first = arena.allocate(MIB);
  assert.equal(source.taken, 64 * MIB);
  const second = arena.allocate(200 * MIB);
  assert.equal(second, first + MIB);
  assert.equal(source.taken, 202 * MIB); // a whole number of granules of 2 MiB
});

Deno.test("arena: out of memory names the request and what is held", () => {
  const arena = new Arena(fakeSource(100 * MIB, true));
  arena.allocate(30 * MIB);
  arena.allocate(20 * MIB);
  assert.throws(() => arena.allocate(60 * MIB), (error) => {
    assert.ok(error instanceof OutOfMemoryError);
    assert.match(
      error.message,
      /60\.0 MiB .* 50\.0 MiB are in use of 64\.0 MiB reserved, the GPU has 36\.0 MiB free; largest allocations: 30\.0 MiB, 20\.0 MiB/,
    );
    return true;
  });
  arena.allocate(50 * MIB); // what is there can still be had
});

Deno.test("arena: wrong sizes and addresses are refused", () => {
  const arena = new Arena(fakeSource(2 ** 30, true));
  for (const bytes of [-1, 1.5, NaN, Infinity]) {
    assert.throws(() => arena.allocate(bytes), /whole number of bytes >= 0/);
  }
  const address = arena.allocate(1000);
  assert.throws(() => arena.free(address + 512), /live allocation/);
  assert.throws(() => arena.free(address + 1), /live allocation/);
  assert.throws(() => arena.free(1), /live allocation/);
  arena.free(address);
  assert.throws(() => arena.free(address), /live allocation/);
});

Deno.test("arena: peak is reset to the present use", () => {
  const arena = new Arena(fakeSource(2 ** 30, true));
  const first = arena.allocate(4096);
  arena.allocate(1024);
  arena.free(first);
  assert.equal(arena.peak_bytes, 5120);
  arena.resetPeak();
  assert.equal(arena.peak_bytes, 1024);
});
