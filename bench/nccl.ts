// NCCL collectives through Deno against PyTorch's: four ranks that share a GPU, a link each (bench/testbed). No operation lives here.
//
//   deno task bench:nccl [--json FILE] [--ranks 4] [--rates 10000,0] [--launches 4] [--turns 1] [--sizes 1024,…] [--ops allReduce,…]
//                        [--sides ours,pytorch] [--budget-s N]
//
// The ranks of both sides live at once and take turns at every operation and size, A B B A …; who has no turn sleeps. A turn is one
// sample: its first operations warm up (at most 1 MiB each), a small allReduce lets the devices begin together, then `time_us` is what an
// operation takes by events of the compute stream, each ordered after that stream and before it again, and `host_us` the call alone, on
// the slowest rank. Hosts sleep while devices work. All processes start anew for every launch. --turns multiplies the turns of a launch;
// --sides pytorch,pytorch shows what noise alone does. A rate of 0 is no limit. --budget-s: nothing begins after so many seconds.
//
// bytes as nccl-tests has them: the buffer of a rank (allReduce, broadcast, reduce, sendRecv), what is received from all ranks (allGather,
// gather), what is sent to all (the others). busbw = bytes / time × 2 (p − 1) / p for allReduce, × 1 for broadcast, reduce and sendRecv,
// × (p − 1) / p for the rest; for allToAllV, whose counts differ by up to 3, × the largest share that a rank sends to others.

import { parseArgs } from "node:util";
import { needGpuHardware } from "./_gpu.ts";
import { linesOf, writeLine } from "./_lines.ts";
import { type Cell, printTable, rowsOf } from "./_nccl_table.ts";

const MIB = 1 << 20;
const SIZES = [1 << 10, 1 << 14, 1 << 18, MIB, 16 * MIB, 256 * MIB];
const OPERATIONS = [
  "allReduce",
  "reduceScatter",
  "allGather",
  "broadcast",
  "reduce",
  "gather",
  "scatter",
  "allToAll",
  "allToAllV",
  "sendRecv",
];
/** Operations in a turn, and turns of each side in a launch, for sizes up to some bytes. Turns come in pairs, A B and B A. */
const PLAN = [
  { most: MIB / 16, iterations: 40, turns: 2 },
  { most: MIB / 4, iterations: 20, turns: 4 },
  { most: MIB, iterations: 8, turns: 12 },
  { most: 16 * MIB, iterations: 2, turns: 6 },
  { most: Infinity, iterations: 1, turns: 2 },
];
/** Times as many without a limit: then the processor is what limits, and times scatter more. */
const MORE_UNLIMITED = 2;
/** Unrecorded turns at the smallest size for every operation: V8 compiles what has run often. */
const WARM_TURNS = 12;
/** How long ranks may take to leave before they are ended, in ms. */
const LEAVE_MS = 10_000;
/** The first side's rendezvous, and how far apart the sides' are: ours takes the port after the one that it is told, as under torchrun. */
const FIRST_PORT = 29500, PORTS = 10;

const { values: options } = parseArgs({
  options: {
    json: { type: "string" },
    ranks: { type: "string", default: "4" },
    rates: { type: "string", default: "10000,0" },
    launches: { type: "string", default: "4" },
    turns: { type: "string", default: "1" },
    sizes: { type: "string", default: SIZES.join() },
    ops: { type: "string", default: OPERATIONS.join() },
    sides: { type: "string", default: "ours,pytorch" },
    "budget-s": { type: "string", default: "Infinity" },
    python: { type: "string", default: "python3" },
  },
});
needGpuHardware();
const numbers = (text: string) => text.split(",").map(Number);
const ranks = Number(options.ranks), launches = Number(options.launches);
const rates = numbers(options.rates!);
const sizes = numbers(options.sizes!).sort((a, b) => a - b);
const operations = options.ops!.split(",");
const sides = options.sides!.split(",").map((side, i, all) =>
  all.indexOf(side) < i ? `${side}-again` : side
);
const begin_ms = performance.now();
const end_ms = begin_ms + 1000 * Number(options["budget-s"]);
const pathOf = (name: string) => new URL(name, import.meta.url).pathname;
const CLUSTER = pathOf("testbed/cluster.sh");

/** Runs a command to its end. @returns What it printed. @throws {Error} With that, if it fails. */
async function run(command: string, ...args: string[]): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(command, { args }).output();
  const [text, errors] = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes));
  if (!success) throw new Error(`${command} ${args.join(" ")}:\n${text}${errors}`);
  return text;
}

/** One side's ranks, which wait for their turns. */
class Side {
  readonly name: string;
  /** Its versions and library, as rank 0 tells. */
  about = "";
  readonly #child: Deno.ChildProcess;
  readonly #connections = new Map<number, Deno.UnixConn>();
  readonly #lines: AsyncGenerator<string, undefined>[] = [];
  readonly #writers: WritableStreamDefaultWriter<Uint8Array<ArrayBuffer>>[] = [];
  /** Rejects when the ranks end, with what they printed. */
  readonly failed: Promise<never>;

  constructor(name: string, port: number, socket: string) {
    this.name = name;
    const program = name.startsWith("ours")
      ? [Deno.execPath(), "run", "-A", "--no-check", pathOf("_nccl_rank.ts")]
      : [options.python!, pathOf("peers/nccl.py")];
    this.#child = new Deno.Command(CLUSTER, {
      args: ["run", ...program, socket, name, String(sizes.at(-1))],
      env: {
        MASTER_PORT: String(port),
        // The hardware queues of one MPS server are shared by twice as many processes as elsewhere.
        CUDA_DEVICE_MAX_CONNECTIONS: Deno.env.get("CUDA_DEVICE_MAX_CONNECTIONS") ?? "4",
      },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    this.failed = this.#child.output().then(({ code, stdout, stderr }) => {
      const text = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes)).join("");
      if (Deno.env.has("NCCL_DEBUG")) console.error(text);
      throw new Error(`The ranks of ${name} have ended with ${code}:\n${text.slice(-4000)}`);
    });
    this.failed.catch(() => {}); // whoever waits for a turn gets it
  }

  /** Takes the connection of one of its ranks. */
  add(
    rank: number,
    about: string,
    connection: Deno.UnixConn,
    lines: AsyncGenerator<string, undefined>,
  ): void {
    this.#connections.set(rank, connection);
    this.#lines[rank] = lines;
    this.#writers[rank] = connection.writable.getWriter();
    if (rank === 0) this.about = about;
  }

  /** One turn. @returns Both times of the slowest rank. */
  async turn(operation: string, bytes: number, iterations: number): Promise<[number, number]> {
    const command = `${operation} ${bytes} ${iterations}`;
    const replies = Promise.all(this.#lines.map(async (lines, rank) => {
      await writeLine(this.#writers[rank], command);
      const { value } = await lines.next();
      if (value === undefined) return await this.failed;
      return value.split(" ").map(Number);
    }));
    const all = await Promise.race([replies, this.failed]);
    return [Math.max(...all.map(([time]) => time)), Math.max(...all.map(([, host]) => host))];
  }

  /** Lets the ranks leave, or ends them. */
  async close(): Promise<void> {
    const timer = setTimeout(() => this.#child.kill("SIGTERM"), LEAVE_MS);
    await Promise.allSettled(this.#writers.map((writer) => writer.close()));
    await this.failed.catch(() => {});
    clearTimeout(timer);
  }

  /** Ends the ranks. */
  end(): void {
    try {
      this.#child.kill("SIGTERM");
    } catch {
      // They have ended.
    }
  }
}

/** Whose processes run. */
let alive: Side[] = [];
for (const signal of ["SIGINT", "SIGTERM"] as const) {
  Deno.addSignalListener(signal, () => alive.forEach((side) => side.end())); // what waits for a turn throws
}

/** Starts all ranks of all sides. */
async function start(): Promise<Side[]> {
  const folder = await Deno.makeTempDir({ prefix: "lina-bench-" });
  const path = `${folder}/socket`;
  using listener = Deno.listen({ transport: "unix", path });
  const started = alive = sides.map((name, i) => new Side(name, FIRST_PORT + PORTS * i, path));
  try {
    for (let left = ranks * sides.length; left > 0; left--) {
      const failed = started.map((side) => side.failed);
      const connection = await Promise.race([listener.accept(), ...failed]);
      const lines = linesOf(connection.readable);
      const [name, rank, ...about] = (await lines.next()).value!.split(" ");
      const side = started.find((side) => side.name === name)!;
      side.add(Number(rank), about.join(" "), connection, lines);
    }
    return started;
  } catch (error) {
    for (const side of started) side.end();
    throw error;
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

const cells = new Map<string, Cell>();
/** Versions and the file's name of NCCL by side. */
const software = new Map<string, string>();

function cellOf(mbit: number, operation: string, bytes: number): Cell {
  const key = `${mbit} ${operation} ${bytes}`;
  const cell = cells.get(key) ?? { operation, mbit, bytes, launches: [] };
  cells.set(key, cell);
  return cell;
}

function progress(text: string): void {
  const seconds = ((performance.now() - begin_ms) / 1000).toFixed(0).padStart(4);
  console.error(`${seconds} s  ${text}`);
}

const isLate = () => performance.now() > end_ms;

async function measureRate(mbit: number, running: readonly Side[], launch: number): Promise<void> {
  for (const bytes of sizes) {
    const { iterations, turns } = PLAN.find(({ most }) => bytes <= most)!;
    const times = Number(options.turns) * (mbit === 0 ? MORE_UNLIMITED : 1);
    for (const operation of operations) {
      if (isLate()) return;
      const samples = running.map(({ name }) => ({ name, turns: [] as [number, number][] }));
      cellOf(mbit, operation, bytes).launches.push(samples);
      for (let turn = 0; turn < turns * times; turn++) {
        const order = turn % 2 === 0 ? [...running.keys()] : [...running.keys()].reverse();
        for (const i of order) {
          samples[i].turns.push(await running[i].turn(operation, bytes, iterations));
        }
      }
    }
    progress(
      `launch ${launch + 1} of ${launches}, ${
        mbit === 0 ? "no limit" : `${mbit} Mbit/s`
      }, ${bytes} bytes`,
    );
  }
}

async function measure(launch: number): Promise<void> {
  await run(CLUSTER, "rate", String(rates[0]));
  const running = await start();
  progress(`launch ${launch + 1} of ${launches}: ${running.length * ranks} ranks are connected`);
  try {
    for (const { name, about } of running) software.set(name, about);
    for (let turn = 0; turn < WARM_TURNS; turn++) {
      for (const operation of operations) {
        for (const side of running) await side.turn(operation, sizes[0], PLAN[0].iterations);
      }
    }
    for (const mbit of rates) {
      await run(CLUSTER, "rate", String(mbit));
      await measureRate(mbit, running, launch);
    }
    await Promise.all(running.map((side) => side.close()));
  } finally {
    for (const side of running) side.end();
  }
}

async function gpuName(): Promise<string> {
  try {
    const args = ["--query-gpu=name", "--format=csv,noheader"];
    return (await run("nvidia-smi", ...args)).trim().split("\n")[0];
  } catch {
    return "no GPU";
  }
}

const about = {
  date: new Date().toISOString(),
  machine: await gpuName(),
  command: ["deno task bench:nccl", ...Deno.args].join(" "),
};
/** A row per line. */
function rowsInFile(): string[] {
  return rowsOf([...cells.values()], sides, ranks).map((row) =>
    JSON.stringify(
      { ...row, software: software.get(row.side), ...about },
      (_, value) =>
        typeof value === "number" && !Number.isInteger(value)
          ? Number(value.toPrecision(5))
          : value,
    )
  );
}

await run(CLUSTER, "up", `${ranks}`, `${rates[0]}`);
try {
  let longest_ms = 0;
  for (let launch = 0; launch < launches; launch++) {
    const start_ms = performance.now();
    if (start_ms + 0.5 * longest_ms > end_ms) break; // it would hardly get to the large sizes
    await measure(launch);
    longest_ms = Math.max(longest_ms, performance.now() - start_ms);
  }
} finally {
  await run(CLUSTER, "down");
  if (options.json && cells.size > 0) {
    await Deno.writeTextFile(options.json, `[\n${rowsInFile().join(",\n")}\n]\n`);
  }
  printTable(rowsOf([...cells.values()], sides, ranks), sides);
  console.log(`\n${about.machine}`);
  for (const [side, text] of software) console.log(`${side}: ${text}`);
}
