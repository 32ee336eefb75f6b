// Collectives as rounds over slots. In round t each rank puts bytes into its slot t mod 2 and raises the slot's flag to t + 1;
// whoever needs them waits for the flag and reads. A message larger than a slot takes several rounds.
//
// Why two slots suffice without a second flag: a rank raises the flag of round t only when it has read all it needs of round
// t − 1. So who sees everybody's flag of round t − 1 may overwrite what it showed in round t − 2.
//
// The flag's line also carries a signature of the operation: ranks that call different operations get an error, not wrong data.

import { bytesOf } from "../../tensor/dtype.ts";
import type { CollectiveRequest } from "../transport.ts";
import type { Counts } from "../types.ts";
import { UserBytes } from "./copy.ts";
import { reduceLinear } from "./kernels.ts";
import { AREA_HEADER_BYTES } from "./segment.ts";
import { signatureOf, type Slots } from "./slots.ts";

/** Up to this many bytes every rank reduces everything itself, which takes one round instead of two. */
export const ONE_ROUND_BYTES: number = 16 << 10;

/** Whom a rank waits for in a round: nobody, the root, or all others. */
type Needs = "none" | "root" | "all";

/** One collective on its way through the rounds. */
export class RoundsOperation {
  readonly #slots: Slots;
  readonly #request: CollectiveRequest;
  readonly #sendCounts: Counts; // copies, because the caller may change his
  readonly #recvCounts: Counts;
  readonly #rank: number;
  readonly #size: number;
  readonly #width: number;
  readonly #send: UserBytes | null;
  readonly #recv: UserBytes | null;
  readonly #signature: number;
  readonly #chunk: number; // elements of each rank in a round
  readonly #area: number; // bytes of a slot for each destination of an all-to-all
  readonly #needs: Needs;
  readonly #whole: boolean; // everybody reduces everything
  #rounds: number;
  #i = 0; // rounds done
  #published: boolean;

  /** @param slots Where. @param request What. @param published Whether the first round's flag is up already. */
  constructor(slots: Slots, request: CollectiveRequest, published: boolean) {
    this.#published = published;
    const { rank, size, layout } = slots.segment;
    const { operation, send, recv } = request;
    this.#slots = slots;
    this.#request = request;
    this.#sendCounts = request.sendCounts.slice();
    this.#recvCounts = request.recvCounts.slice();
    this.#rank = rank;
    this.#size = size;
    const region = send ?? recv;
    this.#width = region === null ? 1 : bytesOf(region.dtype);
    this.#send = send === null ? null : new UserBytes(send);
    this.#recv = recv === null ? null : send === recv ? this.#send : new UserBytes(recv);
    this.#signature = signatureOf(request, size);
    const whole = (operation === "allReduce" || operation === "reduce") &&
      send!.length * this.#width <= Math.min(ONE_ROUND_BYTES, layout.payload);
    this.#whole = whole;
    const divided = operation === "reduceScatter" || operation === "scatter" ||
      operation === "allToAll" || operation === "allToAllV";
    this.#chunk = Math.floor((divided ? layout.payload / size : layout.payload) / this.#width);
    this.#area = AREA_HEADER_BYTES + layout.payload / size;
    this.#rounds = this.#countRounds();
    this.#needs = this.#whomToWaitFor();
  }

  #countRounds(): number {
    const { operation, send, recv, sendCounts, recvCounts } = this.#request;
    const chunks = (n: number) => Math.ceil(n / this.#chunk);
    switch (operation) {
      case "allReduce":
      case "reduce":
        // The results of a chunk travel in the round after it.
        return send!.length === 0 ? 0 : this.#whole ? 1 : chunks(send!.length) + 1;
      case "reduceScatter":
      case "scatter":
        return chunks(recv!.length);
      case "allGather":
      case "gather":
      case "broadcast":
        return chunks(send!.length);
      case "allGatherV":
        return chunks(maxOf(recvCounts, -1));
      case "allToAll":
        return chunks(send!.length / this.#size);
      case "allToAllV": // only a lower bound: the others say in the first round what they need
        return Math.max(1, chunks(maxOf(sendCounts, this.#rank)));
      default:
        return 1;
    }
  }

  #whomToWaitFor(): Needs {
    const { operation, peer } = this.#request;
    const root = this.#rank === peer;
    if (operation === "broadcast" || operation === "scatter") return root ? "none" : "root";
    if (operation === "gather" || (operation === "reduce" && this.#whole)) {
      return root ? "all" : "none";
    }
    return "all";
  }

  /** Moves on as far as it goes. @returns Whether the operation is complete. */
  poll(): boolean {
    const slots = this.#slots;
    while (this.#i < this.#rounds) {
      const round = (slots.round + this.#i) | 0;
      if (!this.#published) {
        if (!slots.writable(round)) return false;
        this.#write(this.#i, slots.payload(this.#rank, round));
        slots.publish(round, this.#signature, this.#rounds);
        this.#published = true;
      }
      if (!this.#ready(round)) return false;
      if (this.#i === 0) this.#checkSignatures(round);
      this.#read(this.#i, round);
      this.#published = false;
      this.#i++;
    }
    slots.round = (slots.round + this.#rounds) | 0;
    return true;
  }

  /** Ranks that this one waits for now. @returns Their numbers. */
  awaited(): number[] {
    const round = (this.#slots.round + this.#i) | 0;
    const others = [...Array(this.#size).keys()].filter((q) => q !== this.#rank);
    if (!this.#published) return others.filter((q) => !this.#slots.arrived(q, (round - 1) | 0));
    return others.filter((q) => this.#waitsFor(q) && !this.#slots.arrived(q, round));
  }

  #waitsFor(rank: number): boolean {
    return this.#needs === "all" || (this.#needs === "root" && rank === this.#request.peer);
  }

  #ready(round: number): boolean {
    if (this.#needs === "none") return true;
    for (let q = 0; q < this.#size; q++) {
      if (q !== this.#rank && this.#waitsFor(q) && !this.#slots.arrived(q, round)) return false;
    }
    return true;
  }

  #checkSignatures(round: number): void {
    for (let q = 0; q < this.#size; q++) {
      if (q === this.#rank || !this.#waitsFor(q)) continue;
      if (this.#slots.signature(q, round) !== this.#signature) {
        throw new Error(
          `all ranks must call the same operation with the same dtype, sizes, root and reduction: current value is another one on rank ${q}; LINA_DEBUG=1 tells which`,
        );
      }
      if (this.#request.operation === "allToAllV") {
        this.#checkCount(q, round);
        this.#rounds = Math.max(this.#rounds, this.#slots.rounds(q, round));
      }
    }
  }

  /** Compares what a rank says it sends to this one with what this one expects. */
  #checkCount(q: number, round: number): void {
    const { words } = this.#slots.segment;
    const at = (this.#slots.payload(q, round) + this.#rank * this.#area) >>> 2;
    const sent = ((words[at] >>> 0) + words[at + 1] * 0x100000000) / this.#width;
    const count = this.#recvCounts[q];
    if (sent === count) return;
    throw new RangeError(
      `sendCounts[${this.#rank}] of rank ${q} must be recvCounts[${q}] of rank ${this.#rank}, ${count}: current value is ${sent}`,
    );
  }

  /** Says how much goes to a rank: in the first round, at the head of what goes to it. */
  #sayCount(bytes: number, at: number): void {
    const { words } = this.#slots.segment;
    words[at >>> 2] = bytes | 0;
    words[(at >>> 2) + 1] = Math.floor(bytes / 0x100000000);
  }

  #write(i: number, payload: number): void {
    const { operation, peer } = this.#request;
    const sendCounts = this.#sendCounts;
    const width = this.#width, chunk = this.#chunk;
    const send = this.#send!;
    const start = i * chunk;
    switch (operation) {
      case "allReduce":
      case "reduce": {
        const n = span(start, chunk, send.length);
        if (this.#whole || send.address < 0) return send.copyOut(start * width, payload, n * width);
        // This rank reduces its own part, so nobody else reads it.
        const [from, to] = this.#part(n, this.#rank);
        send.copyOut(start * width, payload, from * width);
        return send.copyOut((start + to) * width, payload + to * width, (n - to) * width);
      }
      case "reduceScatter":
      case "scatter": {
        if (operation === "scatter" && this.#rank !== peer) return;
        const block = this.#recv!.length;
        const n = span(start, chunk, block);
        for (let q = 0; q < this.#size; q++) {
          if (q === this.#rank && (operation === "scatter" || send.address >= 0)) continue;
          send.copyOut((q * block + start) * width, payload + q * chunk * width, n * width);
        }
        return;
      }
      case "broadcast":
      case "gather":
        if ((this.#rank === peer) === (operation === "gather")) return;
        return send.copyOut(start * width, payload, span(start, chunk, send.length) * width);
      case "allGather":
      case "allGatherV":
        return send.copyOut(start * width, payload, span(start, chunk, send.length) * width);
      case "allToAll":
      case "allToAllV": {
        let at = 0;
        for (let q = 0; q < this.#size; q++) {
          const count = operation === "allToAll" ? send.length / this.#size : sendCounts[q];
          if (q !== this.#rank) {
            const n = span(start, chunk, count);
            const to = payload + q * this.#area;
            if (i === 0) this.#sayCount(count * width, to);
            send.copyOut((at + start) * width, to + AREA_HEADER_BYTES, n * width);
          }
          at += count;
        }
      }
    }
  }

  #read(i: number, round: number): void {
    const { operation, peer } = this.#request;
    const recvCounts = this.#recvCounts;
    const width = this.#width, chunk = this.#chunk, rank = this.#rank;
    const start = i * chunk;
    switch (operation) {
      case "allReduce":
      case "reduce":
        return this.#readReduced(i, round);
      case "reduceScatter": {
        const n = span(start, chunk, this.#recv!.length);
        return this.#reduce(round, rank * chunk, rank * this.#recv!.length + start, start, n, -1);
      }
      case "broadcast":
        if (rank === peer) return;
        return this.#recv!.copyIn(
          start * width,
          this.#slots.payload(peer, round),
          span(start, chunk, this.#recv!.length) * width,
        );
      case "scatter": {
        const n = span(start, chunk, this.#recv!.length);
        if (rank === peer) {
          const block = this.#recv!.length;
          return this.#recv!.copyFrom(
            start * width,
            this.#send!,
            (rank * block + start) * width,
            n * width,
          );
        }
        const from = this.#slots.payload(peer, round) + rank * chunk * width;
        return this.#recv!.copyIn(start * width, from, n * width);
      }
      case "gather":
      case "allGather":
      case "allGatherV": {
        if (operation === "gather" && rank !== peer) return;
        let at = 0;
        for (let q = 0; q < this.#size; q++) {
          const count = operation === "allGatherV" ? recvCounts[q] : this.#send!.length;
          this.#take(q, round, 0, start, at, count);
          at += count;
        }
        return;
      }
      case "allToAll":
      case "allToAllV": {
        let at = 0;
        for (let q = 0; q < this.#size; q++) {
          const count = operation === "allToAll" ? this.#recv!.length / this.#size : recvCounts[q];
          const offset = rank * this.#area + AREA_HEADER_BYTES;
          if (q !== rank) this.#take(q, round, offset, start, at, count);
          else if (i === 0) this.#keep(at, count);
          at += count;
        }
      }
    }
  }

  /** Takes this round's elements of a rank's block; the block begins at element `at` of the destination. */
  #take(q: number, round: number, offset: number, start: number, at: number, count: number): void {
    const n = span(start, this.#chunk, count) * this.#width;
    const to = (at + start) * this.#width;
    if (q === this.#rank) this.#recv!.copyFrom(to, this.#send!, start * this.#width, n);
    else this.#recv!.copyIn(to, this.#slots.payload(q, round) + offset, n);
  }

  /** Copies the block of an all-to-all that stays on this rank. */
  #keep(at: number, count: number): void {
    const { operation } = this.#request;
    const sendCounts = this.#sendCounts;
    let from = 0;
    for (let q = 0; q < this.#rank; q++) from += operation === "allToAll" ? count : sendCounts[q];
    this.#recv!.copyFrom(at * this.#width, this.#send!, from * this.#width, count * this.#width);
  }

  /** The part of a chunk of n elements that a rank reduces. */
  #part(n: number, rank: number): [number, number] {
    const unit = 64 / this.#width;
    const part = Math.ceil(n / this.#size / unit) * unit;
    return [Math.min(n, rank * part), Math.min(n, (rank + 1) * part)];
  }

  #readReduced(i: number, round: number): void {
    const { operation, peer } = this.#request;
    const { length } = this.#send!;
    const chunk = this.#chunk, width = this.#width;
    const wanted = operation === "allReduce" || this.#rank === peer;
    if (this.#whole) {
      if (wanted) this.#reduce(round, 0, 0, 0, length, -1);
      return;
    }
    const results = this.#slots.segment.layout.payload;
    if (i < this.#rounds - 1) {
      const n = span(i * chunk, chunk, length);
      const [from, to] = this.#part(n, this.#rank);
      const next = this.#slots.payload(this.#rank, (round + 1) | 0) + results;
      this.#reduce(round, from, i * chunk + from, wanted ? i * chunk + from : -1, to - from, next);
    }
    if (i === 0 || !wanted) return;
    const start = (i - 1) * chunk;
    const n = span(start, chunk, length);
    for (let q = 0; q < this.#size; q++) {
      if (q === this.#rank) continue;
      const [from, to] = this.#part(n, q);
      const at = this.#slots.payload(q, round) + results;
      this.#recv!.copyIn((start + from) * width, at, (to - from) * width);
    }
  }

  /**
   * Reduces n elements that lie at element `offset` of every rank's payload and at element `own` of this rank's data; the result goes to
   * linear memory at `shared` unless that is −1, and to element `to` of the destination unless that is −1.
   */
  #reduce(round: number, offset: number, own: number, to: number, n: number, shared: number): void {
    if (n <= 0) return;
    const { dtype } = (this.#request.send ?? this.#request.recv)!;
    const width = this.#width, send = this.#send!, recv = this.#recv;
    sources.length = this.#size;
    for (let q = 0; q < this.#size; q++) {
      sources[q] = q === this.#rank && send.address >= 0
        ? send.address + own * width
        : this.#slots.payload(q, round) + offset * width;
    }
    const direct = to >= 0 && recv!.address >= 0 ? recv!.address + to * width : -1;
    if (direct >= 0) {
      return reduceLinear(dtype, this.#request.op, sources, direct, Math.max(shared, 0), n);
    }
    // An ordinary array is filled by way of this rank's next slot, which the others have read by now.
    const target = shared >= 0 ? shared : this.#slots.payload(this.#rank, (round + 1) | 0);
    reduceLinear(dtype, this.#request.op, sources, target, 0, n);
    if (to >= 0) recv!.copyIn(to * width, target, n * width);
  }
}

const sources: number[] = [];

function span(start: number, chunk: number, length: number): number {
  return Math.max(0, Math.min(chunk, length - start));
}

function maxOf(counts: ArrayLike<number>, except: number): number {
  let max = 0;
  for (let r = 0; r < counts.length; r++) if (r !== except && counts[r] > max) max = counts[r];
  return max;
}
