// The training program as a user runs it: its files, its errors, and what a crash leaves.

import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { buildEmulator } from "./emulator/build.ts";

const LAUNCH = fileURLToPath(new URL("../launch.ts", import.meta.url));
const TRAIN = fileURLToPath(new URL("../examples/train.ts", import.meta.url));
const GENERATE = fileURLToPath(new URL("../examples/generate.ts", import.meta.url));
const TEXT = fileURLToPath(new URL("../examples/data/austen.txt", import.meta.url));
const LIMIT_MS = 60_000;

const TINY = Object.entries({
  layers: 2,
  width: 32,
  heads: 2,
  experts: 4,
  hidden: 32,
  seq: 32,
  batch: 8,
  steps: 30,
  warmup: 5,
  sample: 20,
  "val-every": 10,
  "val-batches": 2,
  "trace-steps": 2,
}).flatMap(([name, value]) => [`--${name}`, `${value}`]);

function start(
  args: readonly string[],
  env: Readonly<Record<string, string>> = {},
): Deno.ChildProcess {
  return new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", ...args],
    env: { NO_COLOR: "1", ...env },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
}

async function ended(
  process: Deno.ChildProcess,
  limit_ms = LIMIT_MS,
): Promise<{ code: number; output: string }> {
  const timer = setTimeout(() => process.kill("SIGTERM"), limit_ms);
  const { code, stdout, stderr } = await process.output();
  clearTimeout(timer);
  const text = new TextDecoder();
  return { code, output: text.decode(stdout) + text.decode(stderr) };
}

async function withFolder(use: (folder: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir({ prefix: "lina-train-" });
  try {
    const text = (await Deno.readTextFile(TEXT)).slice(10_000, 40_000);
    await Deno.writeTextFile(join(folder, "text.txt"), text);
    await use(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

function flags(folder: string, run: string): string[] {
  return [...TINY, "--data", join(folder, "text.txt"), "--out", folder, "--run", run];
}

/** Metrics without what a clock gives. */
function metrics(folder: string, run: string): Record<string, number>[] {
  let text = "";
  try {
    text = Deno.readTextFileSync(join(folder, run, "metrics.jsonl"));
  } catch {
    // not yet
  }
  return text.split("\n").slice(0, -1).map((line) => {
    const { step, loss, val_loss, lr, grad_norm } = JSON.parse(line);
    return { step, loss, val_loss, lr, grad_norm };
  });
}

Deno.test("train.ts: leaves metrics, curve, trace and a checkpoint that generate.ts reads", async () => {
  await withFolder(async (folder) => {
    const routing = join(folder, "routing.bin");
    const args = [...flags(folder, "a"), "--record-routing", routing];
    const { code, output } = await ended(start([LAUNCH, "-n", "2", TRAIN, ...args]));
    assert.equal(code, 0, output);
    for (const word of ["validation loss", "bigram baseline", "all-to-all share", "A sample:"]) {
      assert.ok(output.includes(word), output);
    }
    const rows = metrics(folder, "a");
    assert.equal(rows.length, 30);
    assert.ok(rows[29].loss < rows[0].loss);
    assert.deepEqual(
      rows.filter((row) => row.val_loss !== undefined).map((row) => row.step),
      [10, 20, 30],
    );
    assert.match(Deno.readTextFileSync(join(folder, "a", "loss.svg")), /^<svg /);
    const trace = JSON.parse(Deno.readTextFileSync(join(folder, "a", "trace.json")));
    assert.ok(JSON.stringify(trace).includes("allToAllV"));
    assert.ok(Deno.statSync(routing).size > 32);
    // A replay of a model's own choices gives its own loss, on another number of ranks too.
    const replayed = await ended(
      start([
        LAUNCH,
        "-n",
        "1",
        TRAIN,
        ...flags(folder, "a"),
        "--resume",
        "--replay-routing",
        routing,
      ]),
    );
    const [, given, own] = /replayed routing: loss ([\d.]+), of its own ([\d.]+)/
      .exec(replayed.output) ?? assert.fail(replayed.output);
    assert.ok(Math.abs(Number(given) - Number(own)) < 1e-5, replayed.output);

    const say = async (ranks: number) => {
      const run = [GENERATE, join(folder, "a"), "--tokens", "12", "--temperature", "0"];
      return await ended(start([LAUNCH, "-n", `${ranks}`, ...run]));
    };
    const one = await say(1), two = await say(2);
    assert.equal(one.code, 0, one.output);
    assert.ok(one.output.includes("It was "), one.output);
    assert.equal(one.output, two.output);
  });
});

const emulator = await buildEmulator();
if (emulator === null) {
  const message = "Cannot emulate CUDA as there must be clang on Linux";
  if (Deno.env.get("LINA_CI")) throw new Error(message);
  console.warn(`skipped: ${message}`);
}

Deno.test({
  name: "train.ts: on a GPU the trace has its own times of every kernel of the steps recorded",
  ignore: emulator === null,
  fn: () =>
    withFolder(async (folder) => {
      const libraries = ["LINA_CUDART", "LINA_CUDA", "LINA_NVRTC", "LINA_CUBLAS"];
      const env = Object.fromEntries(libraries.map((name) => [name, emulator!]));
      const args = [...flags(folder, "c"), "--device", "cuda", "--layers", "1", "--steps", "4"];
      const began = performance.now();
      const { code, output } = await ended(
        start([TRAIN, ...args, "--sample", "0", "--val-every", "0", "--keep", "0"], env),
        2 * LIMIT_MS, // it may have to compile all kernels
      );
      const elapsed = (performance.now() - began) * 1000;
      assert.equal(code, 0, output);
      interface Event {
        ph: string;
        tid: number;
        name: string;
        ts: number;
        dur: number;
        args: { name: string };
      }
      const { traceEvents, otherData } = JSON.parse(
        Deno.readTextFileSync(join(folder, "c", "trace.json")),
      ) as { traceEvents: Event[]; otherData: { dropped_spans: number } };
      assert.equal(otherData.dropped_spans, 0);
      const row = (wanted: string) => {
        const titles = traceEvents.filter(({ name }) => name === "thread_name");
        const { tid } = titles.find(({ args }) => args.name === wanted) ?? assert.fail(wanted);
        return traceEvents.filter((event) => event.ph === "X" && event.tid === tid);
      };
      const host = row("compute"), device = row("gpu");
      let last = host[0].ts; // no kernel begins before the host has begun to launch the first
      for (const { name, ts, dur } of device) {
        assert.match(name, /^[a-z]\w+$/i);
        assert.ok(
          dur >= 0 && ts >= last - 0.001,
          `${name} at ${ts} µs for ${dur}, not before ${last}`,
        );
        last = ts + dur; // they run one after another
      }
      assert.ok(last <= host[0].ts + elapsed, `the last ends after ${last} µs of ${elapsed}`);
      // Both steps that are recorded have the same kernels, and all that the host names.
      const names = device.map(({ name }) => name), half = names.length / 2;
      assert.deepEqual(names.slice(half), names.slice(0, half));
      for (const { name } of host) assert.ok(names.includes(name), name);
    }),
});

Deno.test("train.ts: a routing record that cannot be written or read is found before training", async () => {
  await withFolder(async (folder) => {
    const absent = join(folder, "absent", "routing.bin");
    for (const flag of ["record", "replay"]) {
      const args = [TRAIN, ...flags(folder, flag), `--${flag}-routing`, absent];
      const { code, output } = await ended(start([LAUNCH, "-n", "2", ...args]));
      assert.notEqual(code, 0);
      assert.match(output, /^.*Cannot .*absent\/routing\.bin/m);
      assert.deepEqual(metrics(folder, flag), []);
    }
  });
});

Deno.test("train.ts: a killed rank is restarted from its checkpoint and gives the same losses", async () => {
  if (Deno.build.os !== "linux") return;
  await withFolder(async (folder) => {
    const common = ["--steps", "150", "--checkpoint-every", "20", "--sample", "0"];
    const args = (run: string) => [TRAIN, ...flags(folder, run), ...common];
    const whole = await ended(start([LAUNCH, "-n", "2", ...args("whole")]));
    assert.equal(whole.code, 0, whole.output);

    const launcher = start([LAUNCH, "-n", "2", "--max-restarts", "1", ...args("killed")]);
    const result = ended(launcher);
    const deadline = Date.now() + LIMIT_MS;
    while (metrics(folder, "killed").length < 50) {
      if (Date.now() > deadline) throw new Error("no progress");
      await new Promise((done) => setTimeout(done, 2));
    }
    const children = Deno.readTextFileSync(
      `/proc/${launcher.pid}/task/${launcher.pid}/children`,
    ).trim().split(" ");
    Deno.kill(Number(children[1]), "SIGKILL");
    const { code, output } = await result;
    assert.equal(code, 0, output);
    assert.match(output, /from step \d+/);
    assert.deepEqual(metrics(folder, "killed"), metrics(folder, "whole"));
  });
});

Deno.test("train.ts: a tokenizer of its own, a sharded optimizer, blocks computed again, no checkpoint", async () => {
  await withFolder(async (folder) => {
    const learn = fileURLToPath(new URL("../examples/data/tokenizer.ts", import.meta.url));
    const learned = await ended(start([learn, join(folder, "text.txt"), "--vocab", "400"]));
    assert.equal(learned.code, 0, learned.output);
    assert.match(learned.output, /400 ids, \d\.\d\d bytes per token/);
    const more = [
      "--tokenizer",
      folder,
      "--shard-optimizer",
      "--schedule",
      "lina",
      "--micro-op-mb",
      "0.01",
      "--recompute",
      "block",
      "--keep",
      "0",
    ];
    const args = [...flags(folder, "b"), ...more, "--vocab", "512", "--steps", "12"];
    const { code, output } = await ended(start([LAUNCH, "-n", "2", TRAIN, ...args]));
    assert.equal(code, 0, output);
    const rows = metrics(folder, "b");
    assert.ok(Math.abs(rows[0].loss - Math.log(512)) < 0.5 && rows[11].loss < rows[0].loss);
    assert.throws(() => Deno.statSync(join(folder, "b", "checkpoint")), Deno.errors.NotFound);
    const trace = Deno.readTextFileSync(join(folder, "b", "trace.json"));
    assert(trace.includes("reduceScatter"), "a run of few steps has a trace, too");
  });
});

Deno.test("train.ts: bad input ends with an error that names it", async () => {
  await withFolder(async (folder) => {
    await Deno.writeTextFile(join(folder, "empty.txt"), "");
    await Deno.writeTextFile(join(folder, "short.txt"), "too short");
    await Deno.writeTextFile(join(folder, "tokenizer.json"), "{");
    const file = (name: string) => ["--data", join(folder, name)];
    const cases: [string[], RegExp, number?][] = [
      [["--bogus"], /Unknown option '--bogus'/],
      [["--steps", "-5"], /--steps/],
      [["--steps", "0"], /--steps must be at least 1/],
      [["--lr", "fast"], /--lr must be a number >= 0: current value is fast/],
      [
        ["--router", "best"],
        /^error: .*--router must be softmax, .*: current value is best\nSee --help/m,
      ],
      [
        ["--drop", "best"],
        /^error: .*--drop must be position or probability: current value is best$/m,
      ],
      [["--device", "tpu"], /--device must be auto, cpu or cuda: current value is tpu/],
      [["--dtype", "f8"], /--dtype must be f32 or bf16: current value is f8/],
      [["--gradient-dtype", "f64"], /--gradient-dtype must be f32 or bf16: current value is f64/],
      [
        ["--gradient-dtype", "bf16", "--device", "cpu"],
        /^error: .*--gradient-dtype must be f32 for weights in f32 .*: current value is bf16$/m,
      ],
      [
        ["--recompute", "all"],
        /--recompute must be none, activation or block: current value is all/,
      ],
      [
        ["--device", "cpu", "--dtype", "bf16"],
        /dtype must be f32 or f64 on .*current value is bf16/,
      ],
      [["--all-to-all", "best"], /--all-to-all must be direct, two-level or auto: .* best/],
      [["--pack", "0"], /--pack must be auto or a whole number >= 1: current value is 0/],
      [["--pack", "2", "--replicas", "2"], /--replicas must be left out where --pack is given/],
      [["--offload-experts", "auto"], /must be a whole number >= 0, or auto beside --pack auto/],
      [["--pack", "3"], /--pack must divide the number of ranks, which is 4: .* is 3/, 4],
      [["--schedule", "lina+pipeline", "--chunks", "0"], /--chunks must be at least 1: .* is 0/],
      [["--link-mbit", "100"], /--link-mbit must go with --schedule lina: .* is fifo/],
      [
        ["--schedule", "lina", "--link-mbit", "100", "--micro-op-mb", "1"],
        /^error: .*--link-mbit must be left out where --micro-op-mb is given: .* is 100$/m,
      ],
      [["--chunks", "2"], /--chunks must go with --schedule lina\+pipeline or planned/],
      [["--schedule", "best"], /--schedule must be fifo, .* or [a-z+]+: current value is best/],
      [["--micro-op-mb", "3"], /--micro-op-mb must go with --schedule lina: .* is fifo/],
      [
        ["--schedule", "lina", "--micro-op-mb", "0"],
        /micro-op must have at least 16 bytes: current value is 0/,
      ],
      [["--shard-optimizer"], /--shard-optimizer must have several ranks .*current value is 1/],
      [
        ["--device", "cpu", "--vocab", "40000000"],
        /^error: Cannot allocate 5\d* bytes on the CPU .*\nLess memory: .*--accumulate.*--recompute block/m,
      ],
      [["--preset", "huge"], /--preset must be large: current value is huge/],
      [["--heads", "5"], /"heads" must be a divisor of the width 32: current value is 5/],
      [["--top-k", "5"], /experts per token must be .*current value is 5/],
      [file("none.txt"), /the file must exist/],
      [file("empty.txt"), /must hold text/],
      [file("short.txt"), /must have at least 33 tokens/],
      [["--tokenizer", join(folder, "tokenizer.json")], /tokenizer\.json/],
      [["--resume", "--run", "never"], /must have a checkpoint/],
      [["--experts", "2"], /ranks need at least 4 experts: current value is 2/, 4],
      [["--batch", "1"], /a sequence for each of 2 ranks/, 2],
    ];
    for (const [change, message, ranks = 1] of cases) {
      const args = [TRAIN, ...flags(folder, "bad"), ...change];
      const command = ranks > 1 ? [LAUNCH, "-n", `${ranks}`, ...args] : args;
      const { code, output } = await ended(start(command));
      assert.notEqual(code, 0, `${change} was accepted`);
      assert.match(output, message);
    }
  });
});
