// Aligned tables for the end of a run and for benchmarks, as plain text or as Markdown. Not a layout engine: one line per row,
// numbers to the right, words to the left.

import { stripVTControlCharacters } from "node:util";

/** What a cell may hold; null and undefined print as `–`. */
export type Cell = string | number | bigint | boolean | null | undefined;

/** How one column is shown. */
export interface Column {
  /** Property of the rows. */
  readonly key: string;
  /** Heading. @default {key} */
  readonly label?: string;
  /** Digits after the point of numbers that are not whole. @default {3} */
  readonly digits?: number;
  /** Side that cells keep to. @default {"right" for columns of numbers, else "left"} */
  readonly align?: "left" | "right";
}

/** Options of {@linkcode formatTable}. */
export interface TableOptions {
  /** Columns in order, by key or in full. @default {the keys of all rows, in order of appearance} */
  readonly columns?: readonly (string | Column)[];
  /** Writes a Markdown table. @default {false} */
  readonly markdown?: boolean;
}

/**
 * Formats rows as an aligned table.
 *
 * @param rows The rows; a property that a row lacks prints as `–`.
 * @param options Columns and form.
 * @returns Lines without a final newline; only the heading when there are no rows.
 *
 * @example
 * ```ts
 * import { formatTable } from "./table.ts";
 * import assert from "node:assert/strict";
 *
 * assert.equal(
 *   formatTable([{ policy: "fifo", step_ms: 31 }, { policy: "lina", step_ms: 9.25 }]),
 *   "policy  step_ms\n------  -------\nfifo         31\nlina      9.250",
 * );
 * ```
 */
export function formatTable(
  rows: readonly Readonly<Record<string, Cell>>[],
  options: TableOptions = {},
): string {
  const keys = options.columns ?? [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const columns: Column[] = keys.map((c) => typeof c === "string" ? { key: c } : c);
  const cells = columns.map((column) => {
    const body = rows.map((row) => formatCell(row[column.key], column.digits ?? 3));
    const numeric = rows.every((row) =>
      row[column.key] === undefined || row[column.key] === null ||
      typeof row[column.key] === "number" || typeof row[column.key] === "bigint"
    );
    const right = (column.align ?? (numeric && rows.length > 0 ? "right" : "left")) === "right";
    const head = column.label ?? column.key;
    const all = options.markdown ? [head, ...body].map(escapePipes) : [head, ...body];
    const width = Math.max(options.markdown ? 3 : 0, ...all.map(widthOf));
    return { right, width, lines: all.map((text) => pad(text, width, right)) };
  });
  const lines: string[] = [];
  for (let i = 0; i <= rows.length; i++) {
    lines.push(cells.map((column) => column.lines[i]).join(options.markdown ? " | " : "  "));
    if (i > 0) continue;
    lines.push(
      options.markdown
        ? cells.map((c) => "-".repeat(c.width - 1) + (c.right ? ":" : "-")).join(" | ")
        : cells.map((c) => "-".repeat(c.width)).join("  "),
    );
  }
  return options.markdown
    ? lines.map((line) => `| ${line} |`).join("\n")
    : lines.map((line) => line.trimEnd()).join("\n");
}

/**
 * A number of bytes as a person reads it.
 *
 * @param bytes The number.
 * @returns For example `1.5 MB`; powers of 1000.
 */
export function formatBytes(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (Math.abs(bytes) >= 999.95 && i < units.length - 1) {
    bytes /= 1000;
    i++;
  }
  return `${i === 0 ? bytes : bytes.toFixed(1)} ${units[i]}`;
}

function formatCell(value: Cell, digits: number): string {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) || !Number.isFinite(value)) return String(value);
  return value.toFixed(digits);
}

function widthOf(text: string): number {
  return [...stripVTControlCharacters(text)].length;
}

function pad(text: string, width: number, right: boolean): string {
  const space = " ".repeat(width - widthOf(text));
  return right ? space + text : text + space;
}

function escapePipes(text: string): string {
  return text.replaceAll("|", "\\|");
}
