// Small messages in one call of WebAssembly: fill the slot, raise the flag, look whether the others have raised theirs, finish.
// If they have not, `rounds.ts` goes on from the raised flag. It is the same protocol, only without a step through JavaScript.

import { bytesOf, DTYPES } from "../../tensor/dtype.ts";
import { allocate, free, linearBuffer } from "../../tensor/cpu/memory.ts";
import { libc } from "../../ffi/libc.ts";
import type { CollectiveRequest, OperationName, Region } from "../transport.ts";
import { REDUCE_OPS } from "../types.ts";
import { UserBytes } from "./copy.ts";
import { type Kernels, kernels } from "./kernels.ts";
import { ONE_ROUND_BYTES } from "./rounds.ts";
import { signatureOf, type Slots } from "./slots.ts";
import { AREA_HEADER_BYTES, type Segment } from "./segment.ts";

/** Most bytes of a message that this file cares for. */
const SMALL_BYTES = 64 << 10;
/** Looks at the others' flags in the call that starts an operation; a few microseconds. */
const SPINS = 8000;
/** Where there are more ranks than cores, how often the core is offered to another rank before the call returns; some 100 µs. */
const YIELDS = 64;
/** Words of `Round` in reduce.c. */
const ROUND_WORDS = 12;
const SLOTS_AT = 0, FLAG = 6, SIGNATURE = 7, PUBLISHED = 11;

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
  readonly #yields: boolean;
  #stage = 0; // where ordinary arrays are copied to and from
  // The arguments of the call in progress.
  #x = 0;
  #out = 0;
  #length = 0;
  #bytes = 0;
  #received = 0;
  #dtype = 0;
  #op = 0;

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
      0,
    ]);
    this.#yields = yields;
  }

  /** Gives its memory back; nothing may be started afterwards. */
  close(): void {
    free(this.#at);
    if (this.#stage !== 0) free(this.#stage);
  }

  /** Starts an operation if it is small. @param request The operation. @returns How far it came. */
  start(request: CollectiveRequest): Attempt {
    if (!this.#takes(request)) return Attempt.None;
    const { operation, recv } = request;
    const round = this.#round;
    round[SLOTS_AT] = this.#slots.slot(0, this.#slots.round);
    round[FLAG] = this.#slots.round + 1;
    round[SIGNATURE] = signatureOf(request, this.#slots.segment.size);
    let state = this.#call(operation);
    if (state === Attempt.Started && this.#yields) {
      const { sched_yield } = libc();
      round[PUBLISHED] = 1;
      for (let i = 0; i < YIELDS && state === Attempt.Started; i++) {
        sched_yield();
        state = this.#call(operation);
      }
      round[PUBLISHED] = 0;
    }
    if (state === Attempt.Complete && recv !== null && recv.address < 0) {
      new UserBytes(recv).copyIn(0, this.#stage + SMALL_BYTES, this.#received);
    }
    return state;
  }

  #call(operation: OperationName): Attempt {
    const kernels = this.#kernels;
    if (operation === "allReduce") {
      return kernels.small_all_reduce(
        this.#at,
        this.#dtype,
        this.#op,
        this.#x,
        this.#out,
        this.#length,
        this.#bytes,
      );
    }
    if (operation === "allGather") {
      return kernels.small_all_gather(this.#at, this.#x, this.#out, this.#bytes);
    }
    if (operation === "barrier") return kernels.small_barrier(this.#at);
    const area = AREA_HEADER_BYTES + this.#area;
    return kernels.small_all_to_all(this.#at, this.#x, this.#out, this.#countsAt, area);
  }

  /** Notes the arguments of an operation. @returns Whether it is small enough. */
  #takes(request: CollectiveRequest): boolean {
    const { operation, send, recv } = request;
    if (operation === "barrier") return true;
    if (send === null || recv === null) return false;
    const width = bytesOf(send.dtype);
    const bytes = send.length * width, received = recv.length * width;
    switch (operation) {
      case "allReduce":
        if (bytes === 0 || bytes > ONE_ROUND_BYTES || bytes > this.#payload) return false;
        this.#dtype = DTYPES.indexOf(send.dtype);
        this.#op = REDUCE_OPS.indexOf(request.op);
        break;
      case "allGather":
        if (bytes === 0 || bytes > this.#payload || received > SMALL_BYTES) return false;
        break;
      case "allToAll":
      case "allToAllV":
        if (bytes > SMALL_BYTES || received > SMALL_BYTES) return false;
        if (!this.#takesCounts(request, bytes, width)) return false;
        break;
      default:
        return false;
    }
    this.#length = send.length;
    this.#bytes = bytes;
    this.#received = received;
    this.#x = this.#from(send, bytes);
    this.#out = this.#to(recv);
    return true;
  }

  #takesCounts(request: CollectiveRequest, bytes: number, width: number): boolean {
    const { rank, size } = this.#slots.segment;
    const counts = this.#counts;
    if (request.operation === "allToAll") {
      if (bytes === 0 || bytes > this.#payload) return false;
      counts.fill(bytes / size);
      return true;
    }
    const { sendCounts, recvCounts } = request;
    for (let q = 0; q < size; q++) {
      const sent = sendCounts[q] * width;
      if (sent > this.#area && q !== rank) return false;
      counts[q] = sent;
      counts[size + q] = recvCounts[q] * width;
    }
    return true;
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
}
