// The counterparts of the paper's Figures 3, 7, 14 and 15 and Tables 1, 3 and 4, one command each, as an HTML page with the paper's numbers
// beside ours. Measures with bench/schedule.ts what the page needs, or draws results that there are.
//
//   deno task figures [--figure 3|7|14|15 | --table 1|3|4] [--from RESULTS.json] [--out FILE.html] [options of bench:schedule]
//
// --out FILE.svg writes a figure's first drawing alone, for other pages. Without --figure or --table: everything. Other options go to bench:schedule as they are (--device cuda --ranks 4 --mbit 10000 …) and stand
// above those that a figure asks for.

import { SCHEDULER_NAMES } from "../lina/training/schedulers.ts";
import { FIGURE_15_MS } from "./report/paper.ts";
import { type Part, PARTS, scheduleHtml, scheduleSvgs } from "./report/schedule_html.ts";
import { parseResults } from "./report/results.ts";

/** What is wanted, as the command line has it. */
export interface Wanted {
  /** What is shown; undefined is everything. */
  readonly part: Part | undefined;
  /** Results that there are. */
  readonly from: string | undefined;
  /** The page. */
  readonly out: string;
  /** Options of bench:schedule. */
  readonly rest: readonly string[];
}

/**
 * Reads a command line.
 *
 * @param args Its words.
 * @returns What is wanted.
 * @throws {RangeError} If there is no such figure or table, a value is missing, or options of bench:schedule stand beside --from.
 */
export function readArgs(args: readonly string[]): Wanted {
  let part: Part | undefined, from: string | undefined, out: string | undefined;
  const rest: string[] = [];
  for (let i = 0; i < args.length; i++) {
    const [, name, joined] = /^--(figure|table|from|out)(?:=(.*))?$/s.exec(args[i]) ?? [];
    if (name === undefined) {
      rest.push(args[i]);
      continue;
    }
    const value = joined ?? args[++i];
    if (value === undefined) throw new RangeError(`Cannot draw as --${name} must have a value`);
    if (name === "from") from = value;
    else if (name === "out") out = value;
    else {
      const found = PARTS.find((known) => known === `${name} ${value}`);
      if (!found || part !== undefined) {
        const known = PARTS.filter((known) => /\d$/.test(known)).join(", ");
        throw new RangeError(
          `Cannot draw as there must be one of ${known}: current value is ${name} ${value}${
            part === undefined ? "" : ` beside ${part}`
          }`,
        );
      }
      part = found;
    }
  }
  if (from !== undefined && rest.length > 0) {
    throw new RangeError(
      `Cannot draw ${from} as nothing is measured, so options must be of this command: current value is ${
        rest[0]
      }`,
    );
  }
  return { part, from, out: out ?? `${(part ?? "schedules").replace(" ", "_")}.html`, rest };
}

/** All policies. */
const ALL = SCHEDULER_NAMES.join();

/**
 * The options of bench:schedule that a part needs.
 *
 * @param part The part; undefined is everything.
 * @param mbit Rate of the links, for sizes that are times on them; 0 is no limit.
 * @returns Words of a command line. `outside` is always there, as its turns give the times of computation.
 */
export function optionsOf(part: Part | undefined, mbit: number): string[] {
  // As long on this link as 10 to 100 MB on the paper's, and less; without a limit, as at 10 Gbit/s.
  const sizes = FIGURE_15_MS.map((ms) => Number((ms * (mbit || 10_000) / 8000).toPrecision(3)));
  const sweep = ["--micro-op-mb", sizes.join()], packed = ["--experts-per-device", "1,2"];
  switch (part) {
    case "figure 3":
      return ["--policies", "fifo,outside,priority,lina,planned"];
    case "figure 7":
      return ["--policies", ALL, "--rounds", "1"];
    case "figure 14":
      return ["--policies", ALL];
    case "figure 15":
      return ["--policies", "fifo,outside,lina,planned", ...sweep];
    case "table 1":
      return ["--policies", "fifo,outside"];
    case "table 3":
      return ["--policies", "fifo,outside,lina+pipeline", ...packed];
    case "table 4":
      return ["--policies", "fifo,outside,lina,lina+pipeline", ...packed];
    default:
      return ["--policies", ALL, ...sweep, ...packed];
  }
}

/** Value of an option among words. */
function valueOf(words: readonly string[], name: string): string | undefined {
  const at = words.findIndex((word) => word === name || word.startsWith(`${name}=`));
  if (at < 0) return undefined;
  return words[at].includes("=") ? words[at].slice(name.length + 1) : words[at + 1];
}

/** Measures. @returns The text of the results. */
async function measure({ part, rest }: Wanted): Promise<string> {
  const own = valueOf(rest, "--json");
  const path = own ?? await Deno.makeTempFile({ prefix: "lina-figures-", suffix: ".json" });
  const mbit = Number(valueOf(rest, "--mbit")?.split(",")[0] ?? 10_000);
  const script = new URL("schedule.ts", import.meta.url).pathname;
  const words = [...optionsOf(part, mbit), ...rest, ...(own === undefined ? ["--json", path] : [])];
  try {
    const { code } = await new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", script, ...words],
      stdin: "null",
      stdout: "inherit",
      stderr: "inherit",
    }).spawn().output();
    if (code !== 0) Deno.exit(code); // it has said why
    return await Deno.readTextFile(path);
  } finally {
    if (own === undefined) await Deno.remove(path).catch(() => {});
  }
}

async function main(): Promise<void> {
  const wanted = readArgs(Deno.args);
  const json = wanted.from === undefined
    ? await measure(wanted)
    : await Deno.readTextFile(wanted.from);
  const results = parseResults(json, wanted.from ?? "what bench:schedule wrote");
  const { part, out } = wanted;
  const title = part === undefined
    ? undefined
    : `Counterpart of the paper's ${part[0].toUpperCase()}${part.slice(1)}`;
  const parts = part === undefined ? undefined : [part, "conditions" as const];
  let text = scheduleHtml(results, { parts, title });
  if (out.endsWith(".svg")) {
    const [first] = part === undefined ? [] : scheduleSvgs(results, part);
    if (first === undefined) {
      throw new RangeError(
        `Cannot draw ${out} as there must be a figure: current value is ${part}`,
      );
    }
    text = first;
  }
  await Deno.writeTextFile(out, text);
  console.log(`${out}: ${part ?? "everything"} of ${results.rows.length} rows`);
}

if (import.meta.main) {
  try {
    await main();
  } catch (error) {
    console.error(`error: ${error instanceof Error ? error.message : error}`);
    Deno.exit(1);
  }
}
