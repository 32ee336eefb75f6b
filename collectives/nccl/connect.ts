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
import { timeoutOf } from "../watchdog.ts";

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

/** How often a rank that connects looks whether another has left, in ms. */
const LOOK_MS = 100;
/** How long what a rank that has left began may still take, in ms. */
const DEPARTED_MS = 1000;

/**
 * Bounds what all ranks must do together before there is anything that could watch: it would wait for ever for a rank that never comes.
 *
 * @param work What waits for the others.
 * @param what Its name in errors: `world/dup1`.
 * @param context This rank.
 * @returns What the work gives.
 * @throws {Error} If a rank has left, or it takes longer than the time-out.
 */
export async function together<T>(
  work: Promise<T>,
  what: string,
  { rank, timeout_ms, departed }: BootContext,
): Promise<T> {
  const start = performance.now();
  const limit_ms = timeoutOf(timeout_ms);
  const failed = Promise.withResolvers<never>();
  const fail = (rule: string, value: string) =>
    failed.reject(
      new Error(`Cannot connect as ${rule} on rank ${rank}: current value is ${value}`),
    );
  let departed_ms = 0;
  const timer = setInterval(() => {
    const waited_ms = performance.now() - start;
    const [lost] = departed ?? [];
    if (lost !== undefined) departed_ms ||= waited_ms;
    if (lost !== undefined && waited_ms - departed_ms > DEPARTED_MS) {
      fail(`all ranks must join ${what}`, `that rank ${lost[0]} ${lost[1]}`);
    } else if (waited_ms > limit_ms) {
      fail(`all ranks must join ${what} within ${limit_ms} ms`, "still waiting");
    }
  }, LOOK_MS);
  try {
    return await Promise.race([work, failed.promise]);
  } finally {
    clearInterval(timer);
  }
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
