// The charts beside the timelines: what a step is spent on, the distribution of slowdowns (the paper's Figure 3), the gain of every part (Figure
// 14) and the size of micro-ops (Figure 15). Each draws what the rows have, and nothing for what they lack.

import { FIGURE_14, FIGURE_3 } from "./paper.ts";
import type { ScheduleRow, SlowdownSamples } from "./results.ts";
import {
  bestOf,
  type Group,
  isValid,
  median,
  nameOf,
  placeOf,
  quickest,
  rateText,
  speedupOf,
} from "./rows.ts";
import { policyClass } from "./style.ts";
import {
  legend,
  line,
  linear,
  logarithmic,
  type Markup,
  rect,
  svg,
  text,
  textWidth,
} from "./svg.ts";

const WIDTH = 1040;

/** Height and place of bars. */
const BAR = 20, BAR_STEP = 27, BARS_LEFT = 190, BARS_RIGHT = 120;

/** Parts of a step in the order in which they are stacked. */
const PARTS = [
  { key: "compute_ms", class: "compute" },
  { key: "exposed_a2a_ms", class: "allToAll" },
  { key: "exposed_allreduce_ms", class: "gradients" },
] as const;

/**
 * What a step is spent on, per policy, beside the floor and the bound.
 *
 * @param group Rows to compare.
 * @returns An SVG element, or null if no row tells its parts.
 */
export function splitSvg(group: Group): Markup | null {
  const rows = quickest(group.rows).filter(({ compute_ms }) => compute_ms !== undefined);
  if (rows.length === 0) return null;
  const most = Math.max(...rows.map((row) => Math.max(row.step_ms, row.bound_ms ?? 0)));
  const x = linear([0, most], [BARS_LEFT, WIDTH - BARS_RIGHT], 8);
  const key = legend([
    { label: "compute", class: "compute" },
    { label: "all-to-all that nothing hides", class: "allToAll" },
    { label: "allreduce that nothing hides", class: "gradients" },
    { label: "neither", class: "other" },
    { label: "floor: no schedule beats it", class: "floor", kind: "tick" },
    { label: "bound of the policy's class", class: "bound", kind: "tick" },
  ], { x: BARS_LEFT, y: 6, width: WIDTH - BARS_LEFT - 20 });
  const top = key.height + 16, bottom = top + rows.length * BAR_STEP;
  const out = [...key.content, ...verticalGrid(x, [top - 4, bottom], "ms per step")];
  rows.forEach((row, i) => {
    const y = top + i * BAR_STEP;
    out.push(text(BARS_LEFT - 10, y + 15, nameOf(row), { anchor: "end" }));
    const ticks = ([[row.floor_ms, "floor"], [row.bound_ms, "bound"]] as const)
      .flatMap(([value, name]) => value === undefined ? [] : [[value, name] as const]);
    let at = 0;
    const parts: { ms: number; name: string }[] = PARTS.map(({ key, class: name }) => ({
      ms: row[key] ?? 0,
      name,
    }));
    const known = parts.reduce((sum, { ms }) => sum + ms, 0);
    parts.push({ ms: Math.max(0, row.step_ms - known), name: "other" });
    for (const { ms, name } of parts) {
      const from = at, to = Math.min(at + Math.max(0, ms), row.step_ms);
      at = to;
      if (to <= from) continue;
      const width = x(to) - x(from), label = ms.toFixed(1);
      out.push(rect({ x: x(from), y, width, height: BAR }, `${name} span`, `${label} ms`));
      // In the middle, or wherever no tick goes through it.
      const half = textWidth(label, 11) / 2 + 4;
      const free = [0.5, 0.25, 0.75].map((part) => x(from) + part * width).find((middle) =>
        middle - half >= x(from) && middle + half <= x(to) &&
        ticks.every(([value]) => Math.abs(x(value) - middle) > half)
      );
      if (free !== undefined) {
        out.push(text(free, y + 14, label, { anchor: "middle", class: "in", size: 11 }));
      }
    }
    for (const [value, name] of ticks) {
      out.push(line([x(value), y - 3], [x(value), y + BAR + 3], name));
    }
    const right = x(Math.max(row.step_ms, row.bound_ms ?? 0)) + 8;
    out.push(text(right, y + 15, `${row.step_ms.toFixed(1)} ms`, { class: "strong" }));
  });
  return svg({ width: WIDTH, height: bottom + 42 }, `Step time by policy: ${group.title}`, out);
}

/** Lines from top to bottom with their values below, and what they mean. */
function verticalGrid(
  x: ReturnType<typeof linear>,
  [top, bottom]: readonly [number, number],
  unit: string,
): Markup[] {
  const [left, right] = [x.ticks[0], x.ticks.at(-1)!].map(x);
  return [
    ...x.ticks.flatMap((tick) => [
      line([x(tick), top], [x(tick), bottom], "grid"),
      text(x(tick), bottom + 16, String(tick), { anchor: "middle", class: "dim" }),
    ]),
    text((left + right) / 2, bottom + 34, unit, { anchor: "middle", class: "dim" }),
  ];
}

/**
 * How much slower all-to-alls are than alone: the distribution, per policy over all shapes (the paper's Figure 3).
 *
 * @param samples Slowdowns; those of the same ranks and rate.
 * @param title What they are of.
 * @returns An SVG element, or null if there are none.
 */
export function slowdownSvg(samples: readonly SlowdownSamples[], title: string): Markup | null {
  const curves = [...Map.groupBy(samples, ({ policy }) => policy)]
    .map(([policy, own]) => ({
      policy,
      values: own.flatMap(({ slowdowns }) => slowdowns)
        .filter((value) => value > 0 && value < 1e6)
        .sort((a, b) => a - b),
    })).filter(({ values }) => values.length > 0)
    .sort((a, b) => placeOf(a.policy) - placeOf(b.policy));
  if (curves.length === 0) return null;
  const at = (values: readonly number[], part: number) =>
    values[Math.min(values.length - 1, Math.floor(part * values.length))];
  // Up to nearly the slowest of all: a few outliers would press everything else together.
  const most = Math.max(2.2, ...curves.map(({ values }) => at(values, 0.99))) * 1.04;
  const least = Math.min(0.9, ...curves.map(({ values }) => at(values, 0.01)));
  const left = 64, right = 300, top = 28, bottom = 340;
  const x = linear([Math.max(0, least), most], [left, WIDTH - right], 8);
  const y = linear([0, 1], [bottom, top], 5);
  const out: Markup[] = verticalGrid(
    x,
    [top, bottom],
    "time of a backward all-to-all / its time alone",
  );
  for (const tick of y.ticks) {
    out.push(line([left, y(tick)], [WIDTH - right, y(tick)], "grid"));
    const label = `${Math.round(tick * 100)} %`;
    out.push(text(left - 8, y(tick) + 4, label, { anchor: "end", class: "dim" }));
  }
  out.push(
    text(left - 48, top - 8, "part of the all-to-alls that take at most so long", { class: "dim" }),
  );
  curves.forEach(({ policy, values }, i) => {
    const shown = thin(values);
    const d = shown.map(([value, part], j) => {
      const to = x(Math.min(value, most)).toFixed(1), up = y(part).toFixed(1);
      return j === 0 ? `M${to} ${up}` : `H${to}V${up}`;
    }).join("");
    const name = policyClass(policy), row = top + 14 + i * 40, edge = WIDTH - right + 24;
    out.push(`<path d="${d}" class="curve ${name}"/>`);
    out.push(line([edge, row - 4], [edge + 28, row - 4], `curve ${name}`));
    out.push(text(edge + 36, row, policy, { class: "strong" }));
    const numbers = `median ${median(values).toFixed(2)}x, p95 ${
      at(values, 0.95).toFixed(2)
    }x, n = ${values.length}`;
    out.push(text(edge + 36, row + 15, numbers, { class: "dim", size: 11 }));
  });
  out.push(
    line([x(FIGURE_3.median), top], [x(FIGURE_3.median), bottom], "paper"),
    text(x(FIGURE_3.median) + 6, bottom - 8, `the paper's baseline, median ${FIGURE_3.median}x`, {
      class: "paper",
    }),
  );
  const height = Math.max(bottom + 42, top + 14 + curves.length * 40);
  return svg({ width: WIDTH, height }, title, out);
}

/** Steps of a distribution, at most some hundreds. */
function thin(values: readonly number[]): [value: number, part: number][] {
  const count = Math.min(values.length, 400);
  const points: [number, number][] = [[values[0], 0]];
  for (let i = 0; i < count; i++) {
    const place = Math.floor((i + 1) * values.length / count) - 1;
    points.push([values[place], (place + 1) / values.length]);
  }
  return points;
}

/**
 * The gain of every part over `fifo` with one expert per device (the paper's Figure 14).
 *
 * @param groups Rows to compare, all drawn on one scale.
 * @returns An SVG element, or null if there is nothing to compare.
 */
export function gainsSvg(groups: readonly Group[]): Markup | null {
  const shown = groups.map((group) => ({
    group,
    bars: quickest(group.rows).filter((row) => row.experts_per_device === 1)
      .map((row) => ({ row, gain: speedupOf(row, group.rows)! }))
      .filter(({ gain }) => Number.isFinite(gain)),
  })).filter(({ bars }) => bars.length > 1);
  if (shown.length === 0) return null;
  const most = Math.max(1.45, ...shown.flatMap(({ bars }) => bars.map(({ gain }) => gain)));
  const x = linear([0, most], [BARS_LEFT, WIDTH - BARS_RIGHT], 8);
  const out: Markup[] = [], grid: Markup[] = [];
  let y = 12;
  for (const { group, bars } of shown) {
    out.push(text(20, y + 12, group.title, { class: "strong", size: 13 }));
    y += 24;
    const top = y;
    for (const { row, gain } of bars) {
      out.push(text(BARS_LEFT - 10, y + 14, row.policy, { anchor: "end" }));
      const box = { x: x(0), y, width: x(gain) - x(0), height: 18 };
      out.push(rect(box, `fill ${policyClass(row.policy)}`, `${row.step_ms.toFixed(2)} ms`));
      out.push(text(x(gain) + 8, y + 14, `${gain.toFixed(2)}x`, { class: "strong" }));
      const paper = row.policy === "lina" ? FIGURE_14.get(group.ranks) : undefined;
      if (paper !== undefined) {
        out.push(line([x(paper), y - 4], [x(paper), y + 22], "paper"));
        const label = `paper ${paper}x`;
        const after = Math.max(x(paper) + 6, x(gain) + 8 + textWidth("0.00x") + 8);
        out.push(text(after, y + 14, label, { class: "paper", size: 11 }));
      }
      y += 24;
    }
    grid.push(line([x(1), top - 4], [x(1), y], "axis"));
    y += 14;
  }
  out.unshift(...grid);
  out.unshift(...verticalGrid(x, [8, y], "speedup over fifo (step time of fifo / step time)"));
  return svg({ width: WIDTH, height: y + 42 }, "Speedup over fifo by policy", out);
}

/** Rows whose micro-ops were swept. */
export interface Sweep {
  /** What they have in common. */
  readonly group: Group;
  /** Valid rows by size, two at least. */
  readonly rows: readonly ScheduleRow[];
}

/**
 * Sweeps of the micro-op size.
 *
 * @param groups Groups of rows.
 * @returns Those with two sizes at least of `lina` with one expert per device.
 */
export function sweepsOf(groups: readonly Group[]): Sweep[] {
  return groups.map((group) => ({
    group,
    rows: group.rows.filter((row) =>
      row.policy === "lina" && row.experts_per_device === 1 && isValid(row) &&
      (row.micro_op_bytes ?? 0) > 0
    ).sort((a, b) => a.micro_op_bytes! - b.micro_op_bytes!),
  })).filter(({ rows }) => new Set(rows.map((row) => row.micro_op_bytes)).size > 1);
}

/**
 * Step time by the size of micro-ops (the paper's Figure 15).
 *
 * @param sweeps Sweeps of one rate.
 * @returns An SVG element, or null if there is none.
 */
export function sweepSvg(sweeps: readonly Sweep[]): Markup | null {
  if (sweeps.length === 0) return null;
  const sizes = sweeps.flatMap(({ rows }) => rows.map((row) => row.micro_op_bytes! / 1e6));
  const { mbit } = sweeps[0].group;
  const left = 64, right = 300, top = 24, bottom = 320;
  const x = logarithmic([Math.min(...sizes), Math.max(...sizes)], [left + 12, WIDTH - right]);
  const relative = sweeps.map(({ group, rows }) => {
    const best = Math.min(...rows.map((row) => row.step_ms));
    return {
      group,
      best,
      points: rows.map((row) => [row.micro_op_bytes! / 1e6, row.step_ms / best] as const),
    };
  });
  const most = Math.max(1.05, ...relative.flatMap(({ points }) => points.map(([, y]) => y)));
  const y = linear([1, most + (most - 1) * 0.06], [bottom, top], 5);
  const out: Markup[] = [];
  for (const tick of y.ticks) {
    out.push(line([left, y(tick)], [WIDTH - right, y(tick)], "grid"));
    out.push(text(left - 8, y(tick) + 4, tick.toFixed(2), { anchor: "end", class: "dim" }));
  }
  for (const tick of x.ticks) {
    out.push(line([x(tick), top], [x(tick), bottom], "grid"));
    out.push(text(x(tick), bottom + 16, String(tick), { anchor: "middle", class: "dim" }));
  }
  const middle = (left + WIDTH - right) / 2;
  out.push(text(middle, bottom + 34, `size of a micro-op in MB at ${rateText(mbit)}`, {
    anchor: "middle",
    class: "dim",
  }));
  out.push(text(left - 48, top - 10, "step time / the sweep's best", { class: "dim" }));
  // The paper's 30 MB are 2.4 ms of its link.
  const paper = mbit * 125 * 2.4 / 1e6;
  if (mbit > 0 && paper >= Math.min(...sizes) && paper <= Math.max(...sizes)) {
    out.push(line([x(paper), top], [x(paper), bottom], "paper"));
    const label = `${Number(paper.toPrecision(3))} MB = 2.4 ms of the link, as the paper's 30 MB`;
    const onRight = x(paper) + textWidth(label) + 10 < WIDTH - right;
    out.push(text(x(paper) + (onRight ? 6 : -6), top + 12, label, {
      class: "paper",
      anchor: onRight ? "start" : "end",
      size: 11,
    }));
  }
  relative.forEach(({ group, best, points }, i) => {
    const name = `p${[3, 2, 5, 1, 6, 0, 4][i % 7]}`;
    const d = points.map(([size, value], j) =>
      `${j === 0 ? "M" : "L"}${x(size).toFixed(1)} ${y(value).toFixed(1)}`
    ).join("");
    out.push(`<path d="${d}" class="curve ${name}"/>`);
    for (const [size, value] of points) {
      out.push(
        rect(
          { x: x(size) - 3, y: y(value) - 3, width: 6, height: 6 },
          `fill ${name}`,
          `${size} MB: ${(value * best).toFixed(2)} ms`,
        ),
      );
    }
    const row = top + 14 + i * 38, edge = WIDTH - right + 24;
    out.push(line([edge, row - 4], [edge + 28, row - 4], `curve ${name}`));
    out.push(text(edge + 36, row, `${group.shape}, ${group.ranks} ranks`, { class: "strong" }));
    const [size] = points.find(([, value]) => value === 1)!;
    const planned = bestOf(group.rows, "planned");
    const beside = planned ? `, planned ${planned.step_ms.toFixed(1)} ms` : "";
    const note = `best ${best.toFixed(1)} ms at ${Number(size.toPrecision(3))} MB${beside}`;
    out.push(text(edge + 36, row + 15, note, { class: "dim", size: 11 }));
  });
  const height = Math.max(bottom + 42, top + 14 + relative.length * 38);
  return svg({ width: WIDTH, height }, "Step time by micro-op size", out);
}

/** Groups of rows by what they have in common besides the shape. */
export function byRate<T extends { readonly ranks: number; readonly mbit: number }>(
  items: readonly T[],
): { readonly title: string; readonly items: readonly T[] }[] {
  return [...Map.groupBy(items, ({ ranks, mbit }) => `${ranks} ranks, ${rateText(mbit)}`)]
    .map(([title, items]) => ({ title, items }));
}
