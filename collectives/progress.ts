// The progress engine: one list of the operations in flight in this process. Nothing moves in the background; whoever polls
// or awaits one operation moves all of them, so that two ranks that await in different orders cannot block each other.
// A host that awaits first spins, then waits natively for a millisecond at a time, and lets the event loop run in between.

import type { Stream, StreamEvent } from "../tensor/device.ts";
import type { Completion } from "./transport.ts";
import type { Work } from "./types.ts";

/** How long an awaiting host polls before it goes back to the event loop for the first time, in ms. */
const SPIN_MS = 0.3;
/** Polls between two looks at the clock. */
const SPINS_PER_LOOK = 64;
/** Polls in one turn of the event loop after that; the last of them may wait natively. */
const SPINS_PER_TURN = 16;
/** From this count on, a transport's `idle` may put the thread to sleep. */
export const SLEEP_AFTER_SPINS = 1 << 20;
/** How often deadlines are looked at, in ms. */
const DEADLINE_INTERVAL_MS = 20;

/** What the engine needs to know about an operation. */
export interface Operation {
  /** Its transport's side. */
  readonly completion: Completion;
  /** Called once when it is complete, before anyone who awaits goes on. */
  finished(): void;
  /** Called once when it has failed. @returns The error that those who await get. */
  failed(cause: unknown): unknown;
  /** How long the host may wait for it before the watchdog gives up, in ms. */
  readonly timeout_ms: number;
  /** Called when that time is over. @returns The error, or a promise of it. */
  expired(): unknown;
}

const resolved: Promise<void> = Promise.resolve();

/** Work of operations that were complete when the call returned: one shared promise, so that awaiting costs one microtask. */
export const COMPLETED: Work = Object.assign(Promise.resolve() as Promise<void>, {
  done: true,
  wait(): PromiseLike<void> {
    return resolved;
  },
});

const enum State {
  Pending,
  Expiring, // the watchdog is collecting the ranks that are missing
  Done,
  Failed,
}

/** An operation in flight, as its caller sees it. */
export class PendingWork implements Work {
  readonly #operation: Operation;
  #state = State.Pending;
  #error: unknown;
  #waiters: PromiseWithResolvers<void> | undefined;
  // Time counts from when the host awaits, or first asks: what it does between start and await is no fault of the other ranks.
  #deadline_ms = 0;

  /** @param operation The started operation; it is polled from now on. */
  constructor(operation: Operation) {
    this.#operation = operation;
    pending.push(this);
  }

  /** Whether the operation is complete; lets all operations progress. */
  get done(): boolean {
    if (this.#state < State.Done) {
      progress();
      this.checkDeadline(performance.now());
    }
    if (this.#state === State.Failed) throw this.#error;
    return this.#state === State.Done;
  }

  /** Completion on a GPU's stream without the host, else on the host. */
  wait(stream: Stream): void | PromiseLike<void> {
    const { completion } = this.#operation;
    if (completion.waitOn) return completion.waitOn(stream);
    return this.#state === State.Done ? resolved : this;
  }

  /** Where it ends on a GPU. */
  get end(): StreamEvent | undefined {
    return this.#operation.completion.end;
  }

  /** A point behind it that the host can wait for, on a GPU. */
  get mark(): (() => StreamEvent) | undefined {
    const { completion } = this.#operation;
    return completion.mark && (() => completion.mark!());
  }

  /** Awaits completion on the host. */
  then<A = void, B = never>(
    onDone?: ((value: void) => A | PromiseLike<A>) | null,
    onError?: ((reason: unknown) => B | PromiseLike<B>) | null,
  ): Promise<A | B> {
    this.#operation.completion.awaited?.();
    if (this.#state < State.Done) this.#spin();
    if (this.#state === State.Done) return resolved.then(onDone, onError);
    if (this.#state === State.Failed) return Promise.reject(this.#error).then(onDone, onError);
    if (!this.#waiters) {
      this.#waiters = Promise.withResolvers<void>();
      this.#deadline_ms = 0;
      waiting++;
      pump();
    }
    return this.#waiters.promise.then(onDone, onError);
  }

  #spin(): void {
    const { completion } = this.#operation;
    let end = 0;
    for (let spins = 0;; spins++) {
      progress();
      if (this.#state !== State.Pending) return;
      if (spins % SPINS_PER_LOOK === SPINS_PER_LOOK - 1) {
        const now_ms = performance.now();
        if (end === 0) end = now_ms + SPIN_MS;
        else if (now_ms > end) return;
      }
      completion.idle(spins);
    }
  }

  /** Moves the operation on. @returns Whether it is settled. For the engine. */
  poll(): boolean {
    if (this.#state !== State.Pending) return this.#state >= State.Done;
    try {
      if (!this.#operation.completion.poll()) return false;
      this.#operation.finished();
      this.#settle(State.Done, undefined);
    } catch (cause) {
      this.#settle(State.Failed, this.#operation.failed(cause));
    }
    return true;
  }

  /** Waits natively, if somebody awaits this operation. For the engine. */
  idle(spins: number): void {
    this.#operation.completion.idle(spins);
  }

  /** Whether somebody awaits. For the engine. */
  get awaited(): boolean {
    return this.#waiters !== undefined && this.#state === State.Pending;
  }

  /** Fails the operation if its time is over. For the engine. */
  checkDeadline(now_ms: number): void {
    if (this.#state !== State.Pending) return;
    if (this.#deadline_ms === 0) this.#deadline_ms = now_ms + this.#operation.timeout_ms;
    if (now_ms < this.#deadline_ms) return;
    this.#state = State.Expiring;
    Promise.resolve(this.#operation.expired()).then(
      (error) => this.#settle(State.Failed, error),
      (error) => this.#settle(State.Failed, error),
    );
  }

  #settle(state: State.Done | State.Failed, error: unknown): void {
    this.#state = state;
    this.#error = error;
    if (!this.#waiters) return;
    waiting--;
    if (state === State.Done) this.#waiters.resolve();
    else this.#waiters.reject(error);
  }
}

const pending: PendingWork[] = [];
let waiting = 0; // operations in flight that somebody awaits
let pumping = false;
let turns = 0;
let nextDeadlineCheck = 0;

/** Lets every operation in flight move on as far as it goes without waiting. @returns Whether any of them settled. */
export function progress(): boolean {
  if (pending.length === 1) { // by far the most frequent case
    if (!pending[0].poll()) return false;
    pending.shift(); // it may have started others
    return true;
  }
  let kept = 0;
  const { length } = pending;
  for (let i = 0; i < length; i++) {
    const work = pending[i];
    if (!work.poll()) pending[kept++] = work;
  }
  // An operation may start others as it moves on (two_level_flight.ts); they are at the end.
  if (kept < length) {
    pending.copyWithin(kept, length);
    pending.length -= length - kept;
  }
  return kept < length;
}

/** How many operations of this process are in flight. @returns Their number. */
export function inFlight(): number {
  return pending.length;
}

function pump(): void {
  if (pumping) return;
  pumping = true;
  turns = 0;
  setImmediate(turn);
}

function turn(): void {
  if (waiting === 0) {
    pumping = false;
    return;
  }
  turns++;
  for (let i = 0; i < SPINS_PER_TURN; i++) {
    if (progress()) {
      turns = 0;
      break;
    }
    const spins = SLEEP_AFTER_SPINS - SPINS_PER_TURN + 1 + i; // the last one may sleep
    for (const work of pending) {
      if (!work.awaited) continue;
      work.idle(spins);
      break;
    }
  }
  const now_ms = performance.now();
  if (now_ms >= nextDeadlineCheck) {
    nextDeadlineCheck = now_ms + DEADLINE_INTERVAL_MS;
    for (const work of pending) if (work.awaited) work.checkDeadline(now_ms);
  }
  setImmediate(turn);
}
