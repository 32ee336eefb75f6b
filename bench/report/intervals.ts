// Intervals of time: unions, sums and what lies inside. Plain arithmetic for the report.

/** A time from start to end, in whatever unit. */
export type Interval = readonly [start: number, end: number];

/**
 * The union of intervals.
 *
 * @param intervals Intervals in any order; empty ones are left out.
 * @param gap Intervals at most this far apart are one. @default {0}
 * @returns Intervals in order that are further apart than that.
 */
export function union(intervals: Iterable<Interval>, gap: number = 0): Interval[] {
  const out: [number, number][] = [];
  const ordered = [...intervals].filter(([start, end]) => end > start).sort((a, b) => a[0] - b[0]);
  for (const [start, end] of ordered) {
    const last = out.at(-1);
    if (last && start <= last[1] + gap) last[1] = Math.max(last[1], end);
    else out.push([start, end]);
  }
  return out;
}

/**
 * The sum of the lengths of a union.
 *
 * @param intervals What {@linkcode union} gives.
 * @returns The sum.
 */
export function length(intervals: readonly Interval[]): number {
  return intervals.reduce((sum, [start, end]) => sum + end - start, 0);
}

/**
 * Where both of two unions are.
 *
 * @param a What {@linkcode union} gives.
 * @param b Another.
 * @returns Their intersection.
 */
export function intersection(a: readonly Interval[], b: readonly Interval[]): Interval[] {
  const out: Interval[] = [];
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    const start = Math.max(a[i][0], b[j][0]), end = Math.min(a[i][1], b[j][1]);
    if (end > start) out.push([start, end]);
    if (a[i][1] < b[j][1]) i++;
    else j++;
  }
  return out;
}

/**
 * Where one union is and another is not.
 *
 * @param a What {@linkcode union} gives.
 * @param b Another.
 * @returns The difference.
 */
export function difference(a: readonly Interval[], b: readonly Interval[]): Interval[] {
  const out: Interval[] = [];
  for (const [start, end] of a) {
    let at = start;
    for (const [from, to] of b) {
      if (to <= at) continue;
      if (from >= end) break;
      if (from > at) out.push([at, from]);
      at = Math.max(at, to);
    }
    if (at < end) out.push([at, end]);
  }
  return out;
}
