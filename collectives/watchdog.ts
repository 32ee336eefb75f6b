// Turns an operation that does not end into an error that says which one, where, and who is missing. The deadlines
// themselves are looked at by the progress engine, which never waits natively for more than 50 ms.

import type { OperationName, Transport } from "./transport.ts";

/** Default of the time-out of an operation, in ms. */
export const DEFAULT_TIMEOUT_MS = 60_000;

/**
 * The time-out of operations: the option, else `LINA_TIMEOUT_MS`, else 60 s.
 *
 * @param option What the caller asked for, in ms.
 * @returns The time-out in ms.
 * @throws {RangeError} If it is not a number above 0.
 */
export function timeoutOf(option: number | undefined): number {
  const text = option === undefined ? Deno.env.get("LINA_TIMEOUT_MS") : undefined;
  const timeout_ms = option ?? (text === undefined ? DEFAULT_TIMEOUT_MS : Number(text));
  if (!(timeout_ms > 0)) {
    throw new RangeError(
      `Cannot watch operations as the time-out (LINA_TIMEOUT_MS) must be a number of ms > 0: current value is ${
        text ?? option
      }`,
    );
  }
  return timeout_ms;
}

/** An operation of a communicator did not complete in time. */
export class CollectiveTimeoutError extends Error {
  /** Ranks of the communicator that have not begun the operation, as far as is known. */
  readonly missing: readonly number[];

  /** @param message What happened. @param missing Ranks that have not arrived. */
  constructor(message: string, missing: readonly number[]) {
    super(message);
    this.name = "CollectiveTimeoutError";
    this.missing = missing;
  }
}

/** What the watchdog says about an operation. */
export interface Watched {
  /** The operation. */
  readonly operation: OperationName;
  /** Its number on its communicator. */
  readonly sequence: number;
  /** The other rank of a send or recv; null for an operation of all ranks. */
  readonly peer: number | null;
  /** Name of the communicator. */
  readonly communicator: string;
  /** This process's rank in it. */
  readonly rank: number;
  /** The time-out that has passed, in ms. */
  readonly timeout_ms: number;
}

/**
 * The error of an operation whose time is over.
 *
 * @param transport Where it runs; it is asked who is missing.
 * @param watched Which operation.
 * @returns The error.
 */
export async function timeoutError(
  transport: Pick<Transport, "missing">,
  watched: Watched,
): Promise<CollectiveTimeoutError> {
  const { operation, sequence, peer, communicator, rank, timeout_ms } = watched;
  let missing: readonly number[] = [];
  let who = "which ranks are missing is not known";
  try {
    missing = peer !== null ? [peer] : await transport.missing(sequence);
    who = missing.length === 0
      ? "all ranks have begun it, so they wait for one another"
      : `not arrived: rank ${missing.join(", rank ")}`;
  } catch (cause) {
    who += ` (${cause instanceof Error ? cause.message : cause})`;
  }
  return new CollectiveTimeoutError(
    `Cannot complete ${operation} ${sequence} of ${communicator} on rank ${rank} as it must end within ${timeout_ms} ms: current value is still waiting; ${who}`,
    missing,
  );
}
