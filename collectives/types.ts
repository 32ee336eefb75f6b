// The communicator's contract: what a user calls, whatever carries the bytes. Names and meanings are MPI's and NCCL's.
// Checks, order and tracing live once in `communicator.ts`; moving bytes lives in a transport (`transport.ts`).

import { type DType, DTYPES, type TypedArray } from "../tensor/dtype.ts";
import type { Stream, StreamEvent } from "../tensor/device.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { SpanArgs } from "../trace/mod.ts";

/** What carries a communicator's bytes. `self` is a world of one. */
export type Backend = "self" | "shm" | "mpi" | "nccl";

/** Elementwise reduction. `avg` is the sum divided by the number of ranks; integers round toward zero. */
export type ReduceOp = "sum" | "min" | "max" | "prod" | "avg";

/** All reductions, in the order in which shm/reduce.c numbers them. */
export const REDUCE_OPS: readonly ReduceOp[] = ["sum", "min", "max", "prod", "avg"];

/** Element types that can be reduced, in the order of `DTYPES`. An i16 only travels: it holds bits, not numbers that are added. */
export const REDUCIBLE: readonly DType[] = DTYPES.filter((dtype) => dtype !== "i16");

/** Data that a collective takes or fills: a typed array on the host (`Uint16Array` is bf16), or a tensor of the rank's device. */
export type Data = TypedArray | Tensor;

/** How many elements go to, or come from, each rank: one whole number ≥ 0 per rank. */
export type Counts = readonly number[] | Int32Array;

/**
 * An operation that has been started. Awaiting it is completion as the host sees it: results may be read, buffers reused.
 * Buffers must not be touched in between, nor freed: on a GPU, free them after `wait(device.stream)`, which needs no host wait.
 */
export interface Work extends PromiseLike<void> {
  /** Whether the operation is complete as the host sees it; never blocks, and lets pending operations progress. */
  readonly done: boolean;
  /**
   * Orders a device stream after the operation. On a GPU the host goes on at once (nothing is returned); on a CPU the stream is the
   * host's own thread, so what is returned must be awaited. Write `await work.wait(stream)` for both.
   */
  wait(stream: Stream): void | PromiseLike<void>;
  /** On a GPU, where the operation ends on the device: what else is to come after it can wait for that. Absent for what is complete. */
  readonly end?: StreamEvent;
  /**
   * On a GPU, a point that {@linkcode Device.passing} takes, behind this operation: call it right after the operation has been started, as it is
   * also behind what its communicator has started since. Absent on the CPU.
   */
  mark?(): StreamEvent;
}

/** Calls of an operation, and bytes that this rank has sent to other ranks by them. */
export interface OperationTraffic {
  /** Number of calls. */
  calls: number;
  /** Bytes sent to other ranks. */
  bytes: number;
}

/** Traffic per operation name; operations that were never called are absent. */
export type Traffic = Readonly<Partial<Record<string, Readonly<OperationTraffic>>>>;

/** What an operation is called in the trace. */
export interface Label {
  /** Name of its span. */
  readonly name: string;
  /** Row of the timeline. @default {the communicator's name} */
  readonly track?: string;
  /** More values to show with the span, once the operation has ended and only while spans are kept; told when the operation began, in µs. */
  readonly args?: (start_us: number) => SpanArgs;
}

/** Options of operations that a schedule places. */
export interface OperationOptions {
  /**
   * On a GPU, what the operation is ordered after: the event at which its data was complete. A host that has run ahead needs it, or the
   * operation waits for everything enqueued meanwhile. @default {the present end of the device's stream}
   */
  readonly after?: StreamEvent;
  /** What it is called in the trace. @default {the operation's name} */
  readonly label?: Label;
}

/** Options of {@linkcode Communicator.reduceScatter}. */
export interface ReduceScatterOptions extends OperationOptions {
  /** Elementwise reduction. @default {"sum"} */
  readonly op?: ReduceOp;
}

/** Options of {@linkcode Communicator.allReduce}. */
export interface AllReduceOptions extends ReduceScatterOptions {
  /** Where the result goes; in place without it. */
  readonly out?: Data;
}

/**
 * A group of ranks that exchange data. All ranks of a communicator call the same operations in the same order; an operation starts at
 * the call and is complete when its {@linkcode Work} is. Wrong sizes, dtypes, roots and counts throw at the call, before
 * anything is sent.
 */
export interface Communicator extends AsyncDisposable {
  /** This process's number, 0 to size − 1. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
  /** What carries the bytes. */
  readonly backend: Backend;
  /** Name for traces and errors: `world`, `world/dup1`, `world/split1.0`. */
  readonly name: string;
  /** What this rank has sent to others on this communicator, per operation; the formulas are those of `volume.ts`. */
  readonly traffic: Traffic;

  /** Reduces over all ranks; every rank gets the result. In place unless `out` is given. MPI_Allreduce, ncclAllReduce. */
  allReduce(x: Data, options?: AllReduceOptions): Work;
  /** Reduces `x` (size · n elements) over all ranks; rank r gets the r-th n elements in `out`. MPI_Reduce_scatter_block, ncclReduceScatter. */
  reduceScatter(x: Data, out: Data, options?: ReduceScatterOptions): Work;
  /** Every rank gets the n elements of each rank, in rank order, in `out` (size · n). MPI_Allgather, ncclAllGather. */
  allGather(x: Data, out: Data): Work;
  /** As allGather, with `counts[r]` elements from rank r. MPI_Allgatherv. */
  allGatherV(x: Data, out: Data, counts: Counts): Work;
  /** Copies `x` from `root` to every rank, in place. MPI_Bcast, ncclBroadcast. */
  broadcast(x: Data, root?: number): Work;
  /** Reduces over all ranks; only `root` gets the result, in `out` or in place. MPI_Reduce, ncclReduce. */
  reduce(
    x: Data,
    options?: { readonly op?: ReduceOp; readonly root?: number; readonly out?: Data },
  ): Work;
  /** `root` gets the n elements of each rank in `out` (size · n); the others pass null. MPI_Gather. */
  gather(x: Data, out: Data | null, root?: number): Work;
  /** Rank r gets the r-th n elements of the root's `x` in `out`; the others pass null for x. MPI_Scatter. */
  scatter(x: Data | null, out: Data, root?: number): Work;
  /** The r-th block of `x` goes to rank r; block s of `out` comes from rank s. Equal blocks. MPI_Alltoall, ncclAlltoAll. */
  allToAll(x: Data, out: Data): Work;
  /**
   * `sendCounts[r]` elements go to rank r, taken one after another from `send`; `recvCounts[s]` come from rank s, laid one after another in
   * `recv`. Rank s's sendCounts[r] must be rank r's recvCounts[s]. MPI_Alltoallv.
   */
  allToAllV(
    send: Data,
    sendCounts: Counts,
    recv: Data,
    recvCounts: Counts,
    options?: OperationOptions,
  ): Work;
  /** Sends `x` to rank `to`; matched by a recv of the same size, in order per (sender, tag). MPI_Send. */
  send(
    x: Data,
    to: number,
    options?: { readonly tag?: number; readonly after?: StreamEvent },
  ): Work;
  /** Receives from rank `from` into `out`. MPI_Recv. */
  recv(
    out: Data,
    from: number,
    options?: { readonly tag?: number; readonly after?: StreamEvent },
  ): Work;
  /** Complete once every rank has called it. MPI_Barrier. */
  barrier(): Work;
  /**
   * Ranks of one color form a new communicator, ordered by key, then by rank; null color gives null. MPI_Comm_split, ncclCommSplit.
   * @param color A whole number ≥ 0, or null to stay out.
   * @param key Order within the color. @default {rank}
   * @param options `urgent`: whether a GPU runs its work before that of other communicators, as it does for the world's. @default {{}}
   */
  split(
    color: number | null,
    key?: number,
    options?: { readonly urgent?: boolean },
  ): Promise<Communicator | null>;
  /** A communicator of the same ranks whose operations are independent of this one's. MPI_Comm_dup. */
  dup(): Promise<Communicator>;
  /** Ends every rank of the job with an error that says why. MPI_Abort. */
  abort(why: string): never;
}

/** Element types, for tables in the docs and checks. */
export type { DType };
