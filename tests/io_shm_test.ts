// Checkpoints and traces of ranks that are processes of their own, over shared memory.

import assert from "node:assert/strict";
import { newestCheckpoint } from "../moe/checkpoint.ts";
import { runRanks } from "./_ranks.ts";
import type { IoArgs } from "./io_shm_ranks.ts";

const PROGRAM = new URL("./io_shm_ranks.ts", import.meta.url);
const root = Deno.makeTempDirSync({ prefix: "lina-io-" });
Deno.test.afterAll(() => Deno.removeSync(root, { recursive: true }));

Deno.test("four processes save, two agree on the newest", async () => {
  const path = `${root}/save`;
  const save: IoArgs = { task: "save", path, steps: [3, 5] };
  await runRanks(PROGRAM, 4, { args: save });
  const found = await runRanks(PROGRAM, 2, { args: { task: "newest", path } satisfies IoArgs });
  assert.deepEqual(found.map(({ result }) => result), [{ step: 4 }, { step: 4 }]);
});

Deno.test("kill -9 of a rank while it saves loses no complete checkpoint", async () => {
  const path = `${root}/kill`;
  let last = 0;
  for (const victim of [0, 1, 0]) {
    const args: IoArgs = { task: "save", path, steps: [last + 1, 1_000_000] };
    let complete = last;
    await runRanks(PROGRAM, 2, {
      args,
      check: false,
      timeout_ms: 30_000,
      started: async (processes) => {
        // Some saves must have gone through; then one dies at some point of a later one.
        const seen = () => stepsIn(path).reduce((a, b) => Math.max(a, b), 0);
        const end = Date.now() + 20_000;
        while (seen() < last + 3 && Date.now() < end) await pause(5);
        await pause(Math.random() * 30);
        complete = seen();
        kill(processes[victim]);
        await pause(50);
        kill(processes[1 - victim]); // as a launcher ends the others
      },
    });
    const warnings: string[] = [];
    const newest = await newestCheckpoint(path, { warn: (text) => void warnings.push(text) });
    assert.deepEqual(warnings, []);
    assert.ok(complete >= last + 3, "some saves went through");
    assert.ok(newest!.step >= complete, `${newest?.step} is older than ${complete}`);
    last = newest!.step;
  }
});

function kill(process: Deno.ChildProcess): void {
  try {
    process.kill("SIGKILL");
  } catch {
    // It has ended.
  }
}

function stepsIn(path: string): number[] {
  try {
    return [...Deno.readDirSync(path)].map(({ name }) =>
      Number(/^step-(\d+)$/.exec(name)?.[1] ?? 0)
    );
  } catch {
    return [];
  }
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

Deno.test("the trace of four processes is on one clock", async () => {
  const path = `${root}/trace.json`;
  await runRanks(PROGRAM, 4, { args: { task: "trace", path } satisfies IoArgs });
  const { traceEvents, otherData } = JSON.parse(Deno.readTextFileSync(path));
  assert.equal(otherData.ranks, 4);
  const operations = new Map<number, { ts: number; dur: number }[]>();
  for (const event of traceEvents) {
    if (event.ph !== "X" || event.name !== "allToAll") continue;
    const { sequence } = event.args;
    operations.set(sequence, [...operations.get(sequence) ?? [], event]);
  }
  assert.equal(operations.size, 5);
  for (const ranks of operations.values()) {
    assert.equal(ranks.length, 4);
    // No rank has everything before the last one has begun to give: true only on one clock.
    const lastStart = Math.max(...ranks.map(({ ts }) => ts));
    const firstEnd = Math.min(...ranks.map(({ ts, dur }) => ts + dur));
    assert.ok(lastStart <= firstEnd + 5, `${lastStart} is after ${firstEnd}`);
  }
  const arrows = traceEvents.filter((event: { ph: string }) => event.ph === "s");
  assert.equal(arrows.length, 20);
});
