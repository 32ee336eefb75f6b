// The order in which the slices of a rank's tokens travel and are computed: with chunks 0 to n, there D0 … Dn, work W0 … Wn, and back B0 … Bn,
//
//   all-to-alls  D0  D1  D2          B0  B1  B2
//   compute          W0  W1  W2
//
// All chunks leave at once, as nothing can be gained by keeping one back: the link takes them one after another. A chunk's way back starts as soon as
// its work is enqueued. Whichever of link and compute is slower, it never waits for the other but for the first and the last chunk. Forward and
// backward pass are alike: dispatch and combine change roles. What the work is, moe_layer.ts knows.

import type { Communicator } from "../collectives/types.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { fromExperts, type PlacedPlan, toExperts, type Travelling } from "./dispatch.ts";
import type { RowExchange } from "./moe_types.ts";
import type { Step } from "./step.ts";

/** One half of a layer's pass. */
export interface HalfPass {
  /** The expert-parallel ranks. */
  readonly comm: Communicator;
  /** Carries rows in place of the communicator's own all-to-all, or null. */
  readonly exchange: RowExchange | null;
  /** Runs the all-to-alls. */
  readonly step: Pick<Step, "allToAll">;
  /** The layer. */
  readonly layer: number;
  /** Which half. */
  readonly phase: "forward" | "backward";
  /** Plans of the slices. */
  readonly slices: readonly PlacedPlan[];
}

/**
 * Sends rows of all slices to their experts.
 *
 * @param half The half of the pass.
 * @param rowsOf Rows of a slice in the send order, by its plan and number: a new tensor.
 * @returns What travels, by slice; drop it if it is not used.
 */
export async function sendSlices(
  half: HalfPass,
  rowsOf: (slice: PlacedPlan, chunk: number) => Tensor,
): Promise<Travelling[]> {
  const role = half.phase === "forward" ? "dispatch" : "combine";
  const leaving: Travelling[] = [];
  using undo = new DisposableStack();
  undo.defer(() => dropAll(leaving));
  for (const [chunk, slice] of half.slices.entries()) {
    leaving.push(await toExperts(rowsOf(slice, chunk), slice, roadOf(half, role, chunk)));
  }
  undo.move();
  return leaving;
}

/**
 * Has the experts work on each slice as it arrives, sends the results back, and takes them there.
 *
 * @param half The half of the pass.
 * @param arriving From {@linkcode sendSlices}; if this throws, still to be dropped.
 * @param work What the experts do with the rows of a slice, which it takes over: gives new rows of as many.
 * @param take Gets the rows of a slice in the send order; they are its own.
 * @param behind Work that nobody waits for: done when the results of the slice are on their way. @default {none}
 */
export async function workOnSlices(
  half: HalfPass,
  arriving: readonly Travelling[],
  work: (rows_MD: Tensor, slice: PlacedPlan, chunk: number) => Tensor | Promise<Tensor>,
  take: (rows_SD: Tensor, slice: PlacedPlan, chunk: number) => void,
  behind?: (slice: PlacedPlan, chunk: number) => void,
): Promise<void> {
  const role = half.phase === "forward" ? "combine" : "dispatch";
  const returning: Travelling[] = [];
  using undo = new DisposableStack();
  undo.defer(() => dropAll(returning));
  for (const [chunk, slice] of half.slices.entries()) {
    const rows_MD = await work(await arriving[chunk].arrive(), slice, chunk);
    returning.push(await fromExperts(rows_MD, slice, roadOf(half, role, chunk)));
    behind?.(slice, chunk);
  }
  for (const [chunk, slice] of half.slices.entries()) {
    take(await returning[chunk].arrive(), slice, chunk);
  }
  undo.move();
}

/**
 * Frees what nobody will use, once it has arrived.
 *
 * @param all What travels.
 */
export function dropAll(all: readonly Travelling[]): void {
  for (const rows of all) rows.drop();
}

function roadOf(half: HalfPass, role: "dispatch" | "combine", chunk: number) {
  const { comm, exchange, step, layer, phase, slices } = half;
  return { comm, exchange, step, place: { layer, phase, role, chunk }, slices: slices.length };
}
