// All-to-alls on two levels against direct ones, bit for bit: over shared memory, and over NCCL on the emulator of CUDA and NCCL, with hosts
// that are only claimed. tests/gpu_ranks_test.ts is the place of runs on a real GPU.

import assert from "node:assert/strict";
import { buildEmulator } from "./emulator/build.ts";
import { buildNccl } from "./emulator/nccl.ts";
import { type RunOptions, runRanks } from "./_ranks.ts";
import type { TrainArgs, TrainResult } from "./_train_ranks.ts";

const program = new URL("./_two_level_ranks.ts", import.meta.url);
const trainings = new URL("./_schedule_ranks.ts", import.meta.url);
const emulator = await buildEmulator();
const library = emulator && await buildNccl(false);
if (library === null) {
  const message = "Cannot emulate NCCL as there must be clang on Linux";
  if (Deno.env.get("LINA_CI")) throw new Error(message);
  console.warn(`skipped: ${message}`);
}
const ignore = library === null;
const messages = ignore
  ? ""
  : await Deno.makeTempDir({ dir: "/dev/shm", prefix: "lina-two-level-test-" });
if (!ignore) addEventListener("unload", () => Deno.removeSync(messages, { recursive: true }));

const NCCL = {
  LINA_EMULATOR_NCCL_FOLDER: messages,
  LINA_TEST_BACKEND: "nccl",
  LINA_EMULATOR: "1",
  LINA_NCCL_LIB: library ?? "",
  LINA_EMULATOR_MEMORY_MIB: "256",
};

function run<T>(
  name: string,
  size: number,
  perHost: number,
  options: RunOptions & { args?: object } = {},
) {
  const args = { program: name, perHost, ...options.args };
  return runRanks<T>(program, size, { ...options, args });
}

interface Outcome {
  readonly calls: number;
  readonly direct: number;
  readonly reason: string;
}

for (const [size, perHost] of [[4, 2], [6, 2], [6, 3], [8, 2]]) {
  const hosts = size / perHost;
  Deno.test(`two levels: random counts over shm on ${hosts} hosts of ${perHost}`, async () => {
    const args = { seed: size * 10 + perHost, cases: 60 };
    for (const { result } of await run<Outcome>("random", size, perHost, { args })) {
      assert.deepEqual(result, {
        calls: 60,
        direct: 0,
        reason: `${hosts} hosts of ${perHost} ranks`,
      });
    }
  });
}

for (const [size, perHost] of [[4, 2], [6, 3]]) {
  const hosts = size / perHost;
  Deno.test({
    name: `two levels: random counts over NCCL on ${hosts} hosts of ${perHost}`,
    ignore,
    fn: async () => {
      const args = { seed: size, cases: 24 };
      for (const { result } of await run<Outcome>("random", size, perHost, { args, env: NCCL })) {
        assert.equal(result!.calls + result!.direct, 24);
        assert(result!.calls > 4 && result!.direct > 4); // tensors and arrays
      }
    },
  });
}

Deno.test("two levels: on a stream buffers live as long as they are used", async (t) => {
  await t.step("shm", async () => void await run("stream", 4, 2));
  if (!ignore) await t.step("nccl", async () => void await run("stream", 6, 2, { env: NCCL }));
});

Deno.test("two levels: halves of several exchanges may overlap", async (t) => {
  await t.step("shm", async () => void await run("ahead", 4, 2));
  if (ignore) return;
  const threads = { LINA_EMULATOR_STREAMS: "asynchronous", LINA_EMULATOR_PAUSE_US: "300" };
  await t.step("nccl", async () => void await run("ahead", 4, 2, { env: NCCL }));
  await t.step("nccl, streams as threads", async () => {
    await run("ahead", 4, 2, { env: { ...NCCL, ...threads }, args: { barrier: true } });
  });
});

Deno.test("two levels: wrong arguments throw at the call", async (t) => {
  await t.step("shm", async () => {
    for (const { result } of await run<string[]>("errors", 4, 2)) {
      assert(result!.length >= 7);
      assert.match(result![0], /^Cannot run allToAllV on rank \d of world\/two-level as /);
    }
  });
  if (!ignore) await t.step("nccl", async () => void await run("errors", 4, 2, { env: NCCL }));
});

Deno.test("two levels: labels, traffic and the choice of the way", async () => {
  for (const { result } of await run<{ spans: object[]; traffic: object }>("traced", 6, 3)) {
    const { spans, traffic } = result!;
    assert.equal(spans.length, 1);
    const { name, track, args } = spans[0] as { name: string; track: string; args: object };
    assert.equal(name, "layer 3 dispatch");
    assert.equal(track, "world/two-level");
    // To two others of the host: 8 elements for itself and 8 for its counterpart; to the other host 3 · 8.
    const bytes = { inner_bytes: 128, outer_bytes: 96 };
    const operation = "allToAllV";
    assert.deepEqual(args, { operation, bytes: 224, ...bytes, sequence: 0, layer: 3 });
    assert.deepEqual(traffic, { calls: 1, direct: 1, ...bytes });
  }
});

Deno.test("two levels: hosts are found out; where they do not suit, all-to-alls are direct", async () => {
  for (const { result } of await run("found", 3, 1)) {
    assert.deepEqual(result, {
      reasons: ["all ranks share a host", "hosts have 1 and 2 ranks"],
      direct: 1,
    });
  }
});

Deno.test("two levels: in debug mode a rank whose counts differ is named", async () => {
  const env = { LINA_DEBUG: "1" };
  for (const { result } of await run<string>("disagree", 4, 2, { env })) {
    assert.match(result!, /allToAllV 1 of .* as the counts must be that of rank 0, .* on rank 1$/);
  }
  await run("random", 4, 2, { env, args: { seed: 5, cases: 12 } });
  if (!ignore) await run("random", 4, 2, { env: { ...env, ...NCCL }, args: { seed: 6, cases: 8 } });
});

Deno.test("two levels: the watchdog names the message that never came", async () => {
  const results = await run<string>("hang", 4, 2, { env: { LINA_TIMEOUT_MS: "600" } });
  const messages = results.slice(0, 3).map(({ result }) => result!);
  for (const message of messages) {
    // One whose time is over leaves; a slower one may see that first.
    assert.match(
      message,
      /^Cannot complete allToAllV 0 of world\/two-level on rank \d: .*(within 600 ms|take part)/,
    );
  }
  assert(messages.some((message) => /(recv|send) .* within 600 ms/.test(message)));
});

Deno.test({
  name:
    "two levels: training over NCCL learns the bits of direct all-to-alls, in slices and paced by the device",
  ignore,
  fn: async () => {
    const model = { experts: 4, width: 16, headDim: 8, heads: 2, hidden: 16, layers: 1 };
    const common: TrainArgs = { steps: 2, batch: 4, sequence: 8, schedule: "lina", model };
    const args = [{}, { perHost: 2 }].map((more) => ({ ...common, chunks: 2, ...more }));
    const env = { ...NCCL, LINA_EMULATOR_STREAMS: "asynchronous" };
    const options = { args, env, timeout_ms: 120_000 };
    for (const { result } of await runRanks<TrainResult[]>(trainings, 4, options)) {
      const [direct, levels] = result!;
      assert.equal(direct.loss.length, 2);
      assert.deepEqual(levels.loss, direct.loss);
      assert.deepEqual(levels.gradNorm, direct.gradNorm);
    }
  },
});
