// Experts that move: exact bits whatever moves whereto, all or nothing, and a training that packs and unpacks loses nothing.

import assert from "node:assert/strict";
import fc from "fast-check";
import { buildEmulator } from "./emulator/build.ts";
import { buildNccl } from "./emulator/nccl.ts";
import type { MovesArgs, MovesResult } from "./_moves_ranks.ts";
import { runRanks } from "./_ranks.ts";

const PROGRAM = new URL("./_moves_ranks.ts", import.meta.url);

interface Result {
  readonly sent?: number;
  readonly trained?: MovesResult;
}

async function run(ranks: number, args: MovesArgs, env?: Record<string, string>) {
  const results = await runRanks<Result>(PROGRAM, ranks, { args, env, timeout_ms: 100_000 });
  return results.map(({ result }) => result!);
}

/** Seats of an expert on one rank at least. */
function seatings(experts: number, ranks: number): fc.Arbitrary<number[][]> {
  const holders = fc.uniqueArray(fc.nat({ max: ranks - 1 }), { minLength: 1, maxLength: ranks });
  const order = fc.infiniteStream(fc.nat());
  return fc.tuple(fc.array(holders, { minLength: experts, maxLength: experts }), order).map(
    ([held, numbers]) => {
      const seats = Array.from({ length: ranks }, () => [] as number[]);
      held.forEach((list, e) => {
        for (const rank of list) {
          const { value } = numbers.next();
          seats[rank].splice((value as number) % (seats[rank].length + 1), 0, e);
        }
      });
      return seats;
    },
  );
}

function randomMoves(ranks: number, dtype: "f32" | "bf16", seed: number): MovesArgs {
  const experts = 5;
  const move = fc.record({
    seats: fc.tuple(seatings(experts, ranks), seatings(experts, ranks)),
    offload: fc.nat({ max: 6 }),
  });
  const [moves] = fc.sample(fc.array(move, { minLength: 9, maxLength: 9 }), {
    numRuns: 1,
    seed,
  });
  return { random: { dtype, experts, moves, staging_bytes: 30_000 } };
}

for (const ranks of [2, 4]) {
  Deno.test(`moves: weights and moments of every layer arrive to the bit (${ranks} ranks)`, async () => {
    const results = await run(ranks, randomMoves(ranks, "f32", ranks));
    assert.ok(results.some(({ sent }) => sent! > 0));
  });
}

Deno.test("moves: a rank without memory stops all, and nothing has moved", async () => {
  await run(2, { ...randomMoves(2, "f32", 5), fails: 1 });
});

Deno.test("moves: 1 -> 2 -> 4 -> 1 copies in training: the same losses, with and without offload and shards", async () => {
  const [still] = await run(4, { train: { replicas: [1, 1, 1, 1, 1, 1] } });
  for (const more of [{}, { offload: 1 }, { shardOptimizer: true, offload: 9 }]) {
    const moved = await run(4, { train: { replicas: [1, 1, 2, 4, 1, 1], ...more } });
    for (const { trained } of moved) {
      assert.ok(trained!.sent_bytes > 0);
      for (const name of ["losses", "gradNorms"] as const) {
        trained![name].forEach((value, i) => {
          const expected = still.trained![name][i];
          assert.ok(
            Math.abs(value - expected) <= 1e-5 * Math.abs(expected),
            `${name} of step ${i}: ${value} and ${expected}`,
          );
        });
      }
      assert.deepEqual(trained!.losses, moved[0].trained!.losses);
    }
  }
});

Deno.test("moves: a checkpoint of packed experts is loaded unpacked and offloaded, and the other way round", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lina-moves-" });
  try {
    const [packed] = await run(4, {
      train: { replicas: [2, 2, 2, 2], save: [2, directory], offload: 1 },
    });
    const [unpacked] = await run(4, {
      train: { replicas: [1, 1], resume: directory, offload: 2 },
    });
    const [again] = await run(2, { train: { replicas: [2, 2], resume: directory } });
    const expected = packed.trained!.losses.slice(2);
    for (const { trained } of [unpacked, again]) {
      trained!.losses.forEach((loss, i) => {
        assert.ok(Math.abs(loss - expected[i]) <= 1e-5 * loss, `${loss} and ${expected[i]}`);
      });
    }
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

const library = await buildEmulator() && await buildNccl(false);
if (!library) {
  const message = "Cannot emulate NCCL as there must be clang on Linux";
  if (Deno.env.get("LINA_CI")) throw new Error(message);
  console.warn(`skipped: ${message}`);
}
const NCCL = {
  LINA_TEST_BACKEND: "nccl",
  LINA_EMULATOR: "1",
  LINA_NCCL_LIB: library || "",
  LINA_EMULATOR_MEMORY_MIB: "256",
};

Deno.test({
  name: "moves: bf16 weights, moments and residuals over NCCL, some in host memory",
  ignore: !library,
  fn: async () => {
    await run(2, randomMoves(2, "bf16", 3), NCCL);
  },
});

Deno.test({
  name: "moves: a training over NCCL that packs and unpacks offloaded experts learns the same",
  ignore: !library,
  fn: async () => {
    const replicas = [1, 2, 2, 1];
    const [plain] = await run(2, { train: { replicas } }, NCCL);
    const [offloaded] = await run(2, { train: { replicas, offload: 3 } }, NCCL);
    const [still] = await run(2, { train: { replicas: [1, 1, 1, 1] } }, NCCL);
    assert.deepEqual(offloaded.trained!.losses, plain.trained!.losses);
    plain.trained!.losses.forEach((loss, i) => {
      assert.ok(Math.abs(loss - still.trained!.losses[i]) <= 1e-5 * loss, `step ${i}: ${loss}`);
    });
  },
});
