// Streams and events of a GPU. Events come from a pool and go back to it once they have passed, so recording one allocates
// nothing in CUDA. Host waits poll and let the event loop run, or another thread waits; nothing blocks this one in native code and nothing
// calls back from it.

import { addressOf } from "../../ffi/address.ts";
import {
  checkCudart,
  type CudaEventHandle,
  CUDART,
  cudart,
  type CudartCalls,
  cudartError,
  type CudaStreamHandle,
} from "../../ffi/cudart.ts";
import { now } from "../../trace/mod.ts";
import { Events, type Stream, type StreamEvent } from "../device.ts";

/** Polls without leaving the thread for so long; a short wait is over by then. */
const SPIN_US = 30;
/** Then lets the event loop turn between polls for so long, then sleeps between them. */
const TURNS_US = 250_000;
/** An anchor is made anew when it is older: the f32 milliseconds that CUDA gives are exact to 0.1 µs until then. */
const STALE_US = 1_000_000;
/** How long an anchor may take before the device is too busy for one: its streams may share hardware queues. */
const LONGEST_ANCHOR_US = 2000;
/** Events that a stream keeps before it looks for passed ones. */
const KEPT = 64;

/**
 * What an event is made for: `plain` ones order streams and are polled; `timed` ones take the time, too, for a third more of the host's; a
 * thread that waits for a `waited` one sleeps.
 */
export type EventKind = "plain" | "timed" | "waited";

const FLAGS: Readonly<Record<EventKind, number>> = {
  plain: CUDART.eventDisableTiming,
  timed: CUDART.eventDefault,
  waited: CUDART.eventDisableTiming | CUDART.eventBlockingSync,
};

/** What the streams of one device share: the pools of events, the clock, the count of host waits. */
export class EventPool {
  readonly #calls: CudartCalls;
  readonly #cell = new BigUint64Array(new ArrayBuffer(8));
  readonly #elapsed = new Float32Array(new ArrayBuffer(4));
  readonly #free: Readonly<Record<EventKind, CudaEventHandle[]>> = {
    plain: [],
    timed: [],
    waited: [],
  };
  #clock: CudaStreamHandle | undefined;
  #anchor: CudaEventHandle | undefined;
  #anchor_us = -Infinity;
  #tried_us = -Infinity;
  /** Times that the host waited for the device, in all. */
  hostWaits = 0;
  /** Times that the host waited for an event on another thread, in all. */
  eventWaits = 0;
  /** CUDA events made, in all; none is destroyed. */
  created = 0;

  /** The device is current. */
  constructor() {
    this.#calls = cudart().calls;
  }

  /**
   * An event that is not in use.
   *
   * @param kind What it is for.
   * @returns Its handle.
   */
  take(kind: EventKind): CudaEventHandle {
    const handle = this.#free[kind].pop();
    if (handle !== undefined) return handle;
    checkCudart(
      this.#calls.cudaEventCreateWithFlags(addressOf(this.#cell.buffer), FLAGS[kind]),
      "cudaEventCreateWithFlags",
    );
    this.created++;
    return this.#cell[0] as CudaEventHandle;
  }

  /**
   * Puts an event back.
   *
   * @param handle The event; it has passed, or nobody waits for it.
   * @param kind What it is for.
   */
  give(handle: CudaEventHandle, kind: EventKind): void {
    this.#free[kind].push(handle);
  }

  /**
   * Whether the device has passed an event.
   *
   * @param handle The event.
   * @returns True once it has.
   * @throws {CudaError} If work before it failed.
   */
  passed(handle: CudaEventHandle): boolean {
    const code = this.#calls.cudaEventQuery(handle);
    if (code === CUDART.success) return true;
    if (code === CUDART.errorNotReady) return false;
    throw cudartError(code, "cudaEventQuery", ", in work that was enqueued earlier");
  }

  /**
   * Waits for an event on another thread, which sleeps meanwhile if the event is a `waited` one.
   *
   * @param handle The event; it must not be recorded anew before this resolves.
   * @throws {CudaError} If work before it failed.
   */
  async passing(handle: CudaEventHandle): Promise<void> {
    this.eventWaits++;
    const code = await this.#calls.cudaEventSynchronize(handle);
    if (code === CUDART.success) return;
    throw cudartError(code, "cudaEventSynchronize", ", in work that was enqueued earlier");
  }

  /**
   * Ties the device's clock to the host's anew: an event on a stream of its own, which is idle, and the host's time around it. Takes
   * some 20 µs; good to a few µs, and the clocks part by about 10 µs per second: once a step is enough. A device that is too busy to pass
   * the event soon leaves the tie as it was.
   */
  anchor(): void {
    this.#clock ??= createStream(this.#calls, 0);
    const end_us = (this.#tried_us = now()) + LONGEST_ANCHOR_US;
    let width = Infinity;
    for (let round = 0; round < 3; round++) {
      const event = this.take("timed");
      const before = now();
      checkCudart(this.#calls.cudaEventRecord(event, this.#clock), "cudaEventRecord");
      let passed = this.passed(event);
      while (!passed && now() < end_us) passed = this.passed(event);
      const after = now();
      if (!passed) return this.give(event, "timed");
      if (after - before >= width) {
        this.give(event, "timed");
        continue;
      }
      width = after - before;
      if (this.#anchor !== undefined) this.give(this.#anchor, "timed");
      this.#anchor = event;
      this.#anchor_us = (before + after) / 2;
    }
  }

  /**
   * When the device passed an event.
   *
   * @param handle An event that takes the time and has passed.
   * @returns Time on the host's clock, in µs: the present if the clocks could never be tied.
   */
  time(handle: CudaEventHandle): number {
    if (now() - Math.max(this.#anchor_us, this.#tried_us) > STALE_US) this.anchor();
    if (this.#anchor === undefined) return now();
    const code = this.#calls.cudaEventElapsedTime(
      addressOf(this.#elapsed.buffer),
      this.#anchor,
      handle,
    );
    checkCudart(code, "cudaEventElapsedTime");
    return this.#anchor_us + this.#elapsed[0] * 1000;
  }
}

/** A point in a CUDA stream's work. */
export class CudaEvent implements StreamEvent {
  readonly #pool: EventPool;
  readonly #kind: EventKind;
  #handle: CudaEventHandle | null;
  #time_us = 0;
  /** The wait on another thread, which needs the handle as it is. */
  #waiting: Promise<void> | undefined;

  /**
   * {@linkcode CudaStream} makes them. @ignore
   *
   * @param pool Where the event came from and returns to.
   * @param handle An event that has been recorded.
   * @param kind What it is for.
   */
  constructor(pool: EventPool, handle: CudaEventHandle, kind: EventKind) {
    this.#pool = pool;
    this.#handle = handle;
    this.#kind = kind;
  }

  /** The CUDA event; null once it was seen to have passed. */
  get handle(): CudaEventHandle | null {
    return this.#handle;
  }

  /** Whether the device has passed the point; never blocks. */
  done(): boolean {
    const handle = this.#handle;
    if (handle === null) return true;
    if (!this.#pool.passed(handle)) return false;
    this.#time_us = this.#kind === "timed" ? this.#pool.time(handle) : now();
    this.#handle = null;
    if (!this.#waiting) this.#pool.give(handle, this.#kind);
    return true;
  }

  /**
   * Resolves once the device has passed the point. The host does not poll: another thread waits, and sleeps if {@linkcode CudaStream.mark}
   * made the event.
   *
   * @throws {CudaError} If work before it failed.
   */
  async passing(): Promise<void> {
    if (this.done()) return;
    await (this.#waiting ??= this.#wait(this.#handle!));
  }

  async #wait(handle: CudaEventHandle): Promise<void> {
    await this.#pool.passing(handle); // an event that failed is not used again
    if (this.#handle !== null) {
      this.#time_us = this.#kind === "timed" ? this.#pool.time(handle) : now();
    }
    this.#handle = null;
    this.#pool.give(handle, this.#kind);
  }

  /**
   * Host-clock time in µs at which the device passed the point. Only {@linkcode CudaStream.recordTimed} makes it so: for other events,
   * which cost a third, it is when the host first saw that they had passed. NaN before that.
   */
  time(): number {
    return this.done() ? this.#time_us : NaN;
  }
}

/**
 * Resolves once the device has passed an event: polls, first on the spot, then once a turn of the event loop.
 *
 * @param event The event.
 * @throws {CudaError} If work before it failed.
 */
export async function passing(event: StreamEvent): Promise<void> {
  const start = now();
  while (!event.done()) {
    const waited = now() - start;
    if (waited < SPIN_US) continue;
    if (waited < TURNS_US) await new Promise<void>((resolve) => setImmediate(resolve));
    else await new Promise<void>((resolve) => setTimeout(resolve, 1));
  }
}

function createStream(calls: CudartCalls, priority: number): CudaStreamHandle {
  const cell = new BigUint64Array(new ArrayBuffer(8));
  const code = calls.cudaStreamCreateWithPriority(
    addressOf(cell.buffer),
    CUDART.streamNonBlocking,
    priority,
  );
  checkCudart(code, "cudaStreamCreateWithPriority");
  return cell[0] as CudaStreamHandle;
}

/** A queue of work on a GPU. It does not wait for the legacy default stream, nor that for it. */
export class CudaStream implements Stream {
  /** A name for traces. */
  readonly name: string;
  /** The CUDA stream. */
  readonly handle: CudaStreamHandle;
  readonly #calls: CudartCalls;
  readonly #pool: EventPool;
  /** Events that were not seen to pass, oldest first from `#oldest`. */
  #events: CudaEvent[] = [];
  #oldest = 0;

  /**
   * Makes a stream of the current device; `createStream` of the device does it for users. @ignore
   *
   * @param name A name for traces.
   * @param pool The device's events.
   * @param priority CUDA's number: 0, or less for more urgent work; the device bounds it.
   */
  constructor(name: string, pool: EventPool, priority = 0) {
    this.name = name;
    this.#pool = pool;
    this.#calls = cudart().calls;
    this.handle = createStream(this.#calls, priority);
  }

  /** Marks the present end of the stream's work. */
  record(): CudaEvent {
    return this.#record("plain");
  }

  /** As {@linkcode record}, with an event whose `time()` is the device's, on the host's clock. */
  recordTimed(): CudaEvent {
    return this.#record("timed");
  }

  /** As {@linkcode record}, with an event that a thread can wait for without spinning: see {@linkcode CudaEvent.passing}. */
  mark(): CudaEvent {
    return this.#record("waited");
  }

  #record(kind: EventKind): CudaEvent {
    if (this.#events.length - this.#oldest >= KEPT) this.#sweep();
    const handle = this.#pool.take(kind);
    const code = this.#calls.cudaEventRecord(handle, this.handle);
    if (code !== 0) throw cudartError(code, "cudaEventRecord", ` on stream ${this.name}`);
    const event = new CudaEvent(this.#pool, handle, kind);
    this.#events.push(event);
    return event;
  }

  /** Looks at the oldest events, so that those nobody asks about return to the pool. They pass in order: the first that has not ends it. */
  #sweep(): void {
    const events = this.#events;
    for (let i = 0; i < 4 && this.#oldest < events.length && events[this.#oldest].done(); i++) {
      this.#oldest++;
    }
    if (this.#oldest >= KEPT) {
      events.copyWithin(0, this.#oldest);
      events.length -= this.#oldest;
      this.#oldest = 0;
    }
  }

  /** Orders all later work of this stream after the event, without blocking the host. */
  wait(event: StreamEvent): void {
    if (event instanceof CudaEvent) {
      const handle = event.handle;
      if (handle === null) return;
      const code = this.#calls.cudaStreamWaitEvent(this.handle, handle, 0);
      if (code !== 0) throw cudartError(code, "cudaStreamWaitEvent", ` on stream ${this.name}`);
    } else if (event instanceof Events) {
      for (const one of event.all) this.wait(one);
    } else if (!event.done()) {
      throw new TypeError(
        `Cannot wait on stream ${this.name} as the event must be a CUDA event or done: current value is an event of another device`,
      );
    }
  }

  /** Ends the stream once its work is done; nothing may be enqueued any more. Its events stay valid. */
  destroy(): void {
    checkCudart(this.#calls.cudaStreamDestroy(this.handle), "cudaStreamDestroy");
  }

  /** Resolves when all work enqueued so far is done, without blocking the event loop. */
  synchronize(): Promise<void> {
    this.#pool.hostWaits++;
    return passing(this.record());
  }
}
