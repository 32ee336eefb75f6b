// Small messages in one call of WebAssembly: fill the slot, raise the flag, look whether the others have raised theirs, finish.
// If they have not, `rounds.ts` goes on from the raised flag. It is the same protocol, only without a step through JavaScript.

import { bytesOf, DTYPES } from "../../tensor/dtype.ts";
import { allocate, linearBuffer } from "../../tensor/cpu/memory.ts";
import type { CollectiveRequest, Region } from "../transport.ts";
import { UserBytes } from "./copy.ts";
import { type Kernels, kernels, REDUCTIONS } from "./kernels.ts";
import { ONE_ROUND_BYTES, signatureOf, type Slots } from "./rounds.ts";
import type { Segment } from "./segment.ts";

/** Most bytes of a message that this file cares for. */
const SMALL_BYTES = 64 << 10;
/** Looks at the others' flags in the call that starts an operation; a few microseconds. */
const SPINS = 8000;
/** Words of `Round` in reduce.c. */
const ROUND_WORDS = 11;
const SLOTS_AT = 0, FLAG = 6, SIGNATURE = 7;

/** How an attempt ended. */
export const enum Attempt {
  /** The flag is up, not all ranks have arrived. */
  Started = 0,
  /** The operation is complete. */
  Complete = 1,
  /** The flag is up and somebody sleeps. */
  Asleep = 2,
  /** Nothing has happened: the operation is not for this file. */
  None = 3,
}

/** Small exchanges of one communicator. */
export class SmallExchange {
  readonly #slots: Slots;
  readonly #kernels: Kernels = kernels();
  readonly #at: number; // Round, in linear memory
  readonly #round: Int32Array;
  readonly #counts: Uint32Array;
  readonly #countsAt: number;
  readonly #area: number;
  readonly #payload: number;
  #stage = 0; // where ordinary arrays are copied to and from

  /** @param slots The slots. @param bell Where processes sleep. @param yields Whether there are more ranks than cores. */
  constructor(slots: Slots, bell: Segment, yields: boolean) {
    this.#slots = slots;
    const { rank, size, layout } = slots.segment;
    const words = ROUND_WORDS + 3 * size;
    this.#at = allocate(4 * words);
    this.#round = new Int32Array(linearBuffer(), this.#at, ROUND_WORDS);
    this.#countsAt = this.#at + 4 * (ROUND_WORDS + size);
    this.#counts = new Uint32Array(linearBuffer(), this.#countsAt, 2 * size);
    this.#area = layout.payload / size;
    this.#payload = layout.payload;
    this.#round.set([
      0,
      layout.rankStride,
      rank,
      size,
      bell.base + bell.layout.sleepers,
      bell.size,
      0,
      0,
      yields ? 1 : SPINS,
      this.#at + 4 * ROUND_WORDS,
      Deno.build.arch === "x86_64" ? 1 : 0,
    ]);
  }

  /** Starts an operation if it is small. @param request The operation. @returns How far it came. */
  start(request: CollectiveRequest): Attempt {
    switch (request.operation) {
      case "allReduce":
        return this.#allReduce(request);
      case "allGather":
        return this.#allGather(request);
      case "allToAll":
      case "allToAllV":
        return this.#allToAll(request);
      case "barrier":
        this.#prepare(request);
        return this.#kernels.small_barrier(this.#at);
      default:
        return Attempt.None;
    }
  }

  #allReduce(request: CollectiveRequest): Attempt {
    const send = request.send!, recv = request.recv!;
    const { length, dtype } = send;
    const bytes = length * bytesOf(dtype);
    if (length === 0 || bytes > ONE_ROUND_BYTES || bytes > this.#payload) return Attempt.None;
    this.#prepare(request);
    const code = DTYPES.indexOf(dtype), op = REDUCTIONS.indexOf(request.op);
    const x = this.#from(send, bytes), out = this.#to(recv);
    const state = this.#kernels.small_all_reduce(this.#at, code, op, x, out, length, bytes);
    return this.#finish(state, recv, bytes);
  }

  #allGather(request: CollectiveRequest): Attempt {
    const send = request.send!, recv = request.recv!;
    const bytes = send.length * bytesOf(send.dtype);
    const all = recv.length * bytesOf(send.dtype);
    if (bytes === 0 || bytes > this.#payload || all > SMALL_BYTES) return Attempt.None;
    this.#prepare(request);
    const x = this.#from(send, bytes), out = this.#to(recv);
    return this.#finish(this.#kernels.small_all_gather(this.#at, x, out, bytes), recv, all);
  }

  #allToAll(request: CollectiveRequest): Attempt {
    const send = request.send!, recv = request.recv!;
    const width = bytesOf(send.dtype);
    const sent = send.length * width, received = recv.length * width;
    if (sent > SMALL_BYTES || received > SMALL_BYTES) return Attempt.None;
    const { rank, size } = this.#slots.segment;
    const counts = this.#counts, area = this.#area;
    if (request.operation === "allToAll") {
      if (sent === 0 || sent > this.#payload) return Attempt.None;
      counts.fill(sent / size);
    } else {
      const { sendCounts, recvCounts } = request;
      for (let q = 0; q < size; q++) {
        const bytes = sendCounts[q] * width;
        if (bytes > area && q !== rank) return Attempt.None;
        counts[q] = bytes;
        counts[size + q] = recvCounts[q] * width;
      }
    }
    this.#prepare(request);
    const x = this.#from(send, sent), out = this.#to(recv);
    const state = this.#kernels.small_all_to_all(this.#at, x, out, this.#countsAt, area);
    return this.#finish(state, recv, received);
  }

  #prepare(request: CollectiveRequest): void {
    const { round } = this.#slots;
    this.#round[SLOTS_AT] = this.#slots.slot(0, round);
    this.#round[FLAG] = round + 1;
    this.#round[SIGNATURE] = signatureOf(request, this.#slots.segment.size);
  }

  #from(region: Region, bytes: number): number {
    if (region.address >= 0) return region.address;
    const at = this.#stage ||= allocate(2 * SMALL_BYTES);
    new UserBytes(region).copyOut(0, at, bytes);
    return at;
  }

  #to(region: Region): number {
    if (region.address >= 0) return region.address;
    return (this.#stage ||= allocate(2 * SMALL_BYTES)) + SMALL_BYTES;
  }

  #finish(state: Attempt, recv: Region, bytes: number): Attempt {
    if (state === Attempt.Complete && recv.address < 0) {
      new UserBytes(recv).copyIn(0, this.#stage + SMALL_BYTES, bytes);
    }
    return state;
  }
}
