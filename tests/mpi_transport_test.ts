// The MPI backend under mpirun: every operation against a computed truth on 1, 2 and 4 ranks, and what happens when ranks
// disagree, die or do not come. The ranks run `mpi_program.ts`.

import assert from "node:assert/strict";

const PROGRAM = new URL("./mpi_program.ts", import.meta.url);
const LIMIT_MS = 60_000;

async function hasOpenMpi(): Promise<boolean> {
  try {
    const { stdout } = await new Deno.Command("mpirun", { args: ["--version"] }).output();
    return new TextDecoder().decode(stdout).includes("Open MPI");
  } catch {
    return false;
  }
}

const found = await hasOpenMpi();
if (!found) {
  const message = "Open MPI's mpirun is not installed: the MPI backend is not tested";
  if (Deno.env.has("LINA_CI")) throw new Error(message);
  console.log(message);
}

async function mpirun(
  ranks: number,
  scenario: string,
  env: Record<string, string> = {},
): Promise<{ code: number; text: string; ms: number }> {
  const folder = await Deno.makeTempDir();
  const begin = performance.now();
  try {
    const child = new Deno.Command("mpirun", {
      args: ["--oversubscribe", "--allow-run-as-root", "-x", "LINA_TEST_STORE", "-n", `${ranks}`]
        .concat(Deno.execPath(), "run", "-A", PROGRAM.href, scenario),
      env: { LINA_TEST_STORE: folder, NO_COLOR: "1", ...env },
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    const timer = setTimeout(() => child.kill("SIGTERM"), LIMIT_MS); // mpirun ends its ranks
    const { code, stdout, stderr } = await child.output();
    clearTimeout(timer);
    const text = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
    return { code, text, ms: performance.now() - begin };
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** MPICH's launcher, where it is installed too; its library comes from the loader's path or LINA_MPI_LIB. */
async function hasMpich(): Promise<boolean> {
  try {
    return (await new Deno.Command("mpiexec.hydra", { args: ["--version"] }).output()).success;
  } catch {
    return false;
  }
}

Deno.test({
  name: "MPI carries every operation on 3 ranks of MPICH",
  ignore: !await hasMpich(),
  async fn() {
    const { code, stdout, stderr } = await new Deno.Command("timeout", {
      args: ["60", "mpiexec.hydra", "-n", "3", Deno.execPath(), "run", "-A", PROGRAM.href, "all"],
      env: { NO_COLOR: "1" },
    }).output();
    const text = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
    assert.equal(code, 0, text);
    assert.match(text, /^ok all$/m);
  },
});

for (const ranks of [1, 2, 4]) {
  Deno.test({
    name: `MPI carries every operation on ${ranks} ranks`,
    ignore: !found,
    async fn() {
      const { code, text } = await mpirun(ranks, "all");
      assert.equal(code, 0, text);
      assert.match(text, /^ok all$/m);
    },
  });
}

Deno.test({
  name: "MPI ends the job with the error of the rank that threw",
  ignore: !found,
  async fn() {
    const { code, text, ms } = await mpirun(3, "throws");
    assert.equal(code, 1, text);
    assert.match(text, /rank 1 has a bad day/);
    assert.ok(ms < 10_000, `${ms} ms`);
  },
});

Deno.test({
  name: "MPI ends the job when a rank exits in the middle",
  ignore: !found,
  async fn() {
    const { code, text, ms } = await mpirun(3, "exits");
    assert.notEqual(code, 0, text);
    assert.ok(ms < 10_000, `${ms} ms`);
  },
});

Deno.test({
  name: "MPI's watchdog names the ranks that have not arrived",
  ignore: !found,
  async fn() {
    const { code, text, ms } = await mpirun(3, "missing");
    assert.equal(code, 3, text);
    assert.match(text, /^ok missing$/m);
    assert.ok(ms < 15_000, `${ms} ms`);
  },
});

Deno.test({
  name: "MPI does not wait for ever for a rank that stays when another closes",
  ignore: !found,
  async fn() {
    const { code, text, ms } = await mpirun(2, "stays", { LINA_TIMEOUT_MS: "700" });
    assert.equal(code, 3, text);
    assert.match(
      text,
      /^error: Cannot complete close of world on rank 0 .* within 700 ms: .* still open on rank 1$/m,
    );
    assert.ok(ms < 15_000, `${ms} ms`);
  },
});

Deno.test({
  name: "MPI reports a message that is shorter than its receiver expects",
  ignore: !found,
  async fn() {
    const { code, text } = await mpirun(2, "mismatch");
    assert.notEqual(code, 0, text); // a job in which MPI has failed does not end well
    assert.match(text, /^ok mismatch$/m);
  },
});

Deno.test({
  name: "MPI ranks that call different operations are told by the order check",
  ignore: !found,
  async fn() {
    const { text } = await mpirun(2, "order", { LINA_DEBUG: "1" });
    assert.match(text, /^ok order$/m, text);
  },
});

Deno.test({
  name: "MPI refuses a library that the launcher does not know",
  ignore: !found,
  async fn() {
    // Without mpirun a process is a world of one to MPI, whatever the environment says.
    const { success, stderr } = await new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", PROGRAM.href, "all"],
      env: { PMI_RANK: "0", PMI_SIZE: "2", NO_COLOR: "1" },
    }).output();
    const text = new TextDecoder().decode(stderr);
    assert.equal(success, false, text);
    assert.match(text, /must have started 2 ranks: current value is 1; .*LINA_MPI_LIB/);
  },
});

Deno.test("MPI names every path when no library can be loaded", async () => {
  const { stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", PROGRAM.href, "all"],
    env: { PMI_RANK: "0", PMI_SIZE: "1", NO_COLOR: "1", LINA_MPI_LIB: "/no/such/libmpi.so" },
  }).output();
  const text = new TextDecoder().decode(stderr);
  assert.match(text, /Cannot open Open MPI or MPICH as one of these must load/);
  assert.match(text, /\/no\/such\/libmpi\.so: /);
});
