// The order check of debug mode (LINA_DEBUG=1): before an operation starts, all ranks exchange a description of it, so that
// ranks which call different operations get an error that says who called what, instead of a hang or wrong data. It costs a
// small allGather per operation, works over any transport of host memory, and lets send and recv alone.

import { DTYPES } from "../tensor/dtype.ts";
import { HostRegion } from "./regions.ts";
import type { CollectiveRequest, Completion, OperationName, Transport } from "./transport.ts";
import { REDUCE_OPS } from "./types.ts";

const NAMES: readonly OperationName[] = [
  "allReduce",
  "reduceScatter",
  "allGather",
  "allGatherV",
  "broadcast",
  "reduce",
  "gather",
  "scatter",
  "allToAll",
  "allToAllV",
  "barrier",
];

/** Numbers before the counts: name, sequence, dtype, elements, root, reduction. */
const HEAD = 6;

/** Ranks of a communicator called different operations at the same place of their programs. */
export class CollectiveOrderError extends Error {
  /** The first rank whose operation differs from rank 0's. */
  readonly rank: number;
  /** Number of the operation on its communicator. */
  readonly sequence: number;

  /** @param message What differs. @param rank Where. @param sequence At which operation. */
  constructor(message: string, rank: number, sequence: number) {
    super(message);
    this.name = "CollectiveOrderError";
    this.rank = rank;
    this.sequence = sequence;
  }
}

/** Who checks. */
interface Checker {
  readonly rank: number;
  readonly size: number;
  readonly name: string;
}

/**
 * Starts an operation once all ranks have been found to call the same one.
 *
 * @param transport Where.
 * @param request The operation.
 * @param checker This rank and its communicator.
 * @param previous The checked operation before this one; it must have started first.
 * @returns The completion of check and operation.
 */
export function orderChecked(
  transport: Transport,
  request: CollectiveRequest,
  checker: Checker,
  previous: Completion | undefined,
): Completion {
  return new CheckedCompletion(
    transport,
    request,
    checker,
    previous instanceof CheckedCompletion ? previous : undefined,
  );
}

class CheckedCompletion implements Completion {
  readonly #transport: Transport;
  readonly #request: CollectiveRequest;
  readonly #checker: Checker;
  readonly #all: Float64Array;
  #previous: CheckedCompletion | undefined;
  #check: Completion | undefined;
  #run: Completion | undefined;
  #done = false;
  #error: unknown; // of the check: whoever comes after fails with it, too

  constructor(
    transport: Transport,
    request: CollectiveRequest,
    checker: Checker,
    previous: CheckedCompletion | undefined,
  ) {
    this.#transport = transport;
    this.#request = request;
    this.#checker = checker;
    this.#previous = previous;
    this.#all = new Float64Array(checker.size * (HEAD + 2 * checker.size));
  }

  poll(): boolean {
    if (this.#done) return true; // it may have ended while the next one asked, and a transport says so once
    if (this.#run) return this.#done = this.#run.poll();
    if (this.#error !== undefined) throw this.#error;
    try {
      return this.#advance();
    } catch (cause) {
      throw this.#error = cause;
    }
  }

  #advance(): boolean {
    if (this.#previous) {
      if (!this.#previous.#run) {
        this.#previous.poll();
        if (!this.#previous.#run) return false;
      }
      this.#previous = undefined; // so that the chain of all operations is not kept alive
    }
    this.#check ??= this.#startCheck();
    if (!this.#check.poll()) return false;
    compare(this.#all, this.#checker);
    this.#run = this.#transport.start(this.#request);
    return this.#done = this.#run.poll();
  }

  idle(spins: number): void {
    (this.#run ?? this.#check ?? this.#previous)?.idle(spins);
  }

  #startCheck(): Completion {
    const mine = describe(this.#request, this.#checker.size);
    return this.#transport.start({
      operation: "allGather",
      sequence: this.#request.sequence,
      send: new HostRegion("f64", mine.length, -1, mine),
      recv: new HostRegion("f64", this.#all.length, -1, this.#all),
      sendCounts: [],
      recvCounts: [],
      op: "sum",
      peer: 0,
      tag: 0,
    });
  }
}

function describe(request: CollectiveRequest, size: number): Float64Array {
  const { operation, sequence, send, recv, peer, op, sendCounts, recvCounts } = request;
  const rooted = operation === "gather" || operation === "scatter";
  // What every rank has: a gather's out and a scatter's x exist on the root alone.
  const region = operation === "scatter" || operation === "reduceScatter" ? recv : send ?? recv;
  const counted = operation === "allToAllV" || operation === "allGatherV";
  const numbers = new Float64Array(HEAD + 2 * size);
  numbers.set([
    NAMES.indexOf(operation),
    sequence,
    region === null ? -1 : DTYPES.indexOf(region.dtype),
    region === null || counted ? 0 : region.length,
    rooted || operation === "broadcast" || operation === "reduce" ? peer : -1,
    REDUCE_OPS.indexOf(op),
  ]);
  for (let r = 0; r < sendCounts.length; r++) numbers[HEAD + r] = sendCounts[r];
  for (let r = 0; r < recvCounts.length; r++) numbers[HEAD + size + r] = recvCounts[r];
  return numbers;
}

function compare(all: Float64Array, { rank: me, size, name }: Checker): void {
  const row = HEAD + 2 * size;
  const of = (r: number) => all.subarray(r * row, (r + 1) * row);
  const first = of(0);
  const sequence = first[1];
  const fail = (rank: number, rule: string, value: string) => {
    throw new CollectiveOrderError(
      `Cannot run operation ${sequence} of ${name} on rank ${me} as ${rule}: current value is ${value}`,
      rank,
      sequence,
    );
  };
  const sameCounts = NAMES[first[0]] === "allGatherV";
  for (let r = 1; r < size; r++) {
    const other = of(r);
    const agreed = sameCounts ? row : HEAD;
    for (let i = 0; i < agreed; i++) {
      if (other[i] === first[i]) continue;
      fail(
        r,
        `all ranks must call the same one and rank 0 called ${show(first, size)}`,
        `rank ${r} called ${show(other, size)}`,
      );
    }
  }
  if (NAMES[first[0]] !== "allToAllV") return;
  for (let s = 0; s < size; s++) {
    for (let r = 0; r < size; r++) {
      const sent = of(s)[HEAD + r], expected = of(r)[HEAD + size + s];
      if (sent === expected) continue;
      fail(
        s,
        `sendCounts[${r}] of rank ${s} must be recvCounts[${s}] of rank ${r}, ${expected}`,
        `${sent}`,
      );
    }
  }
}

function show(numbers: Float64Array, size: number): string {
  const [name, sequence, dtype, elements, root, op] = numbers;
  const operation = NAMES[name];
  const parts = [];
  if (dtype >= 0) parts.push(DTYPES[dtype]);
  if (operation === "allGatherV") parts.push(`counts ${numbers.subarray(HEAD + size).join(" ")}`);
  else if (dtype >= 0 && operation !== "allToAllV") parts.push(`${elements} elements`);
  if (root >= 0) parts.push(`root ${root}`);
  if (/reduce/i.test(operation)) parts.push(REDUCE_OPS[op]);
  return `${operation}(${parts.join(", ")}) as operation ${sequence}`;
}
