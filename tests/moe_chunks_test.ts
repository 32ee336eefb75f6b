// The MoE layer on real ranks, over shared memory, with tokens that travel in slices: losses and gradients are those of one slice, to 1e-6 in
// f32, for every router, with ranks that have no tokens and ranks with fewer tokens than slices. The order check of the communicator is on.

import assert from "node:assert/strict";
import { alike, join, type RankOutcome, ROUTERS } from "./_moe_case.ts";
import { gpuRanksEnv, Mps } from "./_gpu_env.ts";
import { type RunOptions, runRanks } from "./_ranks.ts";

const CHUNKS = [1, 2, 3, 5];
const SPLITS: Record<number, number[][]> = {
  1: [[30]],
  2: [[20, 21], [0, 40]],
  4: [[10, 10, 10, 10], [0, 27, 1, 12]],
};

/** Runs routers in slices on as many ranks, and checks that they have what one slice has. */
async function check(
  size: number,
  names: readonly string[],
  options: {
    readonly tolerance: number;
    readonly env: RunOptions["env"];
    readonly hosts?: readonly number[];
  },
): Promise<Record<string, RankOutcome>[]> {
  const splits = SPLITS[size];
  const ranks = await runRanks<Record<string, RankOutcome>>(
    new URL("./_moe_chunks_ranks.ts", import.meta.url),
    size,
    {
      args: { splits, chunks: CHUNKS, routers: names, hosts: options.hosts },
      env: { LINA_DEBUG: "1", ...options.env },
    },
  );
  for (const name of names) {
    for (const split of splits) {
      const of = (chunks: number) =>
        join(ranks.map(({ result }) => result![`${name}, ${split}, ${chunks}`]));
      const whole = of(1);
      for (const chunks of CHUNKS.slice(1)) alike(of(chunks), whole, options.tolerance);
    }
  }
  return ranks.map(({ result }) => result!);
}

for (const size of [1, 2, 4]) {
  Deno.test(`in slices, every router on ${size} ranks has the loss and gradients of one`, async () => {
    await check(size, Object.keys(ROUTERS), { tolerance: 1e-6, env: {} });
  });
}

Deno.test("in slices, all-to-alls in two levels bring the same rows", async () => {
  const names = ["softmax", "expert choice", "gshard, capacity by probability"];
  const direct = await check(4, names, { tolerance: 1e-6, env: {} });
  const two = await check(4, names, { tolerance: 1e-6, env: {}, hosts: [0, 0, 1, 1] });
  assert.deepEqual(two, direct, "bit by bit");
});

const gpuEnv = await gpuRanksEnv();

Deno.test({
  name: "in slices, on GPUs that talk by NCCL",
  ignore: gpuEnv === null,
  async fn() {
    await using mps = await Mps.start();
    const routers = ["softmax", "sigmoid", "switch, capacity by position"];
    const streams = { LINA_EMULATOR_STREAMS: "asynchronous" };
    await check(2, routers, { tolerance: 2e-6, env: { ...gpuEnv, ...mps.env, ...streams } });
  },
});
