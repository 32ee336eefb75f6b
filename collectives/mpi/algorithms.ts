// The collectives as exchanges of messages between every pair of ranks. Reductions are two exchanges: each rank gets everybody's
// elements of one block, reduces them in rank order, and hands the result round. That moves as few bytes as a ring, in two steps
// instead of 2 (p − 1), and gives the same bits on every backend. Measured against Open MPI's own collectives it is level or
// faster (bench/NOTES.md). Each algorithm is a generator: it yields for as long as messages are in flight and is resumed to test
// them, so nothing here ever blocks.

import { bytesOf } from "../../tensor/dtype.ts";
import type { CollectiveRequest, Region } from "../transport.ts";
import { type Bytes, bytesOfRegion, copyBytes, part, Scratch } from "./memory.ts";
import { reduceInRankOrder, type Reduction } from "./reduce.ts";
import type { Group, RequestSet } from "./requests.ts";

/** A collective in progress: yields while messages are in flight, returns when it is complete. */
export type Steps = Generator<void, void, void>;

/** Where an algorithm runs. */
export interface Place {
  /** The ranks. */
  readonly group: Group;
  /** Its messages. */
  readonly requests: RequestSet;
  /** Tags of its two exchanges; no other operation in flight has them. */
  readonly tags: readonly [number, number];
}

/** One block of bytes per rank, anywhere in some memory. */
interface Blocks {
  readonly memory: Bytes;
  /** First byte of each rank's block. */
  readonly offsets: readonly number[];
  /** Its size in bytes. */
  readonly sizes: readonly number[];
}

/** Up to this many bytes in all, latency counts and every rank gets everything. */
const SMALL_BYTES = 32 * 1024;
/** From this many ranks on, few bytes travel along a tree (MPI's own all-gather) instead of from each rank to each. */
const TREE_RANKS = 9;
/** Blocks of a reduction begin at multiples of this many elements: a cache line of every type but i64's two. */
const ALIGN_ELEMENTS = 64;

const NOTHING: Bytes = { view: new Uint8Array(0), address: 0n };

/**
 * The algorithm of a request.
 *
 * @param place Where it runs.
 * @param request What to do; send and recv are in `mod.ts`.
 * @returns Its steps.
 */
export function stepsOf(place: Place, request: CollectiveRequest): Steps {
  switch (request.operation) {
    case "allReduce":
      return allReduce(place, request);
    case "reduceScatter":
      return reduceScatter(place, request);
    case "reduce":
      return reduce(place, request);
    case "broadcast":
      return broadcast(place, request);
    case "barrier":
      return barrier(place);
    case "send":
    case "recv":
      return message(place, request);
    default:
      return move(place, request);
  }
}

function* complete(place: Place): Steps {
  while (!place.requests.test()) yield;
}

/** Posts the messages of an exchange. Each rank begins with its neighbour, so that they do not all send to rank 0 first. */
function post(place: Place, from: Blocks, to: Blocks, tag: number): void {
  const { group, requests } = place;
  const { rank, size } = group;
  for (let i = 1; i < size; i++) {
    const s = (rank + size - i) % size;
    const at = to.memory.address + BigInt(to.offsets[s]);
    requests.receive(group, at, to.sizes[s], s, tag);
  }
  for (let i = 1; i < size; i++) {
    const d = (rank + i) % size;
    const at = from.memory.address + BigInt(from.offsets[d]);
    requests.send(group, at, from.sizes[d], d, tag);
  }
}

/** An exchange with this rank's own block, copied while the others' are on their way. */
function* exchange(place: Place, from: Blocks, to: Blocks, tag: number): Steps {
  post(place, from, to, tag);
  const { rank } = place.group;
  copyBytes(
    part(from.memory, from.offsets[rank], from.sizes[rank]),
    part(to.memory, to.offsets[rank], to.sizes[rank]),
    () => place.requests.test(),
  );
  yield* complete(place);
}

// --- Blocks ------------------------------------------------------------------------------------------------------------------

function memoryOf(region: Region | null): Bytes {
  return region === null ? NOTHING : bytesOfRegion(region);
}

/** The same bytes for every rank. */
function whole(memory: Bytes, size: number): Blocks {
  return {
    memory,
    offsets: Array(size).fill(0),
    sizes: Array(size).fill(memory.view.byteLength),
  };
}

/** Blocks of the given sizes, one after another. */
function inOrder(memory: Bytes, sizes: readonly number[]): Blocks {
  const offsets: number[] = [];
  let at = 0;
  for (const size of sizes) {
    offsets.push(at);
    at += size;
  }
  return { memory, offsets, sizes };
}

/** Equal blocks. */
function equal(memory: Bytes, size: number): Blocks {
  return inOrder(memory, Array(size).fill(memory.view.byteLength / size));
}

/** A block for one rank only. */
function only(memory: Bytes, rank: number, size: number): Blocks {
  const sizes: number[] = Array(size).fill(0);
  sizes[rank] = memory.view.byteLength;
  return inOrder(memory, sizes);
}

/** Blocks of nearly equal size, in bytes; the last may be short or empty. */
function dealt(region: Region, size: number): number[] {
  const width = bytesOf(region.dtype);
  const share = Math.ceil(region.length / size / ALIGN_ELEMENTS) * ALIGN_ELEMENTS;
  const sizes: number[] = [];
  for (let r = 0; r < size; r++) {
    sizes.push(Math.max(0, Math.min(share, region.length - r * share)) * width);
  }
  return sizes;
}

// --- Movement ----------------------------------------------------------------------------------------------------------------

/** allGather, allGatherV, gather, scatter, allToAll and allToAllV: one exchange each, of different blocks. */
function* move(place: Place, request: CollectiveRequest): Steps {
  const { rank, size } = place.group;
  const { operation, peer: root } = request;
  const send = memoryOf(request.send), recv = memoryOf(request.recv);
  const width = bytesOf((request.send ?? request.recv)!.dtype);
  const scaled = (counts: ArrayLike<number>) => Array.from(counts, (n) => n * width);
  let from: Blocks, to: Blocks;
  if (operation === "allGather") {
    if (isSmall(send, size)) return yield* allGatherSmall(place, send, recv);
    from = whole(send, size);
    to = equal(recv, size);
  } else if (operation === "allGatherV") {
    from = whole(send, size);
    to = inOrder(recv, scaled(request.recvCounts));
  } else if (operation === "gather") {
    from = only(send, root, size);
    to = rank === root ? equal(recv, size) : whole(NOTHING, size);
  } else if (operation === "scatter") {
    from = rank === root ? equal(send, size) : whole(NOTHING, size);
    to = only(recv, root, size);
  } else if (operation === "allToAll") {
    from = equal(send, size);
    to = equal(recv, size);
  } else {
    from = inOrder(send, scaled(request.sendCounts));
    to = inOrder(recv, scaled(request.recvCounts));
  }
  yield* exchange(place, from, to, place.tags[0]);
}

function isSmall(block: Bytes, size: number): boolean {
  return block.view.byteLength * size <= SMALL_BYTES;
}

/** Every rank's block, which is small, on every rank. */
function* allGatherSmall(place: Place, send: Bytes, recv: Bytes): Steps {
  const { group, requests } = place;
  const { size } = group;
  const bytes = send.view.byteLength;
  if (size < TREE_RANKS) {
    return yield* exchange(place, whole(send, size), equal(recv, size), place.tags[0]);
  }
  if (bytes === 0) return;
  // The source may be its own place in the destination, which MPI forbids.
  using copy = new Scratch(bytes);
  copyBytes(send, copy);
  requests.allGather(group, copy.address, bytes, recv.address);
  yield* complete(place);
}

function* broadcast(place: Place, request: CollectiveRequest): Steps {
  const { group, requests } = place;
  const { address, view } = memoryOf(request.recv ?? request.send);
  requests.broadcast(group, address, view.byteLength, request.peer);
  yield* complete(place);
}

function* barrier(place: Place): Steps {
  place.requests.barrier(place.group);
  yield* complete(place);
}

function* message(place: Place, request: CollectiveRequest): Steps {
  const { group, requests, tags: [tag] } = place;
  const { peer } = request;
  const { address, view } = memoryOf(request.send ?? request.recv);
  if (request.operation === "send") requests.send(group, address, view.byteLength, peer, tag);
  else requests.receive(group, address, view.byteLength, peer, tag);
  yield* complete(place);
}

// --- Reductions --------------------------------------------------------------------------------------------------------------

function reductionOf(place: Place, request: CollectiveRequest): Reduction {
  const { mpi, rank, size } = place.group;
  return { mpi, dtype: request.send!.dtype, op: request.op, rank, size };
}

/** Sends each rank its block of `x` and reduces everybody's elements of this rank's block in `target`. */
function* reduceOwnBlock(
  place: Place,
  request: CollectiveRequest,
  from: Blocks,
  target: Bytes,
): Steps {
  const { rank, size } = place.group;
  const bytes = from.sizes[rank];
  using slots = new Scratch(bytes * size);
  const own = part(from.memory, from.offsets[rank], bytes);
  post(place, from, equal(slots, size), place.tags[0]);
  copyBytes(own, target, () => place.requests.test());
  yield* complete(place);
  const count = bytes / bytesOf(request.send!.dtype);
  reduceInRankOrder(reductionOf(place, request), slots, target, count);
}

function* reduceScatter(place: Place, request: CollectiveRequest): Steps {
  const from = equal(memoryOf(request.send), place.group.size);
  yield* reduceOwnBlock(place, request, from, memoryOf(request.recv));
}

function* allReduce(place: Place, request: CollectiveRequest): Steps {
  const { rank, size } = place.group;
  const send = memoryOf(request.send), recv = memoryOf(request.recv);
  const bytes = send.view.byteLength;
  if (isSmall(send, size)) {
    using slots = new Scratch(bytes * size);
    yield* allGatherSmall(place, send, slots);
    copyBytes(send, recv);
    reduceInRankOrder(reductionOf(place, request), slots, recv, request.send!.length);
    return;
  }
  const sizes = dealt(request.send!, size);
  const out = inOrder(recv, sizes);
  const own = part(recv, out.offsets[rank], sizes[rank]);
  yield* reduceOwnBlock(place, request, inOrder(send, sizes), own);
  post(place, whole(own, size), out, place.tags[1]);
  yield* complete(place);
}

function* reduce(place: Place, request: CollectiveRequest): Steps {
  const { rank, size } = place.group;
  const root = request.peer;
  const send = memoryOf(request.send), recv = memoryOf(request.recv);
  if (isSmall(send, size)) { // the root does all the work
    const from = only(send, root, size);
    return yield* reduceOwnBlock(place, request, from, rank === root ? recv : NOTHING);
  }
  const sizes = dealt(request.send!, size);
  const from = inOrder(send, sizes);
  using scratch = new Scratch(sizes[rank]); // other ranks have nowhere to reduce to
  const own = rank === root ? part(recv, from.offsets[rank], sizes[rank]) : scratch;
  yield* reduceOwnBlock(place, request, from, own);
  const to = rank === root ? inOrder(recv, sizes) : whole(NOTHING, size);
  post(place, only(own, root, size), to, place.tags[1]);
  yield* complete(place);
}
