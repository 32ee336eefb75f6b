// The slots that ranks exchange data through, as one rank sees them: where they lie, whose flags are up, which may be overwritten. What
// the rounds over them mean is in `rounds.ts`.

import { DTYPES } from "../../tensor/dtype.ts";
import type { CollectiveRequest } from "../transport.ts";
import { REDUCE_OPS } from "../types.ts";
import { type Segment, SLOT_HEADER_BYTES, SLOTS } from "./segment.ts";

/** The state of a segment's slots, shared by the operations of its communicator. */
export class Slots {
  /** The segment. */
  readonly segment: Segment;
  /** Number of the next round. */
  round = 0;
  readonly #seen: Int32Array; // highest flag seen of each rank
  #all = 0; // all flags are known to be at least this

  /** @param segment Where the slots are. */
  constructor(segment: Segment) {
    this.segment = segment;
    this.#seen = new Int32Array(segment.size);
  }

  /** Byte offset of a slot's payload. @param rank Whose. @param round In which round. @returns The offset in linear memory. */
  payload(rank: number, round: number): number {
    return this.slot(rank, round) + SLOT_HEADER_BYTES;
  }

  /** Byte offset of a slot. @param rank Whose. @param round In which round. @returns The offset in linear memory. */
  slot(rank: number, round: number): number {
    const { base, layout } = this.segment;
    return base + layout.slots + rank * layout.rankStride +
      (round & (SLOTS - 1)) * layout.slotStride;
  }

  /** Whether a rank has raised its flag of a round. @param rank Which. @param round Which. @returns Whether its data is there. */
  arrived(rank: number, round: number): boolean {
    const want = round + 1;
    if (((this.#all - want) | 0) >= 0 || ((this.#seen[rank] - want) | 0) >= 0) return true;
    const flag = Atomics.load(this.segment.words, this.slot(rank, round) >>> 2);
    if (((flag - want) | 0) < 0) return false;
    this.#seen[rank] = flag;
    return true;
  }

  /** Whether this rank's slot of a round may be overwritten. @param round Which. @returns Whether all have read what it held. */
  writable(round: number): boolean {
    if (((this.#all - round) | 0) >= 0) return true;
    const { rank, size } = this.segment;
    for (let q = 0; q < size; q++) {
      if (q === rank || ((this.#seen[q] - round) | 0) >= 0) continue;
      if (!this.arrived(q, (round - 1) | 0)) return false;
    }
    this.#all = round;
    return true;
  }

  /** Goes to the next round after one in which all flags were seen. */
  next(): void {
    this.round = this.#all = (this.round + 1) | 0;
  }

  /** Wakes all ranks of the group that sleep. */
  wakeAll(): void {
    const { rank, size } = this.segment;
    for (let q = 0; q < size; q++) if (q !== rank) this.segment.wake(q);
  }

  /** Raises this rank's flag. @param round Of this round. @param signature Of the operation. @param rounds That it takes. */
  publish(round: number, signature: number, rounds: number): void {
    const { words, rank } = this.segment;
    const at = this.slot(rank, round) >>> 2;
    words[at + 1] = signature;
    words[at + 2] = rounds;
    Atomics.store(words, at, (round + 1) | 0);
    this.wakeAll();
  }

  /** What a rank says about its operation. @param rank Which. @param round In this round. @returns Signature and rounds. */
  signature(rank: number, round: number): number {
    return this.segment.words[(this.slot(rank, round) >>> 2) + 1];
  }

  /** Rounds that a rank needs. @param rank Which. @param round In this round. @returns Their number. */
  rounds(rank: number, round: number): number {
    return this.segment.words[(this.slot(rank, round) >>> 2) + 2];
  }
}

/**
 * A number that ranks agree on when they call the same operation.
 *
 * @param request The operation.
 * @param size Number of ranks.
 * @returns The number.
 */
export function signatureOf(request: CollectiveRequest, size: number): number {
  const { operation, send, recv, peer, op, recvCounts } = request;
  let n = 0;
  if (operation === "allGatherV") { for (let r = 0; r < size; r++) n = mix(n, recvCounts[r]); }
  else if (operation === "scatter" || operation === "reduceScatter") n = recv!.length;
  else if (operation !== "allToAllV") n = send?.length ?? 0;
  const region = send ?? recv;
  const dtype = region === null ? 0 : DTYPES.indexOf(region.dtype) + 1;
  let hash = mix(operation.length * 31 + operation.charCodeAt(operation.length - 1), dtype);
  hash = mix(hash, peer * 8 + REDUCE_OPS.indexOf(op));
  return mix(mix(hash, n % 0x100000000), Math.floor(n / 0x100000000));
}

function mix(hash: number, value: number): number {
  return (Math.imul(hash ^ value, 0x9e3779b1) ^ (hash >>> 15)) | 0;
}
