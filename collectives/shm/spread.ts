// Keeps ranks that have a core each from sharing one. The kernel likes to wake a process on the core of who woke it, which is right
// for a pair that takes turns and wrong for ranks: every message then costs a change of process. A rank that keeps missing the others
// moves itself to a core of its own, by allowing that core alone for an instant; it is never pinned. Linux only.

import { libc } from "../../ffi/libc.ts";

const MASK_BYTES = 128; // 1024 cores, the C library's cpu_set_t
/** Waits that ended late before the rank moves. */
const MISSES = 32;
/** Shortest time between two moves, in ms. */
const INTERVAL_MS = 10;

/** Spreads one rank of a job. */
export class Spread {
  readonly #all = new Uint8Array(MASK_BYTES);
  readonly #own = new Uint8Array(MASK_BYTES);
  readonly #active: boolean = false;
  #misses = 0;
  #next_ms = 0;

  /** @param rank This process among those of the machine. @param size How many they are. */
  constructor(rank: number, size: number) {
    const get = libc().sched_getaffinity;
    if (get === null || libc().sched_setaffinity === null) return;
    if (get(0, BigInt(MASK_BYTES), this.#all) <= 0 && this.#all.every((byte) => byte === 0)) return;
    const cores: number[] = [];
    for (let core = 0; core < 8 * MASK_BYTES; core++) {
      if (this.#all[core >> 3] & (1 << (core & 7))) cores.push(core);
    }
    if (size > cores.length) return;
    this.#own[cores[rank] >> 3] = 1 << (cores[rank] & 7);
    this.#active = true;
    this.#move();
  }

  /** Tells that the others came so late that the core was given away. */
  missed(): void {
    if (!this.#active || ++this.#misses < MISSES) return;
    this.#misses = 0;
    const now_ms = performance.now();
    if (now_ms < this.#next_ms) return;
    this.#next_ms = now_ms + INTERVAL_MS;
    this.#move();
  }

  #move(): void {
    const set = libc().sched_setaffinity!;
    set(0, BigInt(MASK_BYTES), this.#own);
    set(0, BigInt(MASK_BYTES), this.#all);
  }
}
