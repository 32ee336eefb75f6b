// One operation in flight: runs an algorithm's steps whenever it is polled, and waits natively when the host has nothing else to
// do. MPI cannot wake a sleeper, so waiting is testing: first as fast as possible, then with ever longer pauses.

import { libc } from "../../ffi/libc.ts";
import { SLEEP_AFTER_SPINS } from "../progress.ts";
import type { CollectiveRequest, Completion } from "../transport.ts";
import type { Steps } from "./algorithms.ts";
import { keepScratch } from "./memory.ts";

/** Tests in a row before the processor is offered to others. */
const TESTS_PER_IDLE = 4;
/** From this count on the processor is offered to another process between tests. */
const YIELD_AFTER_SPINS = 32;
/** How long a native wait tests without a pause, in ms; and after how many such waits it pauses instead. */
const BUSY_MS = 0.5;
const BUSY_WAITS = 40;
/** Pauses of a native wait, in ms: they grow to the longest over about half a minute of waiting. */
const SHORTEST_PAUSE_MS = 0.1, LONGEST_PAUSE_MS = 2;

const never = new Int32Array(new SharedArrayBuffer(4));

/** What a flight tells its transport. */
export interface Watcher {
  /** The operation is complete; its message set is free. */
  landed(flight: Flight): void;
  /** The operation has failed; its messages may still be on their way. */
  failed(flight: Flight): void;
  /** The operation has waited for a while. @returns An error if it can never complete. */
  overdue(flight: Flight): Error | undefined;
}

/** An operation in flight. */
export class Flight implements Completion {
  /** What is carried out. */
  readonly request: CollectiveRequest;
  /** Its number among the collectives of its transport; −1 for send and recv. */
  readonly index: number;
  /** When it began, in ms. */
  readonly since: number = performance.now();
  readonly #steps: Steps;
  readonly #watcher: Watcher;
  #done = false;
  #error: unknown;

  /**
   * Takes over an operation; the first poll starts it.
   *
   * @param request What is carried out.
   * @param index Its number among the collectives.
   * @param steps How.
   * @param watcher Its transport.
   */
  constructor(request: CollectiveRequest, index: number, steps: Steps, watcher: Watcher) {
    this.request = request;
    this.index = index;
    this.#steps = steps;
    this.#watcher = watcher;
  }

  /** Moves the operation on. @returns Whether it is complete. Throws what went wrong. */
  poll(): boolean {
    this.advance();
    if (this.#error !== undefined) throw this.#error;
    return this.#done;
  }

  /** Moves the operation on. @returns Whether there is nothing left to wait for, be it that it has failed. */
  advance(): boolean {
    if (this.#done || this.#error !== undefined) return true;
    try {
      if (!this.#steps.next().done) return false;
      this.#done = true;
      this.#watcher.landed(this);
    } catch (cause) {
      this.#fail(cause);
    }
    return true;
  }

  #fail(cause: unknown): void {
    keepScratch(this);
    this.#error = cause;
    this.#watcher.failed(this);
  }

  /** Tests again and again, or pauses, for at most 2 ms. */
  idle(spins: number): void {
    for (let i = 0; i < TESTS_PER_IDLE; i++) if (this.advance()) return;
    if (spins >= YIELD_AFTER_SPINS) libc().sched_yield();
    if (spins < SLEEP_AFTER_SPINS) return;
    const error = this.#watcher.overdue(this);
    if (error !== undefined) return this.#fail(error);
    const waits = spins - SLEEP_AFTER_SPINS;
    if (waits < BUSY_WAITS) {
      const until = performance.now() + BUSY_MS;
      while (performance.now() < until) {
        for (let i = 0; i < 16; i++) if (this.advance()) return;
        libc().sched_yield();
      }
    } else {
      const pause = SHORTEST_PAUSE_MS * (waits / BUSY_WAITS);
      Atomics.wait(never, 0, 0, Math.min(pause, LONGEST_PAUSE_MS));
    }
  }
}
