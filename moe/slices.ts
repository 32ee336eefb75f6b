// The slices that a rank's tokens are cut into, so that all-to-alls of one slice travel while experts work on another. Every rank cuts its own
// tokens into as many slices, of nearly equal length; with fewer tokens than slices, some are empty.

/**
 * Where the slices of a rank's tokens begin.
 *
 * @param tokens N.
 * @param slices C, a whole number ≥ 1.
 * @returns First token of each slice, ⌊c N / C⌋, and, last, N: [C + 1].
 *
 * @example
 * ```ts
 * import { sliceBounds } from "./slices.ts";
 * import assert from "node:assert/strict";
 *
 * assert.deepEqual(sliceBounds(10, 4), [0, 2, 5, 7, 10]);
 * assert.deepEqual(sliceBounds(1, 3), [0, 0, 0, 1]);
 * ```
 */
export function sliceBounds(tokens: number, slices: number): number[] {
  return Array.from({ length: slices + 1 }, (_, c) => Math.floor(c * tokens / slices));
}
