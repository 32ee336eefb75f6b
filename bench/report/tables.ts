// The tables of the report as HTML: policies, and the counterparts of the paper's Tables 1, 3 and 4 beside it. A cell that was not measured is
// a dash. All text is escaped here.

import { TABLE_1, TABLE_3, TABLE_4 } from "./paper.ts";
import type { ScheduleRow } from "./results.ts";
import { bestOf, type Group, isValid, nameOf, rateText, speedupOf } from "./rows.ts";
import { escape, type Markup } from "./svg.ts";

/** A column: its heading and what a row has there. */
export interface Column<T> {
  /** Heading; may have HTML. */
  readonly head: Markup;
  /** Cell, escaped if it is text; a dash if it is undefined. */
  cell(row: T): Markup | undefined;
  /** Whether words are in it, to the left. @default {false} */
  readonly left?: boolean;
}

/** A part of a table. */
export interface Section<T> {
  /** Line above its rows; not escaped. @default {none} */
  readonly title?: string;
  /** Its rows. */
  readonly rows: readonly T[];
  /** Class of a row. */
  classOf?(row: T): string;
}

/**
 * A table.
 *
 * @param columns Its columns.
 * @param sections Its rows.
 * @param caption What it says; HTML.
 * @returns An element that scrolls if it is too wide.
 */
export function table<T>(
  columns: readonly Column<T>[],
  sections: readonly Section<T>[],
  caption: Markup = "",
): Markup {
  const side = ({ left }: Column<T>) => left ? ' class="l"' : "";
  const heads = columns.map((column) => `<th${side(column)} scope="col">${column.head}</th>`);
  const body = sections.flatMap(({ title, rows, classOf }) => [
    ...(title === undefined ? [] : [
      `<tr class="group"><th colspan="${columns.length}" scope="rowgroup">${
        escape(title)
      }</th></tr>`,
    ]),
    ...rows.map((row) => {
      const cells = columns.map((column) => `<td${side(column)}>${column.cell(row) ?? "–"}</td>`);
      const name = classOf?.(row) ?? "";
      return `<tr${name ? ` class="${name}"` : ""}>${cells.join("")}</tr>`;
    }),
  ]);
  return `<div class="scroll"><table>${caption ? `<caption>${caption}</caption>` : ""}
<thead><tr>${heads.join("")}</tr></thead>
<tbody>
${body.join("\n")}
</tbody></table></div>`;
}

/** A number with so many digits; undefined where there is none. */
export function number(value: number | null | undefined, digits: number): Markup | undefined {
  return typeof value === "number" && Number.isFinite(value) ? value.toFixed(digits) : undefined;
}

/** A part as per cent. */
export function percent(value: number | undefined, digits = 0): Markup | undefined {
  const shown = number(value === undefined ? undefined : value * 100, digits);
  return shown === undefined ? undefined : `${shown} %`;
}

/** A factor. */
export function times(value: number | undefined): Markup | undefined {
  const shown = number(value, 2);
  return shown === undefined ? undefined : `${shown}x`;
}

/** Bytes in MB of 10⁶. */
function megabytes(value: number | null | undefined): Markup | undefined {
  if (typeof value !== "number" || !Number.isFinite(value)) return undefined;
  return (value / 1e6).toFixed(value < 1e7 ? 2 : 1);
}

/** Two cells in one. */
function pair(first: Markup | undefined, second: Markup | undefined): Markup | undefined {
  return first === undefined || second === undefined ? first : `${first} / ${second}`;
}

/**
 * All policies.
 *
 * @param groups Groups of rows.
 * @returns A table with a part per group; void rows are struck through, with the reason.
 */
export function policyTable(groups: readonly Group[]): Markup {
  const rowsOf = new Map(groups.flatMap(({ rows }) => rows.map((row) => [row, rows] as const)));
  const columns: Column<ScheduleRow>[] = [
    {
      head: "policy",
      left: true,
      cell: (row) =>
        escape(nameOf(row)) +
        (row.void === undefined
          ? ""
          : `<br><span class="bad why">void: ${escape(row.void)}</span>`),
    },
    { head: "micro-op<br>MB", cell: (row) => megabytes(row.micro_op_bytes) },
    { head: "slices", cell: (row) => number(row.chunks, 0) },
    { head: "step<br>ms", cell: (row) => number(row.step_ms, 2) },
    { head: "speedup", cell: (row) => times(speedupOf(row, rowsOf.get(row)!)) },
    { head: "bound<br>/ step", cell: (row) => number(row.bound_ms! / row.step_ms, 3) },
    {
      head: "model<br>/ step",
      cell: (row) => number(row.predicted_ms! / row.step_ms, 3),
    },
    { head: "floor<br>ms", cell: (row) => number(row.floor_ms, 2) },
    {
      head: "fwd a2a<br>ms / p95",
      cell: (row) => pair(number(row.a2a_fwd_ms, 2), number(row.a2a_fwd_p95_ms, 2)),
    },
    {
      head: "bwd a2a<br>ms / p95",
      cell: (row) => pair(number(row.a2a_bwd_ms, 2), number(row.a2a_bwd_p95_ms, 2)),
    },
    { head: "bwd a2a<br>slowdown", cell: (row) => times(row.a2a_slowdown) },
    { head: "a2a<br>share", cell: (row) => percent(row.a2a_share) },
    { head: "allreduce<br>ms", cell: (row) => number(row.allreduce_ms, 1) },
    { head: "allreduce<br>ends, ms", cell: (row) => number(row.allreduce_finish_ms, 1) },
    { head: "overlap", cell: (row) => percent(row.overlap) },
    {
      head: "link busy<br>/ used",
      cell: (row) => pair(percent(row.link_busy), percent(row.link_used)),
    },
    { head: "MB<br>sent", cell: (row) => megabytes(row.bytes) },
    { head: "host<br>cost", cell: (row) => percent(row.host_share, 1) },
    { head: "loss", cell: (row) => number(row.loss, 6) },
  ];
  const shown = columns.filter(({ cell }, i) =>
    i === 0 || groups.some(({ rows }) => rows.some((row) => cell(row) !== undefined))
  );
  return table(
    shown,
    groups.map(({ title, rows }) => ({
      title,
      rows,
      classOf: (row: ScheduleRow) => {
        if (!isValid(row)) return "void";
        const same = rows.filter((other) =>
          isValid(other) && other.experts_per_device === row.experts_per_device
        );
        return same.length > 1 && same.every((other) => other.step_ms >= row.step_ms) ? "best" : "";
      },
    })),
    "a2a: all-to-all. Medians over steps; a step is the slowest rank's. Speedup: over unpacked fifo. In bold the quickest with as many experts on a device.",
  );
}

/** A row of ours with the packed one of the same shape. */
interface Packed {
  readonly group: Group;
  readonly alone?: ScheduleRow;
  readonly packed?: ScheduleRow;
}

/** The row of a policy with the most experts on a device that still exchange tokens. */
function packedOf({ rows }: Group, policy: string): ScheduleRow | undefined {
  const most = rows.filter((row) =>
    row.policy === policy && row.experts_per_device > 1 && isValid(row)
  ).reduce((most, { experts_per_device }) => Math.max(most, experts_per_device), 0);
  return most > 0 ? bestOf(rows, policy, most) : undefined;
}

/**
 * The counterpart of Table 1: what all-to-alls cost under `fifo`.
 *
 * @param groups Groups of rows.
 * @returns Two tables, or null if no `fifo` was measured.
 */
export function table1(groups: readonly Group[]): Markup | null {
  const rows = groups.flatMap(({ rows }) => bestOf(rows, "fifo") ?? [])
    .filter(({ a2a_share }) => a2a_share !== undefined);
  if (rows.length === 0) return null;
  const ours = table<ScheduleRow>(
    [
      { head: "shape", left: true, cell: ({ shape }) => escape(shape) },
      { head: "ranks = experts", cell: ({ ranks }) => String(ranks) },
      { head: "link", cell: ({ mbit }) => rateText(mbit) },
      { head: "step ms", cell: ({ step_ms }) => number(step_ms, 1) },
      { head: "all-to-all ms", cell: ({ a2a_ms }) => number(a2a_ms, 1) },
      { head: "share", cell: ({ a2a_share }) => percent(a2a_share, 1) },
    ],
    [{ rows }],
    "Ours, fifo.",
  );
  const paper = table<(typeof TABLE_1)[number]>(
    [
      { head: "model", left: true, cell: ({ model }) => escape(model) },
      { head: "GPUs = experts", cell: ({ gpus }) => String(gpus) },
      { head: "all-to-all ms", cell: ({ a2a_ms }) => String(a2a_ms) },
      { head: "share", cell: ({ share }) => percent(share, 1) },
    ],
    [{ rows: TABLE_1 }],
    "The paper, training; mean share 37.4 %.",
  );
  return `<div class="pair">${ours}${paper}</div>`;
}

/**
 * The counterpart of Table 3: how much of the all-to-alls' time the device computes, without and with packing.
 *
 * @param groups Groups of rows.
 * @returns Two tables, or null if neither was measured.
 */
export function table3(groups: readonly Group[]): Markup | null {
  const policy = "lina+pipeline";
  const rows = groups.map((group): Packed => ({
    group,
    alone: bestOf(group.rows, policy),
    packed: packedOf(group, policy),
  })).filter(({ alone, packed }) => (alone ?? packed)?.pipelining !== undefined);
  if (rows.length === 0) return null;
  const ours = table<Packed>(
    [
      { head: "shape", left: true, cell: ({ group }) => escape(group.title) },
      { head: "without packing", cell: ({ alone }) => percent(alone?.pipelining) },
      { head: "with packing", cell: ({ packed }) => percent(packed?.pipelining) },
      { head: "experts on a device", cell: ({ packed }) => number(packed?.experts_per_device, 0) },
    ],
    [{ rows }],
    "Ours, lina+pipeline: part of the all-to-alls' time during which the rank computes.",
  );
  const paper = table<(typeof TABLE_3)[number]>(
    [
      { head: "model", left: true, cell: ({ model }) => escape(model) },
      { head: "without packing", cell: ({ without }) => percent(without) },
      { head: "with packing", cell: ({ packed }) => percent(packed) },
      { head: "experts on a device", cell: ({ experts }) => String(experts) },
    ],
    [{ rows: TABLE_3 }],
    "The paper, 16 experts.",
  );
  return `<div class="pair">${ours}${paper}</div>`;
}

/**
 * The counterpart of Table 4: utilisation and memory, `fifo` against the quickest of Lina's schedules.
 *
 * @param groups Groups of rows.
 * @returns Two tables, or null if neither was measured.
 */
export function table4(groups: readonly Group[]): Markup | null {
  const rows = groups.map((group) => {
    const fifo = bestOf(group.rows, "fifo");
    const lina = group.rows.filter((row) => row.policy.startsWith("lina") && isValid(row))
      .toSorted((a, b) => a.step_ms - b.step_ms)[0];
    return { group, fifo, lina };
  }).filter(({ fifo, lina }) => fifo?.utilisation !== undefined && lina !== undefined);
  if (rows.length === 0) return null;
  type Row = (typeof rows)[number];
  const memory = (row?: ScheduleRow) =>
    row?.peak_bytes === undefined
      ? undefined
      : row.memory_bytes === undefined
      ? `${(row.peak_bytes / 1e9).toFixed(2)} GB`
      : percent(row.peak_bytes / row.memory_bytes);
  const ours = table<Row>(
    [
      { head: "shape", left: true, cell: ({ group }) => escape(group.title) },
      { head: "utilisation,<br>fifo", cell: ({ fifo }) => percent(fifo?.utilisation, 1) },
      { head: "utilisation,<br>Lina", cell: ({ lina }) => percent(lina?.utilisation, 1) },
      { head: "peak memory of<br>a rank, fifo", cell: ({ fifo }) => memory(fifo) },
      { head: "peak memory of<br>a rank, Lina", cell: ({ lina }) => memory(lina) },
      { head: "Lina is", left: true, cell: ({ lina }) => escape(nameOf(lina!)) },
    ],
    [{ rows }],
    "Ours: part of the step in which the rank computes.",
  );
  const paper = table<(typeof TABLE_4)[number]>(
    [
      { head: "model", left: true, cell: ({ model }) => escape(model) },
      { head: "utilisation,<br>baseline", cell: ({ utilisation }) => percent(utilisation[0], 1) },
      { head: "utilisation,<br>Lina", cell: ({ utilisation }) => percent(utilisation[1], 1) },
      { head: "peak memory,<br>baseline", cell: ({ memory }) => percent(memory[0], 1) },
      { head: "peak memory,<br>Lina", cell: ({ memory }) => percent(memory[1], 1) },
    ],
    [{ rows: TABLE_4 }],
    "The paper, 16 experts, of a GPU's 40 GB.",
  );
  return `<div class="pair">${ours}${paper}</div>`;
}
