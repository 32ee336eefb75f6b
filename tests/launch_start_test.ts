// The other ways into a job: variables of torchrun and mpirun, several launchers, a URL; and what a second job on the same port gets.

import assert from "node:assert/strict";
import {
  allEnd,
  Folder,
  launch,
  LAUNCHER,
  LIBRARY,
  pause,
  pidsOf,
  type Result,
  Running,
  startLauncher,
} from "./launch_support.ts";

const SUM = `
  await using world = await init();
  const x = Float32Array.of(world.rank + 1);
  await world.allReduce(x);
  console.log(\`\${world.rank}/\${world.size} \${world.localRank}/\${world.localSize} \${world.backend} \${x[0]}\`);
`;

/** A port that is free now. */
function freePort(): number {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  return listener.addr.port;
}

function startRank(script: string, env: Record<string, string>): Running {
  return new Running(Deno.execPath(), ["run", "-A", script], env);
}

function lines(results: readonly Result[]): string[] {
  return results.flatMap((r) => r.stdout.split("\n").filter((l) => l !== "")).sort();
}

Deno.test("ranks start from torchrun's variables, in any order", async () => {
  using folder = new Folder();
  const script = folder.script(SUM);
  const port = String(freePort());
  const ranks = [];
  for (const rank of [2, 1, 0]) {
    ranks.push(startRank(script, {
      RANK: String(rank),
      WORLD_SIZE: "3",
      LOCAL_RANK: String(rank),
      LOCAL_WORLD_SIZE: "3",
      MASTER_ADDR: "localhost",
      MASTER_PORT: port,
      TORCHELASTIC_RUN_ID: "none",
    }));
    await pause(30);
  }
  const results = await Promise.all(ranks.map((r) => r.ended()));
  assert.deepEqual(results.map((r) => [r.code, r.stderr]), [[0, ""], [0, ""], [0, ""]]);
  assert.deepEqual(lines(results), ["0/3 0/3 shm 6", "1/3 1/3 shm 6", "2/3 2/3 shm 6"]);
});

Deno.test("without a launcher, too, a lost rank is an error of the others", async () => {
  using folder = new Folder();
  const script = folder.script(`
    await using world = await init();
    console.log(\`pid \${Deno.pid}\`);
    await world.barrier();
    if (world.rank === 0) await new Promise((resolve) => setTimeout(resolve, 60_000));
    await world.barrier();
  `);
  const port = String(freePort());
  const ranks = [0, 1].map((rank) =>
    startRank(script, {
      RANK: String(rank),
      WORLD_SIZE: "2",
      MASTER_ADDR: "127.0.0.1",
      MASTER_PORT: port,
    })
  );
  await ranks[0].says(/pid/);
  await ranks[1].says(/pid/);
  await pause(100);
  ranks[0].kill("SIGKILL");
  const { code, stderr } = await ranks[1].ended();
  await ranks[0].ended();
  assert.equal(code, 1);
  assert.match(stderr, /Cannot complete barrier 1 of world on rank 1: rank 0 must take part/);
});

Deno.test("a script without any launcher is a world of one", async () => {
  using folder = new Folder();
  const { code, stdout, stderr } = await startRank(folder.script(SUM), {}).ended();
  assert.deepEqual([code, stdout, stderr], [0, "0/1 0/1 self 1\n", ""]);
});

Deno.test("a port that is taken, a second job on it, a wrong token: each says what to do", async () => {
  using folder = new Folder();
  const script = folder.script(SUM);
  const port = freePort();
  const base = {
    WORLD_SIZE: "2",
    MASTER_ADDR: "127.0.0.1",
    MASTER_PORT: String(port),
    LINA_TOKEN: "a",
  };
  const first = startRank(script, { ...base, RANK: "0" });
  const connected = async () => {
    for (;;) {
      try {
        (await Deno.connect({ hostname: "127.0.0.1", port: port + 1 })).close();
        return;
      } catch {
        await pause(5);
      }
    }
  };
  await connected();
  const taken = await startRank(script, { ...base, RANK: "0" }).ended();
  assert.equal(taken.code, 1);
  assert.match(
    taken.stderr,
    new RegExp(`Cannot serve the rendezvous as port ${port + 1} of 127.0.0.1 must be free`),
  );
  const stranger = await startRank(script, { ...base, RANK: "1", LINA_TOKEN: "b" }).ended();
  assert.equal(stranger.code, 1);
  assert.match(
    stranger.stderr,
    /LINA_TOKEN must be the token of that job: current value is another/,
  );
  const other = await startRank(script, { ...base, RANK: "1", WORLD_SIZE: "3" }).ended();
  assert.match(other.stderr, /the job has 2 ranks, not 3; perhaps another job uses this port/);
  const second = startRank(script, { ...base, RANK: "1" });
  assert.deepEqual(lines([await first.ended(), await second.ended()]), [
    "0/2 0/2 shm 3",
    "1/2 1/2 shm 3",
  ]);
});

Deno.test("ranks that do not come are named", async () => {
  using folder = new Folder();
  const script = folder.script(SUM.replace("init()", "init({ timeout_ms: 300 })"));
  const env = { WORLD_SIZE: "4", MASTER_ADDR: "127.0.0.1", MASTER_PORT: String(freePort()) };
  const { code, stderr } = await startRank(script, { ...env, RANK: "0" }).ended();
  assert.equal(code, 1);
  assert.match(
    stderr,
    /must be set within 300 ms: current value is unset; not connected: rank 1 to 3/,
  );
});

Deno.test("init() waits no longer than its time-out for the ranks of the launcher", async () => {
  using folder = new Folder();
  const script = folder.script(`
    const start = performance.now();
    if (Deno.env.get("RANK") === "1") await new Promise((resolve) => setTimeout(resolve, 30_000));
    await init({ timeout_ms: 900 }).finally(() => console.log(performance.now() - start < 5000));
  `);
  const { code, stdout, stderr } = await launch(["-n", "2", script]);
  assert.equal(code, 1);
  assert.match(stderr, /all ranks must join the job within 900 ms: .*; not arrived: rank 1/);
  assert.equal(stdout, "[0] true\n");
});

function node(rank: number, port: number, script: string, more: string[] = []): Running {
  const flags = `-n 2 --nnodes 2 --node-rank ${rank} --rdzv 127.0.0.1:${port}`;
  return startLauncher([...flags.split(" "), ...more, script]);
}

Deno.test("two launchers make one job", async () => {
  using folder = new Folder();
  const script = folder.script(SUM);
  const port = freePort();
  const nodes = [node(1, port, script), node(0, port, script)];
  const results = await Promise.all(nodes.map((n) => n.ended()));
  assert.deepEqual(results.map((r) => [r.code, r.stderr]), [[0, ""], [0, ""]]);
  assert.deepEqual(lines(results), [0, 1, 2, 3].map((r) => `[${r}] ${r}/4 ${r % 2}/2 shm 10`));
});

Deno.test("a failure on one node ends, and restarts, the ranks of all", async () => {
  using folder = new Folder();
  const script = folder.script(`
    await using world = await init();
    console.log(\`pid \${Deno.pid}\`);
    await world.barrier();
    if (world.rank === 3 && world.attempt === 0) throw new Error("the cause");
    await new Promise((resolve) => setTimeout(resolve, world.attempt === 0 ? 60_000 : 0));
    await world.barrier();
    console.log(\`attempt \${world.attempt}\`);
  `);
  const ports = [freePort(), freePort()];
  const once = [0, 1].map((rank) => node(rank, ports[0], script));
  for (const { code, stdout, stderr } of await Promise.all(once.map((n) => n.ended()))) {
    assert.equal(code, 1);
    assert.match(stderr, /^launch: rank 3 of 4 failed with exit code 1: Error: the cause$/m);
    await allEnd(pidsOf(stdout), 0);
  }
  const again = [0, 1].map((rank) => node(rank, ports[1], script, ["--max-restarts", "1"]));
  for (const { code, stdout, stderr } of await Promise.all(again.map((n) => n.ended()))) {
    assert.equal(code, 0, stderr);
    assert.equal(stdout.match(/attempt 1/g)?.length, 2);
  }
});
Deno.test("a launcher whose ranks are done says so when another disappears", async () => {
  using folder = new Folder();
  const script = folder.script(`
    console.log(\`pid \${Deno.pid}\`);
    if (Number(Deno.env.get("RANK")) < 2) await new Promise((resolve) => setTimeout(resolve, 60_000));
  `);
  const port = freePort();
  const nodes = [node(0, port, script), node(1, port, script)];
  for (const n of nodes) await n.says(/(pid \d+[^]*){2}/);
  await new Promise((resolve) => setTimeout(resolve, 300)); // until the ranks of node 1 have ended
  nodes[0].kill("SIGKILL");
  const { code, stderr } = await nodes[1].ended();
  assert.equal(code, 1);
  assert.equal(stderr, "launch: the launcher of node 0 has ended\n");
  await nodes[0].ended();
  await allEnd(nodes.flatMap((n) => pidsOf(n.stdout)));
});

Deno.test("a launcher that disappears ends the ranks of the other node", async () => {
  using folder = new Folder();
  const script = folder.script(`
    await using world = await init();
    console.log(\`pid \${Deno.pid}\`);
    await new Promise((resolve) => setTimeout(resolve, 60_000));
  `);
  for (const victim of [0, 1]) {
    const port = freePort();
    const nodes = [node(0, port, script), node(1, port, script)];
    for (const n of nodes) await n.says(/(pid \d+[^]*){2}/);
    nodes[victim].kill("SIGKILL");
    const { code, stderr } = await nodes[1 - victim].ended();
    assert.equal(code, 1);
    assert.match(stderr, new RegExp(`^launch: the launcher of node ${victim} has ended`, "m"));
    await nodes[victim].ended();
    await allEnd(nodes.flatMap((n) => pidsOf(n.stdout)));
  }
});

Deno.test("two jobs cannot share a rendezvous", async () => {
  using folder = new Folder();
  const script = folder.script("console.log('started'); setTimeout(() => {}, 60_000);");
  const port = freePort();
  const first = node(0, port, script);
  await first.says(/started/);
  const second = await node(0, port, script).ended();
  assert.deepEqual([second.code, second.stdout], [1, ""]);
  assert.match(
    second.stderr,
    new RegExp(
      `port ${port} of 127.0.0.1 must be free: current value is in use, perhaps by another job; end that one or choose another port \\(--rdzv`,
    ),
  );
  first.kill("SIGTERM");
  await first.ended();
});

Deno.test("several nodes without a token stay on loopback", async () => {
  using folder = new Folder();
  const flags = "-n 1 --nnodes 2 --node-rank 0 --rdzv 0.0.0.0:29999".split(" ");
  const { code, stderr } = await launch([...flags, folder.script(SUM)], { LINA_TOKEN: "" });
  assert.equal(code, 1);
  assert.match(stderr, /LINA_TOKEN must be set, to the same secret on every node/);
});

/** What a web server says about a file. */
function typeOf(path: string): string {
  if (path.endsWith(".wasm")) return "application/wasm";
  return path.endsWith(".js") ? "text/javascript" : "application/typescript";
}

Deno.test("launcher, library and script work by URL", async () => {
  const root = new URL("../", import.meta.url);
  const server = Deno.serve({ port: 0, hostname: "127.0.0.1", onListen() {} }, async (request) => {
    const path = new URL(request.url).pathname.slice(1);
    if (path === "script.ts") {
      const code = `import { init } from "./mod.ts";\n${SUM}`;
      return new Response(code, { headers: { "content-type": "application/typescript" } });
    }
    try {
      const body = await Deno.readFile(new URL(path, root));
      return new Response(body, { headers: { "content-type": typeOf(path) } });
    } catch {
      return new Response(null, { status: 404 });
    }
  });
  const base = `http://127.0.0.1:${server.addr.port}`;
  using folder = new Folder();
  try {
    const args = [
      "run",
      "-A",
      "--reload=" + base,
      `${base}/launch.ts`,
      "-n",
      "2",
      `${base}/script.ts`,
    ];
    const remote = new Running(Deno.execPath(), args, { DENO_DIR: `${folder.path}/cache` });
    const { code, stdout, stderr } = await remote.ended();
    assert.equal(code, 0, stderr);
    assert.deepEqual(lines([{ code, stdout, stderr }]), ["[0] 0/2 0/2 shm 3", "[1] 1/2 1/2 shm 3"]);
  } finally {
    await server.shutdown();
  }
});

Deno.test("importing the library or the launcher starts nothing", async () => {
  assert.equal(typeof (await import(LIBRARY)).init, "function");
  assert.equal(typeof (await import(LAUNCHER)).launch, "function");
});
