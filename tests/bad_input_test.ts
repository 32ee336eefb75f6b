// Bad input as a user gives it, through the launcher and the programs: ranks that disagree or hang, files that are not there or not
// what they must be, sizes that do not fit, a full disk. What is looked at is what the user sees (who, what, what to do; one
// line without a stack), the exit code, and that nothing is lost. The parts behind it have tests of their own.

import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { formatManifest, readManifest } from "../moe/manifest.ts";
import { Folder, launch, type Result } from "./launch_support.ts";

const PROGRAM = (name: string) => fileURLToPath(new URL(`../examples/${name}.ts`, import.meta.url));
const TEXT = PROGRAM("train").replace(/train\.ts$/, "data/austen.txt");
const SIZES = Object.entries({
  layers: 1,
  width: 16,
  heads: 2,
  experts: 4,
  hidden: 16,
  seq: 16,
  batch: 6,
  steps: 4,
  sample: 0,
  "val-every": 0,
  "trace-steps": 0,
  "checkpoint-every": 2,
}).flatMap(([name, value]) => [`--${name}`, `${value}`]);

/** Runs jobs, two at a time, and gives their results in order. */
async function inPairs<T>(jobs: readonly (() => Promise<T>)[]): Promise<T[]> {
  const results: T[] = [];
  let next = 0;
  const worker = async () => {
    for (let i = next++; i < jobs.length; i = next++) results[i] = await jobs[i]();
  };
  await Promise.all([worker(), worker()]);
  return results;
}

const WATCHED = { LINA_TIMEOUT_MS: "1000" };

Deno.test("ranks that disagree are told so, never left hanging", async () => {
  using folder = new Folder();
  const script = folder.script(`
    await using world = await init();
    const odd = world.rank === 1;
    const x = new Float32Array(64);
    const disagree = {
      count: () => world.allReduce(x.subarray(odd ? 1 : 0)),
      dtype: () => world.allReduce(odd ? new Int32Array(64) : x),
      op: () => world.allReduce(x, { op: odd ? "max" : "sum" }),
      order: async () => {
        if (odd) await world.broadcast(x);
        await world.allReduce(x);
        if (!odd) await world.broadcast(x);
      },
      skip: async () => {
        if (!odd) await world.allReduce(x);
        await world.barrier();
      },
      gathered: () => {
        const counts = [odd ? 3 : 2, 2, 2];
        return world.allGatherV(x.subarray(8, 10), x.subarray(0, odd ? 7 : 6), counts);
      },
      communicators: async () => {
        const other = await world.dup();
        await (odd ? other : world).barrier();
        await (odd ? world : other).barrier();
      },
      dup: () => odd ? new Promise((resolve) => setTimeout(resolve, 60_000)) : world.dup(),
      message: async () => {
        if (world.rank === 0) await world.send(x, 1);
        if (odd) await world.recv(x.subarray(1), 0);
      },
      counts: () => {
        const sent = [2, world.rank === 0 ? 3 : 2, 2];
        return world.allToAllV(x, sent, new Float32Array(64), [2, 2, 2]);
      },
      root: () => world.broadcast(x, odd ? 1 : 0),
    };
    await world.barrier();
    await disagree[Deno.args[0]]();
  `);
  const another = /all ranks must call the same operation .* on rank [01]; LINA_DEBUG=1 tells/;
  // What the order check says: `of`, and then both calls.
  const both = (first: string, second: string) =>
    RegExp(`rank 0 called ${first}.*: current value is rank 1 called ${second}`);
  const late = /barrier \d of world.* within 1000 ms.*not arrived: rank/;
  const size = /message of rank 0 with tag 0 must have 63 elements of f32: current value is 64/;
  const cases: [string, RegExp, RegExp][] = [
    ["count", another, both("allReduce.f32, 64 el", "allReduce.f32, 63 el")],
    ["dtype", another, both("allReduce.f32", "allReduce.i32")],
    ["op", another, both("allReduce.*sum", "allReduce.*max")],
    ["order", another, both("allReduce", "broadcast")],
    ["skip", another, both("allReduce", "barrier")],
    ["gathered", another, both("allGatherV.f32, counts 2 2 2", "allGatherV.f32, counts 3 2 2")],
    ["communicators", late, late],
    ["dup", /world\/dup1 within 1000 ms.*not arrived: rank 1$/, /world\/dup1 within 1000 ms/],
    ["message", size, size],
    // Without the check these exchange what the sender, or each root, has sent.
    ["counts", /^$/, /sendCounts\[1\] of rank 0 must be recvCounts\[0\] of rank 1, 2: .* 3$/],
    ["root", /^$/, both("broadcast.*root 0", "broadcast.*root 1")],
  ];
  const jobs = cases.flatMap(([name, plain, checked]) =>
    [[plain, "0"] as const, [checked, "1"] as const]
      .filter(([message]) => message.source !== "^$")
      .map(([message, debug]) => async () => {
        const env = { ...WATCHED, LINA_DEBUG: debug };
        const { code, stderr } = await launch(["-n", "3", script, name], env);
        assert.equal(code, 1, `${name}, LINA_DEBUG=${debug}`);
        const summary = stderr.trimEnd().split("\n").at(-1)!;
        assert.match(summary, /^launch: rank \d of 3 failed with exit code 1: /);
        assert.match(summary, message);
      })
  );
  await inPairs(jobs);
});

Deno.test("a rank that is lost in a loop, or asleep, is named by the watchdog", async () => {
  using folder = new Folder();
  const script = folder.script(`
    await using world = await init();
    const x = new Float32Array(100);
    for (let i = 0; i < 50; i++) await world.allReduce(x);
    if (world.rank === 1 && Deno.args[0] === "busy") for (;;);
    if (world.rank === 1) await new Promise((resolve) => setTimeout(resolve, 60_000));
    await world.allReduce(x);
  `);
  await inPairs(["busy", "asleep"].map((how) => async () => {
    const start = performance.now();
    const { code, stderr } = await launch(["-n", "3", script, how], WATCHED);
    assert.equal(code, 1);
    assert.match(
      stderr,
      /^launch: rank [02] of 3 failed .*allReduce 50 of world.*within 1000 ms.*not arrived: rank 1$/m,
    );
    assert.ok(performance.now() - start < 9000);
  }));
});

/** A run of the training program, and its folder. */
class Trained implements Disposable {
  readonly folder: Folder = new Folder();
  readonly #data: string;

  constructor() {
    this.#data = this.write("text.txt", Deno.readTextFileSync(TEXT).slice(10_000, 14_000));
  }

  /** Writes a file. @returns Its path. */
  write(name: string, contents: string): string {
    const path = join(this.folder.path, name);
    Deno.writeTextFileSync(path, contents);
    return path;
  }

  /** Runs the training program; later flags win. */
  train(ranks: number, ...flags: string[]): Promise<Result> {
    const own = ["--data", this.#data, "--out", this.folder.path, "--run", "run"];
    return launch(["-n", `${ranks}`, PROGRAM("train"), ...SIZES, ...own, ...flags]);
  }

  /** Lets the model speak. */
  generate(path: string, ...flags: string[]): Promise<Result> {
    return launch(["-n", "2", PROGRAM("generate"), path, "--tokens", "3", ...flags]);
  }

  /** The run, or a file of its checkpoint of a step. */
  path(step?: number, file = ""): string {
    const run = join(this.folder.path, "run");
    return step === undefined ? run : join(run, "checkpoint", `step-0000000${step}`, file);
  }

  /** Every file of the run with its contents. */
  files(): Record<string, string> {
    const found: Record<string, string> = {};
    const visit = (folder: string) => {
      for (const { name, isDirectory } of Deno.readDirSync(folder)) {
        const path = join(folder, name);
        if (isDirectory) visit(path);
        else found[path] = Deno.readFileSync(path).toBase64();
      }
    };
    visit(this.path());
    return found;
  }

  [Symbol.dispose](): void {
    this.folder[Symbol.dispose]();
  }
}

/** An error as a user wants it: each rank and the launcher say it in one line, without a stack. */
function assertToldOnce({ code, stderr }: Result, message: RegExp, expected = 1): void {
  const lines = stderr.trimEnd().split("\n");
  const summary = lines.pop()!;
  assert.equal(code, expected, stderr);
  assert.match(summary, RegExp(`^launch: rank \\d of \\d failed with exit code ${expected}: `));
  assert.match(summary, message);
  for (const line of lines) assert.match(line, /^\[\d\] (error: |Passed over: |See --help\.$)/);
}

Deno.test("files and sizes that do not fit are one line of error, and the older run stays", async () => {
  using trained = new Trained();
  const first = await trained.train(2);
  assert.equal(first.code, 0, first.stderr);
  const before = trained.files();
  assert.ok(Object.keys(before).length > 10);
  const file = (name: string, contents: string) => trained.write(name, contents);
  const cases: [string[], RegExp, number?, number?][] = [
    [["--bogus"], /Unknown option '--bogus'/, 2, 2],
    [["--resume", "--run"], /--run/, 2, 2],
    [["--data", join(trained.path(), "none")], /none: the file must exist$/],
    [["--data", trained.path()], /Cannot read the text .*: it must be a file, and it is a folder$/],
    [["--data", file("empty", "")], /empty as it must hold text: current value is 0 bytes$/],
    [["--data", file("short", "a".repeat(17))], /must have at least 17 tokens .* value is 16$/],
    [["--tokenizer", file("t.json", '{"model":{"ty')], /t\.json as it must be JSON/],
    [["--tokenizer", file("u.json", '{"model":{}}')], /u\.json as it must describe a model/],
    [["--heads", "3"], /"heads" must be a divisor of the width 16: current value is 3$/],
    [["--top-k", "5"], /experts per token must be .* in 1\.\.4, .*: current value is 5$/],
    [["--experts", "2"], /3 ranks need at least 3 experts: current value is 2; use fewer/, 1, 3],
    [["--batch", "1"], /a sequence for each of 2 ranks .*: current value is 1$/],
    [["--prompt", "", "--sample", "3"], /--prompt must hold a token/],
    [["--out", file("file", "")], /Cannot write the run to .*file.run: /],
    [
      [],
      /name must be new: .* earlier run with checkpoints; give another --run, --resume .*--overwrite$/,
    ],
    [["--run", "never", "--resume"], /never must have a checkpoint: current value has none$/],
  ];
  await inPairs(cases.map(([flags, message, code, ranks]) => async () => {
    assertToldOnce(await trained.train(ranks ?? 2, ...flags), message, code);
  }));
  assert.deepEqual(trained.files(), before);
});

Deno.test("a damaged checkpoint is passed over aloud, one of another model or of the future refused", async () => {
  using trained = new Trained();
  assert.equal((await trained.train(2)).code, 0);
  const good = trained.files();
  const restore = () => {
    for (const [path, contents] of Object.entries(good)) {
      Deno.writeFileSync(path, Uint8Array.fromBase64(contents));
    }
  };
  const weights = trained.path(4, "model-00001-of-00002.safetensors");
  const resume = (...flags: string[]) => trained.train(2, "--resume", "--steps", "3", ...flags);

  Deno.truncateSync(weights, 1000);
  const truncated = await trained.generate(trained.path());
  assert.equal(truncated.code, 0, truncated.stderr);
  assert.match(truncated.stderr, /^\[0\] Passed over: .*step-00000004.* bytes: .* 1000\n$/);
  assert.match(truncated.stdout, /It was /);
  assertToldOnce(await trained.generate(trained.path(4)), /Cannot use .* bytes: .* 1000$/);

  restore();
  const flipped = Deno.readFileSync(weights);
  flipped[flipped.length - 9] ^= 16;
  Deno.writeFileSync(weights, flipped);
  const resumed = await resume();
  assert.equal(resumed.code, 0, resumed.stderr);
  assert.match(resumed.stderr, /^\[0\] Passed over: .*step-00000004.*SHA-256 must be .*\n$/);
  assert.match(resumed.stdout, /from step 2$/m);

  // The damaged one does not take the place of a good one.
  const left = [...Deno.readDirSync(join(trained.path(), "checkpoint"))].map(({ name }) => name);
  assert.deepEqual(left.sort(), ["step-00000002", "step-00000003", "step-00000004"]);

  restore();
  const { path } = trained.folder;
  const another = /step-00000004 into this model as config.hidden must be 32: current value is 16$/;
  assertToldOnce(await resume("--hidden", "32"), another);
  const manifest = { ...readManifest(trained.path(4)), format: 2 as 1 };
  Deno.writeTextFileSync(trained.path(4, "manifest.json"), formatManifest(manifest));
  const future = /format must be at most 1, the newest this version knows: current value is 2$/;
  assertToldOnce(await resume(), future);
  assertToldOnce(await trained.generate(trained.path()), future);
  assertToldOnce(await trained.generate(path), /must hold a checkpoint: current value has none$/);
});

Deno.test({
  name: "a disk that is full ends the run with one line, and the older checkpoint is gone on from",
  ignore: Deno.build.os === "windows",
  fn: async () => {
    using trained = new Trained();
    assert.equal((await trained.train(1)).code, 0);
    const older = Deno.readTextFileSync(trained.path(4, "manifest.json"));
    const limited = trained.write(
      "limited.sh",
      "trap '' XFSZ; ulimit -f 24; exec \"$@\"", // files of at most 12 KiB, as an error and not as a signal
    );
    const flags = ["--data", join(trained.folder.path, "text.txt"), "--out", trained.folder.path];
    const script = [PROGRAM("train"), ...SIZES, ...flags, "--run", "run", "--resume"];
    const { code, stderr } = await new Deno.Command("sh", {
      args: [limited, Deno.execPath(), "run", "-A", ...script, "--steps", "6"],
      env: { NO_COLOR: "1" },
      stdout: "null",
      stderr: "piped",
    }).output();
    const text = new TextDecoder().decode(stderr);
    assert.equal(code, 1, text);
    assert.match(text, /^error: Cannot save the checkpoint .*step-00000006: File too large .*\n$/);
    const left = [...Deno.readDirSync(join(trained.path(), "checkpoint"))].map(({ name }) => name);
    assert.deepEqual(left.sort(), ["step-00000002", "step-00000004"]);
    assert.equal(Deno.readTextFileSync(trained.path(4, "manifest.json")), older);
    const again = await trained.train(1, "--resume", "--steps", "6");
    assert.equal(again.code, 0, again.stderr);
    assert.match(again.stdout, /from step 4$/m);
  },
});
