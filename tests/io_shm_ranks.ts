// The ranks of io_shm_test.ts: saves checkpoints, or records collectives and writes a trace.

import { newestCheckpoint, saveCheckpoint } from "../moe/checkpoint.ts";
import { recorder } from "../trace/mod.ts";
import { writeTrace } from "../trace/perfetto.ts";
import { rankMain } from "./_ranks.ts";
import { Part } from "./checkpoint_fixture.ts";

/** What a rank is told to do. */
export interface IoArgs {
  /** Which part of the test. */
  readonly task: "save" | "newest" | "trace";
  /** Where checkpoints lie, or the file of the trace. */
  readonly path: string;
  /** First step that is saved, and the one after the last. @default {[1, 2]} */
  readonly steps?: readonly [number, number];
}

await rankMain(async ({ comm, args }) => {
  const { task, path, steps = [1, 2] } = args as IoArgs;
  if (task === "save") {
    for (let step = steps[0]; step < steps[1]; step++) {
      await saveCheckpoint(path, new Part(comm.rank, comm.size, step).contents(step), { comm });
    }
  } else if (task === "newest") {
    const newest = await newestCheckpoint(path, { comm });
    return { step: newest?.step };
  } else {
    recorder.capturing = true;
    const send = new Float32Array(comm.size * 64).fill(comm.rank), recv = new Float32Array(send);
    for (let i = 0; i < 5; i++) {
      await comm.allToAll(send, recv);
      await comm.allReduce(recv);
    }
    await writeTrace(path, { ranks: comm });
  }
});
