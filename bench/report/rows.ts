// Looks for rows: which belong together, which are the baseline, which one says it best. Plain data in, plain data out.

import type { ScheduleRow } from "./results.ts";
import { POLICY_ORDER } from "./style.ts";

/** Rows that may be compared: of one shape, on one number of ranks and one rate. */
export interface Group {
  /** What they have in common, for readers: `txl, 4 ranks, 10 Gbit/s`. */
  readonly title: string;
  /** The shape. */
  readonly shape: string;
  /** Number of ranks. */
  readonly ranks: number;
  /** Ranks that share a link. */
  readonly per_host: number;
  /** Nominal rate in Mbit/s. */
  readonly mbit: number;
  /** The rows, by policy from the plainest on, unpacked ones first. */
  readonly rows: readonly ScheduleRow[];
}

/** Whether a row says something. */
export function isValid(row: ScheduleRow): boolean {
  return row.void === undefined && Number.isFinite(row.step_ms) && row.step_ms > 0;
}

/** Rank of a policy from the plainest on; what follows a comma is a variant of it. */
export function placeOf(policy: string): number {
  const place = POLICY_ORDER.indexOf(policy.split(",")[0]);
  return place < 0 ? POLICY_ORDER.length : place;
}

/** A rate in words. */
export function rateText(mbit: number): string {
  return mbit === 0 ? "no limit" : mbit >= 1000 ? `${mbit / 1000} Gbit/s` : `${mbit} Mbit/s`;
}

/**
 * Groups rows.
 *
 * @param rows Any rows.
 * @returns The groups in the order in which they appear.
 */
export function groupsOf(rows: readonly ScheduleRow[]): Group[] {
  const key = ({ shape, ranks, per_host, mbit, device }: ScheduleRow) =>
    JSON.stringify([shape, ranks, per_host, mbit, device]);
  return [...Map.groupBy(rows, key).values()].map((own) => {
    const { shape, ranks, per_host, mbit, device } = own[0];
    const hosts = per_host > 1 ? `, ${per_host} to a link` : "";
    return {
      title: `${shape}, ${ranks} ranks${hosts}, ${rateText(mbit)}${
        device === "cpu" ? ", CPU" : ""
      }`,
      shape,
      ranks,
      per_host,
      mbit,
      rows: own.toSorted((a, b) =>
        a.experts_per_device - b.experts_per_device || placeOf(a.policy) - placeOf(b.policy) ||
        a.policy.localeCompare(b.policy) || (a.micro_op_bytes ?? 0) - (b.micro_op_bytes ?? 0)
      ),
    };
  });
}

/**
 * The quickest valid row of a policy, with micro-ops of its own size where there is one.
 *
 * @param rows Rows of a group.
 * @param policy The policy.
 * @param experts Experts of a device. @default {1}
 * @param options Whether sizes of a sweep count, too. @default {{swept: false}}
 * @returns It, or undefined.
 */
export function bestOf(
  rows: readonly ScheduleRow[],
  policy: string,
  experts: number = 1,
  options: { readonly swept?: boolean } = {},
): ScheduleRow | undefined {
  const all = rows.filter((row) =>
    row.policy === policy && row.experts_per_device === experts && isValid(row)
  );
  const own = all.filter(({ swept }) => !swept);
  return (own.length > 0 && !options.swept ? own : all).reduce<ScheduleRow | undefined>(
    (best, row) => !best || row.step_ms < best.step_ms ? row : best,
    undefined,
  );
}

/**
 * How much quicker a row is than unpacked `fifo` of its group.
 *
 * @param row The row.
 * @param rows Rows of its group.
 * @returns The factor; undefined if there is nothing to compare with.
 */
export function speedupOf(row: ScheduleRow, rows: readonly ScheduleRow[]): number | undefined {
  if (!isValid(row)) return undefined;
  const base = bestOf(rows, "fifo");
  return base ? base.step_ms / row.step_ms : row.speedup;
}

/**
 * One row per policy and packing, without those of a sweep.
 *
 * @param rows Rows of a group.
 * @returns Valid rows in their order.
 */
export function quickest(rows: readonly ScheduleRow[]): ScheduleRow[] {
  return rows.filter((row) =>
    isValid(row) && bestOf(rows, row.policy, row.experts_per_device) === row
  );
}

/** Name of a row in a chart. */
export function nameOf({ policy, experts_per_device }: ScheduleRow): string {
  return experts_per_device > 1 ? `${policy}, ${experts_per_device} experts` : policy;
}

/** Middle of some numbers; NaN of none. */
export function median(values: readonly number[]): number {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  return sorted.length === 0
    ? NaN
    : (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}
