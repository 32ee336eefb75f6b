// `--backend mpi` and plain mpirun: the same prefixes, names and exit codes as without MPI.

import assert from "node:assert/strict";
import { allEnd, Folder, launch, pidsOf, Running, startLauncher } from "./launch_support.ts";

/** Whether mpirun is there; with LINA_CI set it has to be. */
function installed(): boolean {
  try {
    return new Deno.Command("mpirun", { args: ["--version"] }).outputSync().success;
  } catch {
    assert.ok(!Deno.env.has("LINA_CI"), "mpirun must be installed");
    console.log("skipped: mpirun is not installed");
    return false;
  }
}
const ignore = !installed();

Deno.test({
  name: "--backend mpi starts the ranks by mpirun",
  ignore,
  async fn() {
    using folder = new Folder();
    const script = folder.script(`
      await using world = await init();
      const x = Float32Array.of(world.rank + 1);
      await world.allReduce(x);
      await world.store.set(\`key\${world.rank}\`, new Uint8Array([world.rank]));
      const [other] = await world.store.get(\`key\${(world.rank + 1) % world.size}\`);
      console.log(\`\${world.rank}/\${world.size} \${world.backend} \${x[0]} \${other} \${Deno.args}\`);
      if (world.rank === 1) console.error("to stderr");
    `);
    const logs = `${folder.path}/logs`;
    const args = ["-n", "2", "--backend", "mpi", "--log-dir", logs, script, "-x", "y"];
    const { code, stdout, stderr } = await launch(args);
    assert.equal(code, 0, stderr);
    const lines = stdout.trimEnd().split("\n").sort();
    assert.deepEqual(lines, ["[0] 0/2 mpi 3 1 -x,y", "[1] 1/2 mpi 3 0 -x,y"]);
    assert.match(stderr, /^\[1\] to stderr$/m);
    assert.equal(Deno.readTextFileSync(`${logs}/rank_0.log`), "0/2 mpi 3 1 -x,y\n");
  },
});

Deno.test({
  name: "--backend mpi names the rank that fails, and ends the others",
  ignore,
  async fn() {
    using folder = new Folder();
    const script = folder.script(`
      await using world = await init();
      console.log(\`pid \${Deno.pid}\`);
      await world.barrier();
      if (world.rank === 1) throw new RangeError("the cause");
      await world.barrier();
    `);
    const { code, stdout, stderr } = await launch(["-n", "3", "--backend", "mpi", script]);
    assert.equal(code, 1);
    assert.match(stderr, /^launch: rank 1 of 3 failed with exit code 1: RangeError: the cause$/m);
    await allEnd(pidsOf(stdout));
  },
});

Deno.test({
  name: "plain mpirun is a job of its own, with a store",
  ignore,
  async fn() {
    using folder = new Folder();
    const script = folder.script(`
      await using world = await init();
      const n = await world.store.add("arrived", 1);
      await world.barrier();
      console.log(\`\${world.size} \${world.backend} \${n >= 1 && n <= 2}\`);
    `);
    const root = Deno.uid() === 0 ? ["--allow-run-as-root"] : [];
    const args = [...root, "--oversubscribe", "-n", "2", Deno.execPath(), "run", "-A", script];
    const { code, stdout, stderr } = await new Running("mpirun", args).ended();
    assert.equal(code, 0, stderr);
    assert.equal(stdout, "2 mpi true\n2 mpi true\n");
  },
});

for (const signal of ["SIGTERM", "SIGKILL"] as const) {
  Deno.test({
    name: `${signal} to the launcher leaves no orphan of mpirun`,
    ignore,
    async fn() {
      using folder = new Folder();
      const script = folder.script(`
        await using world = await init();
        console.log(\`pid \${Deno.pid} pid \${Deno.env.get("OMPI_COMM_WORLD_RANK") ? Deno.ppid : 1e9}\`);
        if (world.rank === 0) await new Promise((resolve) => setTimeout(resolve, 60_000));
        await world.barrier();
      `);
      const job = startLauncher(["-n", "2", "--backend", "mpi", script]);
      await job.says(/(pid \d+ pid \d+[^]*){2}/);
      job.kill(signal);
      await job.ended();
      await allEnd(pidsOf(job.stdout));
    },
  });
}
