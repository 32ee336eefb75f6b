// From the samples of bench/nccl.ts to rows, with medians, quartiles and intervals of the ratios, and the table that people read. No
// measuring lives here.

/** Samples of one operation, size and rate. */
export interface Cell {
  readonly operation: string;
  readonly mbit: number;
  readonly bytes: number;
  /** For every launch and side its turns: `time_us`, `host_us`. */
  readonly launches: {
    readonly name: string;
    readonly turns: [time_us: number, host_us: number][];
  }[][];
}

/** Second side / first side: the median and its 95 % interval. Above 1 the first is faster. */
export interface Ratio {
  readonly median: number;
  readonly low: number;
  readonly high: number;
}

/** One side of a cell. */
export interface Row {
  readonly op: string;
  readonly side: string;
  readonly ranks: number;
  /** Rate of the links, 0 without a limit. */
  readonly mbit: number;
  readonly bytes: number;
  /** Medians and quartiles over turns, per operation. */
  readonly time_us: number;
  readonly time_quartiles_us: readonly [number, number];
  readonly host_us: number;
  readonly host_quartiles_us: readonly [number, number];
  readonly busbw_gbs: number;
  readonly launches: number;
  readonly turns: number;
  /** Medians of the launches' times. */
  readonly time_by_launch_us: readonly number[];
  /** On rows of the first side. */
  readonly time_ratio?: Ratio;
  readonly host_ratio?: Ratio;
}

/** Sizes from which the mark holds, and what it asks of time and host time. */
const MARK = { bytes: 1 << 20, time: 0.97, host: 1 };
const RESAMPLES = 1000;

function quantile(sorted: readonly number[], q: number): number {
  const at = q * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (at - low) * (sorted[Math.ceil(at)] - sorted[low]);
}

function quartiles(values: readonly number[]): [number, number, number] {
  const sorted = values.toSorted((a, b) => a - b);
  return [quantile(sorted, 0.25), quantile(sorted, 0.5), quantile(sorted, 0.75)];
}

const median = (values: readonly number[]) => quartiles(values)[1];

/** Numbers from 0 to 1 that are the same in every run (mulberry32). */
function randomOf(seed: number): () => number {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), seed | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/**
 * The ratio of two medians with its interval by bootstrap: launches are drawn, the same for both sides, then turns in each.
 *
 * @param first Samples of the first side, by launch.
 * @param second Those of the second.
 * @returns second / first.
 */
export function ratioOf(
  first: readonly (readonly number[])[],
  second: readonly (readonly number[])[],
): Ratio {
  const random = randomOf(1);
  const draw = <T>(from: readonly T[]) => from.map(() => from[Math.floor(random() * from.length)]);
  const launches = [...first.keys()];
  const ratios = Array.from({ length: RESAMPLES }, () => {
    const drawn = draw(launches);
    const [a, b] = [first, second].map((side) => median(drawn.flatMap((i) => draw(side[i]))));
    return b / a;
  }).sort((a, b) => a - b);
  const [low, high] = [quantile(ratios, 0.025), quantile(ratios, 0.975)];
  return { median: median(second.flat()) / median(first.flat()), low, high };
}

/** Part of a rank's bytes that crosses its link. */
function share(op: string, ranks: number): number {
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

/**
 * The rows of a result.
 *
 * @param cells What was measured.
 * @param sides Names of the sides.
 * @param ranks Ranks of a side.
 * @returns A row per cell and side.
 */
export function rowsOf(cells: readonly Cell[], sides: readonly string[], ranks: number): Row[] {
  return cells.flatMap(({ operation: op, mbit, bytes, launches: all }) => {
    // A launch that was cut short may lack the last turn of a side.
    const launches = all.filter((launch) => launch.every(({ turns }) => turns.length > 0));
    if (launches.length === 0) return [];
    const samplesOf = (side: number, what: 0 | 1) =>
      launches.map((launch) => launch[side].turns.map((turn) => turn[what]));
    return sides.map((side, i): Row => {
      const [times, hosts] = [samplesOf(i, 0), samplesOf(i, 1)];
      const [time_q1, time_us, time_q3] = quartiles(times.flat());
      const [host_q1, host_us, host_q3] = quartiles(hosts.flat());
      return {
        op,
        side,
        ranks,
        mbit,
        bytes,
        time_us,
        time_quartiles_us: [time_q1, time_q3],
        host_us,
        host_quartiles_us: [host_q1, host_q3],
        busbw_gbs: bytes / time_us / 1000 * share(op, ranks),
        launches: launches.length,
        turns: times.flat().length,
        time_by_launch_us: times.map(median),
        ...(i === 0 && sides.length > 1 && {
          time_ratio: ratioOf(times, samplesOf(1, 0)),
          host_ratio: ratioOf(hosts, samplesOf(1, 1)),
        }),
      };
    });
  });
}

/** Whether a ratio keeps a mark: the interval decides, or says that it cannot. */
export function verdict({ median, low, high }: Ratio, mark: number): string {
  if (low >= mark) return "";
  if (high < mark) return "below";
  return median < mark ? "open -" : "open +";
}

function ratioText({ median, low, high }: Ratio): string {
  return `${median.toFixed(2)}x`.padStart(7) + ` ${low.toFixed(2)}-${high.toFixed(2)}`.padEnd(11);
}

/**
 * Prints a table per rate, and what it says of the marks.
 *
 * @param rows The result.
 * @param sides Names of the sides.
 */
export function printTable(rows: readonly Row[], sides: readonly string[]): void {
  for (const mbit of new Set(rows.map((row) => row.mbit))) {
    const here = rows.filter((row) => row.mbit === mbit);
    console.log(
      `\n${here[0].ranks} ranks, ${mbit === 0 ? "links without limit" : `links of ${mbit} Mbit/s`}`,
    );
    const columns = sides.map((side) => `${side} us`.padStart(18) + "host us".padStart(9));
    const ratios = sides.length > 1 ? "   time (95 %)       host (95 %)" : "";
    console.log("op".padEnd(14) + "bytes".padStart(10) + columns.join("") + ratios);
    const operations = [...new Set(here.map((row) => row.op))];
    for (const op of operations) {
      for (const row of here.filter((row) => row.op === op && row.side === sides[0])) {
        const cells = here.filter((other) => other.op === op && other.bytes === row.bytes)
          .map(({ time_us, host_us }) =>
            time_us.toFixed(1).padStart(18) + host_us.toFixed(1).padStart(9)
          );
        const { time_ratio: time, host_ratio: host } = row;
        const end = time && host
          ? ratioText(time) + ratioText(host) +
            (row.bytes >= MARK.bytes ? verdict(time, MARK.time) : "")
          : "";
        console.log(op.padEnd(14) + String(row.bytes).padStart(10) + cells.join("") + end);
      }
    }
    console.log(summary(here, sides));
  }
}

function summary(rows: readonly Row[], sides: readonly string[]): string {
  const ours = rows.filter(({ time_ratio }) => time_ratio !== undefined);
  const large = ours.filter(({ bytes }) => bytes >= MARK.bytes);
  if (large.length === 0) return "";
  const mean = Math.exp(
    large.reduce((sum, row) => sum + Math.log(row.time_ratio!.median), 0) / large.length,
  );
  const limit_gbs = rows[0].mbit / 8000;
  const best = Math.max(...rows.map((row) => row.busbw_gbs));
  const lines = [
    `time, 1 MiB and up: ${sides[1]} / ${sides[0]} ${mean.toFixed(3)} in the mean; ` +
    verdicts(large, "time_ratio", MARK.time),
    `host time: ${verdicts(ours, "host_ratio", MARK.host)}`,
  ];
  if (best < 0.9 * limit_gbs) lines.push("VOID: the links did not reach 0.9 of their rate");
  return lines.join("\n");
}

function verdicts(
  rows: readonly Row[],
  what: "time_ratio" | "host_ratio",
  mark: number,
): string {
  const below = rows.filter((row) => row[what]!.high < mark);
  const kept = rows.filter((row) => row[what]!.low >= mark);
  const open = rows.length - below.length - kept.length;
  const under = rows.filter((row) => row[what]!.median < mark);
  const names = below.map(({ op, bytes }) => `${op} ${bytes}`).join(", ");
  return `of ${rows.length} rows ${kept.length} are at ${mark} or above (95 %), ${open} cannot be told, ${below.length} are below${
    names && `: ${names}`
  }; medians below: ${under.length}`;
}
