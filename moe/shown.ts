// What a MoE layer's forward pass has shown: its losses and its load. On the CPU they are known when the layer returns. On a GPU that routes
// by itself they are a small record on the device, and nobody waits for it: `readShown` reads the records of all layers of a pass at once,
// when the pass has been enqueued.

import * as ops from "../tensor/ops.ts";
import { empty, type Tensor, zeros } from "../tensor/tensor.ts";

/** Load of a batch, alike on all ranks. */
export interface MoeStats {
  /** Choices per expert of the global batch, before drops. */
  readonly counts: Float64Array;
  /** Choices that were dropped. */
  readonly dropped: number;
  /** Rows that each rank computes. */
  readonly rowsPerRank: Int32Array;
  /** Rows of the most loaded rank / mean rows of a rank; 1 for an empty batch. */
  readonly imbalance: number;
}

/** Losses and load of a batch, alike on all ranks. */
export interface MoeShown {
  /** Balance and z loss of the global batch, coefficients applied: to be added once to the mean loss, not once per rank. */
  readonly auxLoss: number;
  /** Load and drops. */
  readonly stats: MoeStats;
}

/** Losses and load that are still on the device. */
export interface PendingShown {
  /** The ranks' records, f64; an owner's share of the tensor, which {@linkcode PendingShown.release} gives back. */
  readonly records: Tensor;
  /** Makes numbers of the records' elements, and tells the layer, which counts its load; once. Throws if a logit was not finite. */
  finish(records: Float64Array): MoeShown;
  /** Gives the records back, if that has not happened. */
  release(): void;
}

/** What a forward pass returns of its losses and load: give it to {@linkcode readShown} or {@linkcode dropShown}. */
export type Shown = MoeShown | PendingShown;

/**
 * Reads losses and load of any number of forward passes, with one wait for the device at most.
 *
 * @param all What the layers have returned; each is read once, before the step ends.
 * @returns Their losses and load, in the same order.
 * @throws {RangeError} If a logit was not finite.
 */
export async function readShown(all: readonly Shown[]): Promise<MoeShown[]> {
  const records = recordsOf(all);
  try {
    return finishShown(all, records.length > 0 ? await readTogether(records) : []);
  } finally {
    dropShown(all);
  }
}

/**
 * The records that are still on the device, for {@linkcode readTogether}.
 *
 * @param all What the layers have returned.
 * @returns Their tensors, in the same order.
 */
export function recordsOf(all: readonly Shown[]): Tensor[] {
  return all.filter((one) => "records" in one).map(({ records }) => records);
}

/**
 * Losses and load, once the records are on the host.
 *
 * @param all What the layers have returned; those that are not finished stay to be dropped if one throws.
 * @param records Elements of {@linkcode recordsOf} them.
 * @returns Their losses and load, in the same order.
 * @throws {RangeError} If a logit was not finite.
 */
export function finishShown(
  all: readonly Shown[],
  records: readonly Float64Array[],
): MoeShown[] {
  let next = 0;
  return all.map((one) => "records" in one ? one.finish(records[next++]) : one);
}

/**
 * Gives back what nobody will read. A training pass whose load stayed on the device does then not count for a selection bias.
 *
 * @param all What the layers have returned; nothing happens to what was read or given back before.
 */
export function dropShown(all: readonly Shown[]): void {
  for (const one of all) if ("records" in one) one.release();
}

/**
 * The elements of several f64 tensors by one copy to the host.
 *
 * @param tensors Tensors of one device; at least one.
 * @returns Their elements, in the same order.
 */
export async function readTogether(tensors: readonly Tensor[]): Promise<Float64Array[]> {
  if (tensors.length === 1) return [await tensors[0].toArray() as Float64Array];
  const { device } = tensors[0];
  using together = empty(device, [tensors.reduce((sum, { size }) => sum + size, 0)], "f64");
  using first = zeros(device, [1], "i32");
  let at = 0;
  for (const tensor of tensors) {
    const part = together.rows(at, at += tensor.size);
    ops.gatherRows(tensor.reshape(1, tensor.size), first, part.reshape(1, tensor.size));
  }
  const all = await together.toArray() as Float64Array;
  at = 0;
  return tensors.map(({ size }) => all.subarray(at, at += size));
}

/**
 * Load of a batch.
 *
 * @param counts Choices per expert.
 * @param dropped Choices that were dropped.
 * @param rowsPerRank Rows that each rank computes.
 * @returns The load, with its imbalance.
 */
export function statsOf(
  counts: Float64Array,
  dropped: number,
  rowsPerRank: Int32Array,
): MoeStats {
  let most = 0, sum = 0;
  for (const rows of rowsPerRank) {
    most = Math.max(most, rows);
    sum += rows;
  }
  const imbalance = sum > 0 ? most * rowsPerRank.length / sum : 1;
  return { counts, dropped, rowsPerRank, imbalance };
}
