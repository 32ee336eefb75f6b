// NCCL collectives through Deno against PyTorch's on the same ranks, in one run: four ranks that share a GPU, a link each (bench/testbed).
//
//   deno task bench:nccl [--json FILE] [--ranks 4] [--rates 10000,0] [--repeats 3] [--sizes 1024,…] [--sides ours,pytorch] [--budget-s N]
//
// bytes as nccl-tests has them: the buffer of a rank (allReduce, broadcast, reduce, sendRecv), what is received from all ranks (allGather,
// gather), what is sent to all (the others). busbw = bytes / time × 2 (p − 1) / p for allReduce, × 1 for broadcast, reduce and sendRecv,
// × (p − 1) / p for the rest; for allToAllV, whose counts differ by up to 3, × the largest share that a rank sends to others. time_us:
// per operation by events of the compute stream, when each is ordered after that stream and before it again; host_us: the call alone. Both
// are those of the slowest rank, medians over repeats in which the sides alternate. A rate of 0 is no limit. --budget-s bounds the whole
// bench: every link and side gets an equal part of it, sizes ascend, and what does not fit (large sizes, further repeats) is left out.

import { parseArgs } from "node:util";

const SIZES = [1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 24, 1 << 28];
const SAMPLES = 3;
/** Time that ranks get to end what they have begun and to leave, before they are ended, in ms. */
const GRACE_MS = 4000;
/** Time that is left for what comes after the last side, in ms. */
const LEAVE_MS = 2000;
const SIDES = ["ours", "pytorch"] as const;

type Side = (typeof SIDES)[number];

interface Row {
  op: string;
  side: Side;
  ranks: number;
  mbit: number;
  bytes: number;
  time_us: number;
  host_us: number;
  repeats: number;
  busbw_gbs: number;
  date: string;
  machine: string;
  command: string;
}

const { values: options } = parseArgs({
  options: {
    json: { type: "string" },
    ranks: { type: "string", default: "4" },
    rates: { type: "string", default: "10000,0" },
    repeats: { type: "string", default: "3" },
    sizes: { type: "string", default: SIZES.join() },
    sides: { type: "string", default: SIDES.join() },
    "budget-s": { type: "string", default: "Infinity" },
    python: { type: "string", default: "python3" },
  },
});
const ranks = Number(options.ranks), repeats = Number(options.repeats);
const sizes = options.sizes!.split(",").map(Number).sort((a, b) => a - b)
  .map((bytes) => `${bytes}:${iterationsOf(bytes)}`);
const sides = options.sides!.split(",") as Side[];
const end_ms = Date.now() + 1000 * Number(options["budget-s"]) - LEAVE_MS;
const pathOf = (name: string) => new URL(name, import.meta.url).pathname;
const CLUSTER = pathOf("testbed/cluster.sh");

function iterationsOf(bytes: number): number {
  return bytes <= 65_536
    ? 60
    : bytes <= 1 << 20
    ? 30
    : bytes <= 4 << 20
    ? 10
    : bytes <= 16 << 20
    ? 4
    : bytes <= 64 << 20
    ? 2
    : 1;
}

/** Runs a command; its output, or an error with what it printed. One that has to be ended gives what it had printed. */
async function run(command: string, args: string[], limit_ms = Infinity): Promise<string> {
  const child = new Deno.Command(command, {
    args,
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  let ended = false;
  const timer = limit_ms < Infinity
    ? setTimeout(() => {
      ended = true;
      child.kill("SIGTERM");
    }, limit_ms)
    : undefined;
  const { success, stdout, stderr } = await child.output();
  clearTimeout(timer);
  const [text, errors] = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes));
  if (ended) console.warn(`${args.slice(0, 2).join(" ")} was ended: ${errors.slice(-400)}`);
  else if (!success) {
    throw new Error(`${command} ${args.join(" ")}:\n${text}${errors}`.slice(0, 6000));
  }
  for (const line of errors.split("\n")) if (line.startsWith("# ")) versions.add(line.slice(2));
  return text;
}

const versions = new Set<string>();

/** Runs a side on all ranks. @param until_ms When its ranks begin nothing new any more, on the clock of the day. */
function runSide(side: Side, until_ms: number): Promise<string> {
  const until = until_ms < Infinity ? String(Math.round(until_ms)) : "inf";
  const rank = [String(SAMPLES), until, ...sizes];
  const program = side === "ours"
    ? [Deno.execPath(), "run", "-A", "--no-check", pathOf("_nccl_rank.ts")]
    : [options.python!, pathOf("peers/nccl.py")];
  return run(CLUSTER, ["run", ...program, ...rank], until_ms - Date.now() + GRACE_MS);
}

function share(op: string): number {
  const part = (ranks - 1) / ranks;
  if (op === "allReduce") return 2 * part;
  if (op === "broadcast" || op === "reduce" || op === "sendRecv") return 1;
  if (op !== "allToAllV") return part;
  const sent = Array.from({ length: ranks }, (_, s) => {
    const units = Array.from({ length: ranks }, (_, r) => s === r ? 0 : 1 + (s + r) % 3);
    return units.reduce((a, b) => a + b) / (3 * ranks);
  });
  return Math.max(...sent);
}

const median = (xs: number[]) => [...xs].sort((a, b) => a - b)[xs.length >> 1];

async function gpuName(): Promise<string> {
  try {
    const args = ["--query-gpu=name", "--format=csv,noheader"];
    return (await run("nvidia-smi", args)).trim().split("\n")[0];
  } catch {
    return "no GPU";
  }
}

async function measure(mbit: number, machine: string, until_ms: number): Promise<Row[]> {
  const samples = new Map<string, { time: number[]; host: number[] }>();
  await run(CLUSTER, ["up", `${ranks}`, `${mbit}`]);
  try {
    let last_ms = 0; // what a repeat takes
    for (let repeat = 0; repeat < repeats && Date.now() + last_ms < until_ms; repeat++) {
      const start_ms = Date.now();
      for (const [i, side] of sides.entries()) {
        const part_ms = (until_ms - Date.now()) / (sides.length - i);
        const text = await runSide(side, Date.now() + part_ms - GRACE_MS);
        for (const line of text.trim().split("\n")) {
          const [op, bytes, time_us, host_us] = line.split(" ");
          if (!Number(time_us) || !Number(host_us)) continue;
          const key = `${op} ${side} ${bytes}`;
          const row = samples.get(key) ?? { time: [], host: [] };
          row.time.push(Number(time_us));
          row.host.push(Number(host_us));
          samples.set(key, row);
        }
      }
      last_ms = Date.now() - start_ms;
    }
  } finally {
    await run(CLUSTER, ["down"]);
  }
  const about = { date: new Date().toISOString(), machine, command: command() };
  return [...samples].map(([key, { time, host }]) => {
    const [op, side, bytes] = key.split(" ");
    const time_us = median(time);
    return {
      op,
      side: side as Side,
      ranks,
      mbit,
      bytes: Number(bytes),
      time_us,
      host_us: median(host),
      repeats: time.length,
      busbw_gbs: Number(bytes) / time_us / 1000 * share(op),
      ...about,
    };
  });
}

function command(): string {
  return ["deno task bench:nccl", ...Deno.args].join(" ");
}

function printTable(rows: Row[], mbit: number): void {
  console.log(
    `\n${ranks} ranks, ${mbit === 0 ? "links without limit" : `links of ${mbit} Mbit/s`}`,
  );
  console.log(
    `${"op".padEnd(14)}${"bytes".padStart(10)}${
      SIDES.map((side) => `${side} us`.padStart(13) + "GB/s".padStart(8) + "host us".padStart(9))
        .join("")
    }   time   host`,
  );
  const ops = [...new Set(rows.map(({ op }) => op))];
  const byOp = (a: Row, b: Row) => ops.indexOf(a.op) - ops.indexOf(b.op) || a.bytes - b.bytes;
  for (const ours of rows.filter((row) => row.side === "ours").sort(byOp)) {
    const peer = rows.find((row) =>
      row.side === "pytorch" && row.op === ours.op && row.bytes === ours.bytes
    );
    const cells = [ours, peer].map((row) =>
      row === undefined
        ? "-".padStart(13) + "-".padStart(8) + "-".padStart(9)
        : row.time_us.toFixed(1).padStart(13) + row.busbw_gbs.toFixed(3).padStart(8) +
          row.host_us.toFixed(1).padStart(9)
    );
    const ratios = peer ? [peer.time_us / ours.time_us, peer.host_us / ours.host_us] : [];
    console.log(
      ours.op.padEnd(14) + String(ours.bytes).padStart(10) + cells.join("") +
        ratios.map((ratio) => `${ratio.toFixed(2)}x`.padStart(7)).join(""),
    );
  }
  summary(rows);
}

function summary(rows: Row[]): void {
  const ratios = rows.filter((row) => row.side === "ours" && row.bytes >= 1 << 20)
    .flatMap((ours) => {
      const peer = rows.find((row) =>
        row.side === "pytorch" && row.op === ours.op && row.bytes === ours.bytes
      );
      return peer ? [{ ours, ratio: peer.time_us / ours.time_us }] : [];
    });
  if (ratios.length === 0) return;
  const mean = Math.exp(ratios.reduce((sum, r) => sum + Math.log(r.ratio), 0) / ratios.length);
  const least = ratios.reduce((a, b) => b.ratio < a.ratio ? b : a);
  const limited = ratios[0].ours.mbit * 1e6 / 8e9;
  const best = Math.max(...rows.map((row) => row.busbw_gbs));
  console.log(
    `1 MiB and up: ${mean.toFixed(3)}x of PyTorch in the mean, least ${
      least.ratio.toFixed(2)
    }x (${least.ours.op}, ${least.ours.bytes})${
      limited > 0 && best < 0.9 * limited ? "; VOID: the links did not reach 0.9 of their rate" : ""
    }`,
  );
}

const machine = await gpuName();
const rows: Row[] = [];
const rates = options.rates!.split(",").map(Number);
for (const [i, mbit] of rates.entries()) {
  const until_ms = Date.now() + (end_ms - Date.now()) / (rates.length - i);
  const more = await measure(mbit, machine, until_ms);
  printTable(more, mbit);
  rows.push(...more);
  if (options.json) await Deno.writeTextFile(options.json, JSON.stringify(rows, null, 1) + "\n");
}
const counts = rows.map((row) => row.repeats);
console.log(
  `\n${machine}; ${[...versions].join("; ")}; ${Math.min(...counts)} to ${
    Math.max(...counts)
  } repeats of ${SAMPLES} samples`,
);
