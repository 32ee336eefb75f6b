// All-to-alls on two levels against direct ones, on ranks that share hosts, whose links are limited (bench/testbed).
//
//   deno task bench:two-level [--device cpu|cuda] [--shapes 2x2,3x2] [--mbit 1000,…] [--sizes 1024,…] [--rounds N] [--budget-s N] [--json FILE]
//
// --shapes: hosts x ranks per host. On processors Open MPI carries the data, over TCP inside a host, too; on GPUs NCCL does, over sockets, and
// all ranks share one GPU. bytes: what the rank that sends most gives in all, its own part included. A turn is several operations in a row,
// each begun when the one before has ended, as a layer's are; both ways take turns, and the slowest rank counts. Results are compared bit
// by bit before. Then what the α-β model of lina/training/levels.ts, fitted on the same links, says and would choose. --budget-s bounds every
// shape and rate.

import { parseArgs } from "node:util";
import { needGpuHardware } from "./_gpu.ts";
import type { TwoLevelJob, TwoLevelRow } from "./_two_level_rank.ts";

const { values: options } = parseArgs({
  options: {
    device: { type: "string", default: "cpu" },
    shapes: { type: "string", default: "2x2" },
    mbit: { type: "string", default: "1000" },
    sizes: { type: "string", default: "1024,4096,16384,65536,262144,1048576,4194304" },
    rounds: { type: "string", default: "7" },
    "budget-s": { type: "string", default: "60" },
    json: { type: "string" },
  },
});
const { device } = options;
if (device !== "cpu" && device !== "cuda") {
  throw new TypeError(
    `Cannot measure as --device must be cpu or cuda: current value is ${device}`,
  );
}
if (device === "cuda") needGpuHardware();
const job: TwoLevelJob = {
  device,
  sizes: options.sizes!.split(",").map(Number),
  rounds: Number(options.rounds),
  budget_s: Number(options["budget-s"]),
};
const CLUSTER = new URL("testbed/cluster.sh", import.meta.url).pathname;
const program = new URL("_two_level_rank.ts", import.meta.url).pathname;
/** How long ranks may take to start and to leave, in ms. */
const SLACK_MS = 40_000;

/** Runs a command to its end. @returns What it printed. @throws {Error} With that, if it fails. */
async function run(command: string, args: string[], limit_ms = SLACK_MS): Promise<string> {
  const signal = AbortSignal.timeout(limit_ms);
  const { success, stdout, stderr } = await new Deno.Command(command, {
    args,
    signal,
    stdin: "null",
  }).output();
  const [text, errors] = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes));
  if (!success) throw new Error(`${command} ${args.join(" ")}:\n${(text + errors).slice(-4000)}`);
  return text;
}

async function machine(): Promise<string> {
  if (device === "cuda") {
    const args = ["--query-gpu=name", "--format=csv,noheader"];
    return (await run("nvidia-smi", args)).trim().split("\n")[0];
  }
  const text = await Deno.readTextFile("/proc/cpuinfo");
  const model = /^model name\s*: (.*)$/m.exec(text)?.[1] ?? Deno.build.arch;
  return `${model}, ${navigator.hardwareConcurrency} cores`;
}

const about = {
  device,
  date: new Date().toISOString(),
  machine: await machine(),
  command: ["deno task bench:two-level", ...Deno.args].join(" "),
};
const lines: object[] = [];

/** Measures one shape of the testbed at one rate. */
async function measure(hosts: number, perHost: number, mbit: number): Promise<void> {
  await run(CLUSTER, ["up", `${hosts}`, `${mbit}`, `${perHost}`]);
  try {
    const deno = [Deno.execPath(), "run", "-A", "--no-check", program, JSON.stringify(job)];
    const how = device === "cpu" ? "mpirun" : "run";
    // Under mpirun the ranks find each other through MPI: rank 0 could not serve a rendezvous while MPI starts.
    const lone = device === "cpu" ? ["env", "-u", "MASTER_ADDR", "-u", "MASTER_PORT"] : [];
    const text = await run(CLUSTER, [how, ...lone, ...deno], 1000 * job.budget_s + SLACK_MS);
    for (const line of text.split("\n")) {
      const [, kind, json] = /^(ROW|FITS) (.*)$/.exec(line) ?? [];
      if (kind === undefined) continue;
      const value = JSON.parse(json);
      lines.push({ kind: kind.toLowerCase(), hosts, per_host: perHost, mbit, ...value, ...about });
      if (kind === "ROW") print(value, mbit);
      else printFits(value, mbit);
    }
  } finally {
    await run(CLUSTER, ["down"]);
  }
}

const number = (x: number, width: number) =>
  (x >= 1000 ? x.toFixed(0) : x >= 100 ? x.toFixed(1) : x.toPrecision(3)).padStart(width);

function printFits(
  { inner, outer, direct, handoff_us }: Record<string, { alpha_us: number; bytes_per_us: number }>,
  mbit: number,
): void {
  const link = (name: string, { alpha_us, bytes_per_us }: typeof inner) =>
    `${name} ${alpha_us.toFixed(1)} µs + bytes / ${bytes_per_us.toFixed(0)} MB/s`;
  console.log(
    `\n${mbit} Mbit/s: ${link("inner", inner)}, ${link("outer", outer)}, ${
      link("direct", direct)
    }, hand-off ${Number(handoff_us).toFixed(1)} µs`,
  );
  console.log(
    "shape counts      bytes  direct µs two-lev. µs  speedup  host µs       model µs           chosen     regret",
  );
}

function print(row: TwoLevelRow, _mbit: number): void {
  console.log([
    `${row.hosts}x${row.per_host}  `,
    row.counts.padEnd(7),
    number(row.bytes, 8),
    number(row.direct_us, 10),
    number(row.two_level_us, 11),
    row.speedup.toFixed(2).padStart(8),
    number(row.direct_host_us, 8),
    number(row.two_level_host_us, 6),
    number(row.model_direct_us, 9),
    number(row.model_two_level_us, 9),
    row.chosen.padStart(10),
    row.regret.toFixed(2).padStart(6),
  ].join(" "));
}

try {
  for (const shape of options.shapes!.split(",")) {
    const [hosts, perHost] = shape.split("x").map(Number);
    for (const mbit of options.mbit!.split(",")) await measure(hosts, perHost, Number(mbit));
  }
} finally {
  if (options.json && lines.length > 0) {
    const text = lines.map((line) =>
      JSON.stringify(
        line,
        (_, value) =>
          typeof value === "number" && !Number.isInteger(value)
            ? Number(value.toPrecision(5))
            : value,
      )
    );
    await Deno.writeTextFile(options.json, `[\n${text.join(",\n")}\n]\n`);
  }
}
