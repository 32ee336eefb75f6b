// Ranks inside one process, for tests of code that uses only allGather and allGatherV: no processes, no shared memory, and a
// rank that waits for one that has given up is an error at once.

import type { Communicator } from "../collectives/types.ts";
import type { TypedArray } from "../tensor/dtype.ts";

/** Runs a body as every rank at once and returns their results; the first error of any rank is thrown once all have ended. */
export async function asRanks<T>(
  size: number,
  body: (comm: Communicator) => Promise<T>,
): Promise<T[]> {
  const settled = await settleRanks(size, body);
  const failed = settled.find((result) => result.status === "rejected");
  if (failed) throw failed.reason;
  return settled.map((result) => (result as PromiseFulfilledResult<T>).value);
}

/** The same, with the outcome of every rank. */
export function settleRanks<T>(
  size: number,
  body: (comm: Communicator) => Promise<T>,
): Promise<PromiseSettledResult<T>[]> {
  let arrived: TypedArray[] = [];
  let round = Promise.withResolvers<TypedArray[]>();
  let alive = size;

  async function gather(rank: number, x: TypedArray, out: TypedArray): Promise<void> {
    arrived[rank] = x.slice();
    const mine = round;
    if (Object.keys(arrived).length === size) {
      round.resolve(arrived);
      arrived = [];
      round = Promise.withResolvers();
    } else if (alive < size) throw new Error("a rank has left");
    let at = 0;
    for (const part of await mine.promise) {
      (out as Uint8Array).set(part as Uint8Array, at);
      at += part.length;
    }
    if (at !== out.length) throw new RangeError(`gathered ${at} elements into ${out.length}`);
  }

  return Promise.allSettled(Array.from({ length: size }, async (_, rank) => {
    const comm = {
      rank,
      size,
      allGather: (x: TypedArray, out: TypedArray) => gather(rank, x, out),
      allGatherV: (x: TypedArray, out: TypedArray) => gather(rank, x, out),
    } as unknown as Communicator;
    try {
      return await body(comm);
    } finally {
      alive--;
      if (Object.keys(arrived).length > 0) round.reject(new Error("a rank has left"));
    }
  }));
}
