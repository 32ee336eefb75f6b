// Watches over a transport: ranks that have left the job, errors that NCCL's own threads have met, operations that stand still. A GPU
// waits for a lost peer for ever, and with it everything that is ordered after it, so this runs by a timer, whether or not anybody
// awaits. What it finds fails the transport; an error that nobody polls for within a second ends the process.

import type { BootContext } from "../transport.ts";
import { timeoutError, timeoutOf } from "../watchdog.ts";
import type { HostFlight } from "./flight.ts";

/** Time between two looks, in ms. */
const INTERVAL_MS = 250;
/** How long what a lost rank has begun may still take to arrive, in ms. */
const DEPARTED_MS = 1000;
/** How long the rendezvous may take to name the rank behind an error of the network, in ms. */
const NAME_MS = 3000;
/** From this age on an operation counts as overdue: the others are told how far this rank has come. */
const OVERDUE_MS = 1000;
/** How much later than the watchdog of those who await this one is, in ms. */
const GRACE_MS = 1000;
/** How long an error may wait for somebody who polls, in ms. */
const UNTOLD_MS = 1000;

/** Whom to watch. */
export interface Watched {
  /** This rank's place in the job. */
  readonly context: BootContext;
  /** Ranks of the job, in the order of the transport. */
  readonly members: readonly number[];
  /** Name of the transport. */
  readonly id: string;
  /** This rank, in the transport. */
  readonly rank: number;
}

/** The transport's side. */
export interface Hooks {
  /** Operations in flight, oldest first. */
  readonly flights: readonly HostFlight[];
  /** Collectives begun so far. */
  begun(): number;
  /** What NCCL's own threads have met, or null. */
  asyncError(): Error | null;
  /** Fails the transport. */
  fail(error: Error): void;
}

/** The watch over one transport. */
export class Watch {
  /** Ranks of the job, in the order of the transport. */
  readonly members: readonly number[];
  /** Name of the transport. */
  readonly id: string;
  /** Whether somebody has got the error. */
  told = false;
  readonly #watched: Watched;
  readonly #hooks: Hooks;
  readonly #timeout_ms: number;
  readonly #timer: ReturnType<typeof setInterval>;
  #inspected_ms = 0;
  #error: Error | undefined; // of NCCL, until it is known who is behind it
  #error_ms = 0;
  #departed_ms = 0;
  #oldest: HostFlight | undefined;
  #oldest_ms = 0;
  #noted = -1;
  #failed = false;

  /** @param watched Whom to watch. @param hooks The transport's side. */
  constructor(watched: Watched, hooks: Hooks) {
    this.members = watched.members;
    this.id = watched.id;
    this.#watched = watched;
    this.#hooks = hooks;
    this.#timeout_ms = timeoutOf(undefined);
    this.#timer = setInterval(() => this.#look(), INTERVAL_MS);
    Deno.unrefTimer(this.#timer);
  }

  /** Looks, but not more often than the timer does. */
  inspect(): void {
    if (performance.now() - this.#inspected_ms >= INTERVAL_MS) this.#look();
  }

  #look(): void {
    const now_ms = this.#inspected_ms = performance.now();
    const [oldest] = this.#hooks.flights;
    if (this.#failed) return;
    if (oldest !== this.#oldest) {
      this.#oldest = oldest;
      this.#oldest_ms = now_ms;
    }
    if (oldest === undefined) return;
    if (now_ms - this.#oldest_ms > OVERDUE_MS) this.#note();
    const lost = this.#lostRank();
    if (lost >= 0) {
      if (this.#departed_ms === 0) this.#departed_ms = now_ms;
      if (now_ms - this.#departed_ms > DEPARTED_MS) return this.#fail(this.#lossOf(oldest, lost));
    }
    if (this.#error === undefined) {
      const error = this.#hooks.asyncError();
      if (error === null) return this.#checkAge(oldest, now_ms);
      this.#error = error;
      this.#error_ms = now_ms;
    }
    if (lost < 0 && now_ms - this.#error_ms > NAME_MS) this.#fail(this.#error);
  }

  #lostRank(): number {
    const { context: { departed }, rank } = this.#watched;
    if (departed === undefined || departed.size === 0) return -1;
    return this.members.findIndex((member, r) => r !== rank && departed.has(member));
  }

  #lossOf({ request }: HostFlight, r: number): Error {
    const { context, id, rank } = this.#watched;
    const how = context.departed!.get(this.members[r]);
    const cause = this.#error;
    return new Error(
      `Cannot complete ${request.operation} of ${id} on rank ${rank} as every rank must take part: current value is that rank ${r} ${how}`,
      { cause },
    );
  }

  /** An operation that nobody awaits may hang, too, and the device with it. */
  #checkAge({ request, index }: HostFlight, now_ms: number): void {
    if (now_ms - this.#oldest_ms < this.#timeout_ms + GRACE_MS) return;
    this.#failed = true;
    const { id, rank } = this.#watched;
    const { operation, sequence, peer } = request;
    const missing = () => this.#missing(index, peer);
    void timeoutError({ missing }, {
      operation,
      sequence,
      peer: index < 0 ? peer : null,
      communicator: id,
      rank,
      timeout_ms: this.#timeout_ms,
    }).then((error) => this.#fail(error));
  }

  #fail(error: Error): void {
    this.#failed = true;
    this.#hooks.fail(error);
    this.tellLater(error);
  }

  /** An error that nobody has polled for in time ends the process: what the device computes from now on is wrong. */
  tellLater(error: Error): void {
    this.#failed = true;
    setTimeout(() => {
      if (!this.told) throw error;
    }, UNTOLD_MS);
  }

  #noteKey(rank: number): string {
    return `nccl/${this.#watched.id}/begun/${rank}`;
  }

  /** Leaves the number of collectives begun here for ranks that ask who is missing. */
  #note(): void {
    const begun = this.#hooks.begun();
    if (this.#noted === begun) return;
    this.#noted = begun;
    const value = new TextEncoder().encode(String(begun));
    const { context: { store }, rank } = this.#watched;
    store.set(this.#noteKey(rank), value).catch(() => {});
  }

  /** Ranks that have not begun an operation, as far as can be known. @param sequence Its number on its communicator. @returns Them. */
  async missing(sequence: number): Promise<readonly number[]> {
    this.told = true; // whoever asks reports it
    const flight = this.#hooks.flights.find(({ index, request }) =>
      index >= 0 && request.sequence === sequence
    );
    return flight ? await this.#missing(flight.index, 0) : [];
  }

  async #missing(index: number, peer: number): Promise<readonly number[]> {
    if (index < 0) return [peer];
    this.#note();
    await new Promise((resolve) => setTimeout(resolve, OVERDUE_MS / 2)); // for ranks that have begun to wait when this one did
    const others = this.members.map((_, r) => r).filter((r) => r !== this.#watched.rank);
    const begun = await Promise.all(others.map((r) => this.#begunBy(r)));
    return others.filter((_, i) => begun[i] <= index);
  }

  async #begunBy(rank: number): Promise<number> {
    try {
      const value = await this.#watched.context.store.get(this.#noteKey(rank), OVERDUE_MS / 2);
      return Number(new TextDecoder().decode(value));
    } catch {
      return 0;
    }
  }

  /** Ends the watch. */
  close(): void {
    clearInterval(this.#timer);
  }
}
