// What the rows say of the marks that the schedules are held to. Pure; a mark that no row can tell is left out.

import type { ScheduleResults, ScheduleRow } from "./results.ts";
import { bestOf, type Group, isValid, nameOf, placeOf } from "./rows.ts";

/** One mark on one group of rows, or over all. */
export interface Verdict {
  /** What is asked. */
  readonly mark: string;
  /** Of what. */
  readonly group: string;
  /** What was measured. */
  readonly measured: string;
  /** Whether it is kept. */
  readonly kept: boolean;
}

/** Part that the quickest must leave to noise before another counts as quicker. */
const NOISE = 0.005;

/**
 * Holds rows against marks.
 *
 * @param groups Groups of rows.
 * @returns A verdict for every mark and group that has the rows for it.
 */
export function verdicts(groups: readonly Group[]): Verdict[] {
  return groups.flatMap((group) => [...schedulingOf(group), ...packingOf(group)]);
}

function schedulingOf({ title: group, rows }: Group): Verdict[] {
  const out: Verdict[] = [];
  const add = (mark: string, measured: string, kept: boolean) =>
    out.push({ mark, group, measured, kept });
  const fifo = bestOf(rows, "fifo"), lina = bestOf(rows, "lina"), planned = bestOf(rows, "planned");
  if (fifo?.a2a_share !== undefined) {
    const part = fifo.a2a_share;
    add(
      "the baseline's all-to-alls take 33 to 45 % of its step",
      per(part),
      part >= 0.33 && part <= 0.45,
    );
  }
  if (lina?.bound_ms !== undefined) {
    const part = lina.bound_ms / lina.step_ms;
    add("lina reaches 0.92 of its bound", part.toFixed(3), part >= 0.92);
  }
  const others = ["fifo", "outside", "priority"].flatMap((name) => bestOf(rows, name) ?? []);
  if (lina && others.length > 0) {
    const [best] = others.toSorted((a, b) => a.step_ms - b.step_ms);
    const gain = best.step_ms / lina.step_ms;
    add(
      "lina is quicker than fifo, outside and priority",
      `${gain.toFixed(3)}x of ${best.policy}`,
      gain > 1,
    );
  }
  if (lina?.a2a_slowdown !== undefined) {
    const beside = fifo?.a2a_slowdown === undefined
      ? ""
      : `; fifo ${fifo.a2a_slowdown.toFixed(2)}x`;
    add(
      "with lina an all-to-all beside gradients takes at most 1.1x of alone",
      `${lina.a2a_slowdown.toFixed(2)}x${beside}`,
      lina.a2a_slowdown <= 1.1,
    );
  }
  if (planned?.bound_ms !== undefined) {
    const part = planned.bound_ms / planned.step_ms;
    add("planned reaches 0.95 of its bound", part.toFixed(3), part >= 0.95);
  }
  const rivals = ["lina", "outside", "fifo"].flatMap((name) =>
    bestOf(rows, name, 1, { swept: true }) ?? []
  );
  if (planned && rivals.length > 0) {
    const [best] = rivals.toSorted((a, b) => a.step_ms - b.step_ms);
    const gain = best.step_ms / planned.step_ms;
    add(
      "planned is no slower than lina at its best size, outside and fifo",
      `${gain.toFixed(3)}x of ${nameOf(best)}`,
      gain >= 1 - NOISE,
    );
  }
  const costs = rows.filter((row) => isValid(row) && row.host_share !== undefined);
  if (costs.length > 0) {
    const [worst] = costs.toSorted((a, b) => b.host_share! - a.host_share!);
    const text = `${(worst.host_share! * 100).toFixed(1)} %, ${nameOf(worst)}`;
    add("scheduling costs at most 2 % of the step in host time", text, worst.host_share! <= 0.02);
  }
  return out;
}

function packingOf({ title: group, rows }: Group): Verdict[] {
  const packed = rows.filter((row) =>
    isValid(row) && row.experts_per_device > 1 &&
    (row.policy.startsWith("lina") || row.policy.startsWith("planned"))
  );
  if (packed.length === 0) return [];
  const out: Verdict[] = [];
  const [best] = packed.toSorted((a, b) => a.step_ms - b.step_ms);
  const fifo = bestOf(rows, "fifo"), same = bestOf(rows, "fifo", best.experts_per_device);
  if (best.bound_ms !== undefined) {
    const part = best.bound_ms / best.step_ms;
    const measured = `${part.toFixed(3)}, ${nameOf(best)}`;
    out.push({ mark: "packed, 0.92 of the bound", group, measured, kept: part >= 0.92 });
  }
  if (fifo) {
    const gain = fifo.step_ms / best.step_ms;
    const beside = same ? `; equally packed fifo ${(fifo.step_ms / same.step_ms).toFixed(2)}x` : "";
    const mark = "packed, the paper's mean gain of 1.57x over unpacked fifo";
    out.push({ mark, group, measured: `${gain.toFixed(2)}x${beside}`, kept: gain >= 1.57 });
  }
  const pipelined =
    packed.filter(({ policy, pipelining }) =>
      policy.endsWith("+pipeline") && pipelining !== undefined
    ).toSorted((a, b) => b.pipelining! - a.pipelining!)[0];
  if (pipelined) {
    const part = pipelined.pipelining!;
    const measured = `${per(part)}, ${nameOf(pipelined)}`;
    out.push({ mark: "packed, pipelining efficiency of 80 %", group, measured, kept: part >= 0.8 });
  }
  return out;
}

/**
 * How far the losses of one group are apart.
 *
 * @param rows Rows of a group.
 * @returns The greatest relative difference between valid rows with as many experts on a device; undefined if fewer than two have a loss.
 */
export function lossSpread(rows: readonly ScheduleRow[]): number | undefined {
  const packs = Map.groupBy(
    rows.filter((row) => isValid(row) && Number.isFinite(row.loss)),
    ({ experts_per_device }) => experts_per_device,
  );
  let most: number | undefined;
  for (const own of packs.values()) {
    if (own.length < 2) continue;
    const losses = own.map((row) => row.loss!);
    const low = Math.min(...losses), high = Math.max(...losses);
    most = Math.max(most ?? 0, (high - low) / Math.max(Math.abs(high), Number.MIN_VALUE));
  }
  return most;
}

/** The policies that appear, from the plainest on. */
export function policiesOf({ rows, timelines = [] }: ScheduleResults): string[] {
  return [...new Set([...rows, ...timelines].map(({ policy }) => policy))]
    .sort((a, b) => placeOf(a) - placeOf(b) || a.localeCompare(b));
}

function per(part: number): string {
  return `${(part * 100).toFixed(1)} %`;
}
