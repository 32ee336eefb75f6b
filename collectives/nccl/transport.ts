// A transport between GPUs. Each has a communicator and a stream of its own; an operation is ordered after the compute stream (or an
// event), enqueued, and ends with an event. The host never waits for the device, except to bound how far it runs ahead. A second communicator, the trunk, is used for nothing but to be split, so that groups can be made while operations run.

import {
  abortComm,
  asyncError,
  destroyComm,
  type Nccl,
  type NcclComm,
  splitComm,
} from "../../ffi/nccl.ts";
import { libc } from "../../ffi/libc.ts";
import type { CudaDevice } from "../../tensor/cuda/device.ts";
import type { CudaEvent, CudaStream } from "../../tensor/cuda/streams.ts";
import { now, recorder } from "../../trace/mod.ts";
import { progress } from "../progress.ts";
import type {
  BootContext,
  CollectiveRequest,
  Completion,
  Region,
  Transport,
} from "../transport.ts";
import { connect, together } from "./connect.ts";
import { DeviceFlight, HostFlight, type Tower } from "./flight.ts";
import { enqueue, enqueueMessages, type Message, type Place } from "./operations.ts";
import { type Staged, Staging } from "./staging.ts";
import { Watch } from "./watch.ts";

/** Name of the transport of all ranks. */
export const WORLD = "world";
/** Operations in flight per transport; CUDA's own queue holds about 1024 commands and blocks beyond. */
const MOST_IN_FLIGHT = 128;
/** Operations between two looks at those that nobody awaits. */
const LET_GO = 64;
/** Longest time that a call waits for the oldest of them, in ms. */
const HOLD_MS = 40;
/** How long a transport that closes waits for operations that others may never join, in ms. */
const CLOSE_MS = 1000;
/** Priority of a stream whose kernels go first; CUDA takes the nearest that the device has. */
const URGENT = -5;
/** How long an anchor of the device's clock is good for, in µs: the clocks drift 4 to 10 µs per second apart. */
const ANCHOR_US = 1e6;
/** How long the orderly end of a communicator may take, in ms. */
const DESTROY_MS = 10_000;

/** What all transports of this process share. */
export interface Job {
  /** The library. */
  readonly nccl: Nccl;
  /** The rank's GPU. */
  readonly device: CudaDevice;
  /** This rank. */
  readonly context: BootContext;
  /** Transports that have not been closed, in the order in which they were made. */
  readonly open: Set<NcclTransport>;
  /** When the device's clock was last tied to the host's, in µs. */
  anchored_us: number;
}

/** Which ranks a transport connects. */
export interface Membership {
  /** Ranks of the job, in the order of this transport. */
  readonly members: readonly number[];
  /** Name that all members agree on. */
  readonly id: string;
  /** This rank, in this transport. */
  readonly rank: number;
}

/** The communicators of a transport. */
export interface Communicators {
  /** Is split, and nothing else. */
  readonly trunk: NcclComm;
  /** Carries the operations. */
  readonly comm: NcclComm;
}

/** A transport over NCCL. */
export class NcclTransport implements Transport, Tower {
  readonly backend = "nccl";
  readonly #job: Job;
  readonly #communicators: Communicators;
  readonly #place: Place;
  readonly #stream: CudaStream;
  readonly #staging: Staging;
  readonly #watch: Watch;
  readonly #scratch: number;
  readonly #inFlight: HostFlight[] = [];
  #waiting: HostFlight[] = []; // messages that are not enqueued yet
  #begun = 0; // collectives
  #started = 0; // collectives and messages
  #failure: Error | undefined;
  #aborting: Promise<void> | undefined;
  #closed = false;

  /** Connects the ranks of fresh communicators. */
  static async open(
    job: Job,
    communicators: Communicators,
    membership: Membership,
    urgent: boolean,
  ): Promise<NcclTransport> {
    const stream = job.device.createStream(membership.id, { priority: urgent ? URGENT : 0 });
    const scratch = job.device.allocate(8 * membership.members.length);
    stream.wait(job.device.stream.record()); // the memory is in the order of that stream
    const { rank, members: { length: size } } = membership;
    const { comm } = communicators;
    const wiring = { nccl: job.nccl, comm, rank, size, stream };
    await together(connect(wiring, BigInt(scratch)), membership.id, job.context);
    return new NcclTransport(job, communicators, membership, stream, scratch);
  }

  private constructor(
    job: Job,
    communicators: Communicators,
    { members, id, rank }: Membership,
    stream: CudaStream,
    scratch: number,
  ) {
    this.#job = job;
    this.#communicators = communicators;
    this.#stream = stream;
    this.#scratch = scratch;
    this.#staging = new Staging(job.device, stream);
    const { comm } = communicators;
    const size = members.length;
    this.#place = { nccl: job.nccl, comm, rank, size, stream, scratch: BigInt(scratch) };
    job.open.add(this);
    this.#watch = new Watch(
      { context: job.context, members, id, rank },
      {
        flights: this.#inFlight,
        begun: () => this.#begun,
        asyncError: () => asyncError(comm),
        fail: (error) => void this.#fail(error),
      },
    );
  }

  start(request: CollectiveRequest): Completion {
    this.check();
    this.#holdBack();
    const { operation, send, recv } = request;
    const paired = operation === "send" || operation === "recv";
    const index = paired ? -1 : this.#begun++;
    const flight =
      recv !== null && recv.array !== null || send !== null && paired && send.array !== null
        ? new HostFlight(request, index, this)
        : new DeviceFlight(request, index, this);
    if (paired) {
      // A send and a receive that are started one after the other must run side by side, or all ranks could wait in their sends.
      if (this.#waiting.push(flight) === 1) queueMicrotask(() => this.#flushLate());
      return flight;
    }
    this.flush();
    this.#enqueue(flight);
    return flight;
  }

  #enqueue(flight: HostFlight): void {
    const { request } = flight;
    const { send, recv, operation, peer } = request;
    try {
      this.#order(request);
      const filled = operation !== "broadcast" || peer === this.#place.rank;
      const from = this.#stage(send, filled);
      const to = recv === send ? from : this.#stage(recv, false);
      this.#begin(flight);
      enqueue(this.#place, request, addressOf(send, from), addressOf(recv, to));
      if (to !== null) this.#staging.fetch(to);
      if (from !== null || to !== null) {
        flight.staged = { read: from === to ? null : from, written: to };
      }
      this.#end(flight);
    } catch (error) {
      throw this.#fail(error as Error);
    }
  }

  /** Host arrays go to the device, and back, on the same stream. */
  #stage(region: Region | null, filled: boolean): Staged | null {
    return region === null || region.array === null ? null : this.#staging.stage(region, filled);
  }

  /** Orders the stream after what the data comes from: an event, or all that the device's stream holds. The host's data needs nothing. */
  #order({ send, recv, after }: CollectiveRequest): void {
    const onHost = (region: Region | null) => region === null || region.array !== null;
    if ((send !== null || recv !== null) && onHost(send) && onHost(recv)) return;
    this.#stream.wait(after ?? this.#job.device.stream.record());
  }

  #begin(flight: HostFlight): void {
    const { operation } = flight.request;
    const counts = recorder.timed && (operation === "allToAll" || operation === "allToAllV");
    if (!recorder.capturing && !counts) return;
    if (now() - this.#job.anchored_us > ANCHOR_US) {
      this.#job.device.anchor();
      this.#job.anchored_us = now();
    }
    flight.begin = this.#stream.recordTimed();
  }

  #end(...flights: HostFlight[]): void {
    const timed = flights[0].begin !== undefined; // a timed record costs three times as much
    const end = timed ? this.#stream.recordTimed() : this.#stream.record();
    for (const flight of flights) {
      flight.end = end;
      this.#inFlight.push(flight);
    }
  }

  /** Enqueues the messages that have been started, as one group. */
  flush(): void {
    if (this.#waiting.length === 0) return;
    const flights = this.#waiting;
    this.#waiting = [];
    try {
      for (const flight of flights) this.#order(flight.request);
      const staged = flights.map(({ request: { send, recv } }) =>
        this.#stage(send ?? recv, send !== null)
      );
      this.#begin(flights[0]);
      for (const flight of flights) flight.begin = flights[0].begin;
      const messages = flights.map((flight, i) => messageOf(flight, staged[i]));
      enqueueMessages(this.#place, messages);
      flights.forEach((flight, i) => {
        const one = staged[i];
        if (one === null) return;
        const received = flight.request.operation === "recv";
        if (received) this.#staging.fetch(one);
        flight.staged = received ? { read: null, written: one } : { read: one, written: null };
      });
      this.#end(...flights);
    } catch (error) {
      throw this.#fail(error as Error);
    }
  }

  /** The same where nobody can catch: whoever polls the messages gets the error. */
  #flushLate(): void {
    try {
      this.flush();
    } catch (error) {
      this.#watch.tellLater(error as Error);
    }
  }

  look(heard: boolean): void {
    this.#retire();
    if (!this.#failure) return;
    if (heard) this.#watch.told = true;
    throw this.#failure;
  }

  check(): void {
    if (!this.#failure) return;
    this.#watch.told = true;
    throw this.#failure;
  }

  mark(): CudaEvent {
    this.check();
    this.flush();
    return this.#stream.mark();
  }

  hear(): void {
    if (this.#failure) this.#watch.told = true;
  }

  inspect(): void {
    this.#watch.inspect();
  }

  /** Operations end in order, so only the oldest is asked for. */
  #retire(): void {
    const flights = this.#inFlight;
    while (flights.length > 0 && !this.#failure && flights[0].end!.done()) {
      this.#land(flights.shift()!);
    }
  }

  #land(flight: HostFlight): void {
    flight.landed = true;
    flight.begin?.done(); // takes its time by the same tie of the clocks as the end's
    const { staged } = flight;
    if (staged === undefined) return;
    const { read, written } = staged;
    if (read !== null) this.#staging.finish(read, false);
    if (written !== null) this.#staging.finish(written, true);
    flight.staged = undefined;
  }

  /** Bounds how far the host runs ahead of the device. */
  #holdBack(): void {
    // Nobody may ever await what only streams wait for: the progress engine lets go of it here.
    if (++this.#started % LET_GO === 0) queueMicrotask(progress);
    this.#retire();
    if (this.#inFlight.length < MOST_IN_FLIGHT) return;
    const end_ms = performance.now() + HOLD_MS;
    while (this.#inFlight.length >= MOST_IN_FLIGHT && performance.now() < end_ms) {
      libc().sched_yield();
      this.#retire();
    }
  }

  /**
   * Nothing can complete any more: what runs on the device is stopped, or its streams would never move again, and NCCL lets the other
   * ranks know. @returns The first error.
   */
  #fail(error: Error): Error {
    if (this.#failure) return this.#failure;
    this.#failure = error;
    void this.#stop();
    return error;
  }

  #stop(): Promise<void> {
    const { trunk, comm } = this.#communicators;
    return this.#aborting ??= Promise.all([abortComm(comm), abortComm(trunk)]).then(
      () => {},
      () => {}, // it ends with the process
    );
  }

  missing(sequence: number): Promise<readonly number[]> {
    return this.#watch.missing(sequence);
  }

  async split(members: readonly number[], id: string, urgent = false): Promise<Transport> {
    const rank = members.indexOf(this.#place.rank);
    const color = Math.min(...members); // one for all members, another for every other group
    const trunk = await this.#split(color, rank, id);
    const comm = await together(splitComm(trunk!, 0, rank), id, this.#job.context);
    const ranks = members.map((r) => this.#watch.members[r]);
    const communicators = { trunk: trunk!, comm: comm! };
    return await NcclTransport.open(this.#job, communicators, { members: ranks, id, rank }, urgent);
  }

  async abstain(): Promise<void> {
    await this.#split(-1, 0, "the others' group");
  }

  async #split(color: number, key: number, id: string): Promise<NcclComm | null> {
    if (this.#failure) throw this.#failure;
    const { trunk } = this.#communicators;
    return await together(splitComm(trunk, color, key), id, this.#job.context);
  }

  abort(why: string): void {
    this.#fail(new Error(why));
  }

  /** Closes it; with the world, all others go before it: a process that ends with communicators at work may crash. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    const { open } = this.#job;
    open.delete(this);
    if (this.#watch.id === WORLD) { for (const other of [...open].reverse()) await other.close(); }
    await this.#settle();
    this.#watch.close();
    if (this.#failure || this.#inFlight.length > 0) return await this.#stop();
    const limit = Promise.withResolvers<"late">();
    const timer = setTimeout(() => limit.resolve("late"), DESTROY_MS);
    const { trunk, comm } = this.#communicators;
    const destroyed = destroyComm(comm).then(() => destroyComm(trunk));
    const late = await Promise.race([destroyed, limit.promise]);
    clearTimeout(timer);
    if (late) return await this.#stop(); // another rank has not closed it
    this.#staging.close();
    this.#job.device.free(this.#scratch);
  }

  /** Waits for what is in flight, but not for what others may never join. */
  async #settle(): Promise<void> {
    const end_ms = performance.now() + CLOSE_MS;
    try {
      this.flush();
      while (this.#inFlight.length > 0 && !this.#failure && performance.now() < end_ms) {
        this.#retire();
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
    } catch (error) {
      this.#fail(error as Error);
    }
  }
}

function addressOf(region: Region | null, staged: Staged | null): bigint {
  return staged?.address ?? (region === null ? 0n : BigInt(region.address));
}

function messageOf(flight: HostFlight, staged: Staged | null): Message {
  const { operation, peer, send, recv } = flight.request;
  const region = (send ?? recv)!;
  const { dtype, length } = region;
  const receive = operation === "recv";
  return { receive, peer, dtype, length, address: addressOf(region, staged) };
}
