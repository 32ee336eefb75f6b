// The communicator that users call, over any transport: it says what every operation's arguments must be and gives them to
// `starting.ts`, which numbers and starts the operations. It moves no bytes itself.

import type { StreamEvent } from "../tensor/device.ts";
import {
  argumentError,
  beApart,
  beRank,
  blockOf,
  type Caller,
  firstOf,
  haveLength,
  sameDType,
  sumOf,
} from "./regions.ts";
import { type CommunicatorOptions, NO_COUNTS, Starter } from "./starting.ts";
import type { Region, Transport } from "./transport.ts";
import { REDUCE_OPS, REDUCIBLE } from "./types.ts";
import type {
  AllReduceOptions,
  Backend,
  Communicator,
  Counts,
  Data,
  OperationOptions,
  ReduceOp,
  ReduceScatterOptions,
  Traffic,
  Work,
} from "./types.ts";

export type { CommunicatorOptions };

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
  readonly #starter: Starter;
  readonly #options: CommunicatorOptions;
  #duplicates = 0;
  #splits = 0;
  #making: Promise<unknown> = Promise.resolve(); // the latest split or dup

  constructor(transport: Transport, options: CommunicatorOptions) {
    this.rank = options.rank;
    this.size = options.size;
    this.name = options.name;
    this.backend = transport.backend;
    this.#options = options;
    this.#starter = new Starter(transport, options);
  }

  get traffic(): Traffic {
    return this.#starter.traffic;
  }

  allReduce(x: Data, options?: AllReduceOptions): Work {
    const caller = this.#starter.caller("allReduce");
    const from = this.#starter.region(caller, x, "x");
    const op = reduction(caller, options?.op, from);
    const out = options?.out;
    const to = out === undefined ? from : this.#starter.region(caller, out, "out");
    if (to !== from) {
      sameDType(caller, from, to);
      haveLength(caller, to, from.length, "out");
      beApart(caller, from, to, 0);
    }
    return this.#starter.start(caller, from, to, op, 0, 0, NO_COUNTS, NO_COUNTS, options);
  }

  reduceScatter(x: Data, out: Data, options?: ReduceScatterOptions): Work {
    const caller = this.#starter.caller("reduceScatter");
    const from = this.#starter.region(caller, x, "x");
    const op = reduction(caller, options?.op, from);
    const to = this.#starter.region(caller, out, "out");
    sameDType(caller, from, to);
    haveLength(caller, from, to.length * this.size, "x");
    beApart(caller, from, to, -this.rank * to.length);
    return this.#starter.start(caller, from, to, op, 0, 0, NO_COUNTS, NO_COUNTS, options);
  }

  allGather(x: Data, out: Data): Work {
    const caller = this.#starter.caller("allGather");
    const from = this.#starter.region(caller, x, "x");
    const to = this.#starter.region(caller, out, "out");
    sameDType(caller, from, to);
    haveLength(caller, to, from.length * this.size, "out");
    beApart(caller, from, to, this.rank * from.length);
    return this.#starter.start(caller, from, to);
  }

  allGatherV(x: Data, out: Data, counts: Counts): Work {
    const caller = this.#starter.caller("allGatherV");
    const from = this.#starter.region(caller, x, "x");
    const to = this.#starter.region(caller, out, "out");
    sameDType(caller, from, to);
    const sum = sumOf(caller, counts, "counts");
    haveLength(caller, from, counts[this.rank], "x");
    haveLength(caller, to, sum, "out");
    let before = 0;
    for (let r = 0; r < this.rank; r++) before += counts[r];
    beApart(caller, from, to, before);
    return this.#starter.start(caller, from, to, "sum", 0, 0, NO_COUNTS, counts);
  }

  broadcast(x: Data, root = 0): Work {
    const caller = this.#starter.caller("broadcast");
    beRank(caller, root, "root");
    const region = this.#starter.region(caller, x, "x");
    return this.#starter.start(caller, region, region, "sum", root);
  }

  reduce(
    x: Data,
    options?: { readonly op?: ReduceOp; readonly root?: number; readonly out?: Data },
  ): Work {
    const caller = this.#starter.caller("reduce");
    const root = options?.root ?? 0;
    beRank(caller, root, "root");
    const from = this.#starter.region(caller, x, "x");
    const op = reduction(caller, options?.op, from);
    const out = options?.out;
    if (this.rank !== root) {
      if (out !== undefined) {
        throw argumentError(caller, `out must be absent but on root ${root}`, "given");
      }
      return this.#starter.start(caller, from, null, op, root);
    }
    const to = out === undefined ? from : this.#starter.region(caller, out, "out");
    if (to !== from) {
      sameDType(caller, from, to);
      haveLength(caller, to, from.length, "out");
      beApart(caller, from, to, 0);
    }
    return this.#starter.start(caller, from, to, op, root);
  }

  gather(x: Data, out: Data | null, root = 0): Work {
    const caller = this.#starter.caller("gather");
    beRank(caller, root, "root");
    const from = this.#starter.region(caller, x, "x");
    const to = this.#rooted(caller, out, root, "out");
    if (to !== null) {
      sameDType(caller, from, to);
      haveLength(caller, to, from.length * this.size, "out");
      beApart(caller, from, to, root * from.length);
    }
    return this.#starter.start(caller, from, to, "sum", root);
  }

  scatter(x: Data | null, out: Data, root = 0): Work {
    const caller = this.#starter.caller("scatter");
    beRank(caller, root, "root");
    const from = this.#rooted(caller, x, root, "x");
    const to = this.#starter.region(caller, out, "out");
    if (from !== null) {
      sameDType(caller, from, to);
      haveLength(caller, from, to.length * this.size, "x");
      beApart(caller, from, to, -root * to.length);
    }
    return this.#starter.start(caller, from, to, "sum", root);
  }

  allToAll(x: Data, out: Data): Work {
    const caller = this.#starter.caller("allToAll");
    const from = this.#starter.region(caller, x, "x");
    const to = this.#starter.region(caller, out, "out");
    sameDType(caller, from, to);
    blockOf(caller, from, "x");
    haveLength(caller, to, from.length, "out");
    beApart(caller, from, to);
    return this.#starter.start(caller, from, to);
  }

  allToAllV(
    send: Data,
    sendCounts: Counts,
    recv: Data,
    recvCounts: Counts,
    options?: OperationOptions,
  ): Work {
    const caller = this.#starter.caller("allToAllV");
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
    return this.#starter.start(caller, from, to, "sum", 0, 0, sendCounts, recvCounts, options);
  }

  send(
    x: Data,
    to: number,
    options?: { readonly tag?: number; readonly after?: StreamEvent },
  ): Work {
    const caller = this.#starter.caller("send");
    beRank(caller, to, "to");
    const region = this.#starter.region(caller, x, "x");
    const tag = tagOf(caller, options?.tag);
    return this.#starter.start(
      caller,
      region,
      null,
      "sum",
      to,
      tag,
      NO_COUNTS,
      NO_COUNTS,
      options,
    );
  }

  recv(
    out: Data,
    from: number,
    options?: { readonly tag?: number; readonly after?: StreamEvent },
  ): Work {
    const caller = this.#starter.caller("recv");
    beRank(caller, from, "from");
    const region = this.#starter.region(caller, out, "out");
    const tag = tagOf(caller, options?.tag);
    return this.#starter.start(
      caller,
      null,
      region,
      "sum",
      from,
      tag,
      NO_COUNTS,
      NO_COUNTS,
      options,
    );
  }

  barrier(): Work {
    return this.#starter.start(this.#starter.caller("barrier"), null, null);
  }

  async split(
    color: number | null,
    key: number = this.rank,
    options: { readonly urgent?: boolean } = {},
  ): Promise<Communicator | null> {
    const caller = this.#starter.caller("split");
    if (color !== null && !(Number.isSafeInteger(color) && color >= 0)) {
      throw argumentError(caller, "color must be a whole number >= 0 or null", color);
    }
    if (!Number.isFinite(key)) throw argumentError(caller, "key must be a finite number", key);
    const number = ++this.#splits;
    const exchange = this.#exchange([color ?? -1, key]); // at the call, as every collective
    exchange.catch(() => {}); // reported when its turn has come
    return await this.#inTurn(async () => {
      const all = await exchange;
      if (color === null) {
        await this.#starter.transport.abstain?.();
        return null;
      }
      const members = [...Array(this.size).keys()]
        .filter((r) => all[2 * r] === color)
        .sort((a, b) => all[2 * a + 1] - all[2 * b + 1] || a - b);
      return await this.#child(members, `${this.name}/split${number}.${color}`, options.urgent);
    });
  }

  async dup(): Promise<Communicator> {
    this.#starter.caller("dup");
    const name = `${this.name}/dup${++this.#duplicates}`;
    return await this.#inTurn(() => this.#child([...Array(this.size).keys()], name));
  }

  abort(why: string): never {
    const error = new Error(`Rank ${this.rank} of ${this.name} has aborted the job: ${why}`);
    this.#starter.breakBy(error);
    this.#starter.transport.abort?.(error.message);
    this.#options.onAbort?.(why);
    throw error;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#starter.closed) return;
    this.#starter.closed = true;
    await this.#starter.transport.close();
  }

  /** Every rank's numbers, in rank order. */
  async #exchange(mine: readonly number[]): Promise<Float64Array> {
    const all = new Float64Array(mine.length * this.size);
    await this.allGather(Float64Array.from(mine), all);
    return all;
  }

  /** Makes groups one after another in the order of the calls, or two ranks could each wait for the other in another one. */
  #inTurn<T>(make: () => Promise<T>): Promise<T> {
    const made = this.#making.then(make);
    this.#making = made.catch(() => {});
    return made;
  }

  async #child(
    members: readonly number[],
    name: string,
    urgent?: boolean,
  ): Promise<Communicator> {
    const transport = await this.#starter.transport.split(members, name, urgent);
    return new TransportCommunicator(transport, {
      ...this.#options,
      rank: members.indexOf(this.rank),
      size: members.length,
      name,
    });
  }

  /** The root's buffer; null, and nothing else, on the other ranks. */
  #rooted(caller: Caller, data: Data | null, root: number, what: string): Region | null {
    if (this.rank !== root) {
      if (data === null) return null;
      throw argumentError(caller, `${what} must be null but on root ${root}`, "given");
    }
    if (data === null) throw argumentError(caller, `${what} must be given on root ${root}`, "null");
    return this.#starter.region(caller, data, what);
  }

  /** A buffer whose first elements, as many as the counts say, take part. */
  #counted(caller: Caller, data: Data, counts: Counts, what: string): Region {
    const region = this.#starter.region(caller, data, what);
    const sum = sumOf(caller, counts, `${what}Counts`);
    if (sum > region.length) {
      throw argumentError(caller, `${what} must have at least ${sum} elements`, region.length);
    }
    return firstOf(region, sum);
  }
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
