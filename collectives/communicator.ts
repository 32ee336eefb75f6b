// The communicator that users call, over any transport: it checks arguments, numbers the operations, starts them, watches
// the time and keeps the trace. It moves no bytes itself.

import { now, recorder } from "../trace/mod.ts";
import type { Device, StreamEvent } from "../tensor/device.ts";
import { Tensor } from "../tensor/tensor.ts";
import { orderChecked } from "./order.ts";
import { COMPLETED, type Operation, PendingWork } from "./progress.ts";
import {
  argumentError,
  beApart,
  beRank,
  blockOf,
  type Caller,
  firstOf,
  haveLength,
  HostRegion,
  regionOf,
  sameDType,
  sumOf,
} from "./regions.ts";
import { bytesSent } from "./volume.ts";
import { timeoutError, timeoutOf } from "./watchdog.ts";
import type {
  CollectiveRequest,
  Completion,
  OperationName,
  Region,
  Transport,
} from "./transport.ts";
import { REDUCE_OPS, REDUCIBLE } from "./types.ts";
import type {
  AllReduceOptions,
  Backend,
  Communicator,
  Counts,
  Data,
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
interface Kind extends Caller {
  calls: number;
  bytes: number;
}

const NO_COUNTS: Counts = [];
/** From this many bytes on, operations that are complete when the call returns are timed too. */
const TIMED_BYTES = 16 << 10;

/**
 * Makes a communicator over a transport.
 *
 * @param transport Carries the bytes; the communicator owns it from now on.
 * @param options Who this rank is.
 * @returns The communicator.
 */
export function createCommunicator(
  transport: Transport,
  options: CommunicatorOptions,
): Communicator {
  return new TransportCommunicator(transport, options);
}

class TransportCommunicator implements Communicator {
  readonly rank: number;
  readonly size: number;
  readonly backend: Backend;
  readonly name: string;
  readonly #transport: Transport;
  readonly #options: CommunicatorOptions;
  readonly #device: Device | null;
  readonly #timeout_ms: number;
  readonly #debug: boolean;
  readonly #maxElements: number;
  readonly #kinds: Readonly<Record<OperationName | "split" | "dup", Kind>>;
  #sequence = 0; // of operations that all ranks call
  #messages = 0; // of send and recv, which only two ranks call
  #duplicates = 0;
  #splits = 0;
  #making: Promise<unknown> = Promise.resolve(); // the latest split or dup
  #failure: unknown; // what broke the communicator, if anything did
  #closed = false;
  #last: Completion | undefined; // the latest operation under the order check
  /** The request and the regions of what is complete within its call, reused: small operations make no garbage. */
  readonly #lent: { -readonly [K in keyof CollectiveRequest]: CollectiveRequest[K] };
  readonly #regions = [
    new HostRegion("u8", 0, -1, undefined),
    new HostRegion("u8", 0, -1, undefined),
  ];
  #regionsUsed = 0;

  constructor(transport: Transport, options: CommunicatorOptions) {
    this.rank = options.rank;
    this.size = options.size;
    this.name = options.name;
    this.backend = transport.backend;
    this.#transport = transport;
    this.#options = options;
    this.#device = options.device ?? null;
    const { rank, size, name } = options;
    const device = this.#device;
    const kind = (operation: string) => ({
      operation,
      rank,
      size,
      name,
      device,
      calls: 0,
      bytes: 0,
    });
    this.#kinds = {
      allReduce: kind("allReduce"),
      reduceScatter: kind("reduceScatter"),
      allGather: kind("allGather"),
      allGatherV: kind("allGatherV"),
      broadcast: kind("broadcast"),
      reduce: kind("reduce"),
      gather: kind("gather"),
      scatter: kind("scatter"),
      allToAll: kind("allToAll"),
      allToAllV: kind("allToAllV"),
      send: kind("send"),
      recv: kind("recv"),
      barrier: kind("barrier"),
      split: kind("split"),
      dup: kind("dup"),
    };
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

  get traffic(): Traffic {
    const traffic: Partial<Record<string, OperationTraffic>> = {};
    for (const { operation, calls, bytes } of Object.values(this.#kinds)) {
      if (calls > 0) traffic[operation] = { calls, bytes };
    }
    return traffic;
  }

  allReduce(x: Data, options?: AllReduceOptions): Work {
    const caller = this.#caller("allReduce");
    const from = this.#region(caller, x, "x");
    const op = reduction(caller, options?.op, from);
    const out = options?.out;
    const to = out === undefined ? from : this.#region(caller, out, "out");
    if (to !== from) {
      sameDType(caller, from, to);
      haveLength(caller, to, from.length, "out");
      beApart(caller, from, to, 0);
    }
    return this.#start(caller, from, to, op, 0, 0, NO_COUNTS, NO_COUNTS, options?.after);
  }

  reduceScatter(x: Data, out: Data, options?: { readonly op?: ReduceOp }): Work {
    const caller = this.#caller("reduceScatter");
    const from = this.#region(caller, x, "x");
    const op = reduction(caller, options?.op, from);
    const to = this.#region(caller, out, "out");
    sameDType(caller, from, to);
    haveLength(caller, from, to.length * this.size, "x");
    beApart(caller, from, to, -this.rank * to.length);
    return this.#start(caller, from, to, op);
  }

  allGather(x: Data, out: Data): Work {
    const caller = this.#caller("allGather");
    const from = this.#region(caller, x, "x");
    const to = this.#region(caller, out, "out");
    sameDType(caller, from, to);
    haveLength(caller, to, from.length * this.size, "out");
    beApart(caller, from, to, this.rank * from.length);
    return this.#start(caller, from, to);
  }

  allGatherV(x: Data, out: Data, counts: Counts): Work {
    const caller = this.#caller("allGatherV");
    const from = this.#region(caller, x, "x");
    const to = this.#region(caller, out, "out");
    sameDType(caller, from, to);
    const sum = sumOf(caller, counts, "counts");
    haveLength(caller, from, counts[this.rank], "x");
    haveLength(caller, to, sum, "out");
    let before = 0;
    for (let r = 0; r < this.rank; r++) before += counts[r];
    beApart(caller, from, to, before);
    return this.#start(caller, from, to, "sum", 0, 0, NO_COUNTS, counts);
  }

  broadcast(x: Data, root = 0): Work {
    const caller = this.#caller("broadcast");
    beRank(caller, root, "root");
    const region = this.#region(caller, x, "x");
    return this.#start(caller, region, region, "sum", root);
  }

  reduce(
    x: Data,
    options?: { readonly op?: ReduceOp; readonly root?: number; readonly out?: Data },
  ): Work {
    const caller = this.#caller("reduce");
    const root = options?.root ?? 0;
    beRank(caller, root, "root");
    const from = this.#region(caller, x, "x");
    const op = reduction(caller, options?.op, from);
    const out = options?.out;
    if (this.rank !== root) {
      if (out !== undefined) {
        throw argumentError(caller, `out must be absent but on root ${root}`, "given");
      }
      return this.#start(caller, from, null, op, root);
    }
    const to = out === undefined ? from : this.#region(caller, out, "out");
    if (to !== from) {
      sameDType(caller, from, to);
      haveLength(caller, to, from.length, "out");
      beApart(caller, from, to, 0);
    }
    return this.#start(caller, from, to, op, root);
  }

  gather(x: Data, out: Data | null, root = 0): Work {
    const caller = this.#caller("gather");
    beRank(caller, root, "root");
    const from = this.#region(caller, x, "x");
    const to = this.#rooted(caller, out, root, "out");
    if (to !== null) {
      sameDType(caller, from, to);
      haveLength(caller, to, from.length * this.size, "out");
      beApart(caller, from, to, root * from.length);
    }
    return this.#start(caller, from, to, "sum", root);
  }

  scatter(x: Data | null, out: Data, root = 0): Work {
    const caller = this.#caller("scatter");
    beRank(caller, root, "root");
    const from = this.#rooted(caller, x, root, "x");
    const to = this.#region(caller, out, "out");
    if (from !== null) {
      sameDType(caller, from, to);
      haveLength(caller, from, to.length * this.size, "x");
      beApart(caller, from, to, -root * to.length);
    }
    return this.#start(caller, from, to, "sum", root);
  }

  allToAll(x: Data, out: Data): Work {
    const caller = this.#caller("allToAll");
    const from = this.#region(caller, x, "x");
    const to = this.#region(caller, out, "out");
    sameDType(caller, from, to);
    blockOf(caller, from, "x");
    haveLength(caller, to, from.length, "out");
    beApart(caller, from, to);
    return this.#start(caller, from, to);
  }

  allToAllV(send: Data, sendCounts: Counts, recv: Data, recvCounts: Counts): Work {
    const caller = this.#caller("allToAllV");
    const from = this.#counted(caller, send, sendCounts, "send");
    const to = this.#counted(caller, recv, recvCounts, "recv");
    sameDType(caller, from, to);
    const { rank } = this;
    if (sendCounts[rank] !== recvCounts[rank]) {
      throw argumentError(
        caller,
        `recvCounts[${rank}] must be sendCounts[${rank}] = ${sendCounts[rank]}`,
        recvCounts[rank],
      );
    }
    beApart(caller, from, to);
    return this.#start(caller, from, to, "sum", 0, 0, sendCounts, recvCounts);
  }

  send(
    x: Data,
    to: number,
    options?: { readonly tag?: number; readonly after?: StreamEvent },
  ): Work {
    const caller = this.#caller("send");
    beRank(caller, to, "to");
    const region = this.#region(caller, x, "x");
    const tag = tagOf(caller, options?.tag);
    return this.#start(caller, region, null, "sum", to, tag, NO_COUNTS, NO_COUNTS, options?.after);
  }

  recv(
    out: Data,
    from: number,
    options?: { readonly tag?: number; readonly after?: StreamEvent },
  ): Work {
    const caller = this.#caller("recv");
    beRank(caller, from, "from");
    const region = this.#region(caller, out, "out");
    const tag = tagOf(caller, options?.tag);
    return this.#start(
      caller,
      null,
      region,
      "sum",
      from,
      tag,
      NO_COUNTS,
      NO_COUNTS,
      options?.after,
    );
  }

  barrier(): Work {
    return this.#start(this.#caller("barrier"), null, null);
  }

  async split(color: number | null, key: number = this.rank): Promise<Communicator | null> {
    const caller = this.#caller("split");
    if (color !== null && !(Number.isSafeInteger(color) && color >= 0)) {
      throw argumentError(caller, "color must be a whole number >= 0 or null", color);
    }
    if (!Number.isFinite(key)) throw argumentError(caller, "key must be a finite number", key);
    const number = ++this.#splits;
    const exchange = this.#exchange([color ?? -1, key]); // at the call, as every collective
    exchange.catch(() => {}); // reported when its turn has come
    return await this.#inTurn(async () => {
      const all = await exchange;
      if (color === null) return null;
      const members = [...Array(this.size).keys()]
        .filter((r) => all[2 * r] === color)
        .sort((a, b) => all[2 * a + 1] - all[2 * b + 1] || a - b);
      return await this.#child(members, `${this.name}/split${number}.${color}`);
    });
  }

  async dup(): Promise<Communicator> {
    this.#caller("dup");
    const name = `${this.name}/dup${++this.#duplicates}`;
    return await this.#inTurn(() => this.#child([...Array(this.size).keys()], name));
  }

  abort(why: string): never {
    const error = new Error(`Rank ${this.rank} of ${this.name} has aborted the job: ${why}`);
    this.#failure ??= error;
    this.#transport.abort?.(error.message);
    this.#options.onAbort?.(why);
    throw error;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    await this.#transport.close();
  }

  /** Every rank's numbers, in rank order; as tensors when the transport takes only those of a GPU. */
  async #exchange(mine: readonly number[]): Promise<Float64Array> {
    const x = Float64Array.from(mine);
    const all = new Float64Array(mine.length * this.size);
    const device = this.#device;
    if (device?.kind !== "cuda") {
      await this.allGather(x, all);
      return all;
    }
    const memory = device.allocate(x.byteLength + all.byteLength);
    try {
      const from = new Tensor(device, "f64", [x.length], { address: memory });
      const to = new Tensor(device, "f64", [all.length], { address: memory + x.byteLength });
      device.write(x, from);
      const work = this.allGather(from, to);
      await work;
      return await device.read(to) as Float64Array;
    } finally {
      device.free(memory);
    }
  }

  /** Makes groups one after another in the order of the calls, or two ranks could each wait for the other in another one. */
  #inTurn<T>(make: () => Promise<T>): Promise<T> {
    const made = this.#making.then(make);
    this.#making = made.catch(() => {});
    return made;
  }

  async #child(members: readonly number[], name: string): Promise<Communicator> {
    const transport = await this.#transport.split(members, name);
    return new TransportCommunicator(transport, {
      ...this.#options,
      rank: members.indexOf(this.rank),
      size: members.length,
      name,
    });
  }

  /** Who calls, for messages; throws when the communicator cannot run anything any more. */
  #caller(operation: OperationName | "split" | "dup"): Kind {
    const kind = this.#kinds[operation];
    this.#regionsUsed = 0;
    if (this.#failure === undefined && !this.#closed) return kind;
    const state = this.#closed ? "closed" : "broken by an earlier failure";
    throw new Error(
      `Cannot run ${operation} on rank ${this.rank} of ${this.name} as the communicator must be open: current value is ${state}`,
      { cause: this.#failure },
    );
  }

  #region(caller: Caller, data: Data, what: string): Region {
    const region = regionOf(caller, data, what, this.#regions[this.#regionsUsed++]);
    if (region.length > this.#maxElements) {
      throw argumentError(
        caller,
        `${what} must have at most ${this.#maxElements} elements on ${this.backend}`,
        region.length,
      );
    }
    return region;
  }

  /** The root's buffer; null, and nothing else, on the other ranks. */
  #rooted(caller: Caller, data: Data | null, root: number, what: string): Region | null {
    if (this.rank !== root) {
      if (data === null) return null;
      throw argumentError(caller, `${what} must be null but on root ${root}`, "given");
    }
    if (data === null) throw argumentError(caller, `${what} must be given on root ${root}`, "null");
    return this.#region(caller, data, what);
  }

  /** A buffer whose first elements, as many as the counts say, take part. */
  #counted(caller: Caller, data: Data, counts: Counts, what: string): Region {
    const region = this.#region(caller, data, what);
    const sum = sumOf(caller, counts, `${what}Counts`);
    if (sum > region.length) {
      throw argumentError(caller, `${what} must have at least ${sum} elements`, region.length);
    }
    return firstOf(region, sum);
  }

  #start(
    kind: Kind,
    send: Region | null,
    recv: Region | null,
    op: ReduceOp = "sum",
    peer = 0,
    tag = 0,
    sendCounts = NO_COUNTS,
    recvCounts = NO_COUNTS,
    after?: StreamEvent,
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
    lent.after = after;
    const bytes = bytesSent(lent, this.rank, this.size);
    kind.calls++;
    kind.bytes += bytes;
    // Reading the clock takes as long as a small exchange: what is complete at once is timed only where it matters.
    const timed = bytes >= TIMED_BYTES || recorder.capturing;
    const start = timed ? now() : 0;
    if (!paired && !this.#debug) {
      try {
        if (this.#transport.now?.(lent)) {
          if (timed) record(this.name, lent, bytes, start, now());
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
        if (timed) record(this.name, request, bytes, start, now());
        return COMPLETED;
      }
    } catch (cause) {
      throw this.fail(request, cause);
    }
    return new PendingWork(
      new Running(this, request, completion, bytes, timed ? start : now(), this.#timeout_ms),
    );
  }

  #launch(request: CollectiveRequest): Completion {
    const { operation } = request;
    if (!this.#debug || this.size === 1 || operation === "send" || operation === "recv") {
      if (this.size === 1 && request.send?.array === null) return this.#copyOnDevice(request);
      return this.#transport.start(request);
    }
    const { rank, size, name } = this;
    return this.#last = orderChecked(this.#transport, request, { rank, size, name }, this.#last);
  }

  /** A world of one on a GPU: what is left of a collective is a copy on the device's stream. */
  #copyOnDevice({ operation, send, recv }: CollectiveRequest): Completion {
    const device = this.#device!;
    if (operation === "send" || operation === "recv") {
      throw argumentError(
        this.#caller(operation),
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
    return { poll: () => true, idle: () => {}, waitOn: () => {} };
  }

  /** Marks the communicator broken. For operations. @returns The error that says where. */
  fail({ operation, sequence }: CollectiveRequest, cause: unknown): Error {
    const error = new Error(
      `Cannot complete ${operation} ${sequence} of ${this.name} on rank ${this.rank}: ${
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
    const error = await timeoutError(this.#transport, {
      operation,
      sequence,
      peer: operation === "send" || operation === "recv" ? peer : null,
      communicator: this.name,
      rank: this.rank,
      timeout_ms: this.#timeout_ms,
    });
    this.#failure ??= error;
    return error;
  }
}

/** One operation in flight: its trace and its watchdog. */
class Running implements Operation {
  readonly completion: Completion;
  readonly timeout_ms: number;
  readonly #communicator: TransportCommunicator;
  readonly #request: CollectiveRequest;
  readonly #bytes: number;
  readonly #start: number;

  constructor(
    communicator: TransportCommunicator,
    request: CollectiveRequest,
    completion: Completion,
    bytes: number,
    start: number,
    timeout_ms: number,
  ) {
    this.completion = completion;
    this.timeout_ms = timeout_ms;
    this.#communicator = communicator;
    this.#request = request;
    this.#bytes = bytes;
    this.#start = start;
  }

  finished(): void {
    const [start, end] = this.completion.span?.() ?? [this.#start, now()];
    record(this.#communicator.name, this.#request, this.#bytes, start, end);
  }

  failed(cause: unknown): unknown {
    return this.#communicator.fail(this.#request, cause);
  }

  expired(): Promise<Error> {
    return this.#communicator.timeout(this.#request);
  }
}

function record(
  track: string,
  { operation, sequence }: CollectiveRequest,
  bytes: number,
  start: number,
  end: number,
): void {
  const category = operation === "allToAll" || operation === "allToAllV"
    ? "allToAll"
    : operation === "allReduce"
    ? "allReduce"
    : "comm";
  recorder.record({ track, name: operation, category, start, end, args: { bytes, sequence } });
}

function kept(region: Region | null): Region | null {
  return region instanceof HostRegion ? region.keep() : region;
}

function reduction(caller: Caller, op: ReduceOp | undefined, { dtype }: Region): ReduceOp {
  if (!REDUCIBLE.includes(dtype)) {
    throw argumentError(caller, `the dtype must be one of ${REDUCIBLE.join(", ")}`, dtype);
  }
  if (op === undefined) return "sum";
  if (!REDUCE_OPS.includes(op)) {
    throw argumentError(caller, `op must be one of ${REDUCE_OPS.join(", ")}`, op);
  }
  return op;
}

function tagOf(caller: Caller, tag = 0): number {
  if (!Number.isInteger(tag) || tag < 0 || tag > 32767) {
    throw argumentError(caller, "tag must be a whole number, 0 to 32767", tag);
  }
  return tag;
}
