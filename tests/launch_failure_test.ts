// The launcher on scripts that fail: who is named, with what error and exit code, and that nothing hangs or stays behind.

import assert from "node:assert/strict";
import { allEnd, Folder, launch, pidsOf, startLauncher } from "./launch_support.ts";

Deno.test("output is prefixed, the exit code is 0 when all ranks succeed", async () => {
  using folder = new Folder();
  const script = folder.script(`
    await using world = await init();
    const x = Float32Array.of(world.rank + 1);
    await world.allReduce(x);
    console.log(\`rank \${world.rank} of \${world.size} by \${world.backend}: \${x[0]}, \${Deno.args}\`);
  `);
  const { code, stdout, stderr } = await launch(["-n", "3", script, "--flag", "x"]);
  assert.equal(stderr, "");
  assert.deepEqual(
    stdout.trimEnd().split("\n").sort(),
    [0, 1, 2].map((r) => `[${r}] rank ${r} of 3 by shm: 6, --flag,x`),
  );
  assert.equal(code, 0);
});

Deno.test.each([
  ["--nonsense", /flags must be known: current value is --nonsense/],
  ["-n 0 SCRIPT", /-n must be a whole number in 1\.\.1024: current value is 0/],
  ["-n 2 SCRIPT.missing", /must be a file: current value is missing/],
  ["-n 2", /a script must be named/],
])("a wrong command line starts nothing: %s", async (line, message) => {
  using folder = new Folder();
  const script = folder.script("console.log('started');");
  const { code, stdout, stderr } = await launch(line.replace("SCRIPT", script).split(" "));
  assert.equal(code, 2);
  assert.equal(stdout, "");
  assert.match(stderr, message);
  assert.match(stderr, /^Usage: deno run -A launch.ts -n N/m);
});

Deno.test("a rank that throws is named with its error, shown once; the others are ended", async () => {
  using folder = new Folder();
  const script = folder.script(`
    await using world = await init();
    console.log(\`pid \${Deno.pid}\`);
    await world.barrier();
    if (world.rank === 2) throw new RangeError("the cause");
    await world.barrier();
  `);
  const { code, stdout, stderr } = await launch(["-n", "4", script]);
  assert.equal(code, 1);
  assert.match(stderr, /^launch: rank 2 of 4 failed with exit code 1: RangeError: the cause$/m);
  assert.equal(stderr.match(/^\[2\] error: Uncaught.*RangeError: the cause$/gm)?.length, 1);
  assert.equal(pidsOf(stdout).length, 4);
  await allEnd(pidsOf(stdout), 0);
});

Deno.test("an unhandled rejection, and an exit code of its own, count as failures", async () => {
  using folder = new Folder();
  const rejection = folder.script(`
    const world = await init();
    if (world.rank === 1) setTimeout(() => void Promise.reject(new Error("nobody listens")), 10);
    else await world.barrier();
    await new Promise((resolve) => setTimeout(resolve, 30_000));
  `);
  const first = await launch(["-n", "2", rejection]);
  assert.equal(first.code, 1);
  assert.match(
    first.stderr,
    /^launch: rank 1 of 2 failed with exit code 1: Error: nobody listens$/m,
  );
  const exits = folder.script(
    "if (Deno.env.get('RANK') === '0') Deno.exit(7); setTimeout(() => {}, 1e5);",
  );
  const second = await launch(["-n", "2", exits]);
  assert.equal(second.code, 7);
  assert.match(second.stderr, /^launch: rank 0 of 2 failed with exit code 7$/m);
});

Deno.test("a rank that exits 0 early is named by those that wait for it", async () => {
  using folder = new Folder();
  for (const leave of ["Deno.exit(0)", "await world[Symbol.asyncDispose]()"]) {
    const script = folder.script(`
      const world = await init();
      await world.barrier();
      if (world.rank === 1) ${leave};
      else await world.allReduce(new Float32Array(4));
    `);
    const { code, stderr } = await launch(["-n", "3", script]);
    assert.equal(code, 1);
    assert.match(
      stderr,
      /^launch: rank [02] of 3 failed .*Cannot complete allReduce.*rank 1 must take part/m,
    );
  }
});

Deno.test("a rank that hangs is named by the watchdog", async () => {
  using folder = new Folder();
  const script = folder.script(`
    await using world = await init();
    await world.barrier();
    if (world.rank === 1) await new Promise((resolve) => setTimeout(resolve, 60_000));
    await world.barrier();
  `);
  const { code, stderr } = await launch(["-n", "2", script], { LINA_TIMEOUT_MS: "700" });
  assert.equal(code, 1);
  assert.match(
    stderr,
    /^launch: rank 0 of 2 failed .*barrier 1 of world.*within 700 ms.*not arrived: rank 1/m,
  );
});

Deno.test("a rank that is killed ends the job and is named", async () => {
  using folder = new Folder();
  const script = folder.script(`
    await using world = await init();
    console.log(\`rank \${world.rank} pid \${Deno.pid}\`);
    const x = new Float32Array(1000);
    for (;;) await world.allReduce(x);
  `);
  const job = startLauncher(["-n", "3", script]);
  await job.says(/(pid \d+[^]*){3}/);
  const victim = Number((await job.says(/rank 1 pid (\d+)/))[1]);
  Deno.kill(victim, "SIGKILL");
  const { code, stdout, stderr } = await job.ended();
  assert.equal(code, 137);
  assert.match(stderr, /^launch: rank 1 of 3 was ended by SIGKILL/m);
  await allEnd(pidsOf(stdout), 0);
});

Deno.test("abort() ends all ranks with its reason", async () => {
  using folder = new Folder();
  const script = folder.script(`
    await using world = await init();
    await world.barrier();
    if (world.rank === 1) world.abort("the loss is NaN");
    await world.barrier();
  `);
  const { code, stderr } = await launch(["-n", "2", script]);
  assert.equal(code, 1);
  assert.match(
    stderr,
    /^launch: rank 1 of 2 failed .*Rank 1 of 2 has aborted the job: the loss is NaN$/m,
  );
});

Deno.test("ranks that ignore SIGTERM, and what they have started, are killed", async () => {
  using folder = new Folder();
  const script = folder.script(`
    Deno.addSignalListener("SIGTERM", () => {});
    const child = new Deno.Command("sleep", { args: ["60"] }).spawn();
    console.log(\`pid \${Deno.pid} pid \${child.pid}\`);
    await using world = await init();
    await world.barrier();
    if (world.rank === 0) Deno.exit(3);
    setInterval(() => {}, 1000);
    await new Promise(() => {});
  `);
  const { code, stdout } = await launch(["-n", "2", script]);
  assert.equal(code, 3);
  assert.equal(pidsOf(stdout).length, 4);
  await allEnd(pidsOf(stdout), 1000);
});

Deno.test("--max-restarts starts all ranks again and tells them how often", async () => {
  using folder = new Folder();
  const script = folder.script(`
    await using world = await init();
    await world.barrier();
    console.log(\`attempt \${world.attempt} \${Deno.env.get("LINA_RESTART")}\`);
    if (world.attempt < 2 && world.rank === 1) Deno.exit(9);
    await world.barrier();
  `);
  const logs = `${folder.path}/logs`;
  const good = await launch(["-n", "2", "--max-restarts", "3", "--log-dir", logs, script]);
  assert.equal(good.code, 0);
  for (const r of [0, 1]) {
    const lines = good.stdout.split("\n").filter((l) => l.startsWith(`[${r}]`));
    assert.deepEqual(lines.slice(-1), [`[${r}] attempt 2 2`]);
  }
  assert.match(
    good.stderr,
    /^launch: rank 1 of 2 failed with exit code 9[^]*^launch: restart 1 of 3$/m,
  );
  assert.match(
    Deno.readTextFileSync(`${logs}/rank_1.log`),
    /attempt 0 0\nattempt 1 1\nattempt 2 2\n/,
  );
  const bad = await launch(["-n", "2", "--max-restarts", "1", script]);
  assert.equal(bad.code, 9);
});

Deno.test("backends that are impossible say why", async () => {
  using folder = new Folder();
  const script = folder.script("await using world = await init(); console.log(world.backend);");
  const nccl = await launch(["-n", "1", "--backend", "nccl", "--device", "cpu", script]);
  assert.equal(nccl.code, 1);
  assert.match(nccl.stderr, /^launch: .*Cannot use backend nccl as .*: current value is cpu;/m);
  const alone = await launch(["-n", "1", script]);
  assert.equal(alone.stdout, "[0] self\n");
});
