// From a checked request to NCCL's calls on a stream. What NCCL has is called by name; gather, scatter and everything with counts of
// each rank's own are sends and receives in one group, with exactly the counts; a rank's own block is a copy on the same stream, or a
// message, too.
// Counts may pass 2³¹: they are size_t in NCCL. Nothing here waits, and nothing is known of events.

import { checkNccl, type Nccl, NCCL_OPS, NCCL_TYPES, type NcclComm } from "../../ffi/nccl.ts";
import { CUDART } from "../../ffi/cudart.ts";
import type { CudaStream } from "../../tensor/cuda/streams.ts";
import { bytesOf, type DType } from "../../tensor/dtype.ts";
import type { CollectiveRequest } from "../transport.ts";
import type { Counts } from "../types.ts";
import { copy } from "./staging.ts";

/**
 * Up to so many bytes, a rank's own block of an all-to-all is a message of the group, as in NCCL's own: a copy before the group would be
 * waited for (some 6 µs). A larger one is copied, which leaves NCCL's channels to the others.
 */
const OWN_MESSAGE_BYTES = 65_536;

/** Where operations run. */
export interface Place {
  /** The library. */
  readonly nccl: Nccl;
  /** The communicator. */
  readonly comm: NcclComm;
  /** This rank. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
  /** The stream. */
  readonly stream: CudaStream;
  /** Address of a few bytes of device memory that a barrier reduces. */
  readonly scratch: bigint;
}

/**
 * Enqueues a collective.
 *
 * @param place Where.
 * @param request The operation.
 * @param send Device address of what this rank gives; 0 if nothing.
 * @param recv Device address of what it gets; 0 if nothing.
 * @throws {CudaError} If NCCL refuses it.
 */
export function enqueue(
  place: Place,
  request: CollectiveRequest,
  send: bigint,
  recv: bigint,
): void {
  const { nccl: { calls }, comm, size, stream: { handle } } = place;
  const { operation, peer, op } = request;
  const region = (request.send ?? request.recv)!;
  const uneven = operation === "allToAllV" || operation === "allGatherV";
  if (operation !== "barrier" && !uneven && region.length === 0) return; // on every rank alike
  switch (operation) {
    case "barrier": {
      const { u8: type } = NCCL_TYPES;
      const { max } = NCCL_OPS;
      const { scratch } = place;
      const code = calls.ncclAllReduce(scratch, scratch, 1n, type, max, comm, handle);
      return checkNccl(code, "ncclAllReduce", comm);
    }
    case "allReduce": {
      const [type, count] = [reducible(region.dtype), BigInt(region.length)];
      const code = calls.ncclAllReduce(send, recv, count, type, NCCL_OPS[op], comm, handle);
      return checkNccl(code, "ncclAllReduce", comm);
    }
    case "reduceScatter": {
      const [type, count] = [reducible(region.dtype), BigInt(request.recv!.length)];
      const code = calls.ncclReduceScatter(send, recv, count, type, NCCL_OPS[op], comm, handle);
      return checkNccl(code, "ncclReduceScatter", comm);
    }
    case "reduce": {
      const [type, count] = [reducible(region.dtype), BigInt(region.length)];
      const code = calls.ncclReduce(send, recv, count, type, NCCL_OPS[op], peer, comm, handle);
      return checkNccl(code, "ncclReduce", comm);
    }
    case "allGather": {
      const [type, count] = movable(region.dtype, request.send!.length);
      const code = calls.ncclAllGather(send, recv, count, type, comm, handle);
      return checkNccl(code, "ncclAllGather", comm);
    }
    case "broadcast": {
      const [type, count] = movable(region.dtype, region.length);
      const code = calls.ncclBroadcast(send, recv, count, type, peer, comm, handle);
      return checkNccl(code, "ncclBroadcast", comm);
    }
    case "allToAll": {
      const block = region.length / size;
      if (calls.ncclAlltoAll === null) return exchange(place, region.dtype, send, recv, block);
      const [type, count] = movable(region.dtype, block);
      const code = calls.ncclAlltoAll(send, recv, count, type, comm, handle);
      return checkNccl(code, "ncclAlltoAll", comm);
    }
    case "allToAllV": {
      const { sendCounts, recvCounts } = request;
      return exchange(place, region.dtype, send, recv, sendCounts, recvCounts);
    }
    case "allGatherV":
      return gatherV(place, request, send, recv);
    case "gather":
      return gather(place, request, send, recv);
    case "scatter":
      return scatter(place, request, send, recv);
    default:
      throw new TypeError(`Cannot enqueue as ${operation} must be a collective: it is a message`);
  }
}

/** A message of a group. */
export interface Message {
  /** Whether this rank receives it. */
  readonly receive: boolean;
  /** The other rank. */
  readonly peer: number;
  /** Element type. */
  readonly dtype: DType;
  /** Elements. */
  readonly length: number;
  /** Device address. */
  readonly address: bigint;
}

/**
 * Enqueues messages that may all be on their way at once.
 *
 * @param place Where.
 * @param messages The messages; those of one pair of ranks match in their order.
 */
export function enqueueMessages(place: Place, messages: readonly Message[]): void {
  grouped(place, () => {
    for (const { receive, peer, dtype, length, address } of messages) {
      const [type, count] = movable(dtype, length);
      if (receive) receiveFrom(place, address, count, type, peer);
      else sendTo(place, address, count, type, peer);
    }
  });
}

function reducible(dtype: DType): number {
  if (dtype === "i16") {
    throw new TypeError(
      "Cannot reduce on nccl as the elements must be numbers that NCCL adds: current value is i16",
    );
  }
  return NCCL_TYPES[dtype];
}

/** Type and count that move elements; those that NCCL does not know travel as bytes. */
function movable(dtype: DType, length: number): [type: number, count: bigint] {
  return dtype === "i16"
    ? [NCCL_TYPES.u8, BigInt(2 * length)]
    : [NCCL_TYPES[dtype], BigInt(length)];
}

/** Runs calls as one group, which is closed whatever happens. */
function grouped({ nccl: { calls }, comm }: Place, run: () => void): void {
  checkNccl(calls.ncclGroupStart(), "ncclGroupStart", comm);
  try {
    run();
  } catch (error) {
    calls.ncclGroupEnd();
    throw error;
  }
  checkNccl(calls.ncclGroupEnd(), "ncclGroupEnd", comm);
}

function sendTo(place: Place, from: bigint, count: bigint, type: number, peer: number): void {
  const { nccl: { calls }, comm, stream } = place;
  checkNccl(calls.ncclSend(from, count, type, peer, comm, stream.handle), "ncclSend", comm);
}

function receiveFrom(place: Place, to: bigint, count: bigint, type: number, peer: number): void {
  const { nccl: { calls }, comm, stream } = place;
  checkNccl(calls.ncclRecv(to, count, type, peer, comm, stream.handle), "ncclRecv", comm);
}

/** A rank's own block, unless it is in its place. */
function copyOwn({ stream }: Place, from: bigint, to: bigint, bytes: number): void {
  if (bytes > 0 && from !== to) copy(stream, to, from, bytes, CUDART.deviceToDevice);
}

/** Blocks of equal or of given lengths from every rank to every rank. */
function exchange(
  place: Place,
  dtype: DType,
  send: bigint,
  recv: bigint,
  sent: Counts | number,
  received: Counts | number = sent,
): void {
  const { rank, size } = place;
  const width = bytesOf(dtype);
  const [from, sends] = layout(send, sent, size, width);
  const [to, receives] = layout(recv, received, size, width);
  const own = sends[rank] * width;
  let others = 0;
  for (let r = 0; r < size; r++) if (r !== rank) others += sends[r] + receives[r];
  const copied = others === 0 || own > OWN_MESSAGE_BYTES;
  if (copied) copyOwn(place, from[rank], to[rank], own);
  if (others === 0) return;
  grouped(place, () => {
    for (let r = 0; r < size; r++) {
      if (r === rank && copied) continue;
      if (sends[r] > 0) {
        const [type, count] = movable(dtype, sends[r]);
        sendTo(place, from[r], count, type, r);
      }
      if (receives[r] > 0) {
        const [type, count] = movable(dtype, receives[r]);
        receiveFrom(place, to[r], count, type, r);
      }
    }
  });
}

/** Addresses and lengths of the blocks that lie one after another. */
function layout(
  address: bigint,
  counts: Counts | number,
  size: number,
  width: number,
): [addresses: bigint[], lengths: number[]] {
  const addresses: bigint[] = [], lengths: number[] = [];
  let at = 0;
  for (let r = 0; r < size; r++) {
    const length = typeof counts === "number" ? counts : counts[r];
    addresses.push(address + BigInt(at));
    lengths.push(length);
    at += length * width;
  }
  return [addresses, lengths];
}

function gatherV(place: Place, request: CollectiveRequest, send: bigint, recv: bigint): void {
  const { rank, size } = place;
  const { dtype, length } = request.send!;
  const width = bytesOf(dtype);
  const [to, lengths] = layout(recv, request.recvCounts, size, width);
  copyOwn(place, send, to[rank], length * width);
  if (request.recv!.length === 0) return;
  const [type, mine] = movable(dtype, length);
  grouped(place, () => {
    for (let r = 0; r < size; r++) {
      if (r === rank) continue;
      if (length > 0) sendTo(place, send, mine, type, r);
      if (lengths[r] > 0) receiveFrom(place, to[r], movable(dtype, lengths[r])[1], type, r);
    }
  });
}

function gather(place: Place, request: CollectiveRequest, send: bigint, recv: bigint): void {
  const { rank, size } = place;
  const { dtype, length } = request.send!;
  const [type, count] = movable(dtype, length);
  if (rank !== request.peer) return sendTo(place, send, count, type, request.peer);
  const [to] = layout(recv, length, size, bytesOf(dtype));
  copyOwn(place, send, to[rank], length * bytesOf(dtype));
  grouped(place, () => {
    for (let r = 0; r < size; r++) if (r !== rank) receiveFrom(place, to[r], count, type, r);
  });
}

function scatter(place: Place, request: CollectiveRequest, send: bigint, recv: bigint): void {
  const { rank, size } = place;
  const { dtype, length } = request.recv!;
  const [type, count] = movable(dtype, length);
  if (rank !== request.peer) return receiveFrom(place, recv, count, type, request.peer);
  const [from] = layout(send, length, size, bytesOf(dtype));
  copyOwn(place, from[rank], recv, length * bytesOf(dtype));
  grouped(place, () => {
    for (let r = 0; r < size; r++) if (r !== rank) sendTo(place, from[r], count, type, r);
  });
}
