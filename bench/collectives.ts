// Collectives on the CPU against a bare C loop over MPI, in one run, as a table like that of nccl-tests.
//
//   deno task bench:collectives [--ranks 2,4] [--json FILE] [--repeats 5] [--backends shm,mpi-c,mpi]
//
// bytes: allReduce, the buffer of a rank; allGather, what a rank receives from all; allToAllV, what a rank sends to all (its own
// block included, equal counts). algbw = bytes / time; busbw = algbw × 2 (p − 1) / p for allReduce, × (p − 1) / p for the others.
// time_us: the median over repeats, whose sides alternate, of the median over samples of the slowest rank's mean. Every row's data is
// checked before and after it is timed. Open MPI polls busily, as it does by default.

import { parseArgs } from "node:util";

const BYTES = Array.from({ length: 12 }, (_, i) => 4 ** (i + 1));
const SAMPLES = 5;
const MPIRUN = ["--allow-run-as-root", "--oversubscribe"];
const folder = new URL(".", import.meta.url);

type Backend = "shm" | "mpi-c" | "mpi";

interface Row {
  op: string;
  backend: Backend;
  ranks: number;
  bytes: number;
  time_us: number;
  algbw_gbs: number;
  busbw_gbs: number;
  date: string;
  machine: string;
  command: string;
}

const { values: options } = parseArgs({
  options: {
    ranks: { type: "string", default: "2,4" },
    json: { type: "string" },
    repeats: { type: "string", default: "5" },
    backends: { type: "string", default: "shm,mpi-c,mpi" },
  },
});
const repeats = Number(options.repeats);
const sizes = BYTES.map((bytes) => `${bytes}:${iterationsOf(bytes)}`);

function iterationsOf(bytes: number): number {
  return bytes <= 4096 ? 20000 : bytes <= 65536 ? 2000 : bytes <= 1 << 20 ? 100 : 8;
}

/** Ends with an error that says what a command printed. */
async function output(command: string, args: string[], env = {}): Promise<string> {
  const child = new Deno.Command(command, { args, env, stdin: "null", stderr: "piped" });
  const { success, stdout, stderr } = await child.output();
  if (!success) {
    throw new Error(`${command} ${args.join(" ")}: ${new TextDecoder().decode(stderr)}`);
  }
  return new TextDecoder().decode(stdout);
}

async function compilePeer(): Promise<string | null> {
  const program = await Deno.makeTempFile({ prefix: "mpi-collectives-" });
  const source = new URL("mpi_collectives.c", folder).pathname;
  try {
    await output("mpicc", ["-O3", "-o", program, source]);
    return program;
  } catch (cause) {
    if (Deno.env.has("LINA_CI") || !(cause instanceof Deno.errors.NotFound)) throw cause;
    console.log("No mpicc on this machine: only our own backend is measured");
    return null;
  }
}

async function runShm(ranks: number): Promise<string> {
  const store = await Deno.makeTempDir({ prefix: "lina-bench-" });
  const program = new URL("_collectives_rank.ts", folder).href;
  try {
    const outputs = await Promise.all(
      Array.from({ length: ranks }, (_, rank) =>
        output(
          Deno.execPath(),
          ["run", "-A", "--no-check", program, "shm", store, `${SAMPLES}`, ...sizes],
          { LINA_BENCH_RANK: `${rank}`, LINA_BENCH_SIZE: `${ranks}` },
        )),
    );
    return outputs[0];
  } finally {
    await Deno.remove(store, { recursive: true });
  }
}

async function runMpi(ranks: number): Promise<string> {
  const store = await Deno.makeTempDir({ prefix: "lina-bench-" });
  const program = new URL("_collectives_rank.ts", folder).href;
  const deno = [Deno.execPath(), "run", "-A", "--no-check", program, "mpi", store];
  try {
    return await output("mpirun", [...MPIRUN, "-n", `${ranks}`, ...deno, `${SAMPLES}`, ...sizes]);
  } finally {
    await Deno.remove(store, { recursive: true });
  }
}

const median = (xs: number[]) => xs.sort((a, b) => a - b)[xs.length >> 1];
const geometricMean = (xs: number[]) =>
  Math.exp(xs.reduce((s, x) => s + Math.log(x), 0) / xs.length);

function parse(text: string, times: Map<string, number[]>, backend: Backend, ranks: number): void {
  for (const line of text.trim().split("\n")) {
    const [op, bytes, time_us, good] = line.split(" ");
    if (good !== "1") {
      throw new Error(`${backend}, ${ranks} ranks: wrong data in ${op} of ${bytes} bytes`);
    }
    const key = [op, backend, ranks, bytes].join(" ");
    times.set(key, [...times.get(key) ?? [], Number(time_us)]);
  }
}

function rowOf(key: string, samples: number[]): Row {
  const [op, backend, ranksText, bytesText] = key.split(" ");
  const ranks = Number(ranksText), bytes = Number(bytesText), time_us = median(samples);
  const algbw_gbs = bytes / time_us / 1000;
  const share = (ranks - 1) / ranks * (op === "allReduce" ? 2 : 1);
  return {
    op,
    backend: backend as Backend,
    ranks,
    bytes,
    time_us,
    algbw_gbs,
    busbw_gbs: algbw_gbs * share,
    date: new Date().toISOString(),
    machine: machine(),
    command: ["deno task bench:collectives", ...Deno.args].join(" "),
  };
}

function machine(): string {
  let model = Deno.build.arch as string;
  try {
    model = /model name\s*: (.*)/.exec(Deno.readTextFileSync("/proc/cpuinfo"))?.[1] ?? model;
  } catch { /* not Linux */ }
  return `${model}, ${navigator.hardwareConcurrency} cores, ${Deno.build.os}`;
}

function printTable(rows: Row[], backends: Backend[]): void {
  const at = (row: Row, backend: Backend) =>
    rows.find((r) =>
      r.backend === backend && r.op === row.op && r.ranks === row.ranks && r.bytes === row.bytes
    );
  console.log(
    `${"op".padEnd(10)} ranks      bytes ` +
      backends.map((b) => `${`${b} us`.padStart(12)} ${"busbw GB/s".padStart(11)}`).join("") +
      "   shm/mpi-c   mpi/mpi-c",
  );
  const ratios: Record<string, number[]> = { shm: [], mpi: [] };
  for (const row of rows.filter((r) => r.backend === backends[0])) {
    const peer = at(row, "mpi-c");
    const cells = backends.map((b) => {
      const r = at(row, b);
      return r
        ? `${r.time_us.toFixed(2).padStart(12)} ${r.busbw_gbs.toFixed(2).padStart(11)}`
        : " ".repeat(24);
    });
    const shown = (["shm", "mpi"] as const).map((b) => {
      const r = at(row, b);
      if (!r || !peer) return "-".padStart(11);
      const ratio = peer.time_us / r.time_us;
      if (b === "shm" || row.bytes >= 1 << 20) ratios[b].push(ratio);
      return `${ratio.toFixed(2)}x`.padStart(11);
    });
    console.log(
      `${row.op.padEnd(10)} ${`${row.ranks}`.padStart(5)} ${`${row.bytes}`.padStart(10)} ${
        cells.join("")
      } ${shown.join(" ")}`,
    );
  }
  for (const [backend, xs] of Object.entries(ratios)) {
    if (xs.length === 0) continue;
    const which = backend === "mpi" ? ", rows of 1 MiB and up" : "";
    console.log(
      `${backend} over mpi-c${which}: geometric mean ${geometricMean(xs).toFixed(2)}x, least ${
        Math.min(...xs).toFixed(2)
      }x, ${xs.length} rows`,
    );
  }
}

const peer = await compilePeer();
const backends = options.backends!.split(",").filter((b) => b === "shm" || peer) as Backend[];
console.log(
  `# mpirun ${MPIRUN.join(" ")} -n N; ${repeats} repeats of ${SAMPLES} samples; ${machine()}`,
);
const times = new Map<string, number[]>();
for (const ranks of options.ranks!.split(",").map(Number)) {
  for (let repeat = 0; repeat < repeats; repeat++) {
    for (const backend of backends) {
      const text = backend === "shm"
        ? await runShm(ranks)
        : backend === "mpi"
        ? await runMpi(ranks)
        : await output("mpirun", [...MPIRUN, "-n", `${ranks}`, peer!, `${SAMPLES}`, ...sizes]);
      parse(text, times, backend, ranks);
    }
  }
}
if (peer) await Deno.remove(peer);
const rows = [...times].map(([key, samples]) => rowOf(key, samples));
printTable(rows, backends);
if (options.json) await Deno.writeTextFile(options.json, JSON.stringify(rows, null, 1) + "\n");
