// The shm transport on 1 to 4 rank processes: every operation, dtype, reduction and place of data, around the borders of its chunks;
// errors at the call; order, time-outs, and ranks that leave, die or abort. Many cases run inside few processes.

import assert from "node:assert/strict";
import fc from "fast-check";
import { type RunOptions, runRanks } from "./_ranks.ts";

const program = new URL("./_collectives_ranks.ts", import.meta.url);

function run<T>(name: string, size: number, options: RunOptions & { args?: object } = {}) {
  return runRanks<T>(program, size, { ...options, args: { program: name, ...options.args } });
}

interface Attempt {
  readonly message: string;
  readonly ms: number;
}

// 4096 f32 is the border of one-round reductions, 65,536 that of a slot; 16,384 that of a slot's part for one of four ranks.
const LENGTHS = [0, 1, 3, 16, 63, 4096, 4097, 16_385, 65_537, 200_003];

for (const size of [1, 2, 3, 4]) {
  Deno.test(`collectives give what they must on ${size} ranks, for arrays and tensors`, async () => {
    const lengths = size < 3 ? LENGTHS : [0, 1, 63, 4097, 65_537];
    const results = await run<number>("operations", size, { args: { lengths } });
    for (const { result } of results) assert(result! > 600, `${result} cases`);
  });

  Deno.test(`wrong arguments throw at the call on ${size} ranks`, async () => {
    for (const { result } of await run<string[]>("errors", size)) assert(result!.length >= 22);
  });
}

Deno.test("a rank's block of the other buffer may be source or destination", async () => {
  for (const size of [1, 3]) await run("inPlace", size);
});

Deno.test("reductions have equal bits whatever the size of the messages", async () => {
  for (const size of [2, 3, 4]) await run("bitEqual", size);
});

Deno.test("random operations on two communicators with random delays end and are right", async () => {
  await fc.assert(
    fc.asyncProperty(fc.integer(), fc.constantFrom(2, 3, 4), async (seed, size) => {
      await run("random", size, { args: { seed, steps: 150 }, timeout_ms: 40_000 });
    }),
    { numRuns: 4, endOnFailure: true },
  );
});

Deno.test("split and dup make independent communicators", async () => {
  const results = await run<{ name: string; rank: number; sum: number }>("groups", 4);
  assert.deepEqual(results.map((r) => r.result), [
    { name: "world/split1.0", rank: 1, sum: 2 },
    { name: "world/split1.1", rank: 1, sum: 4 },
    { name: "world/split1.0", rank: 0, sum: 2 },
    { name: "world/split1.1", rank: 0, sum: 4 },
  ]);
});

Deno.test("in debug mode ranks that call different operations are named", async () => {
  const env = { LINA_DEBUG: "1" };
  for (const { result } of await run<Attempt>("order", 3, { env })) {
    assert.match(result!.message, /operation 1 of world/);
    assert.match(result!.message, /rank 0 called allReduce\(f32, 8 elements, sum\)/);
    assert.match(result!.message, /rank 1 called broadcast\(f32, 8 elements, root 0\)/);
  }
  for (
    const { result } of await run<Attempt>("counts", 2, {
      env,
      args: { count: 1, more: 1, delay_ms: 0 },
    })
  ) {
    assert.match(
      result!.message,
      /sendCounts\[1\] of rank 0 must be recvCounts\[0\] of rank 1, 1: .* 2$/,
    );
  }
});

Deno.test("debug mode changes no result", async () => {
  await run("operations", 2, { env: { LINA_DEBUG: "1" }, args: { lengths: [0, 1, 5, 5000] } });
});

Deno.test("without debug mode different operations are an error, not a hang or wrong data", async () => {
  const results = await run<Attempt>("order", 2, { env: { LINA_TIMEOUT_MS: "3000" } });
  assert(
    results.some((r) =>
      /all ranks must call the same operation.*LINA_DEBUG=1/.test(r.result!.message)
    ),
  );
  for (const { result } of results) assert.notEqual(result!.message, "");
});

Deno.test("without debug mode counts that differ are an error of the receiver, whatever the size", async () => {
  // In one call, in one round begun late, in several rounds; and with the other rank's larger count.
  for (const [count, more, delay_ms] of [[1, 1, 0], [1, 1, 50], [200_000, 1, 0], [1, 200_000, 0]]) {
    const args = { count, more, delay_ms };
    const [first, second] = await run<Attempt>("counts", 2, { args, check: false });
    assert.equal(
      second.result!.message,
      `Cannot complete allToAllV 0 of world on rank 1: sendCounts[1] of rank 0 must be recvCounts[0] of rank 1, ${count}: current value is ${
        count + more
      }`,
    );
    if (count + more < 1000) assert.equal(first.result!.message, "");
  }
});

Deno.test("the watchdog names the operation and the ranks that have not arrived", async () => {
  const results = await run<Attempt & { ticks: number; after: Attempt }>("hang", 3, {
    env: { LINA_TIMEOUT_MS: "700" },
  });
  for (const { result } of results.slice(0, 2)) {
    assert.match(result!.message, /allReduce 1 of world on rank \d.*700 ms.*not arrived: rank 2$/);
    assert(result!.ms >= 650 && result!.ms < 5000, `${result!.ms} ms`);
    assert(result!.ticks > 10, `timers ran ${result!.ticks} times while waiting`);
    assert.match(
      result!.after.message,
      /must be open: current value is broken by an earlier failure/,
    );
  }
});

Deno.test("a time-out counts the waiting, not what the host does before", async () => {
  for (const { result } of await run<Attempt>("busy", 2, { env: { LINA_TIMEOUT_MS: "500" } })) {
    assert.equal(result!.message, "");
  }
  const [asking] = await run<Attempt>("asking", 2, { env: { LINA_TIMEOUT_MS: "500" } });
  assert.match(asking.result!.message, /recv 0 of world on rank 0.*500 ms.*not arrived: rank 1$/);
});

Deno.test("a message that overtakes its receiver is not lost", async () => {
  const [, second] = await run<number[]>("crossing", 2, { env: { LINA_TIMEOUT_MS: "5000" } });
  assert.deepEqual(second.result, [4, 3, 3]);
});

Deno.test("a rank that exits early is named by those who wait for it", async () => {
  for (const { result, rank, end_ms } of await run<Attempt>("leave", 3)) {
    if (rank === 2) continue;
    assert.match(result!.message, /rank 2 must take part: current value is that it has died/);
    assert(end_ms < 10_000, `${end_ms} ms`);
  }
});

Deno.test("a rank that is killed is named by those who wait for it", async () => {
  const results = await run<Attempt>("killed", 3, {
    check: false,
    started: ([, , last]) => setTimeout(() => last.kill("SIGKILL"), 2500),
  });
  for (const { result, end_ms } of results.slice(0, 2)) {
    assert.match(result!.message, /rank 2 must take part: current value is that it has died/);
    assert(end_ms < 12_500, `${end_ms} ms`);
  }
});

Deno.test("abort fails the operations of the other ranks with its reason", async () => {
  const [, second] = await run<Attempt>("abort", 2);
  assert.match(second.result!.message, /Rank 0 of world has aborted the job: the data is wrong/);
});

Deno.test("traffic is what the formulas say, to the byte", async () => {
  const size = 4;
  const results = await run<Record<string, { calls: number; bytes: number }>>("volume", size);
  results.forEach(({ result, rank }) => {
    assert.deepEqual(result, {
      allReduce: { calls: 1, bytes: Math.floor(2 * 3 * 1001 * 4 / 4) },
      allGather: { calls: 1, bytes: 3 * 10 * 4 },
      broadcast: { calls: 1, bytes: rank === 1 ? 3 * 7 * 4 : 0 },
      allToAllV: { calls: 1, bytes: 3 * 3 * 4 },
      reduceScatter: { calls: 1, bytes: 3 * 5 * 4 },
      gather: { calls: 1, bytes: rank === 0 ? 0 : 2 * 4 },
      barrier: { calls: 1, bytes: 0 },
    });
  });
});
