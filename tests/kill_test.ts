// kill -9 of a rank at random times while the training program runs and while it saves: the job ends soon, no process stays
// behind, no complete checkpoint is lost, and the run goes on from the newest one with the losses that it would have had.
// Seeds are printed with every failure; LINA_KILLS sets how many kills there are, LINA_KILL_SEED the first seed.

import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { loadCheckpoint, newestCheckpoint } from "../moe/checkpoint.ts";
import { pause, type Running, startLauncher } from "./launch_support.ts";

const KILLS = Number(Deno.env.get("LINA_KILLS") ?? 8);
const FIRST_SEED = Number(Deno.env.get("LINA_KILL_SEED") ?? Math.floor(Math.random() * 1e6));
const LONGEST_END_MS = 10_000;
const LONGEST_INTERRUPT_MS = 2_000;
const RANKS = 3, STEPS = 36, EVERY = 3;
/** In the environment of every process of a job, so that none can hide. */
const MARK = "LINA_KILL_TEST";

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
  steps: STEPS,
  warmup: 5,
  sample: 0,
  "val-every": 12,
  "val-batches": 1,
  "trace-steps": 0,
  "checkpoint-every": EVERY,
}).flatMap(([name, value]) => [`--${name}`, `${value}`]);

/** A folder with a text and the runs on it. */
class Runs implements Disposable {
  readonly folder: string = Deno.makeTempDirSync({ prefix: "lina-kill-" });

  constructor() {
    const text = Deno.readTextFileSync(TEXT).slice(10_000, 22_000);
    Deno.writeTextFileSync(join(this.folder, "text.txt"), text);
  }

  /** Starts the training program. @param run Its name, also its mark. @param more Flags of launcher and program; whether the program is not told the name. */
  start(
    run: string,
    more: { launch?: string[]; train?: string[]; unnamed?: boolean } = {},
  ): Running {
    const data = ["--data", join(this.folder, "text.txt"), "--out", this.folder];
    const name = more.unnamed ? [] : ["--run", run];
    const args = [TRAIN, ...SIZES, ...data, ...name, ...more.train ?? []];
    return startLauncher(["-n", `${RANKS}`, ...more.launch ?? [], ...args], { [MARK]: run });
  }

  /** Folder of a run's checkpoints. */
  checkpoints(run: string): string {
    return join(this.folder, run, "checkpoint");
  }

  /** The rows of metrics.jsonl without what a clock gives. */
  metrics(run: string): Record<string, number>[] {
    return textOf(join(this.folder, run, "metrics.jsonl")).split("\n").slice(0, -1).map((line) => {
      const { step, loss, val_loss, lr, grad_norm } = JSON.parse(line);
      return { step, loss, val_loss, lr, grad_norm };
    });
  }

  [Symbol.dispose](): void {
    Deno.removeSync(this.folder, { recursive: true });
  }
}

function textOf(path: string): string {
  try {
    return Deno.readTextFileSync(path);
  } catch {
    return "";
  }
}

/** The processes that a run has started and that still run, with their rank; -1 for the launcher and its guard. */
function processesOf(run: string): Map<number, number> {
  const found = new Map<number, number>();
  for (const { name } of Deno.readDirSync("/proc")) {
    if (!/^\d+$/.test(name)) continue;
    const environment = textOf(`/proc/${name}/environ`).split("\0");
    if (!environment.includes(`${MARK}=${run}`)) continue;
    const state = textOf(`/proc/${name}/stat`).replace(/^.*\) /s, "")[0];
    if (state === undefined || "ZX".includes(state)) continue;
    const rank = environment.find((line) => line.startsWith("RANK="));
    found.set(Number(name), rank === undefined ? -1 : Number(rank.slice(5)));
  }
  return found;
}

/** The process of a rank, once it runs; undefined if the run has ended. */
async function pidOf(run: string, rank: number): Promise<number | undefined> {
  for (const end = performance.now() + 5000; performance.now() < end; await pause(1)) {
    const processes = processesOf(run);
    const pid = [...processes].find(([, number]) => number === rank)?.[0];
    if (pid !== undefined || processes.size === 0) return pid;
  }
}

function kill(pid: number | undefined): void {
  try {
    if (pid !== undefined) Deno.kill(pid, "SIGKILL");
  } catch {
    // it has just ended
  }
}

async function noneLeft(run: string): Promise<void> {
  // The launcher's guard ends by itself when the launcher has.
  for (const end = performance.now() + 1000; performance.now() < end; await pause(20)) {
    if (processesOf(run).size === 0) return;
  }
  assert.deepEqual([...processesOf(run)], [], "processes are left behind");
}

/** Steps of the checkpoints that lie there under their final names, the newest first. */
function savedSteps(folder: string): number[] {
  const steps = [...list(folder)].flatMap((name) => name.match(/^step-(\d{8})/)?.slice(1) ?? []);
  return steps.map(Number).sort((a, b) => b - a);
}

function list(folder: string): string[] {
  try {
    return [...Deno.readDirSync(folder)].map((entry) => entry.name);
  } catch {
    return [];
  }
}

/** Numbers in [0, 1) from a seed (mulberry32). */
function randomOf(seed: number): () => number {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

const MOMENTS = ["at any time", "in a step", "while saving"] as const;

/** Waits for a moment to kill at. */
async function moment(
  what: typeof MOMENTS[number],
  place: { runs: Runs; run: string; random: () => number; whole_ms: number; job: Running },
): Promise<void> {
  const { runs, run, random, whole_ms } = place;
  if (what === "at any time") return await pause(random() * whole_ms);
  const after = Math.floor(random() * (STEPS - 2));
  const arrived = () =>
    textOf(join(runs.folder, run, "metrics.jsonl")).split("\n").length - 1 > after;
  const saving = () =>
    list(runs.checkpoints(run)).some((name) => name.startsWith(".checkpoint-saving"));
  for (const end = performance.now() + 20_000; performance.now() < end; await pause(0)) {
    if (arrived() && (what === "in a step" || saving())) break;
  }
  await pause(random() * (what === "while saving" ? 6 : 12));
}

/** One job with one kill, and all that must hold afterwards. */
async function killOnce(
  seed: number,
  runs: Runs,
  whole: { metrics: Record<string, number>[]; ms: number },
): Promise<string> {
  const random = randomOf(seed);
  const what = MOMENTS[seed % MOMENTS.length];
  const restarts = Math.floor(seed / MOMENTS.length) % 2 === 0;
  const victim = Math.floor(random() * RANKS);
  const run = `kill-${seed}`;
  const job = runs.start(run, { launch: restarts ? ["--max-restarts", "1"] : [] });
  await moment(what, { runs, run, random, whole_ms: whole.ms, job });
  const pid = await pidOf(run, victim);
  const before = savedSteps(runs.checkpoints(run))[0] ?? 0;
  const step = runs.metrics(run).length;
  const killed = performance.now();
  kill(pid);
  let over = false;
  void job.ended().then(() => over = true);
  while (!over && !(restarts && /^launch: restart 1 of 1$/m.test(job.stderr))) await pause(2);
  const took_ms = performance.now() - killed;
  assert.ok(took_ms < LONGEST_END_MS, `the job ended only ${took_ms} ms after the kill`);
  const { code, stdout, stderr } = await job.ended();
  assert.equal(code, restarts || stderr === "" ? 0 : 137, stderr);
  if (stderr !== "") { // else the rank had ended before it was killed
    assert.match(stderr, RegExp(`^launch: rank ${victim} of ${RANKS} was ended by SIGKILL`, "m"));
  }
  await noneLeft(run);

  const found = await newestCheckpoint(runs.checkpoints(run), {
    warn: (message) => assert.fail(message),
  });
  // A line of metrics is written once the checkpoint of an earlier step is complete.
  const saved = Math.max(before, Math.floor((step - 1) / EVERY) * EVERY);
  const from = restarts && stderr !== ""
    ? Number(stdout.match(/from step (\d+)$/m)?.[1] ?? 0)
    : found?.step ?? 0;
  assert.ok(from >= saved, `step ${saved} was saved, the run went on from step ${from}`);
  if (found) await loadCheckpoint(found, { model: [] });

  if (!restarts) {
    const train = found ? ["--resume"] : [];
    const again = await runs.start(run, { train }).ended();
    assert.equal(again.code, 0, again.stderr);
    await noneLeft(run);
  }
  assert.deepEqual(runs.metrics(run), whole.metrics);
  const how = stderr === "" ? "too late" : restarts ? "restarted" : "resumed";
  return `seed ${seed}: rank ${victim} ${what}, after step ${step}; ${how} from step ${from}; ended in ${
    took_ms.toFixed(0)
  } ms`;
}

Deno.test({
  name: `kill -9 of a rank at ${KILLS} random times loses nothing`,
  ignore: Deno.build.os !== "linux",
  fn: async () => {
    using runs = new Runs();
    const start = performance.now();
    const first = await runs.start("whole").ended();
    assert.equal(first.code, 0, first.stderr);
    const whole = { metrics: runs.metrics("whole"), ms: performance.now() - start };
    assert.equal(whole.metrics.length, STEPS);
    for (let i = 0; i < KILLS; i++) {
      const seed = FIRST_SEED + i;
      try {
        const line = await killOnce(seed, runs, whole);
        if (Deno.env.has("LINA_KILLS")) console.log(line);
      } catch (error) {
        throw new Error(`LINA_KILL_SEED=${seed} LINA_KILLS=1: ${(error as Error).message}`, {
          cause: error,
        });
      }
    }
  },
});

Deno.test({
  name: "a restarted run finds its own folder, and takes up nothing of an older run of its name",
  ignore: Deno.build.os !== "linux",
  fn: async () => {
    using runs = new Runs();
    // Without --run the folder has the time for a name.
    const unnamed = runs.start("unnamed", { launch: ["--max-restarts", "1"], unnamed: true });
    const saved = () => list(runs.folder).flatMap((run) => savedSteps(runs.checkpoints(run)));
    while (saved().length === 0) await pause(1);
    kill(await pidOf("unnamed", 1));
    const first = await unnamed.ended();
    assert.equal(first.code, 0, first.stderr);
    assert.match(first.stdout, /from step [1-9]\d*$/m);
    const folders = list(runs.folder).filter((name) => name !== "text.txt");
    assert.equal(folders.length, 1, `${folders}`);

    // The second run of the name dies before it has begun.
    const run = folders[0];
    const train = ["--lr", "0.001", "--overwrite"];
    const again = runs.start(run, { launch: ["--max-restarts", "1"], train });
    kill(await pidOf(run, 0));
    const second = await again.ended();
    assert.equal(second.code, 0, second.stderr);
    assert.match(second.stderr, /^launch: restart 1 of 1$/m);
    assert.doesNotMatch(second.stdout, /from step/);
    assert.equal(Math.max(...runs.metrics(run).map((row) => row.lr)), 0.001);
  },
});

Deno.test({
  name: "Ctrl-C in the middle of training ends all ranks soon, with exit code 130",
  ignore: Deno.build.os !== "linux",
  fn: async () => {
    using runs = new Runs();
    const job = runs.start("interrupted", { train: ["--steps", "100000"] });
    await job.says(/step +\d+\/100000/);
    await pause(300);
    assert.equal(
      [...processesOf("interrupted").values()].filter((rank) => rank >= 0).length,
      RANKS,
    );
    const start = performance.now();
    job.kill("SIGINT");
    const { code, stderr } = await job.ended();
    const took_ms = performance.now() - start;
    assert.equal(code, 130);
    assert.equal(stderr, "launch: SIGINT: ending all ranks\n");
    assert.ok(took_ms < LONGEST_INTERRUPT_MS, `${took_ms} ms`);
    await noneLeft("interrupted");
  },
});
