// Ranks that do something which may fail on any of them, such as writing a file, and must then all go on or all give up. A
// rank that threw alone would leave the others waiting in their next collective.

import type { Communicator } from "../collectives/types.ts";
import { CheckpointError } from "./manifest.ts";

/** Some ranks, or this process alone. */
export interface Group {
  /** This process's number. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
  /**
   * Runs an action on every rank and waits for all.
   *
   * @param task Begins the message of an error: `Cannot do this`. Empty for the action's own message alone.
   * @param action What to do; what it returns must be plain data.
   * @returns The results of all ranks, in rank order.
   * @throws {Error} On every rank, if the action failed on any: the error of the first that failed, with its number.
   */
  agree<T>(task: string, action: () => T | Promise<T>): Promise<T[]>;
  /** The same with an action that only rank 0 runs. @returns Its result, on every rank. */
  onRoot<T>(task: string, action: () => T | Promise<T>): Promise<T>;
}

/** What a rank tells the others. */
interface Outcome {
  readonly value?: unknown;
  readonly error?: { readonly message: string; readonly damaged: boolean; readonly newer: boolean };
}

/**
 * The ranks of a communicator.
 *
 * @param comm The communicator; without one the group is this process alone.
 * @returns The group.
 */
export function groupOf(comm?: Communicator): Group {
  const rank = comm?.rank ?? 0, size = comm?.size ?? 1;
  async function agree<T>(task: string, action: () => T | Promise<T>): Promise<T[]> {
    let outcome: Outcome, cause: unknown;
    try {
      outcome = { value: await action() };
    } catch (error) {
      cause = error;
      const message = error instanceof Error ? error.message : String(error);
      const damaged = error instanceof CheckpointError;
      outcome = { error: { message, damaged, newer: damaged && error.newer } };
    }
    const outcomes = await exchange(comm, JSON.stringify(outcome));
    const failed = outcomes.findIndex((other) => other.error);
    if (failed < 0) return outcomes.map((other) => other.value as T);
    const { message, damaged, newer } = outcomes[failed].error!;
    const where = size > 1 && task ? `rank ${failed}: ` : "";
    const text = task ? `${task}: ${where}${message}` : message;
    throw damaged ? new CheckpointError(text, { cause, newer }) : new Error(text, { cause });
  }
  async function onRoot<T>(task: string, action: () => T | Promise<T>): Promise<T> {
    const [result] = await agree(task, () => rank === 0 ? action() : undefined);
    return result as T;
  }
  return { rank, size, agree, onRoot };
}

async function exchange(comm: Communicator | undefined, own: string): Promise<Outcome[]> {
  if (!comm || comm.size === 1) return [JSON.parse(own)];
  const bytes = new TextEncoder().encode(own);
  const counts = new Int32Array(comm.size);
  await comm.allGather(new Int32Array([bytes.length]), counts);
  const all = new Uint8Array(counts.reduce((sum, n) => sum + n, 0));
  await comm.allGatherV(bytes, all, counts);
  const decoder = new TextDecoder();
  let at = 0;
  return Array.from(counts, (n) => JSON.parse(decoder.decode(all.subarray(at, at += n))));
}
