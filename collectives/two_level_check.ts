// Debug mode (LINA_DEBUG=1) of all-to-alls on two levels: all ranks must pass the same counts, which nobody else could tell, as a wrong count only
// shows as a message of another size somewhere else. It costs a small allGather per exchange.

import { type DType, DTYPES } from "../tensor/dtype.ts";
import type { Stream } from "../tensor/device.ts";
import { CollectiveOrderError } from "./order.ts";
import { settled } from "./two_level_flight.ts";
import type { Completion } from "./transport.ts";
import type { Communicator, Work } from "./types.ts";

/** Numbers that a rank tells: which exchange, element type, the counts' hash. */
const NUMBERS = 3;

/** A completion of which it is known what it waits for. */
export type Exchange = Completion & { readonly waiting: Work | undefined };

/** What ranks must agree about. */
export interface Agreed {
  /** Name of the exchanges' group. */
  readonly name: string;
  /** Number of the exchange. */
  readonly sequence: number;
  /** Element type. */
  readonly dtype: DType;
  /** Elements from source to destination. */
  readonly counts: ArrayLike<number>;
}

/** Asks whether all ranks pass the same. */
export class Agreement {
  readonly #comm: Communicator;
  readonly #all: Float64Array;
  readonly #agreed: Agreed;
  readonly #work: Work;
  #done = false;

  /** Asks. @param comm The ranks. @param agreed What this rank passes. */
  constructor(comm: Communicator, agreed: Agreed) {
    const { sequence, dtype, counts } = agreed;
    this.#comm = comm;
    this.#agreed = agreed;
    this.#all = new Float64Array(NUMBERS * comm.size);
    const mine = Float64Array.of(sequence, DTYPES.indexOf(dtype), hashOf(counts));
    this.#work = comm.allGather(mine, this.#all);
  }

  /** Whether all have answered. @throws {CollectiveOrderError} If they do not agree. */
  poll(): boolean {
    if (this.#done) return true;
    if (!settled(this.#work)) return false;
    for (let r = 1; r < this.#comm.size; r++) {
      for (let i = 0; i < NUMBERS; i++) {
        if (this.#all[NUMBERS * r + i] !== this.#all[i]) throw this.#error(r, i);
      }
    }
    return this.#done = true;
  }

  /** The question, while it is open. */
  get waiting(): Work | undefined {
    return this.#done ? undefined : this.#work;
  }

  #error(rank: number, which: number): CollectiveOrderError {
    const { name, sequence } = this.#agreed;
    const said = (r: number) => this.#all[NUMBERS * r + which];
    const [what, show] = [
      ["exchange", (r: number) => `${said(r)}`],
      ["element type", (r: number) => DTYPES[said(r)]],
      ["counts", (r: number) => `a matrix of hash ${said(r)}`],
    ][which] as [string, (r: number) => string];
    return new CollectiveOrderError(
      `Cannot run allToAllV ${sequence} of ${name} on rank ${this.#comm.rank} as the ${what} must be that of rank 0, ${
        show(0)
      }, on all ranks: current value is ${show(rank)} on rank ${rank}`,
      rank,
      sequence,
    );
  }
}

/** An exchange that fails if ranks do not agree about it, instead of waiting for messages that never come. */
export class CheckedExchange implements Completion {
  readonly #exchange: Exchange;
  readonly #agreement: Agreement;

  /** @param exchange The exchange. @param agreement Its question. */
  constructor(exchange: Exchange, agreement: Agreement) {
    this.#exchange = exchange;
    this.#agreement = agreement;
  }

  poll(): boolean {
    // Both move on: the others may wait for this rank's messages.
    const agreed = this.#agreement.poll();
    return this.#exchange.poll() && agreed;
  }

  idle(spins: number): void {
    this.#exchange.idle(spins);
  }

  get waiting(): Work | undefined {
    return this.#agreement.waiting ?? this.#exchange.waiting;
  }

  get waitOn(): ((stream: Stream) => void) | undefined {
    const exchange = this.#exchange;
    return exchange.waitOn && ((stream) => exchange.waitOn!(stream));
  }

  get end(): Completion["end"] {
    return this.#exchange.end;
  }

  get mark(): Completion["mark"] {
    const exchange = this.#exchange;
    return exchange.mark && (() => exchange.mark!());
  }

  get span(): Completion["span"] {
    const exchange = this.#exchange;
    return exchange.span && (() => exchange.span!());
  }
}

function hashOf(counts: ArrayLike<number>): number {
  let hash = 0x811c9dc5;
  for (let i = 0; i < counts.length; i++) {
    const n = counts[i];
    for (const word of [n >>> 0, Math.floor(n / 2 ** 32)]) {
      hash = Math.imul(hash ^ word, 0x01000193);
      hash ^= hash >>> 15;
    }
  }
  return hash >>> 0;
}
