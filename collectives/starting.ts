// From checked arguments to an operation in flight: numbers the operations of a communicator, counts their bytes, hands them to the
// transport, and gives each its trace and its watchdog. What arguments must be is checked in `communicator.ts`.

import { now, recorder } from "../trace/mod.ts";
import type { Device } from "../tensor/device.ts";
import { Tensor } from "../tensor/tensor.ts";
import { orderChecked } from "./order.ts";
import { COMPLETED, type Operation, PendingWork } from "./progress.ts";
import { argumentError, type Caller, HostRegion, regionOf } from "./regions.ts";
import { bytesSent } from "./volume.ts";
import { timeoutError, timeoutOf } from "./watchdog.ts";
import type {
  CollectiveRequest,
  Completion,
  OperationName,
  Region,
  Transport,
} from "./transport.ts";
import type {
  Counts,
  Data,
  Label,
  OperationOptions,
  OperationTraffic,
  ReduceOp,
  Traffic,
  Work,
} from "./types.ts";

/** Options of {@linkcode createCommunicator}. */
export interface CommunicatorOptions {
  /** This process's rank in the transport. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
  /** Name for traces and errors. */
  readonly name: string;
  /** The device whose tensors are taken. @default {any CPU device} */
  readonly device?: Device | null;
  /** Called by `abort`, before it throws: ends the job. */
  readonly onAbort?: (why: string) => void;
  /** Time after which an operation fails, in ms. @default {LINA_TIMEOUT_MS, or 60000} */
  readonly timeout_ms?: number;
  /** Compares every operation with those of the other ranks before it starts. @default {whether LINA_DEBUG is 1} */
  readonly debug?: boolean;
}

/** An operation of a communicator: who calls it, and how often. */
export interface Kind extends Caller {
  /** Number of calls. */
  calls: number;
  /** Bytes sent to other ranks. */
  bytes: number;
}

/** For operations without counts. */
export const NO_COUNTS: Counts = [];
/** From this many bytes on, operations that are complete when the call returns are timed too. */
const TIMED_BYTES = 16 << 10;

const OPERATIONS = [
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
  "send",
  "recv",
  "barrier",
  "split",
  "dup",
] as const satisfies readonly (OperationName | "split" | "dup")[];

/** Starts the operations of one communicator. */
export class Starter {
  /** What carries the bytes. */
  readonly transport: Transport;
  /** Whether the communicator has been closed. */
  closed = false;
  readonly #options: CommunicatorOptions;
  readonly #device: Device | null;
  readonly #timeout_ms: number;
  readonly #debug: boolean;
  readonly #maxElements: number;
  readonly #kinds: Readonly<Record<(typeof OPERATIONS)[number], Kind>>;
  #sequence = 0; // of operations that all ranks call
  #messages = 0; // of send and recv, which only two ranks call
  #failure: unknown; // what broke the communicator, if anything did
  #last: Completion | undefined; // the latest operation under the order check
  /** The request and the regions of what is complete within its call, reused: small operations make no garbage. */
  readonly #lent: { -readonly [K in keyof CollectiveRequest]: CollectiveRequest[K] };
  readonly #regions = [
    new HostRegion("u8", 0, -1, undefined),
    new HostRegion("u8", 0, -1, undefined),
  ];
  #regionsUsed = 0;

  /** @param transport Carries the bytes. @param options Who this rank is. */
  constructor(transport: Transport, options: CommunicatorOptions) {
    this.transport = transport;
    this.#options = options;
    this.#device = options.device ?? null;
    const { rank, size, name } = options;
    const device = this.#device;
    const kinds: Partial<Record<string, Kind>> = {};
    for (const operation of OPERATIONS) {
      kinds[operation] = { operation, rank, size, name, device, calls: 0, bytes: 0 };
    }
    this.#kinds = kinds as Record<(typeof OPERATIONS)[number], Kind>;
    this.#timeout_ms = timeoutOf(options.timeout_ms);
    this.#debug = options.debug ?? Deno.env.get("LINA_DEBUG") === "1";
    this.#maxElements = transport.maxElements ?? Number.MAX_SAFE_INTEGER;
    this.#lent = {
      operation: "barrier",
      sequence: 0,
      send: null,
      recv: null,
      sendCounts: NO_COUNTS,
      recvCounts: NO_COUNTS,
      op: "sum",
      peer: 0,
      tag: 0,
      after: undefined,
    };
  }

  /** The communicator's name. */
  get name(): string {
    return this.#options.name;
  }

  /** Calls and bytes so far. */
  get traffic(): Traffic {
    const traffic: Partial<Record<string, OperationTraffic>> = {};
    for (const { operation, calls, bytes } of Object.values(this.#kinds)) {
      if (calls > 0) traffic[operation] = { calls, bytes };
    }
    return traffic;
  }

  /** Marks the communicator broken, unless it is. @param error What has broken it. */
  breakBy(error: unknown): void {
    this.#failure ??= error;
  }

  /** Who calls, for messages; throws when the communicator cannot run anything any more. */
  caller(operation: OperationName | "split" | "dup"): Kind {
    const kind = this.#kinds[operation];
    this.#regionsUsed = 0;
    if (this.#failure === undefined && !this.closed) return kind;
    const state = this.closed ? "closed" : "broken by an earlier failure";
    throw new Error(
      `Cannot run ${operation} on rank ${kind.rank} of ${kind.name} as the communicator must be open: current value is ${state}`,
      { cause: this.#failure },
    );
  }

  /** Checks a buffer and describes its elements. */
  region(caller: Caller, data: Data, what: string): Region {
    const region = regionOf(caller, data, what, this.#regions[this.#regionsUsed++]);
    if (region.length > this.#maxElements) {
      throw argumentError(
        caller,
        `${what} must have at most ${this.#maxElements} elements on ${this.transport.backend}`,
        region.length,
      );
    }
    return region;
  }

  /** Starts an operation whose arguments are right. */
  start(
    kind: Kind,
    send: Region | null,
    recv: Region | null,
    op: ReduceOp = "sum",
    peer = 0,
    tag = 0,
    sendCounts = NO_COUNTS,
    recvCounts = NO_COUNTS,
    options?: OperationOptions,
  ): Work {
    const operation = kind.operation as OperationName;
    const paired = operation === "send" || operation === "recv";
    const sequence = paired ? this.#messages++ : this.#sequence++;
    const lent = this.#lent;
    lent.operation = operation;
    lent.sequence = sequence;
    lent.send = send;
    lent.recv = recv;
    lent.sendCounts = sendCounts;
    lent.recvCounts = recvCounts;
    lent.op = op;
    lent.peer = peer;
    lent.tag = tag;
    lent.after = options?.after;
    const bytes = bytesSent(lent, kind.rank, kind.size);
    kind.calls++;
    kind.bytes += bytes;
    // Reading the clock takes as long as a small exchange: what is complete at once is timed only where it matters.
    const timed = bytes >= TIMED_BYTES || recorder.capturing;
    const start = timed ? now() : 0;
    if (!paired && !this.#debug) {
      try {
        if (this.transport.now?.(lent)) {
          if (timed) record(kind.name, lent, bytes, start, now(), options?.label);
          return COMPLETED;
        }
      } catch (cause) {
        throw this.fail(lent, cause);
      }
    }
    const from = kept(send);
    const request = { ...lent, send: from, recv: recv === send ? from : kept(recv) };
    let completion: Completion;
    try {
      completion = this.#launch(request);
      if (completion.poll() && completion.waitOn === undefined) {
        if (timed) record(kind.name, request, bytes, start, now(), options?.label);
        return COMPLETED;
      }
    } catch (cause) {
      throw this.fail(request, cause);
    }
    return new PendingWork(
      new Running(this, request, completion, {
        bytes,
        start: timed ? start : now(),
        timeout_ms: this.#timeout_ms,
        label: options?.label,
      }),
    );
  }

  #launch(request: CollectiveRequest): Completion {
    const { operation } = request;
    const { rank, size, name } = this.#options;
    if (!this.#debug || size === 1 || operation === "send" || operation === "recv") {
      if (size === 1 && request.send?.array === null) return this.#copyOnDevice(request);
      return this.transport.start(request);
    }
    return this.#last = orderChecked(this.transport, request, { rank, size, name }, this.#last);
  }

  /** A world of one on a GPU: what is left of a collective is a copy on the device's stream. */
  #copyOnDevice({ operation, send, recv }: CollectiveRequest): Completion {
    const device = this.#device!;
    if (operation === "send" || operation === "recv") {
      throw argumentError(
        this.caller(operation),
        "a message to itself must be on the host",
        device.name,
      );
    }
    if (send !== null && recv !== null && send !== recv) {
      const [from, to] = [send, recv].map((region) =>
        new Tensor(device, region.dtype, [region.length], { address: region.address })
      );
      device.kernels.copy(from, to);
    }
    return { poll: () => true, idle: () => {} }; // what comes next on that stream is ordered after it
  }

  /** Marks the communicator broken. For operations. @returns The error that says where. */
  fail({ operation, sequence }: CollectiveRequest, cause: unknown): Error {
    const { name, rank } = this.#options;
    const error = new Error(
      `Cannot complete ${operation} ${sequence} of ${name} on rank ${rank}: ${
        cause instanceof Error ? cause.message : cause
      }`,
      { cause },
    );
    this.#failure ??= error;
    return error;
  }

  /** The watchdog's verdict: marks the communicator broken. For operations. */
  async timeout(request: CollectiveRequest): Promise<Error> {
    const { operation, sequence, peer } = request;
    const error = await timeoutError(this.transport, {
      operation,
      sequence,
      peer: operation === "send" || operation === "recv" ? peer : null,
      communicator: this.#options.name,
      rank: this.#options.rank,
      timeout_ms: this.#timeout_ms,
    });
    this.#failure ??= error;
    return error;
  }
}

/** What is known of an operation when it begins. */
interface Begun {
  /** Bytes that this rank sends. */
  readonly bytes: number;
  /** When, in µs. */
  readonly start: number;
  readonly timeout_ms: number;
  readonly label: Label | undefined;
}

/** One operation in flight: its trace and its watchdog. */
class Running implements Operation {
  readonly completion: Completion;
  readonly timeout_ms: number;
  readonly #starter: Starter;
  readonly #request: CollectiveRequest;
  readonly #begun: Begun;

  constructor(
    starter: Starter,
    request: CollectiveRequest,
    completion: Completion,
    begun: Begun,
  ) {
    this.completion = completion;
    this.timeout_ms = begun.timeout_ms;
    this.#starter = starter;
    this.#request = request;
    this.#begun = begun;
  }

  finished(): void {
    const { bytes, label } = this.#begun;
    const [start, end] = this.completion.span?.() ?? [this.#begun.start, now()];
    record(this.#starter.name, this.#request, bytes, start, end, label);
  }

  failed(cause: unknown): unknown {
    return this.#starter.fail(this.#request, cause);
  }

  expired(): Promise<Error> {
    return this.#starter.timeout(this.#request);
  }
}

function record(
  track: string,
  { operation, sequence }: CollectiveRequest,
  bytes: number,
  start: number,
  end: number,
  label?: Label,
): void {
  const category = operation === "allToAll" || operation === "allToAllV"
    ? "allToAll"
    : operation === "allReduce"
    ? "allReduce"
    : "comm";
  if (!label || !recorder.capturing) {
    recorder.record({ track, name: operation, category, start, end, args: { bytes, sequence } });
    return;
  }
  const args = { operation, bytes, sequence, ...label.args?.(start) };
  recorder.record({ track: label.track ?? track, name: label.name, category, start, end, args });
}

function kept(region: Region | null): Region | null {
  return region instanceof HostRegion ? region.keep() : region;
}
