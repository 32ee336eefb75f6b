// Policies of the training scheduler side by side, on ranks that share real links: hosts of bench/testbed with a link each, CPU ranks over Open
// MPI or GPU ranks over NCCL; or, without a rate, ranks of this host over shared memory.
//
//   deno task bench:schedule [--device cpu|cuda] [--ranks 4,8] [--per-host P] [--mbit 10000,5000] [--policies fifo,lina,…] [--shapes txl,…]
//                            [--micro-op-mb 1,3,…] [--experts-per-device 1,2] [--chunks 2,4] [--two-level] [--rounds N] [--steps N]
//                            [--warm N] [--settle N] [--gpu-share %] [--budget-s N] [--json FILE] [--report FILE.html] [--trace FILE]
//
// --ranks and --mbit go together: one rate, or one for each number of ranks; --other-mbit R,R adds rates at which only --other-policies run, once,
// for half the steps.
// --mbit 0: no testbed. --two-level, with --per-host: `fifo`, `lina` and `planned` with all-to-alls of two levels, too. --micro-op-mb adds a
// `lina` of each size. --chunks: slices of the pipelined policies. With more than one expert per device those policies run that packing is
// compared by.
//
// Ranks start once for each number of ranks. They make a shape's model, train it for --settle steps without a limit of the rate, until its
// load is about even, and then policies take turns, --rounds times: every turn restores weights, moments and batches, so all train the same
// steps and losses are comparable, and what drifts meets all policies. `outside`, beside whose all-to-alls nothing is reduced, comes first:
// its turn gives the times of computation, for bounds and plans. Conditions are in _schedule_shapes.ts, definitions in _schedule_rows.ts.

import { parseArgs } from "node:util";
import { SCHEDULER_NAMES } from "../lina/training/schedulers.ts";
import { needGpuHardware } from "./_gpu.ts";
import type { ScheduleResults } from "./report/results.ts";
import { Ranks, testbed } from "./_schedule_ranks.ts";
import { describeShape, PAPER_SHAPES, SHAPES } from "./_schedule_shapes.ts";
import { type Launch, measureShape } from "./_schedule_shape.ts";
import { tableOf } from "./_schedule_table.ts";
import { writeTrace } from "./_schedule_trace.ts";

const { values: options } = parseArgs({
  options: {
    device: { type: "string", default: "cpu" },
    ranks: { type: "string", default: "4" },
    "per-host": { type: "string", default: "1" },
    mbit: { type: "string", default: "10000" },
    "other-mbit": { type: "string", default: "" },
    policies: { type: "string", default: SCHEDULER_NAMES.join() },
    "other-policies": { type: "string", default: "fifo,outside,lina,planned" },
    shapes: { type: "string", default: PAPER_SHAPES.join() },
    "micro-op-mb": { type: "string", default: "" },
    "experts-per-device": { type: "string", default: "1" },
    chunks: { type: "string", default: "2" },
    "two-level": { type: "boolean", default: false },
    rounds: { type: "string", default: "2" },
    steps: { type: "string", default: "6" },
    warm: { type: "string", default: "2" },
    settle: { type: "string", default: "30" },
    "gpu-share": { type: "string" },
    "budget-s": { type: "string", default: "Infinity" },
    json: { type: "string" },
    report: { type: "string" },
    trace: { type: "string" },
  },
});

function refuse(what: string, rule: string, value: unknown): never {
  console.error(
    `error: Cannot compare schedules as --${what} must be ${rule}: current value is ${value}`,
  );
  Deno.exit(1);
}

/** The numbers of an option. */
function numbers(name: keyof typeof options, least: number): number[] {
  const text = String(options[name]);
  const list = text === "" ? [] : text.split(",").map(Number);
  if (list.some((value) => !(value >= least))) refuse(name, `numbers >= ${least}`, text);
  return list;
}

/** The names of an option. */
function names<T extends string>(name: keyof typeof options, known: readonly T[]): T[] {
  const list = String(options[name]).split(",") as T[];
  for (const value of list) {
    if (!known.includes(value)) refuse(name, `among ${known.join(", ")}`, value);
  }
  return list;
}

const device = names("device", ["cpu", "cuda"] as const)[0];
if (device === "cuda") needGpuHardware();
const ranksList = numbers("ranks", 2), rates = numbers("mbit", 0);
if (rates.length !== 1 && rates.length !== ranksList.length) {
  refuse("mbit", "one rate, or one for each number of ranks", options.mbit);
}
const [perHost] = numbers("per-host", 1), otherRates = numbers("other-mbit", 1);
const shapes = names("shapes", Object.keys(SHAPES));
const begin_ms = performance.now();
/** What holds for every number of ranks. */
const asked = {
  perHost,
  device,
  policies: names("policies", SCHEDULER_NAMES),
  otherPolicies: names("other-policies", SCHEDULER_NAMES),
  microOpBytes: numbers("micro-op-mb", 0.001).map((mb) => Math.round(mb * 1e6)),
  experts: numbers("experts-per-device", 1),
  chunks: numbers("chunks", 1),
  twoLevel: options["two-level"],
  rounds: numbers("rounds", 1)[0],
  steps: numbers("steps", 1)[0],
  warm: numbers("warm", 0)[0],
  settle: numbers("settle", 0)[0],
  end_ms: begin_ms + 1000 * Number(options["budget-s"]),
  progress,
};
for (const ranks of ranksList) {
  if (ranks % perHost !== 0) refuse("per-host", `a divisor of ${ranks} ranks`, perHost);
}

/** NCCL's settings, alike for all policies; whoever sets them has it so. */
const NCCL: Readonly<Record<string, string>> = { NCCL_MAX_CTAS: "1" };
/** Part of an H200 that is to a link of 10 Gbit/s what the paper's A100 is to its 100 Gbit/s; half of it for a link of 5. */
const GPU_SHARE = 32;

function settings(ranks: number): Record<string, string> {
  const env: Record<string, string> = {};
  if (device === "cpu") return env;
  for (const [name, value] of Object.entries(NCCL)) env[name] = Deno.env.get(name) ?? value;
  env.GPU_SHARE = options["gpu-share"] ?? String(Math.round(GPU_SHARE / ranks));
  return env;
}

const results: ScheduleResults & { rows: object[] } = {
  conditions: {},
  rows: [],
  timelines: [],
  slowdowns: [],
};
const about = {
  date: new Date().toISOString(),
  machine: "",
  command: ["deno task bench:schedule", ...Deno.args].join(" "),
};

function progress(text: string): void {
  const seconds = ((performance.now() - begin_ms) / 1000).toFixed(0).padStart(4);
  console.error(`${seconds} s  ${text}`);
}

/** Shapes that are left to be measured, for all numbers of ranks. */
let left = ranksList.length * shapes.length;

let alive: Ranks | null = null;
for (const signal of ["SIGINT", "SIGTERM"] as const) {
  Deno.addSignalListener(signal, () => alive ? alive.end() : Deno.exit(1)); // what waits for ranks throws
}

/** Everything with one number of ranks. */
async function launch(ranks: number, mbit: number): Promise<void> {
  const box = mbit > 0, env = settings(ranks);
  if (box) await testbed("up", String(ranks / perHost), String(mbit), String(perHost));
  try {
    await using running = alive = await Ranks.start({ device, ranks, perHost, box, env });
    about.machine = running.about;
    progress(`${ranks} ranks are connected: ${running.about}`);
    const plan: Launch = {
      ...asked,
      ranks,
      box,
      rates: [mbit, ...(box ? otherRates : [])],
    };
    for (const shape of shapes) {
      const now_ms = performance.now();
      if (now_ms > asked.end_ms) return;
      // What is left of the time is shared among what is left to be measured.
      const share_ms = (asked.end_ms - now_ms) / left--;
      for await (
        const part of measureShape(running, { ...plan, end_ms: now_ms + share_ms }, shape)
      ) {
        results.rows.push(...part.rows.map((row) => ({ ...row, ...about })));
        (results.timelines as object[]).push(...part.timelines);
        (results.slowdowns as object[]).push(...part.slowdowns);
        if (options.trace && part.traces) await writeTrace(options.trace, part.traces);
        for (const line of tableOf(part.rows)) console.log(line);
      }
    }
  } finally {
    alive = null;
    if (box) await testbed("down");
  }
}

function conditions(): ScheduleResults["conditions"] {
  const share = settings(ranksList[0]).GPU_SHARE;
  return {
    ...about,
    ...(share && { gpu_share: Number(share) }),
    shapes: Object.fromEntries(shapes.map((name) => [name, describeShape(SHAPES[name])])),
    settings: {
      ...Object.fromEntries(
        ranksList.flatMap((ranks) =>
          Object.entries(settings(ranks)).map(([name, value]) => [`${name}, ${ranks} ranks`, value])
        ),
      ),
      rounds: Number(options.rounds),
      steps: Number(options.steps),
      "steps before each turn": Number(options.warm),
      "steps before all turns": Number(options.settle),
    },
  };
}

/** Numbers as long as they need to be. */
function short(_: string, value: unknown): unknown {
  return typeof value === "number" && !Number.isInteger(value)
    ? Number(value.toPrecision(6))
    : value;
}

try {
  for (const [i, ranks] of ranksList.entries()) await launch(ranks, rates[i] ?? rates[0]);
} finally {
  const all = { ...results, conditions: conditions() };
  if (options.json && all.rows.length > 0) {
    await Deno.writeTextFile(options.json, JSON.stringify(all, short, 1) + "\n");
  }
  if (options.report && all.rows.length > 0) {
    const { scheduleHtml } = await import("./report/schedule_html.ts");
    await Deno.writeTextFile(options.report, scheduleHtml(all));
  }
  console.log(`\n${about.machine}`);
}
