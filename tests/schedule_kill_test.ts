// A rank that is killed under a schedule paced by the device: the job ends soon with an error that names the rank, nothing hangs on a
// micro-op or an all-to-all that will never be complete, and the run goes on from its checkpoint under another schedule.

import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { buildEmulator } from "./emulator/build.ts";
import { buildNccl } from "./emulator/nccl.ts";
import { allEnd, Folder, pause, startLauncher } from "./launch_support.ts";

const LONGEST_END_MS = 10_000;
const TRAIN = fileURLToPath(new URL("../examples/train.ts", import.meta.url));
const TEXT = fileURLToPath(new URL("../examples/data/austen.txt", import.meta.url));
const SIZES = Object.entries({
  layers: 2,
  width: 16,
  heads: 2,
  experts: 4,
  hidden: 16,
  seq: 16,
  batch: 6,
  steps: 400,
  warmup: 5,
  sample: 0,
  "val-every": 0,
  "trace-steps": 0,
  "checkpoint-every": 5,
}).flatMap(([name, value]) => [`--${name}`, `${value}`]);

/** Processes that a launcher has started. */
function childrenOf(pid: number): number[] {
  return Deno.readTextFileSync(`/proc/${pid}/task/${pid}/children`).trim().split(" ").map(Number);
}

/** Lines of a run's metrics so far. */
function stepsOf(path: string): number {
  try {
    return Deno.readTextFileSync(path).split("\n").length - 1;
  } catch {
    return 0; // not yet
  }
}

/** What it takes for the launcher's ranks to share an emulated GPU; null without a compiler. */
async function emulatedGpu(folder: string): Promise<Record<string, string> | null> {
  const emulator = await buildEmulator(), nccl = emulator && await buildNccl(false);
  if (!emulator || !nccl) {
    const message = "Cannot emulate CUDA and NCCL as there must be clang on Linux";
    if (Deno.env.get("LINA_CI")) throw new Error(message);
    console.warn(`skipped: ${message}`);
    return null;
  }
  const libraries = ["LINA_CUDART", "LINA_CUDA", "LINA_NVRTC", "LINA_CUBLAS"];
  return {
    ...Object.fromEntries(libraries.map((name) => [name, emulator])),
    LINA_NCCL_LIB: nccl,
    LINA_EMULATOR_NCCL_FOLDER: folder,
    LINA_EMULATOR_MEMORY_MIB: "256",
    LINA_EMULATOR_STREAMS: "asynchronous",
  };
}

const CASES = [["lina", "cpu"], ["planned+pipeline", "cpu"], ["lina+pipeline", "cuda"]] as const;
for (const [schedule, device] of CASES) {
  Deno.test({
    name: `schedules: a rank killed under ${schedule} (${device}) ends the job, which goes on`,
    ignore: Deno.build.os !== "linux",
    async fn() {
      using folder = new Folder();
      const gpu = device === "cuda";
      const env = gpu ? await emulatedGpu(folder.path) : {};
      if (!env) return;
      Deno.writeTextFileSync(
        join(folder.path, "text.txt"),
        Deno.readTextFileSync(TEXT).slice(10_000, 22_000),
      );
      const metrics = join(folder.path, "run", "metrics.jsonl");
      const start = (more: string[]) => {
        const files = ["--data", join(folder.path, "text.txt"), "--out", folder.path];
        const launch = gpu ? ["-n", "2", "--device", "cuda", "--share-gpu"] : ["-n", "2"];
        return startLauncher([...launch, TRAIN, ...SIZES, ...files, "--run", "run", ...more], env);
      };
      const job = start(["--schedule", schedule]);
      const before = gpu ? 6 : 15;
      for (const end = performance.now() + 30_000; stepsOf(metrics) < before; await pause(2)) {
        assert.ok(performance.now() < end, job.stderr);
      }
      const processes = childrenOf(job.child.pid);
      const killed = performance.now();
      const victims = processes.filter((pid) => {
        return Deno.readTextFileSync(`/proc/${pid}/environ`).split("\0").includes("RANK=1");
      });
      assert.equal(victims.length, 1);
      Deno.kill(victims[0], "SIGKILL");
      const { code, stderr } = await job.ended();
      const took_ms = performance.now() - killed;
      assert.ok(took_ms < LONGEST_END_MS, `the job ended only ${took_ms} ms after the kill`);
      assert.equal(code, 137, stderr);
      assert.match(stderr, /^launch: rank 1 of 2 was ended by SIGKILL/m);
      await allEnd(processes);
      const steps = stepsOf(metrics);
      const again = start(["--schedule", "outside", "--resume", "--steps", `${steps + 2}`]);
      const resumed = await again.ended();
      assert.equal(resumed.code, 0, resumed.stderr);
      assert.match(resumed.stdout, /from step [1-9]\d*$/m);
      assert.equal(stepsOf(metrics), steps + 2);
    },
  });
}
