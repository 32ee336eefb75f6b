// The NCCL transport on processes of this machine: on the emulator of CUDA and of NCCL, so that all of it but NCCL itself runs without a
// GPU. The same rank programs run on a GPU in gpu_ranks_test.ts.

import assert from "node:assert/strict";
import { buildEmulator } from "./emulator/build.ts";
import { buildNccl } from "./emulator/nccl.ts";
import type { End } from "./nccl_failure_ranks.ts";
import { Folder, launch } from "./launch_support.ts";
import { likeOneRank, type RankOutcome } from "./_moe_case.ts";
import { type RunOptions, runRanks } from "./_ranks.ts";

const program = new URL("./_collectives_ranks.ts", import.meta.url);
const failures = new URL("./nccl_failure_ranks.ts", import.meta.url);
const moeProgram = new URL("./moe_program.ts", import.meta.url);
const emulator = await buildEmulator();
const library = emulator && await buildNccl(false);
const oldLibrary = library && await buildNccl(true);
if (library === null) {
  const message = "Cannot emulate NCCL as there must be clang on Linux";
  if (Deno.env.get("LINA_CI")) throw new Error(message);
  console.warn(`skipped: ${message}`);
}
const ignore = library === null;

/** Where the emulator's messages lie: ranks that fail leave some. */
const messages = ignore
  ? ""
  : await Deno.makeTempDir({ dir: "/dev/shm", prefix: "lina-nccl-test-" });
if (!ignore) addEventListener("unload", () => Deno.removeSync(messages, { recursive: true }));

const ENV = {
  LINA_EMULATOR_NCCL_FOLDER: messages,
  LINA_TEST_BACKEND: "nccl",
  LINA_EMULATOR: "1",
  LINA_NCCL_LIB: library ?? "",
  LINA_EMULATOR_MEMORY_MIB: "256",
};

function run<T>(name: string, size: number, options: RunOptions & { args?: object } = {}) {
  const env = { ...ENV, ...options.env };
  return runRanks<T>(program, size, { ...options, env, args: { program: name, ...options.args } });
}

Deno.test({
  name: "nccl: collectives give what they must, for arrays and tensors",
  ignore,
  fn: async () => {
    for (
      const { result } of await run<number>("operations", 4, { args: { lengths: [0, 1, 63] } })
    ) {
      assert(result! > 600, `${result} cases`);
    }
    const env = { LINA_NCCL_LIB: oldLibrary! };
    await run<number>("operations", 3, { env, args: { lengths: [0, 5] } });
  },
});

Deno.test({
  name: "nccl: wrong arguments throw at the call",
  ignore,
  fn: async () => {
    for (const { result } of await run<string[]>("errors", 2)) assert(result!.length >= 22);
  },
});

Deno.test({
  name: "nccl: a rank's block of the other buffer may be source or destination",
  ignore,
  fn: async () => void await run("inPlace", 3),
});

Deno.test({
  name: "nccl: random operations on two communicators end and are right",
  ignore,
  fn: async () => void await run("random", 3, { args: { seed: 7, steps: 60 } }),
});

Deno.test({
  name: "nccl: split and dup make independent communicators",
  ignore,
  fn: async () => {
    const results = await run<{ name: string; rank: number; sum: number }>("groups", 4);
    assert.deepEqual(results.map((r) => r.result), [
      { name: "world/split1.0", rank: 1, sum: 2 },
      { name: "world/split1.1", rank: 1, sum: 4 },
      { name: "world/split1.0", rank: 0, sum: 2 },
      { name: "world/split1.1", rank: 0, sum: 4 },
    ]);
  },
});

Deno.test({
  name: "nccl: in debug mode ranks that call different operations are named",
  ignore,
  fn: async () => {
    const env = { LINA_DEBUG: "1" };
    for (const { result } of await run<{ message: string }>("order", 2, { env })) {
      assert.match(result!.message, /operation 1 of world/);
      assert.match(result!.message, /rank 1 called broadcast\(f32, 8 elements, root 0\)/);
    }
  },
});

/** A peer of a rank that has failed hears of it long before its own patience ends. */
function knows(ends: readonly End[]): void {
  assert.match(ends.at(-1)!.message, /a rank has aborted/);
  const ms = ends.reduce((sum, end) => sum + end.ms, 0);
  assert(ms < 8000, `${ms} ms`);
}

Deno.test({
  name: "nccl: a message that fails fails those of its group, for streams and host, and the peer",
  ignore,
  fn: async () => {
    const args = { program: "messages" };
    const ranks = await runRanks<End[]>(failures, 2, { args, env: ENV, check: false });
    const [failed, peer] = ranks.map(({ result, output }) => {
      assert(result, output);
      return result;
    });
    assert.equal(failed.length, 4);
    for (const { message, ms } of failed.slice(0, 3)) {
      assert.match(message, /ncclSend failed .*told to fail/);
      assert(ms < 2000, `${ms} ms`);
    }
    knows(peer);
  },
});

Deno.test({
  name: "nccl: a collective that a rank cannot enqueue ends on the others, too",
  ignore,
  fn: async () => {
    const args = { program: "collective" };
    const ranks = await runRanks<End[]>(failures, 2, { args, env: ENV, check: false });
    const [failed, peer] = ranks.map(({ result, output }) => {
      assert(result, output);
      return result;
    });
    assert.match(failed[0].message, /ncclAllReduce failed .*told to fail/);
    knows(peer);
  },
});

Deno.test({
  name: "nccl: messages of one group queue one microtask",
  ignore,
  fn: async () => {
    const args = { program: "microtasks" };
    const ranks = await runRanks<number>(failures, 2, { args, env: ENV });
    for (const { result } of ranks) assert(result! <= 2, `${result} microtasks`);
  },
});

Deno.test({
  name:
    "nccl: a MoE layer on two GPUs has the loss and the gradients of one rank, with every router",
  ignore,
  fn: async () => {
    const args = { splits: [[20, 20], [0, 40]], seed: 3 };
    const ranks = await runRanks<Record<string, RankOutcome>>(moeProgram, 2, { args, env: ENV });
    await likeOneRank(ranks.map(({ result }) => result!), args.splits, args.seed, 1e-4);
  },
});

Deno.test({
  name: "nccl: the launcher's ranks use GPUs if each gets one, or share one by wish",
  ignore,
  fn: async () => {
    using folder = new Folder();
    const script = folder.script(`await using world = await init();
      const x = Float32Array.of(world.rank);
      await world.allReduce(x);
      console.log(world.backend, world.device.kind, x[0]);`);
    const env = {
      LINA_CUDART: emulator!,
      LINA_CUDA: emulator!,
      LINA_NVRTC: emulator!,
      LINA_CUBLAS: emulator!,
      LINA_NCCL_LIB: library!,
      LINA_EMULATOR_NCCL_FOLDER: messages,
      LINA_EMULATOR_MEMORY_MIB: "256",
    };
    const shared = await launch(["-n", "2", "--device", "cuda", "--share-gpu", script], env);
    assert.equal(shared.code, 0, shared.stderr);
    assert.deepEqual(shared.stdout.trim().split("\n").sort(), [
      "[0] nccl cuda 1",
      "[1] nccl cuda 1",
    ]);
    assert.match(shared.stderr, /^\[0\] lina: ranks share a GPU, which is for testing/m);
    const refused = await launch(["-n", "2", "--device", "cuda", script], env);
    assert.match(refused.stderr, /1 GPU is not enough for 2 ranks.*--share-gpu allows it/);
    const missing = { ...env, LINA_NCCL_LIB: "/nowhere/libnccl.so.2" };
    const without = await launch(["-n", "2", "--backend", "nccl", "--share-gpu", script], missing);
    assert.match(without.stderr, /Cannot use backend nccl .*Cannot open NCCL/);
  },
});
