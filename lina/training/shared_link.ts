// A virtual clock and the link that a simulated step's transfers share. It knows bytes' times, latencies and moments to be called at, no
// collectives and no schedulers: those are timeline.ts's.

import type { CollectiveCost } from "./links.ts";

/** A transfer that has not ended. */
interface Transfer {
  /** Latency that is left. */
  latency_us: number;
  /** Time of the link alone that is left. */
  link_us: number;
  readonly ended: () => void;
}

/** Something to be done at a moment. */
interface Timer {
  readonly at_us: number;
  readonly call: () => void;
}

/**
 * The clock and what is on the link. A transfer first spends its latency, which takes nothing of the link, then its bytes; transfers whose
 * bytes are under way share the link fairly, so it is never idle while there are bytes to send.
 */
export class SharedLink {
  /** The clock, in µs. */
  now_us = 0;
  /** Time with bytes on the link, in µs. */
  busy_us = 0;
  readonly #transfers: Transfer[] = [];
  /** By time; those of one time in the order in which they were set. */
  readonly #timers: Timer[] = [];

  /**
   * Puts a transfer on the link.
   *
   * @param cost Its latency and the link's time.
   * @param ended Called once it is complete, never before this returns.
   * @throws {RangeError} If a time is negative or not finite.
   */
  start({ latency_us, link_us }: CollectiveCost, ended: () => void): void {
    checkedTime(latency_us, "latency of a collective");
    checkedTime(link_us, "link's time of a collective");
    this.#transfers.push({ latency_us, link_us, ended });
  }

  /**
   * Sets a timer.
   *
   * @param at_us When, not before the present.
   * @param call What is to be done then.
   */
  at(at_us: number, call: () => void): void {
    let place = this.#timers.length;
    while (place > 0 && this.#timers[place - 1].at_us > at_us) place--;
    this.#timers.splice(place, 0, { at_us, call });
  }

  /**
   * Lets time pass, what ends at the very end included.
   *
   * @param end_us Until when.
   */
  runTo(end_us: number): void {
    while (this.#next() <= end_us) this.#event();
    if (end_us <= this.now_us) return; // rounding
    this.#pass(end_us - this.now_us);
    this.now_us = end_us;
  }

  /**
   * Lets time pass until something is so.
   *
   * @param done Whether it is.
   * @throws {Error} If nothing is under way that could make it so.
   */
  runUntil(done: () => boolean): void {
    while (!done()) {
      if (this.#transfers.length + this.#timers.length === 0) {
        throw new Error("Cannot go on with a timeline as nothing is under way that it waits for");
      }
      this.#event();
    }
  }

  /** Transfers whose bytes are under way. */
  #sharing(): number {
    let sharing = 0;
    for (const { latency_us } of this.#transfers) if (latency_us === 0) sharing++;
    return sharing;
  }

  /** The transfer whose latency or bytes are over first, and how long that takes. */
  #first(): { readonly transfer: Transfer | null; readonly wait_us: number } {
    const sharing = this.#sharing();
    let first: Transfer | null = null, least = Infinity;
    for (const transfer of this.#transfers) {
      const { latency_us, link_us } = transfer;
      const wait_us = latency_us > 0 ? latency_us : link_us * sharing;
      if (wait_us < least) [first, least] = [transfer, wait_us];
    }
    return { transfer: first, wait_us: least };
  }

  /** When something is next. */
  #next(): number {
    const timer_us = this.#timers.length > 0 ? this.#timers[0].at_us : Infinity;
    return Math.min(this.now_us + this.#first().wait_us, timer_us);
  }

  /** Goes to the next moment at which a latency or a transfer is over, or a timer rings: transfers come first. */
  #event(): void {
    const { transfer, wait_us } = this.#first();
    const timer = this.#timers[0];
    if (timer && timer.at_us < this.now_us + wait_us) {
      this.#timers.shift();
      this.#pass(timer.at_us - this.now_us);
      this.now_us = Math.max(this.now_us, timer.at_us);
      return timer.call();
    }
    const first = transfer!, waited = first.latency_us > 0;
    this.#pass(wait_us);
    this.now_us += wait_us;
    first.latency_us = 0;
    if (waited) return; // its bytes come now
    this.#transfers.splice(this.#transfers.indexOf(first), 1);
    first.ended();
  }

  /** Takes time off what is under way. */
  #pass(time_us: number): void {
    const sharing = this.#sharing();
    if (sharing > 0) this.busy_us += time_us;
    for (const transfer of this.#transfers) {
      if (transfer.latency_us > 0) transfer.latency_us = Math.max(0, transfer.latency_us - time_us);
      else transfer.link_us = Math.max(0, transfer.link_us - time_us / sharing);
    }
  }
}

/**
 * A duration, if it is one.
 *
 * @param time_us The duration in µs.
 * @param what Of what, for the error.
 * @returns It.
 * @throws {RangeError} If it is negative or not finite.
 */
export function checkedTime(time_us: number, what: string): number {
  if (time_us >= 0 && time_us < Infinity) return time_us;
  throw new RangeError(
    `Cannot run a timeline as the ${what} must be at least 0 and finite: current value is ${time_us}`,
  );
}
