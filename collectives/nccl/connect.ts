// Makes communicators and connects their ranks at once: NCCL would do it within the first operation, whose call then waits for the
// peers, so that first uses in different orders would hang. All calls here run off the main thread.

import {
  checkNccl,
  initRank,
  type Nccl,
  nccl,
  NCCL_TYPES,
  type NcclComm,
  uniqueId,
} from "../../ffi/nccl.ts";
import type { CudaStream } from "../../tensor/cuda/streams.ts";
import type { BootContext } from "../transport.ts";

/** What an environment variable of NCCL is set to unless the user has. */
const SETTINGS: Readonly<Record<string, string>> = {
  NCCL_RUNTIME_CONNECT: "0", // 2.22 and newer: all algorithms connect when the communicator is made
};

/** Sets what has to be known before NCCL is loaded. */
export function prepareEnvironment(): void {
  for (const [name, value] of Object.entries(SETTINGS)) {
    if (!Deno.env.has(name)) Deno.env.set(name, value);
  }
}

/**
 * Whether NCCL can be opened; nothing is connected.
 *
 * @returns Why not, as half a sentence; null if it can.
 */
export function whyNoNccl(): string | null {
  prepareEnvironment();
  try {
    nccl();
    return null;
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

/**
 * Makes a communicator of all ranks of the job; they find each other through the store.
 *
 * @param context This rank.
 * @returns The communicator; not yet used.
 */
export async function meet(context: BootContext): Promise<NcclComm> {
  const { store, rank, size, timeout_ms } = context;
  const key = "nccl/id";
  let id: Uint8Array<ArrayBuffer>;
  if (rank === 0) await store.set(key, id = uniqueId());
  else id = new Uint8Array(await store.get(key, timeout_ms));
  return await initRank(id, rank, size);
}

/** Where {@linkcode connect} works. */
export interface Wiring {
  /** The library. */
  readonly nccl: Nccl;
  /** The communicator, which nobody uses yet. */
  readonly comm: NcclComm;
  /** This rank. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
  /** Where the first operations run. */
  readonly stream: CudaStream;
}

/**
 * Connects every rank with every other, and the algorithms of reductions. All ranks call it; it resolves when the device has done the
 * operations that do it.
 *
 * @param wiring Where.
 * @param memory Device memory of at least 8 bytes per rank.
 */
export async function connect(wiring: Wiring, memory: bigint): Promise<void> {
  const { nccl, comm, rank, size, stream } = wiring;
  const { connecting } = nccl;
  const { handle } = stream;
  const { u8: type } = NCCL_TYPES;
  const to = memory + BigInt(4 * size);
  const code = await connecting.ncclAllReduce(memory, to, 1n, type, 0, comm, handle);
  checkNccl(code, "ncclAllReduce", comm);
  if (nccl.calls.ncclAlltoAll !== null) {
    const code = await connecting.ncclAlltoAll!(memory, to, 1n, type, comm, handle);
    checkNccl(code, "ncclAlltoAll", comm);
  } else {
    for (let round = 0; round < roundsOf(size); round++) {
      const peer = partnerOf(rank, size, round);
      if (peer === rank) continue;
      const send = async () => {
        const code = await connecting.ncclSend(memory, 1n, type, peer, comm, handle);
        checkNccl(code, "ncclSend", comm);
      };
      const receive = async () => {
        const code = await connecting.ncclRecv(to, 1n, type, peer, comm, handle);
        checkNccl(code, "ncclRecv", comm);
      };
      if (rank < peer) {
        await send();
        await receive();
      } else {
        await receive();
        await send();
      }
    }
  }
  await stream.synchronize();
}

/**
 * Rounds in which every rank meets every other once.
 *
 * @param size Number of ranks.
 * @returns Number of rounds.
 */
export function roundsOf(size: number): number {
  return size % 2 === 0 ? size - 1 : size;
}

/**
 * Whom a rank meets in a round of a tournament in which everybody meets everybody once.
 *
 * @param rank The rank.
 * @param size Number of ranks.
 * @param round Which round, 0 to {@linkcode roundsOf} − 1.
 * @returns The other rank; the rank itself if it sits out.
 */
export function partnerOf(rank: number, size: number, round: number): number {
  const odd = roundsOf(size); // with an even number, the last rank meets whoever would sit out
  const last = odd < size ? size - 1 : -1;
  if (rank === last) return round % 2 === 0 ? round / 2 : (round + odd) / 2;
  const peer = (round - rank + odd) % odd;
  return peer === rank && last >= 0 ? last : peer;
}
