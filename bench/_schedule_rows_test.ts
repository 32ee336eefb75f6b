import assert from "node:assert/strict";
import type { AllToAllSample, LinksReply, StepSample, TurnReply } from "./_schedule_messages.ts";
import { achievedOf, quantile, restOf, rowOf, slowdownsOf } from "./_schedule_rows.ts";

const link = { alpha_us: 10, bytes_per_us: 100, error: 0 };
const links: LinksReply = {
  allToAll_us: 1000,
  allReduce_us: 2000,
  allToAllBeside_us: 1900,
  allToAll_bytes: 80_000,
  allReduce_bytes: 190_000,
  allToAll: link,
  reduction: link,
};

function allToAll(
  phase: AllToAllSample["phase"],
  role: AllToAllSample["role"],
  [start_us, end_us]: readonly [number, number],
  bytes: number,
): AllToAllSample {
  return { start_us, end_us, bytes, layer: 0, phase, role, chunk: 0 };
}

/** A step of 1000 µs: computes, sends forward, computes, sends backward twice with a reduction beside the second, computes. */
function step(shift: number, bytes: number): StepSample {
  const at = (a: number, b: number) => [a + shift, b + shift] as const;
  return {
    begin_us: shift,
    end_us: 1000 + shift,
    loss: 2.5,
    imbalance: 1.1,
    hostCpu_ms: 0.2,
    schedule_us: 100,
    allToAlls: [
      allToAll("forward", "dispatch", at(200, 300), bytes),
      allToAll("forward", "combine", at(300, 400), bytes),
      allToAll("backward", "combine", at(500, 600), bytes),
      allToAll("backward", "dispatch", at(600, 800), bytes),
    ],
    microOps: [[600 + shift, 900 + shift, 30_000]],
    computing: [at(100, 200), at(400, 500), at(750, 850)],
  };
}

function turn(steps: readonly StepSample[]): TurnReply {
  const bounds = {
    bound_us: 700,
    floor_us: 500,
    compute_us: 300,
    link_us: 500,
    predicted_us: 750,
  };
  const plan = { microOps: 1, microOpBytes: 30_000, chunks: 1, bounds };
  return { plan, steps, peak_bytes: 7, spans: [] };
}

const key = {
  policy: { name: "fifo", experts: 1 },
  shape: "txl",
  ranks: 2,
  perHost: 1,
  mbit: 800,
  device: "cuda",
} as const;

Deno.test("quantile() interpolates", () => {
  assert.equal(quantile([3, 1, 2], 0.5), 2);
  assert.equal(quantile([1, 2], 0.25), 1.25);
  assert.ok(Number.isNaN(quantile([], 0.5)));
});

Deno.test("achievedOf() takes the better of two collectives, on the slowest rank", () => {
  // 800 Mbit/s are 100 bytes per µs.
  assert.equal(achievedOf([links], 800), 0.95);
  assert.equal(achievedOf([links, { ...links, allReduce_us: 4000 }], 800), 0.8);
  assert.equal(achievedOf([links], 0), undefined);
});

Deno.test("slowdownsOf() counts from the last rank's begin, with the busiest rank's bytes", () => {
  // Rank 1 begins 50 µs later and sends more: 10 + 9000 / 100 µs alone.
  const slowdowns = slowdownsOf([step(0, 4000), step(50, 9000)], link);
  assert.deepEqual(slowdowns, [1, 2]);
});

Deno.test("rowOf() splits a step", () => {
  const turns = [[turn([step(0, 9000)]), turn([step(0, 9000)])]];
  assert.equal(restOf(turns), 0.2);
  const row = rowOf(key, { turns, links: [links, links], rest_ms: 0.2 }, {
    step_ms: 1.5,
  });
  assert.equal(row.step_ms, 1);
  assert.equal(row.speedup, 1.5);
  assert.equal(row.host_share, 0.1);
  assert.equal(row.a2a_fwd_ms, 0.1);
  assert.ok(Math.abs(row.a2a_bwd_ms! - 0.15) < 1e-9);
  assert.equal(row.a2a_share, 0.5);
  assert.equal(row.allreduce_ms, 0.3);
  assert.equal(row.allreduce_finish_ms, 0.9);
  assert.equal(row.link_busy, 0.6); // 200..400 and 500..900
  assert.equal(row.overlap, 100 / 600);
  assert.equal(row.pipelining, 50 / 500);
  assert.equal(row.exposed_a2a_ms, 0.45);
  assert.equal(row.exposed_allreduce_ms, 0.05); // 850..900
  assert.equal(row.bytes, 66_000);
  assert.equal(row.link_used, 0.66);
  assert.ok(Math.abs(row.bound_ms! - 0.9) < 1e-9 && Math.abs(row.floor_ms! - 0.7) < 1e-9);
  assert.equal(row.void, undefined);
});

Deno.test("rowOf() marks rows whose links were too slow", () => {
  const slow = { ...links, allReduce_us: 3000 };
  const row = rowOf(key, { turns: [[turn([step(0, 9000)])]], links: [slow], rest_ms: 0 });
  assert.equal(row.void, "links reached 0.80 of their rate");
  assert.equal(row.speedup, undefined);
});
