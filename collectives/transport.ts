// What a backend implements: starting one checked request and telling when it is complete. A transport checks nothing that
// `communicator.ts` has checked, knows no user-facing names and keeps no trace.

import type { DType, TypedArray } from "../tensor/dtype.ts";
import type { Device, Stream, StreamEvent } from "../tensor/device.ts";
import type { Backend, Counts, ReduceOp } from "./types.ts";

/** Names of the operations that a transport carries out. */
export type OperationName =
  | "allReduce"
  | "reduceScatter"
  | "allGather"
  | "allGatherV"
  | "broadcast"
  | "reduce"
  | "gather"
  | "scatter"
  | "allToAll"
  | "allToAllV"
  | "send"
  | "recv"
  | "barrier";

/** Elements that an operation reads or writes. */
export interface Region {
  /** Element type. */
  readonly dtype: DType;
  /** Number of elements. */
  readonly length: number;
  /** The elements on the host; null when they are on a GPU. */
  readonly array: TypedArray | null;
  /** Byte offset in the CPU's linear memory or device address; −1 for an ordinary typed array. */
  readonly address: number;
}

/** One checked operation. Fields that an operation does not use hold their neutral value. */
export interface CollectiveRequest {
  /** Which operation. */
  readonly operation: OperationName;
  /** Number of this operation on its communicator, from 0. */
  readonly sequence: number;
  /** Source elements; null where this rank has none to give. For in-place operations the same region as `recv`. */
  readonly send: Region | null;
  /** Destination elements; null where this rank gets none. */
  readonly recv: Region | null;
  /** Elements per rank that this rank sends (allToAllV), else empty. */
  readonly sendCounts: Counts;
  /** Elements per rank that this rank receives (allToAllV, allGatherV), else empty. */
  readonly recvCounts: Counts;
  /** Reduction. */
  readonly op: ReduceOp;
  /** Root, or the peer of send and recv. */
  readonly peer: number;
  /** Tag of send and recv. */
  readonly tag: number;
  /** What the operation is ordered after on a GPU; the present end of the device's stream without it. Nothing to a CPU. */
  readonly after?: StreamEvent;
}

/** An operation in flight, as the transport sees it. */
export interface Completion {
  /** Moves the operation on as far as it goes without waiting. @returns Whether it is complete. Throws what went wrong. */
  poll(): boolean;
  /**
   * Called repeatedly by a host that has nothing else to do, while `poll()` is false: yields or waits natively, for at most 50 ms.
   */
  idle(spins: number): void;
  /** Called when somebody awaits the operation, so that an error will be heard. */
  awaited?(): void;
  /** Orders a GPU stream after the operation; absent on the CPU. */
  waitOn?(stream: Stream): void;
  /** Where the operation ends on a GPU; absent on the CPU, and while that is not known. */
  readonly end?: StreamEvent;
  /** A point on a GPU that the host can wait for without polling, behind the operation and whatever its transport has started since. */
  mark?(): StreamEvent;
  /** Host-clock times in µs at which the device began and ended it, once it is complete; absent on the CPU, where the host's are right. */
  span?(): readonly [start_us: number, end_us: number];
}

/** Carries the bytes of one communicator. */
export interface Transport {
  /** Which backend. */
  readonly backend: Backend;
  /**
   * Starts an operation. Operations of one transport are started in the same order on all its ranks; those of two transports need not be,
   * so `start` never waits for a peer: all connections exist once the transport does. Counts are read before it returns.
   */
  start(request: CollectiveRequest): Completion;
  /**
   * Tries to complete a collective within the call. The request and its regions are lent: they change after it. If it returns false,
   * `start` of the same operation is the next call and goes on from what has been done.
   */
  now?(request: CollectiveRequest): boolean;
  /**
   * A transport among some of the ranks, called by all of them at the same point. `members[newRank]` is the rank in this transport;
   * `id` is a name that all members agree on and that nobody else uses; `urgent` is whether a GPU runs its work before that of others.
   */
  split(members: readonly number[], id: string, urgent?: boolean): Promise<Transport>;
  /** Called instead of `split` by ranks that join none of the groups, where making groups takes all ranks. */
  abstain?(): Promise<void>;
  /** Ranks (of this transport) that have not begun operation `sequence`, as far as can be known; for the watchdog. */
  missing(sequence: number): Promise<readonly number[]> | readonly number[];
  /** Tells the other ranks, where that is possible without their help, that the job ends; their operations then fail with `why`. */
  abort?(why: string): void;
  /** Most elements that one region of a request may have. @default {Number.MAX_SAFE_INTEGER} */
  readonly maxElements?: number;
  /** Frees what the transport holds, once all ranks have stopped using it. */
  close(): Promise<void>;
}

/** What a backend gets to connect the ranks of a job. */
export interface BootContext {
  /** This process's rank in the job. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
  /** Rank among the processes of this host. */
  readonly localRank: number;
  /** Where ranks leave each other small messages. */
  readonly store: Store;
  /** How long the other ranks may take to come, in ms. @default {LINA_TIMEOUT_MS, or 60000} */
  readonly timeout_ms?: number;
  /** The rank's GPU: operations order themselves after its stream. Absent on the CPU, whose one stream is the host's thread. */
  readonly device?: Device;
  /**
   * Ranks that have left the job and how ("has ended without leaving the job"), as the rendezvous has told so far; it fills while the
   * job runs. A transport that waits for such a rank for more than a second throws and names it.
   */
  readonly departed?: ReadonlyMap<number, string>;
}

/** The rendezvous: a small key-value store that all ranks of a job reach before they can talk otherwise. */
export interface Store {
  /** Sets a key; anyone waiting for it wakes up. */
  set(key: string, value: Uint8Array): Promise<void>;
  /** The value of a key, waiting for it to be set. Throws after the time-out, naming the key. */
  get(key: string, timeout_ms?: number): Promise<Uint8Array>;
  /** Adds to a counter (0 at first) and returns the new value. */
  add(key: string, delta: number): Promise<number>;
  /** Ends this rank's connection. */
  close(): Promise<void>;
}
