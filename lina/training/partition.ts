// Cuts gradients into micro-ops: parts of single gradients of about equal size, none larger than asked for. Nothing is copied, as a part is
// a range of its gradient; when a part is reduced is the schedulers' matter.

import type { GradientNode, MicroOp } from "../../moe/hooks.ts";

/** Where parts begin, in bytes from the start of their gradient: what the widest loads of CPUs and GPUs ask for. */
export const PART_ALIGNMENT: number = 16;

/**
 * Cuts gradients into micro-ops of one part each. A gradient of b bytes becomes about n = ⌈b / S⌉ parts of ⌈b / n⌉ bytes, rounded up to
 * {@linkcode PART_ALIGNMENT}: equal parts, as the paper cuts them (section 4.2), leave no small rest that costs a collective of its own.
 *
 * @param gradients The gradients, in the order in which they become ready; those without elements are left out.
 * @param microOpBytes Most bytes S of a micro-op, at least 16; Infinity leaves gradients whole.
 * @returns The micro-ops, in the gradients' order and each gradient's from its start.
 * @throws {RangeError} If the size is too small.
 *
 * @example Two micro-ops of one gradient
 * ```ts
 * import assert from "node:assert/strict";
 *
 * const weight = { kind: "gradient", id: 0, name: "w", elements: 100, bytes: 400, group: "world", after: [] } as const;
 * assert.deepEqual(partition([weight], 256).map(({ bytes }) => bytes), [208, 192]);
 * ```
 */
export function partition(gradients: readonly GradientNode[], microOpBytes: number): MicroOp[] {
  if (!(microOpBytes >= PART_ALIGNMENT)) {
    throw new RangeError(
      `Cannot cut gradients as a micro-op must have at least ${PART_ALIGNMENT} bytes: current value is ${microOpBytes}`,
    );
  }
  const most = microOpBytes - microOpBytes % PART_ALIGNMENT;
  return gradients.flatMap(({ id, elements, bytes }) => {
    if (elements === 0) return [];
    const elementBytes = bytes / elements;
    const count = Number.isFinite(most) ? Math.ceil(bytes / most) : 1;
    const unit = PART_ALIGNMENT / elementBytes;
    const size = count === 1 ? elements : Math.ceil(elements / count / unit) * unit;
    return Array.from({ length: Math.ceil(elements / size) }, (_, i): MicroOp => {
      const start = i * size, end = Math.min(elements, start + size);
      return { parts: [{ gradient: id, start, end }], bytes: (end - start) * elementBytes };
    });
  });
}
