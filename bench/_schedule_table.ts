// The rows of bench/schedule.ts as tables for people, one per shape, ranks and rate.

import type { Row } from "./_schedule_rows.ts";

const COLUMNS: readonly (readonly [title: string, cell: (row: Row) => string])[] = [
  ["policy", (row) => nameOf(row)],
  ["step ms", (row) => fixed(row.step_ms, 1)],
  ["speedup", (row) => fixed(row.speedup, 3)],
  ["bound", (row) => fixed(row.bound_ms, 1)],
  ["of it", (row) => fixed(ratio(row.bound_ms, row.step_ms), 2)],
  ["floor", (row) => fixed(row.floor_ms, 1)],
  ["model", (row) => fixed(row.predicted_ms, 1)],
  ["a2a %", (row) => percent(row.a2a_share)],
  ["fwd ms", (row) => fixed(row.a2a_fwd_ms, 2)],
  ["p95", (row) => fixed(row.a2a_fwd_p95_ms, 2)],
  ["bwd ms", (row) => fixed(row.a2a_bwd_ms, 2)],
  ["p95", (row) => fixed(row.a2a_bwd_p95_ms, 2)],
  ["slower", (row) => fixed(row.a2a_slowdown, 2)],
  ["reduce", (row) => fixed(row.allreduce_ms, 1)],
  ["done at", (row) => fixed(row.allreduce_finish_ms, 1)],
  ["overlap", (row) => percent(row.overlap)],
  ["piped", (row) => percent(row.pipelining)],
  ["link %", (row) => percent(row.link_used ?? row.link_busy)],
  ["MB", (row) => fixed(ratio(row.bytes, 1e6), 0)],
  ["ops", (row) => String(row.micro_ops)],
  ["sched %", (row) => percent(row.host_share)],
  ["host ms", (row) => fixed(row.host_ms, 1)],
  ["load", (row) => fixed(row.imbalance, 2)],
  ["loss", (row) => fixed(row.loss, 5)],
];

/**
 * The table of some rows.
 *
 * @param rows Of one shape, number of ranks and rate.
 * @returns Lines, the heading first.
 */
export function tableOf(rows: readonly Row[]): string[] {
  if (rows.length === 0) return [];
  const [{ shape, ranks, per_host, mbit, link_achieved, device }] = rows;
  const rate = mbit === 0 ? "no limit" : `${mbit} Mbit/s (${percent(link_achieved)} % reached)`;
  const hosts = per_host > 1 ? `, ${per_host} a host` : "";
  const cells = [
    COLUMNS.map(([title]) => title),
    ...rows.map((row) => COLUMNS.map(([, cell]) => cell(row) + (row.void ? "*" : ""))),
  ];
  const widths = COLUMNS.map((_, i) => Math.max(...cells.map((line) => line[i].length)));
  const lines = cells.map((line) =>
    line.map((cell, i) => i === 0 ? cell.padEnd(widths[i]) : cell.padStart(widths[i])).join("  ")
  );
  const note = rows.find((row) => row.void)?.void;
  return [
    "",
    `${shape}: ${ranks} ranks${hosts}, ${device}, ${rate}`,
    ...lines,
    ...(note ? [`* void: ${note}`] : []),
  ];
}

/** A policy with what sets it apart from others of its name. */
function nameOf(
  { policy, experts_per_device, micro_op_bytes, chunks = 1, swept }: Row & { swept?: boolean },
): string {
  const packed = experts_per_device > 1 ? ` k${experts_per_device}` : "";
  const cut = chunks > 1 ? ` c${chunks}` : "";
  const size = swept ? ` ${((micro_op_bytes ?? 0) / 1e6).toFixed(2)} MB` : "";
  return policy + packed + cut + size;
}

function ratio(a: number | undefined, b: number): number | undefined {
  return a === undefined ? undefined : a / b;
}

function fixed(value: number | undefined, digits: number): string {
  return value === undefined || !Number.isFinite(value) ? "-" : value.toFixed(digits);
}

function percent(value: number | undefined): string {
  return value === undefined || !Number.isFinite(value) ? "-" : (100 * value).toFixed(1);
}
