// One clock for the ranks of a job. Processes of one host share the clock that spans use; those of several hosts measure how
// far theirs is from rank 0's, by messages to and fro. Good to half the quickest round trip, which is what a trace needs.

import { now } from "./mod.ts";

/** What traces ask of a group of ranks; every communicator of this project has it. */
export interface Ranks {
  /** This process's number. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
  /** Every rank gets the numbers of each, in rank order. */
  allGather(x: Float64Array, out: Float64Array): PromiseLike<void>;
  /** Sends to a rank. */
  send(x: Float64Array | Uint8Array, to: number): PromiseLike<void>;
  /** Receives from a rank. */
  recv(out: Float64Array | Uint8Array, from: number): PromiseLike<void>;
}

/** One round trip: when it left, what the other clock showed, when it was back; µs. */
export interface RoundTrip {
  /** Own clock at the start. */
  readonly sent: number;
  /** The other rank's clock in between. */
  readonly remote: number;
  /** Own clock at the end. */
  readonly received: number;
}

/**
 * How far the other clock is ahead, from the quickest of some round trips. It is taken as 0 where that agrees with the measurement: two
 * processes of one host read the same clock, and a guess from a round trip would be worse.
 *
 * @param trips The round trips, one at least.
 * @returns µs to add to the own clock.
 */
export function clockOffset(trips: readonly RoundTrip[]): number {
  const best = trips.reduce((a, b) => b.received - b.sent < a.received - a.sent ? b : a);
  const agrees = trips.every((trip) => trip.sent <= trip.remote && trip.remote <= trip.received);
  return agrees ? 0 : best.remote - (best.sent + best.received) / 2;
}

/**
 * Measures how far rank 0's clock is ahead of this rank's. Every rank calls it at the same point.
 *
 * @param ranks The ranks.
 * @param clock The clock to compare, in µs. @default {now}
 * @returns µs to add to this rank's clock; 0 on rank 0.
 */
export async function measureClockOffset(ranks: Ranks, clock: () => number = now): Promise<number> {
  const rounds = 16;
  const cell = new Float64Array(1);
  let offset = 0;
  // One rank at a time: round trips that wait for each other measure nothing.
  for (let peer = 1; peer < ranks.size; peer++) {
    if (ranks.rank === 0) {
      for (let i = 0; i < rounds; i++) {
        await ranks.recv(cell, peer);
        cell[0] = clock();
        await ranks.send(cell, peer);
      }
    } else if (ranks.rank === peer) {
      const trips: RoundTrip[] = [];
      for (let i = 0; i < rounds; i++) {
        const sent = clock();
        await ranks.send(cell, 0);
        await ranks.recv(cell, 0);
        trips.push({ sent, remote: cell[0], received: clock() });
      }
      offset = clockOffset(trips);
    }
  }
  return offset;
}
