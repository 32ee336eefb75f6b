// A store that is used before it is there: under a plain mpirun the ranks can only agree on a rendezvous once MPI connects them,
// while the MPI backend wants a store from the start. Requests wait until the real one is given.

import type { Store } from "../transport.ts";

/** Passes every request on to a store that comes later. */
export class DeferredStore implements Store {
  #real = Promise.withResolvers<Store>();
  #given = false;

  /** Gives the real store. @param store From now on, everything goes there. */
  give(store: Store): void {
    this.#given = true;
    this.#real.resolve(store);
  }

  /** As {@linkcode Store.set}. @param key The key. @param value The value. */
  async set(key: string, value: Uint8Array): Promise<void> {
    await (await this.#real.promise).set(key, value);
  }

  /** As {@linkcode Store.get}. @param key The key. @param timeout_ms Longest wait in ms. @returns The value. */
  async get(key: string, timeout_ms?: number): Promise<Uint8Array> {
    return await (await this.#real.promise).get(key, timeout_ms);
  }

  /** As {@linkcode Store.add}. @param key The counter. @param delta What to add. @returns The new value. */
  async add(key: string, delta: number): Promise<number> {
    return await (await this.#real.promise).add(key, delta);
  }

  /** Ends the connection, if there is one. */
  async close(): Promise<void> {
    if (this.#given) await (await this.#real.promise).close();
  }
}
