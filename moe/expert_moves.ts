// How experts travel between ranks: all that moves, of all layers, goes by one all-to-all of bytes through two buffers of bounded
// size, in as many rounds as it takes. What moves whereto is expert_store.ts's to say; ranks agree on it without a message.

import type { Communicator } from "../collectives/types.ts";
import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor, TensorScope } from "../tensor/tensor.ts";
import { bytesOfTensor, type HostedMoments } from "./expert_memory.ts";

/** Bytes of each of the two buffers, and what the rounds of a pair of ranks are cut at multiples of. */
const STAGING_BYTES = 32 * 2 ** 20, ALIGN = 256;

/** An expert that a rank is to hold and has not held. */
export interface ExpertMove {
  /** The expert. */
  readonly expert: number;
  /** A rank that holds it. */
  readonly from: number;
  /** The rank that is to hold it, too. */
  readonly to: number;
}

/**
 * What must travel for experts to sit elsewhere: one order on all ranks, by expert, then by new holder; old holders take turns as the source.
 *
 * @param before The ranks that hold each expert.
 * @param after Those that are to hold it.
 * @returns The moves.
 */
export function movesOf(
  before: readonly (readonly number[])[],
  after: readonly (readonly number[])[],
): ExpertMove[] {
  return after.flatMap((ranks, expert) => {
    const old = before[expert];
    const fresh = ranks.filter((rank) => !old.includes(rank));
    return fresh.map((to, i) => ({ expert, from: old[i % old.length], to }));
  });
}

/** A part of what an expert is made of: device memory, or moments in host memory. */
export type StatePiece = Tensor | HostedMoments;

/** Bytes that go from one rank to another. */
export interface StateTransfer {
  /** Who has them. */
  readonly from: number;
  /** Who gets them. */
  readonly to: number;
  /** How many: the same on all ranks. */
  readonly bytes: number;
  /** Where they are or go, on these two ranks; on others nobody asks. */
  readonly pieces: readonly StatePiece[];
}

/** All that a rank has for another one, or gets from it, as one range of bytes. */
class ByteStream {
  bytes = 0;
  readonly #pieces: { readonly piece: StatePiece; readonly start: number; readonly end: number }[] =
    [];

  add({ bytes, pieces }: StateTransfer): void {
    let at = this.bytes;
    this.bytes += bytes;
    for (const piece of pieces) {
      const size = "layout" in piece ? piece.layout.bytes : piece.bytes;
      this.#pieces.push({ piece, start: at, end: at += size });
    }
    if (at !== this.bytes) {
      throw new RangeError(
        `Cannot move an expert as its parts must have ${bytes} bytes: current value is ${
          bytes + at - this.bytes
        }`,
      );
    }
  }

  /** Where round `round` of `rounds` begins. */
  cut(round: number, rounds: number): number {
    return round === rounds ? this.bytes : Math.floor(this.bytes * round / rounds / ALIGN) * ALIGN;
  }

  /** Copies the bytes `start` to `end` to the head of a buffer, or from there. */
  copy(start: number, end: number, buffer: Tensor, direction: "out" | "in"): void {
    for (const { piece, start: first, end: last } of this.#pieces) {
      const from = Math.max(start, first), to = Math.min(end, last);
      if (from >= to) continue;
      const staged = buffer.rows(from - start, to - start);
      if ("layout" in piece) {
        if (direction === "out") piece.load(from - first, staged);
        else piece.store(staged, from - first);
      } else {
        const part = bytesOfTensor(piece).rows(from - first, to - first);
        if (direction === "out") ops.copy(part, staged);
        else ops.copy(staged, part);
      }
    }
  }
}

/** Carries bytes between ranks. All ranks make it and run it together, with the same transfers in the same order. */
export class StateExchange implements Disposable {
  readonly #comm: Communicator;
  readonly #device: Device;
  /** By the other rank. */
  readonly #sends: readonly ByteStream[];
  readonly #receives: readonly ByteStream[];
  readonly #rounds: number;
  readonly #sending: Tensor;
  readonly #receiving: Tensor;

  /**
   * Takes memory for the buffers.
   *
   * @param comm The ranks.
   * @param device Where the buffers are.
   * @param transfers What goes from where to where; never from a rank to itself.
   * @param staging_bytes Size of each of the two buffers, but for roundings. @default {32 MiB}
   * @throws {OutOfMemoryError} If the memory does not suffice.
   */
  constructor(
    comm: Communicator,
    device: Device,
    transfers: readonly StateTransfer[],
    staging_bytes: number = STAGING_BYTES,
  ) {
    this.#comm = comm;
    this.#device = device;
    const { rank, size } = comm;
    const streams = () => Array.from({ length: size }, () => new ByteStream());
    const sends = streams(), receives = streams();
    // What each rank sends and gets in all: every rank makes as many rounds as the one with the most to do.
    const out = new Float64Array(size), into = new Float64Array(size);
    for (const transfer of transfers) {
      out[transfer.from] += transfer.bytes;
      into[transfer.to] += transfer.bytes;
      if (transfer.from === rank) sends[transfer.to].add(transfer);
      if (transfer.to === rank) receives[transfer.from].add(transfer);
    }
    const rounds = Math.ceil(Math.max(...out, ...into) / staging_bytes);
    const room = (streams: readonly ByteStream[]) => {
      let most = 0;
      for (let i = 0; i < rounds; i++) most = Math.max(most, sum(countsOf(streams, i, rounds)));
      return empty(device, [most], "u8");
    };
    using scope = new TensorScope();
    this.#sends = sends;
    this.#receives = receives;
    this.#rounds = rounds;
    this.#sending = room(sends);
    this.#receiving = room(receives);
    scope.keep(this);
  }

  /** Bytes that this rank sends. */
  get bytes(): number {
    return this.#sends.reduce((bytes, stream) => bytes + stream.bytes, 0);
  }

  /**
   * Moves the bytes. Sources stay as they are; on a GPU all is in the order of the device's stream when it returns, and nothing was waited for.
   */
  async run(): Promise<void> {
    const { stream } = this.#device, rounds = this.#rounds;
    for (let i = 0; i < rounds; i++) {
      const sendCounts = countsOf(this.#sends, i, rounds);
      const recvCounts = countsOf(this.#receives, i, rounds);
      stage(this.#sends, sendCounts, this.#sending, i, rounds, "out");
      const work = this.#comm.allToAllV(this.#sending, sendCounts, this.#receiving, recvCounts);
      await work.wait(stream);
      stage(this.#receives, recvCounts, this.#receiving, i, rounds, "in");
    }
  }

  /** Frees the buffers. */
  [Symbol.dispose](): void {
    this.#sending[Symbol.dispose]();
    this.#receiving[Symbol.dispose]();
  }
}

/** Bytes of each rank in a round. */
function countsOf(streams: readonly ByteStream[], round: number, rounds: number): number[] {
  return streams.map((stream) => stream.cut(round + 1, rounds) - stream.cut(round, rounds));
}

function stage(
  streams: readonly ByteStream[],
  counts: readonly number[],
  buffer: Tensor,
  round: number,
  rounds: number,
  direction: "out" | "in",
): void {
  let at = 0;
  streams.forEach((stream, rank) => {
    const start = stream.cut(round, rounds), part = buffer.rows(at, at += counts[rank]);
    stream.copy(start, start + counts[rank], part, direction);
  });
}

function sum(counts: readonly number[]): number {
  return counts.reduce((a, b) => a + b, 0);
}
