// Tells what a step passes when the DEVICE passes it, though the host that enqueues is far ahead: each thing to tell waits for an event of a
// stream. Other threads sleep until the events have passed, so the host neither polls nor waits. Not here: what is told, and to whom.
//
// There are three queues, as three things run beside each other on a device: its computation, its all-to-alls and its reductions. Within
// a queue things are told in order; of two queues, whatever has passed is told, but never the effect before its cause.

import type { Device, StreamEvent } from "../tensor/device.ts";

/** Something to tell. */
interface Entry {
  /** Told once this has passed; null is at once, in its turn. */
  readonly event: StreamEvent | null;
  /** What must have been told before: so many entries of other queues. */
  readonly after: readonly Place[];
  tell(): void;
}

/** So many entries of a queue. */
export interface Place {
  /** The queue. */
  readonly queue: Queue;
  /** Entries from the step's begin. */
  readonly count: number;
}

/** Things that pass one after the other. */
export class Queue {
  /** Entries that have not been told. */
  readonly entries: Entry[] = [];
  /** Entries that have. */
  told = 0;
  /** Whether somebody waits for the first one. */
  watched = false;

  /** Where the queue's present end is, for {@linkcode Pump.push}. */
  get end(): Place {
    return { queue: this, count: this.told + this.entries.length };
  }
}

/** Tells things in the order in which a device passes them; one for each step. */
export class Pump implements Disposable {
  /** The device's computation. */
  readonly compute: Queue = new Queue();
  /** Ends of all-to-alls. */
  readonly allToAlls: Queue = new Queue();
  /** Ends of reductions. */
  readonly reductions: Queue = new Queue();
  readonly #device: Device;
  readonly #check: () => void;
  readonly #finished = Promise.withResolvers<void>();
  /** What has gone wrong. */
  #failure: { readonly error: unknown } | null = null;
  #ended = false;

  /**
   * Begins a step.
   *
   * @param device Whose streams' events are waited for; it has `passing`.
   * @param check Called now and then while {@linkcode Pump.finish} waits: throws if what the device does cannot end any more.
   */
  constructor(device: Device, check: () => void) {
    this.#device = device;
    this.#check = check;
    this.#finished.promise.catch(() => {}); // whoever finishes hears of it, or the next who pushes
  }

  /**
   * Has something told.
   *
   * @param queue Where it comes after everything else.
   * @param event What must have passed: of a stream on which the events of the queue come in order; null is nothing.
   * @param tell Tells it; what it throws ends the pump.
   * @param after Ends of other queues that are told before. @default {[]}
   * @throws What has gone wrong before.
   */
  push(
    queue: Queue,
    event: StreamEvent | null,
    tell: () => void,
    after: readonly Place[] = [],
  ): void {
    this.#throwFailure();
    if (this.#ended) return;
    queue.entries.push({ event, after, tell });
    if (!queue.watched) void this.#watch(queue);
  }

  /**
   * Has something told behind all the computation, and ends the pump with it.
   *
   * @param event The end of the computation.
   * @param tell Tells it.
   * @param after Ends of other queues that are told before.
   * @returns A promise that resolves once it has been told.
   * @throws What has gone wrong.
   */
  async finish(event: StreamEvent, tell: () => void, after: readonly Place[]): Promise<void> {
    this.push(this.compute, event, () => {
      tell();
      this.#end();
    }, after);
    const timer = setInterval(() => {
      try {
        this.#check();
      } catch (error) {
        this.#fail(error);
      }
    }, CHECK_MS);
    try {
      await this.#finished.promise;
    } finally {
      clearInterval(timer);
    }
  }

  /** Ends the pump: nothing is told any more. */
  [Symbol.dispose](): void {
    this.#end();
  }

  #end(): void {
    this.#ended = true;
    for (const queue of [this.compute, this.allToAlls, this.reductions]) queue.entries.length = 0;
    this.#finished.resolve();
  }

  #fail(error: unknown): void {
    if (this.#ended) return;
    this.#failure = { error };
    this.#finished.reject(error);
    this.#end();
  }

  #throwFailure(): void {
    if (this.#failure) throw this.#failure.error;
  }

  /** Waits for the first entry of a queue, tells what has passed, and goes on until the queue is empty. Never rejects. */
  async #watch(queue: Queue): Promise<void> {
    queue.watched = true;
    try {
      // What is pushed now is complete when its caller goes on.
      await null;
      for (let [first] = queue.entries; first; [first] = queue.entries) {
        if (first.event) await this.#device.passing!(first.event);
        this.#tellPassed();
      }
    } catch (error) {
      this.#fail(error);
    } finally {
      queue.watched = false;
    }
  }

  /** Tells what has passed; telling may push more. Ends first, so that what they let go is launched with the fewest delays. */
  #tellPassed(): void {
    const queues = [this.allToAlls, this.reductions, this.compute];
    const passed = ({ entries: [first] }: Queue) => first && (first.event?.done() ?? true);
    for (let next = queues.find(passed); next; next = queues.find(passed)) {
      this.#tell({ queue: next, count: next.told + 1 });
    }
  }

  /** Tells so much of a queue: it has passed, as the device is past something that comes after it. */
  #tell({ queue, count }: Place): void {
    while (queue.told < count && queue.entries.length > 0) {
      const [entry] = queue.entries;
      for (const place of entry.after) this.#tell(place);
      // Telling ends nothing but this step, and what it throws ends the pump.
      queue.entries.shift();
      queue.told++;
      entry.tell();
    }
  }
}

/** Time between two looks while a step's end is waited for, in ms. */
const CHECK_MS = 100;
