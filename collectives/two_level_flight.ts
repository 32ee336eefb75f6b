// An all-to-all on two levels in flight, for data on the host. It is an operation of the progress engine like any other: whoever polls or
// awaits anything moves it on, too, so its second half begins without its caller's help. What a GPU's does is in `nccl/two_level.ts`.

import { type DType, type TypedArray, viewAs } from "../tensor/dtype.ts";
import { PendingWork } from "./progress.ts";
import type { Completion } from "./transport.ts";
import type { Block, ExchangePlan, OwnBlock } from "./two_level_plan.ts";
import type { Communicator, Data, OperationOptions, Work } from "./types.ts";

/** The communicators of the two levels. */
export interface Levels {
  /** The ranks of this host; this rank is l. */
  readonly inner: Communicator;
  /** The ranks of the same l on every host; this rank is h. */
  readonly outer: Communicator;
}

/** Elements of a buffer. @param at The first. @param length How many. */
export type Part = (at: number, length: number) => Data;

/**
 * Whether an operation is complete; those beside it are not moved.
 *
 * @param work An operation that a communicator has started.
 * @returns True once it is.
 * @throws What it has failed with.
 */
export function settled(work: Work): boolean {
  return work instanceof PendingWork ? work.poll() && work.done : work.done;
}

/** The messages of a step, on one communicator. */
export interface Messages {
  /** Parts of what is sent. */
  readonly from: Part;
  /** What goes to whom. */
  readonly sends: readonly Block[];
  /** Parts of where it arrives. */
  readonly to: Part;
  /** What comes from whom. */
  readonly receives: readonly Block[];
}

/**
 * Starts messages; what comes in first, so that it finds its place.
 *
 * @param comm Where.
 * @param messages Which.
 * @param options Of each of them.
 * @returns The operations.
 */
export function startMessages(
  comm: Communicator,
  { from, sends, to, receives }: Messages,
  options?: OperationOptions,
): Work[] {
  const works: Work[] = [];
  for (const { peer, at, length } of receives) {
    works.push(comm.recv(to(at, length), peer, options));
  }
  for (const { peer, at, length } of sends) {
    works.push(comm.send(from(at, length), peer, options));
  }
  return works;
}

/** The host's memory for what ranks gather; pieces are used again. */
export class HostStaging {
  readonly #idle: ArrayBuffer[] = [];

  /** Takes a piece. @param bytes At least so many. @returns It. */
  take(bytes: number): ArrayBuffer {
    const i = this.#idle.findIndex(({ byteLength }) => byteLength >= bytes);
    if (i >= 0) return this.#idle.splice(i, 1)[0];
    this.#idle.pop(); // too small for what is needed now
    let size = 4096;
    while (size < bytes) size *= 2;
    return new ArrayBuffer(size);
  }

  /** Puts a piece back. @param piece What nobody uses any more. */
  give(piece: ArrayBuffer): void {
    this.#idle.push(piece);
  }
}

/** What an exchange of data on the host moves. */
export interface HostCargo {
  /** This rank's part of it. */
  readonly plan: ExchangePlan;
  /** Element type. */
  readonly dtype: DType;
  /** What the rank gives. */
  readonly send: TypedArray;
  /** What it gets. */
  readonly recv: TypedArray;
}

/** One exchange of data on the host. */
export class HostExchange implements Completion {
  readonly #levels: Levels;
  readonly #cargo: HostCargo;
  readonly #staging: HostStaging;
  readonly #piece: ArrayBuffer;
  readonly #gathered: TypedArray;
  #first: readonly Work[]; // what the second half waits for
  #rest: Work[]; // what it does not wait for; then the second half, too
  #previous: HostExchange | undefined;
  #relayed = false;
  #done = false;
  #error: unknown;

  /**
   * Starts the first half.
   *
   * @param levels The communicators.
   * @param cargo What is moved.
   * @param staging Memory.
   * @param previous The exchange before this one: second halves begin in the order of the calls, on every rank.
   */
  constructor(
    levels: Levels,
    cargo: HostCargo,
    staging: HostStaging,
    previous: HostExchange | undefined,
  ) {
    const { plan, dtype, send, recv } = cargo;
    this.#levels = levels;
    this.#cargo = cargo;
    this.#staging = staging;
    this.#previous = previous !== undefined && !previous.#relayed ? previous : undefined;
    this.#piece = staging.take(plan.gathered * send.BYTES_PER_ELEMENT);
    const gathered = this.#gathered = viewAs(dtype, this.#piece, 0, plan.gathered);
    const from = partsOf(send);
    this.#first = startMessages(levels.inner, {
      from,
      sends: plan.gatherSends,
      to: partsOf(gathered),
      receives: plan.gatherReceives,
    });
    this.#rest = startMessages(levels.inner, {
      from,
      sends: plan.homeSends,
      to: partsOf(recv),
      receives: plan.homeReceives,
    });
    for (const own of plan.gatherOwn) copyOwn(send, gathered, own);
    if (plan.homeOwn !== null) copyOwn(send, recv, plan.homeOwn);
  }

  poll(): boolean {
    if (this.#done) return true; // the memory is somebody else's by now
    if (this.#error !== undefined) throw this.#error;
    try {
      if (!this.#relayed && !this.#relay()) return false;
      this.#rest = this.#rest.filter((work) => !settled(work));
      if (this.#rest.length > 0) return false;
    } catch (cause) {
      throw this.#error = cause; // those after it fail with it
    }
    this.#staging.give(this.#piece);
    return this.#done = true;
  }

  /** Starts the second half once what it sends is here. @returns Whether it has. */
  #relay(): boolean {
    const previous = this.#previous;
    if (previous !== undefined) {
      if (!previous.#relayed) {
        if (previous.#error !== undefined) throw previous.#error;
        return false; // it is polled before this one
      }
      this.#previous = undefined; // so that the chain of all exchanges is not kept alive
    }
    this.#first = this.#first.filter((work) => !settled(work));
    if (this.#first.length > 0) return false;
    const { plan, recv } = this.#cargo;
    this.#relayed = true;
    this.#rest.push(...startMessages(this.#levels.outer, {
      from: partsOf(this.#gathered),
      sends: plan.hostSends,
      to: partsOf(recv),
      receives: plan.hostReceives,
    }));
    return true;
  }

  idle(spins: number): void {
    const work = this.waiting;
    if (work instanceof PendingWork) work.idle(spins);
  }

  /** An operation that it waits for. */
  get waiting(): Work | undefined {
    return this.#previous?.waiting ?? this.#first[0] ?? this.#rest[0];
  }
}

function partsOf(array: TypedArray): Part {
  return (at, length) => array.subarray(at, at + length) as TypedArray;
}

function copyOwn(source: TypedArray, target: TypedArray, { from, to, length }: OwnBlock): void {
  // Both have one element type, which the caller has checked.
  (target as Float32Array).set(source.subarray(from, from + length) as Float32Array, to);
}
