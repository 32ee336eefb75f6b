import assert from "node:assert/strict";
import fc from "fast-check";
import type { Mark } from "../../moe/gradients.ts";
import { buildStepGraph } from "../../moe/graph.ts";
import type { Boundary } from "../../moe/hooks.ts";
import { chunkTimes, packedBytes, Packing } from "./packing.ts";

/** What a device shows whose experts and links do so much per chunk with one copy of each. */
function shown(replicas: number, ranks: number, experts_us: number, allToAll_us: number) {
  const away = (group: number) => (group - 1) / group;
  return { experts_us, allToAll_us: allToAll_us * away(ranks / replicas) / away(ranks) };
}

Deno.test("packing: doubles until experts outlast the all-to-all, within the bounds, and then stays", () => {
  const input = fc.record({
    ranks: fc.constantFrom(2, 4, 8, 16),
    leastRanks: fc.constantFrom(1, 2, 4),
    experts_us: fc.integer({ min: 1, max: 10_000 }),
    allToAll_us: fc.integer({ min: 1, max: 10_000 }),
  });
  fc.assert(fc.property(input, ({ ranks, leastRanks, experts_us, allToAll_us }) => {
    const packing = new Packing({ experts: 16, ranks, leastRanks });
    const course: number[] = [];
    for (let i = 0; i < 12; i++) {
      packing.replicas = packing.next(shown(packing.replicas, ranks, experts_us, allToAll_us));
      course.push(packing.replicas);
    }
    const k = packing.replicas;
    assert.deepEqual(course.slice(6), Array(6).fill(k), `goes back and forth: ${course}`);
    assert.ok(k === 1 || ranks / k >= leastRanks);
    const now = shown(k, ranks, experts_us, allToAll_us);
    const limit = ranks / (2 * k) < leastRanks || !Number.isInteger(ranks / (2 * k));
    assert.ok(now.experts_us > now.allToAll_us || limit, "could hold more");
    assert.equal(packing.expertsPerDevice, k * 16 / ranks);
  }));
});

Deno.test("packing: follows the load both ways, and leaves out what has no room", () => {
  const packing = new Packing({ experts: 8, ranks: 8 });
  const step = (experts_us: number, allToAll_us: number) => {
    return packing.replicas = packing.next(shown(packing.replicas, 8, experts_us, allToAll_us));
  };
  assert.deepEqual([step(100, 300), step(100, 300), step(100, 300)], [2, 4, 4]); // least 2 ranks
  // Links have become faster: fewer experts do, one step down at a time.
  assert.deepEqual([step(400, 50), step(400, 50), step(400, 50)], [2, 1, 1]);
  const narrow = new Packing({ experts: 8, ranks: 8 });
  narrow.refuse(4);
  narrow.replicas = narrow.next(shown(1, 8, 100, 900));
  assert.equal(narrow.replicas, 2);
  assert.equal(narrow.next(shown(2, 8, 100, 900)), 2);
  assert.throws(() => new Packing({ experts: 4, ranks: 6, replicas: 4 }), /must divide 6 ranks/);
  assert.throws(() => new Packing({ experts: 2, ranks: 4 }), /groups of at most 2/);
});

Deno.test("packing: times of chunks are read from the forward half's marks", () => {
  const graph = buildStepGraph({
    layers: [0, 1].map(() => ({
      moe: { allToAllBytes: 1, experts: [] },
      feedForward: [],
      attention: [],
    })),
    head: [],
    embedding: [],
  });
  const marks: Mark[] = [];
  let now_us = 0;
  const mark = (after_us: number, boundary: Mark["boundary"]) => {
    const time_us = now_us += after_us;
    marks.push({ boundary, event: { done: () => true, time: () => time_us } });
  };
  const layers = graph.nodes.filter((node) => node.kind === "allToAll" && node.phase === "forward");
  mark(0, { kind: "passBegins" });
  for (let layer = 0; layer < 2; layer++) {
    const [dispatch, combine] = layers.filter((node) =>
      node.kind === "allToAll" && node.layer === layer
    )
      .map(({ id }) => id);
    const tell = (after_us: number, kind: Boundary["kind"], node: number, chunk: number) =>
      mark(after_us, { kind, node, chunk } as Boundary);
    tell(10, "allToAllStarts", dispatch, 0);
    tell(5, "allToAllStarts", dispatch, 1);
    tell(100 + layer, "allToAllEnds", dispatch, 0);
    tell(30, "allToAllStarts", combine, 0);
    tell(60, "allToAllEnds", dispatch, 1);
    tell(40, "allToAllStarts", combine, 1);
    tell(20, "allToAllEnds", combine, 0);
    tell(20, "allToAllEnds", combine, 1);
  }
  assert.deepEqual(chunkTimes(graph, marks), { allToAll_us: 105.5, experts_us: 35 });
  assert.equal(chunkTimes(graph, marks.slice(0, 2)), null);
});

Deno.test("packing: memory that is needed more; three experts' moments pass through buffers", () => {
  const expert = { weights: 2, gradient: 4, moments: 10 };
  const bytes = (before: [number, number], after: [number, number]) =>
    packedBytes({
      layers: 2,
      expert,
      before: { experts: before[0], offloaded: before[1] },
      after: { experts: after[0], offloaded: after[1] },
    });
  assert.equal(bytes([1, 0], [2, 0]), 2 * 16);
  assert.equal(bytes([2, 0], [1, 0]), -2 * 16);
  assert.equal(bytes([1, 0], [2, 2]), 2 * 6 - 2 * 10 + 3 * 10);
  assert.equal(bytes([8, 0], [8, 8]), -16 * 10 + 3 * 10);
  assert.equal(bytes([3, 3], [3, 3]), 0);
});

Deno.test("packing: times that shake around a load do not move experts to and fro", () => {
  const input = fc.record({
    experts_us: fc.integer({ min: 10, max: 1000 }),
    allToAll_us: fc.integer({ min: 10, max: 1000 }),
    noise: fc.array(fc.double({ min: 0.96, max: 1.04, noNaN: true }), {
      minLength: 60,
      maxLength: 60,
    }),
  });
  fc.assert(fc.property(input, ({ experts_us, allToAll_us, noise }) => {
    const packing = new Packing({ experts: 8, ranks: 8, leastRanks: 1 });
    let moves = 0;
    for (const factor of noise) {
      const times = shown(packing.replicas, 8, experts_us * factor, allToAll_us);
      const next = packing.next(times);
      if (next !== packing.replicas) moves++;
      packing.replicas = next;
    }
    assert.ok(moves <= 3, `${moves} moves`);
  }));
});
