import assert from "node:assert/strict";
import { type Cell, ratioOf, rowsOf, verdict } from "./_nccl_table.ts";

/** Samples around a mean that are the same in every run. */
function around(mean: number, spread: number, phase: number): number[][] {
  return [0, 1, 2].map((launch) =>
    Array.from({ length: 8 }, (_, i) => mean * (1 + spread * Math.sin(phase + 7 * i + 31 * launch)))
  );
}

Deno.test("a difference beyond the noise is told, one within it is not", () => {
  const clear = ratioOf(around(100, 0.02, 0), around(90, 0.02, 1));
  assert.ok(clear.low < 0.9 && 0.9 < clear.high && clear.high < 0.97, JSON.stringify(clear));
  assert.equal(verdict(clear, 0.97), "below");
  assert.equal(verdict(ratioOf(around(90, 0.02, 0), around(100, 0.02, 1)), 0.97), "");
  assert.match(verdict(ratioOf(around(100, 0.4, 0), around(90, 0.4, 1)), 0.97), /^open/);
});

Deno.test("a launch that differs from the others widens the interval", () => {
  const even = around(100, 0.02, 0);
  const odd = even.map((turns, i) => turns.map((time) => i === 0 ? 0.5 * time : time));
  const { low, high } = ratioOf(even, odd);
  assert.ok(low < 0.6 && high > 0.97, `${low} ${high}`);
});

Deno.test("rows have medians, quartiles and nccl-tests' bandwidth; a launch without all sides is left out", () => {
  const side = (name: string, times: number[]) => ({
    name,
    turns: times.map((time): [number, number] => [time, time / 10]),
  });
  const cell: Cell = {
    operation: "allReduce",
    mbit: 0,
    bytes: 4000,
    launches: [
      [side("a", [1, 2, 3, 4, 5]), side("b", [2, 4, 6, 8, 10])],
      [side("a", [100]), side("b", [])],
    ],
  };
  const [a, b] = rowsOf([cell], ["a", "b"], 4);
  assert.deepEqual([a.time_us, ...a.time_quartiles_us, a.host_us], [3, 2, 4, 0.3]);
  assert.equal(a.busbw_gbs, 2);
  assert.equal(a.time_ratio!.median, 2);
  assert.deepEqual([b.time_us, b.launches, b.turns, b.time_ratio], [6, 1, 5, undefined]);
});
