// What a step was, from when its device passed the marks of its boundaries (moe/gradients.ts). Pure; reads no clock.

import type { Mark } from "../../moe/gradients.ts";

/** A time from one moment to another, in µs on the marks' clock. */
export interface MarkedInterval {
  /** Begin. */
  readonly start_us: number;
  /** End. */
  readonly end_us: number;
}

/**
 * When the compute stream was at work: between all marks but for the waits that end with an all-to-all. A stream that waits for an all-to-all that
 * has long ended loses nothing, so what lies before such a mark is a wait whatever its length.
 *
 * @param marks The marks of one pass, in order, of a step that has ended.
 * @returns Intervals in order, empty ones left out; neighbours that touch are one.
 *
 * @example
 * ```ts
 * import { computing } from "./measures.ts";
 * import assert from "node:assert/strict";
 *
 * const at = (kind: string, time: number) => {
 *   return { boundary: { kind, node: 0, chunk: 0 }, event: { done: () => true, time: () => time } };
 * };
 * const marks = [at("passBegins", 0), at("allToAllStarts", 5), at("allToAllEnds", 9), at("passEnds", 20)];
 * assert.deepEqual(computing(marks as Parameters<typeof computing>[0]), [
 *   { start_us: 0, end_us: 5 },
 *   { start_us: 9, end_us: 20 },
 * ]);
 * ```
 */
export function computing(marks: readonly Mark[]): MarkedInterval[] {
  const times = timesOf(marks), intervals: { start_us: number; end_us: number }[] = [];
  for (let i = 1; i < marks.length; i++) {
    const start_us = times[i - 1], end_us = times[i];
    if (marks[i].boundary.kind === "allToAllEnds" || !(end_us > start_us)) continue;
    const last = intervals.at(-1);
    if (last?.end_us === start_us) last.end_us = end_us;
    else intervals.push({ start_us, end_us });
  }
  return intervals;
}

/**
 * When the device passed marks.
 *
 * @param marks Marks of a step that has ended.
 * @returns Times in µs, one per mark.
 * @throws {RangeError} If the device has not passed one.
 */
export function timesOf(marks: readonly Mark[]): number[] {
  return marks.map(({ boundary, event }) => {
    if (!event.done()) {
      throw new RangeError(
        `Cannot tell times as the device must have passed every mark: current value is ${boundary.kind}, which it has not`,
      );
    }
    return event.time();
  });
}
