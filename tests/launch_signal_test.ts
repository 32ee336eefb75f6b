// Ending the launcher from outside: whatever the signal, no rank stays behind, whether or not it has called init().

import assert from "node:assert/strict";
import {
  allEnd,
  Folder,
  LAUNCHER,
  pidsOf,
  Running,
  runs,
  startLauncher,
} from "./launch_support.ts";

const SCRIPTS = {
  "ranks in a collective": `
    await using world = await init();
    console.log(\`pid \${Deno.pid}\`);
    if (world.rank > 0) await world.barrier();
    await new Promise((resolve) => setTimeout(resolve, 60_000));
  `,
  "ranks that never call init": `
    console.log(\`pid \${Deno.pid}\`);
    for (const end = Date.now() + 60_000; Date.now() < end;);
  `,
};
const SIGNALS: [Deno.Signal, number][] = [["SIGINT", 130], ["SIGTERM", 143], ["SIGHUP", 129], [
  "SIGKILL",
  137,
]];

for (const [what, code] of Object.entries(SCRIPTS)) {
  for (const [signal, expected] of SIGNALS) {
    Deno.test(`${signal} to the launcher leaves no orphan: ${what}`, async () => {
      using folder = new Folder();
      const job = startLauncher(["-n", "3", folder.script(code)]);
      await job.says(/(pid \d+[^]*){3}/);
      const pids = pidsOf(job.stdout);
      assert.ok(pids.every(runs));
      job.kill(signal);
      // SIGKILL leaves the launcher's pipes to the ranks; the guard closes them by ending the ranks.
      const result = await job.ended();
      await allEnd(pids);
      assert.equal(result.code, expected);
      if (signal !== "SIGKILL") {
        assert.match(result.stderr, new RegExp(`^launch: ${signal}: `, "m"));
      }
    });
  }
}

Deno.test("a launcher that ignores SIGHUP, as under nohup, goes on", async () => {
  using folder = new Folder();
  const script = folder.script(`
    await using world = await init();
    console.log(\`pid \${Deno.pid}\`);
    await new Promise((resolve) => setTimeout(resolve, 500));
  `);
  const command = [Deno.execPath(), "run", "-A", LAUNCHER, "-n", "2", script];
  const job = new Running("sh", ["-c", 'trap "" HUP; exec "$@"', "sh", ...command]);
  await job.says(/(pid \d+[^]*){2}/);
  job.kill("SIGHUP");
  const { code, stderr } = await job.ended();
  assert.deepEqual([code, stderr], [0, ""]);
});

Deno.test("a second Ctrl-C does not wait for ranks that ignore the first", async () => {
  using folder = new Folder();
  const script = folder.script(`
    Deno.addSignalListener("SIGTERM", () => {});
    console.log(\`pid \${Deno.pid}\`);
    setInterval(() => {}, 1000);
  `);
  const job = startLauncher(["-n", "2", script]);
  await job.says(/(pid \d+[^]*){2}/);
  const start = performance.now();
  job.kill("SIGINT");
  await job.says(/launch: SIGINT/);
  job.kill("SIGINT");
  assert.equal((await job.ended()).code, 130);
  await allEnd(pidsOf(job.stdout), 0);
  assert.ok(performance.now() - start < 2500);
});
