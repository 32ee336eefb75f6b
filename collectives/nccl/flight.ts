// One operation in flight on a GPU, as the progress engine sees it. Its end is an event on the transport's stream; nothing is done for
// it by the host but to notice that. The life of the event belongs to the transport.

import { libc } from "../../ffi/libc.ts";
import type { CudaEvent } from "../../tensor/cuda/streams.ts";
import type { Stream } from "../../tensor/device.ts";
import { SLEEP_AFTER_SPINS } from "../progress.ts";
import type { CollectiveRequest, Completion } from "../transport.ts";
import type { Staged } from "./staging.ts";

/** Polls in a row before the processor is offered to others. */
const POLLS_PER_IDLE = 4;
/** Native waits that only offer the processor before they sleep, and the shortest and longest sleep in ms. */
const BUSY_WAITS = 200;
const SHORTEST_PAUSE_MS = 0.05, LONGEST_PAUSE_MS = 1;

const never = new Int32Array(new SharedArrayBuffer(4));

/** What a flight asks of its transport. */
export interface Tower {
  /** Enqueues messages that wait for others to share a group with. */
  flush(): void;
  /** Notices what the device has passed; throws once the transport has failed. @param heard Whether somebody gets the error. */
  look(heard: boolean): void;
  /** Throws the error of a transport that has failed, to somebody who gets it. */
  check(): void;
  /** A point behind all that has been enqueued. */
  mark(): CudaEvent;
  /** Somebody gets the error of a transport that has failed. */
  hear(): void;
  /** Looks for ranks that have gone and for errors of NCCL's own threads. */
  inspect(): void;
}

/** An operation whose data is on the host: it is complete once the results are in its arrays. */
export class HostFlight implements Completion {
  /** What is carried out. */
  readonly request: CollectiveRequest;
  /** Its number among the collectives of its transport; −1 for a message. */
  readonly index: number;
  /** Its end on the stream; undefined until it is enqueued. */
  end: CudaEvent | undefined;
  /** Its begin, if it is timed. */
  begin: CudaEvent | undefined;
  /** The host array that it reads, and the one that it writes. */
  staged: { readonly read: Staged | null; readonly written: Staged | null } | undefined;
  /** Whether the device has passed its end, and results on the host are in their arrays. */
  landed = false;
  /** Its transport. */
  protected readonly tower: Tower;
  #asked = false;
  #awaited = false;
  #waits = 0;

  /** @param request The operation. @param index Its number. @param tower Its transport. */
  constructor(request: CollectiveRequest, index: number, tower: Tower) {
    this.request = request;
    this.index = index;
    this.tower = tower;
  }

  /** Whether it is complete. The first question comes from the call that has started it, so a message may still wait for company. */
  poll(): boolean {
    if (this.landed) return true;
    const first = !this.#asked;
    this.#asked = true;
    if (first && this.end === undefined) return false;
    this.tower.flush();
    this.tower.look(this.#awaited); // also if it has no end, because its group has failed
    return this.landed;
  }

  /** Somebody awaits it. */
  awaited(): void {
    this.#awaited = true;
    if (!this.landed) this.tower.hear();
  }

  /** Polls, offers the processor, or sleeps for at most a millisecond. */
  idle(spins: number): void {
    for (let i = 0; i < POLLS_PER_IDLE; i++) {
      try {
        if (this.poll()) return;
      } catch {
        return; // the next poll tells
      }
    }
    libc().sched_yield();
    if (spins < SLEEP_AFTER_SPINS) return;
    this.tower.inspect();
    if (++this.#waits < BUSY_WAITS) return;
    const pause = SHORTEST_PAUSE_MS * (this.#waits / BUSY_WAITS);
    Atomics.wait(never, 0, 0, Math.min(pause, LONGEST_PAUSE_MS));
  }

  /** When the device began and ended it, in µs of the host's clock. */
  get span(): (() => readonly [number, number]) | undefined {
    const { begin, end } = this;
    return begin && end && (() => [begin.time(), end.time()]);
  }
}

/** An operation whose data is on the device: streams may be ordered after it. */
export class DeviceFlight extends HostFlight {
  /** Orders a stream after the operation. @throws {Error} If the transport has failed: there is no result to come. */
  waitOn(stream: Stream): void {
    if (this.landed) return;
    this.tower.flush();
    this.tower.check();
    stream.wait(this.end!);
  }

  /** A point that the host can wait for, behind all that the transport has enqueued. @throws {Error} If the transport has failed. */
  mark(): CudaEvent {
    return this.tower.mark();
  }
}
