// How many bytes a rank sends to other ranks in one operation. These are the volumes of bandwidth-optimal algorithms (those of
// nccl-tests' bus bandwidth), whatever a backend does, so that runs on different backends compare and a weak-scaling test can
// count to the byte. With p ranks, rank r, elements of b bytes, and n elements as the operation's documentation has them:
//
//   allReduce      ⌊2 (p − 1) n b / p⌋        broadcast   root: (p − 1) n b, others 0
//   reduceScatter  (p − 1) n b                reduce      root: 0, others n b
//   allGather(V)   (p − 1) n b                gather      root: 0, others n b
//   allToAll       (p − 1) n b                scatter     root: (p − 1) n b, others 0
//   allToAllV      Σ_{q ≠ r} sendCounts[q] b  send        n b, to itself 0
//   recv, barrier  0
//
// n is the block of one rank for reduceScatter, allGather(V), gather, scatter and allToAll.

import { bytesOf } from "../tensor/dtype.ts";
import type { CollectiveRequest } from "./transport.ts";

/**
 * Bytes that a rank sends to other ranks in an operation.
 *
 * @param request The operation as this rank calls it.
 * @param rank This rank.
 * @param size Number of ranks.
 * @returns The bytes, by the formulas at the head of `volume.ts`.
 */
export function bytesSent(request: CollectiveRequest, rank: number, size: number): number {
  const { operation, send, recv, peer } = request;
  const others = size - 1;
  const region = send ?? recv;
  if (region === null) return 0;
  const bytes = region.length * bytesOf(region.dtype);
  switch (operation) {
    case "allReduce":
      return Math.floor((2 * others * bytes) / size);
    case "reduceScatter":
    case "allToAll":
      return others * (bytes / size);
    case "allGather":
    case "allGatherV":
      return others * bytes;
    case "broadcast":
      return rank === peer ? others * bytes : 0;
    case "scatter":
      return rank === peer ? others * (bytes / size) : 0;
    case "reduce":
    case "gather":
      return rank === peer ? 0 : bytes;
    case "allToAllV":
      return bytes - request.sendCounts[rank] * bytesOf(region.dtype);
    case "send":
      return rank === peer ? 0 : bytes;
    default:
      return 0;
  }
}
