// The store of a world of one: the same promises, no socket.

import type { Store } from "../transport.ts";
import { DEFAULT_TIMEOUT_MS } from "./store_client.ts";

/** A store that nobody else reaches. */
export class LocalStore implements Store {
  #values = new Map<string, Uint8Array>();
  #counters = new Map<string, number>();
  #waiters = new Map<string, Set<(value: Uint8Array) => void>>();

  /** Sets a key; anyone waiting for it wakes up. @param key The key. @param value The value. */
  set(key: string, value: Uint8Array): Promise<void> {
    this.#values.set(key, value.slice());
    for (const wake of this.#waiters.get(key) ?? []) wake(value);
    this.#waiters.delete(key);
    return Promise.resolve();
  }

  /**
   * The value of a key, waiting for it to be set.
   *
   * @param key The key.
   * @param timeout_ms Longest wait in milliseconds. @default {60000}
   * @returns The value.
   * @throws {Error} After the time-out, naming the key.
   */
  get(key: string, timeout_ms: number = DEFAULT_TIMEOUT_MS): Promise<Uint8Array> {
    const known = this.#values.get(key);
    if (known) return Promise.resolve(known);
    const { promise, resolve, reject } = Promise.withResolvers<Uint8Array>();
    const waiters = this.#waiters.get(key) ?? new Set();
    this.#waiters.set(key, waiters);
    const wake = (value: Uint8Array) => {
      clearTimeout(timer);
      resolve(value);
    };
    const timer = setTimeout(() => {
      waiters.delete(wake);
      reject(
        new Error(
          `Cannot get "${key}" in the rendezvous as it must be set within ${timeout_ms} ms: current value is unset`,
        ),
      );
    }, Math.min(timeout_ms, 2 ** 31 - 1)); // setTimeout takes no more
    waiters.add(wake);
    return promise;
  }

  /** Adds to a counter. @param key The counter, 0 at first. @param delta What to add. @returns The new value. */
  add(key: string, delta: number): Promise<number> {
    const sum = (this.#counters.get(key) ?? 0) + delta;
    this.#counters.set(key, sum);
    return Promise.resolve(sum);
  }

  /** Nothing to end. */
  close(): Promise<void> {
    return Promise.resolve();
  }
}
