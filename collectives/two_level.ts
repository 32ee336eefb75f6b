// An all-to-all on two levels: inside each host, then between hosts, so that a rank sends one message to every other host instead of one to
// every rank there. The bytes that leave a host are the same, those inside it more; it pays where messages are small, and is right, to the
// bit, everywhere. Which messages they are is in `two_level_plan.ts`; when it pays is for others to say (lina/training/levels.ts).

import type { Device } from "../tensor/device.ts";
import { bytesOf } from "../tensor/dtype.ts";
import { Tensor } from "../tensor/tensor.ts";
import { now, recorder } from "../trace/mod.ts";
import { COMPLETED, type Operation, PendingWork } from "./progress.ts";
import {
  argumentError,
  beApart,
  type Caller,
  firstOf,
  HostRegion,
  regionOf,
  sameDType,
} from "./regions.ts";
import { hostIdentity } from "./rendezvous/host.ts";
import type { Region } from "./transport.ts";
import { Agreement, CheckedExchange, type Exchange } from "./two_level_check.ts";
import { HostExchange, HostStaging, type Levels } from "./two_level_flight.ts";
import { type HostLayout, layoutOf, lengthOf, planExchange } from "./two_level_plan.ts";
import type { Communicator, Data, OperationOptions, Work } from "./types.ts";
import { timeoutOf } from "./watchdog.ts";

/** The two ways of an all-to-all. */
export type ExchangeWay = "direct" | "two-level";

/**
 * Chooses the way of an all-to-all: a pure function, which says the same on every rank.
 *
 * @param counts Elements from source to destination, row-major [R, R].
 * @param elementBytes Size of an element in bytes.
 */
export type ChooseWay = (counts: ArrayLike<number>, elementBytes: number) => ExchangeWay;

/** Options of {@linkcode TwoLevel.create}. */
export interface TwoLevelOptions {
  /** The host of every rank, by any number; the same on all ranks. @default {found out: ranks tell one another where they run} */
  readonly hosts?: ArrayLike<number>;
  /** Which all-to-alls go on two levels. @default {all} */
  readonly choose?: ChooseWay | null;
}

/** What a rank has sent to others by all-to-alls of a {@linkcode TwoLevel}. */
export interface TwoLevelTraffic {
  /** All-to-alls on two levels. */
  readonly calls: number;
  /** All-to-alls that took the direct way; their bytes are the communicator's own traffic. */
  readonly direct: number;
  /** Bytes sent to ranks of this host. */
  readonly inner_bytes: number;
  /** Bytes sent to other hosts. */
  readonly outer_bytes: number;
}

/** The hosts and the communicators of the levels. */
export interface TwoLevels extends Levels, HostLayout {}

/** Longest name of a host in bytes. */
const NAME_BYTES = 256;

/** What carries out exchanges of a GPU's data; see `nccl/two_level.ts`. */
interface DeviceSide extends AsyncDisposable {
  start(
    plan: ReturnType<typeof planExchange>,
    send: Tensor,
    recv: Tensor,
    options: OperationOptions | undefined,
  ): Exchange;
}

/**
 * All-to-alls on two levels among the ranks of a communicator. All ranks make it at the same point, and call the same operations in the same
 * order, as they do with the communicator itself. Where the hosts do not allow it, {@linkcode TwoLevel.levels} is null and every all-to-all
 * is the communicator's own.
 */
export class TwoLevel implements AsyncDisposable {
  /** The hosts and their communicators; null where every all-to-all is direct. */
  readonly levels: TwoLevels | null;
  /** Why all-to-alls are direct, or how many hosts and ranks there are, in words. */
  readonly reason: string;
  /** Which all-to-alls go on two levels; all of them without it. Set it alike on all ranks, between the same two all-to-alls. */
  choose: ChooseWay | null;
  readonly #comm: Communicator;
  readonly #timeout_ms = timeoutOf(undefined);
  readonly #debug = Deno.env.get("LINA_DEBUG") === "1";
  readonly #staging = new HostStaging();
  readonly #onDevice: ((device: Device) => DeviceSide) | null;
  #deviceSide: DeviceSide | undefined;
  #previous: HostExchange | undefined;
  #sequence = 0;
  #traffic = { calls: 0, direct: 0, inner_bytes: 0, outer_bytes: 0 };

  /**
   * Finds out who shares a host and makes the communicators of the levels. All ranks call it.
   *
   * @param comm The ranks; it stays the caller's, and must live longer.
   * @param options Hosts, and which all-to-alls take two levels.
   * @returns The exchange; dispose of it.
   * @throws {RangeError} If `hosts` has not one number per rank.
   */
  static async create(comm: Communicator, options: TwoLevelOptions = {}): Promise<TwoLevel> {
    const { rank, size } = comm;
    const hosts = options.hosts ?? await hostsOf(comm);
    if (hosts.length !== size) {
      throw new RangeError(
        `Cannot make two levels as hosts must have ${size} entries: current value is ${hosts.length}`,
      );
    }
    const layout = layoutOf(hosts);
    if (typeof layout === "string") return new TwoLevel(comm, null, layout, null, options);
    const local = rank % layout.perHost, host = (rank - local) / layout.perHost;
    const inner = (await comm.split(host, rank, { urgent: true }))!;
    const outer = (await comm.split(local, rank, { urgent: true }))!;
    const onDevice = comm.backend === "nccl"
      ? (await import("./nccl/two_level.ts")).deviceExchanges({ inner, outer })
      : null;
    const reason = `${layout.hosts} hosts of ${layout.perHost} ranks`;
    return new TwoLevel(comm, { ...layout, inner, outer }, reason, onDevice, options);
  }

  private constructor(
    comm: Communicator,
    levels: TwoLevels | null,
    reason: string,
    onDevice: ((device: Device) => DeviceSide) | null,
    options: TwoLevelOptions,
  ) {
    this.#comm = comm;
    this.levels = levels;
    this.reason = reason;
    this.#onDevice = onDevice;
    this.choose = options.choose ?? null;
  }

  /** What this rank has sent to others so far. */
  get traffic(): TwoLevelTraffic {
    return { ...this.#traffic };
  }

  /**
   * Exchanges elements between all ranks: `counts[s, r]` go from rank s to rank r, taken one after another from `send` in the order of r,
   * laid one after another in `recv` in the order of s. The result is that of the communicator's allToAllV. Data lies on the device on all ranks,
   * or on the host on all; over NCCL a host's data takes the direct way.
   *
   * @param send What this rank gives: at least as many elements as its row of the counts has.
   * @param counts Elements from source to destination, row-major [R, R], the same on all ranks.
   * @param recv Where it gets what it gets: at least as many elements as its column has.
   * @param options As those of the communicator's operations.
   * @returns The operation.
   * @throws {RangeError} If counts or buffers are wrong; nothing has been sent then.
   */
  allToAllV(
    send: Data,
    counts: ArrayLike<number>,
    recv: Data,
    options?: OperationOptions,
  ): Work {
    const comm = this.#comm, { rank, size } = comm;
    const device = send instanceof Tensor && send.device.kind === "cuda" ? send.device : null;
    const caller: Caller = { operation: "allToAllV", rank, size, name: this.name, device };
    const { sent, received } = sumsOf(caller, counts);
    const from = regionWith(caller, send, sent, "send");
    const to = regionWith(caller, recv, received, "recv");
    if (device !== null && to.array !== null) {
      throw argumentError(caller, `recv must be on ${device.name} as send is`, "data on the host");
    }
    sameDType(caller, from, to);
    beApart(caller, from, to);
    const { dtype } = from;
    // A host's data goes through a GPU as one operation of NCCL: its second half would have to wait for the host.
    const suits = this.levels !== null && (device !== null || comm.backend !== "nccl");
    if (!suits || this.choose?.(counts, bytesOf(dtype)) === "direct") {
      this.#traffic.direct++;
      const row = Array.from({ length: size }, (_, r) => counts[rank * size + r]);
      const column = Array.from({ length: size }, (_, s) => counts[s * size + rank]);
      return comm.allToAllV(send, row, recv, column, options);
    }
    const plan = planExchange(this.levels!, rank, counts);
    const width = bytesOf(dtype);
    const inner_bytes = width * (lengthOf(plan.gatherSends) + lengthOf(plan.homeSends));
    const outer_bytes = width * lengthOf(plan.hostSends);
    const sequence = this.#sequence++;
    const start = now();
    const { name } = this;
    const agreement = this.#debug ? new Agreement(comm, { name, sequence, dtype, counts }) : null;
    let completion: Exchange;
    if (device !== null) {
      this.#deviceSide ??= this.#onDevice!(device);
      completion = this.#deviceSide.start(plan, send as Tensor, recv as Tensor, options);
    } else {
      const cargo = { plan, dtype, send: from.array!, recv: to.array! };
      const exchange = new HostExchange(this.levels!, cargo, this.#staging, this.#previous);
      completion = this.#previous = exchange;
    }
    if (agreement !== null) completion = new CheckedExchange(completion, agreement);
    const traffic = this.#traffic;
    traffic.calls++;
    traffic.inner_bytes += inner_bytes;
    traffic.outer_bytes += outer_bytes;
    const operation = new Running(completion, {
      start,
      timeout_ms: this.#timeout_ms,
      what: `allToAllV ${sequence} of ${name} on rank ${rank}`,
      record: ([start, end]) => {
        const label = options?.label;
        const args = {
          ...(label && { operation: "allToAllV" }),
          bytes: inner_bytes + outer_bytes,
          inner_bytes,
          outer_bytes,
          sequence,
          ...(recorder.capturing && label?.args?.(start)),
        };
        recorder.record({
          track: label?.track ?? name,
          name: label?.name ?? "allToAllV",
          category: "allToAll",
          start,
          end,
          args,
        });
      },
    });
    if (device === null && completion.poll()) {
      operation.finished();
      return COMPLETED;
    }
    return new PendingWork(operation);
  }

  /** Name for traces and errors. */
  get name(): string {
    return `${this.#comm.name}/two-level`;
  }

  /** Closes the communicators of the levels; all ranks do, once what they have started is complete. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.levels?.outer[Symbol.asyncDispose]();
    await this.levels?.inner[Symbol.asyncDispose]();
    await this.#deviceSide?.[Symbol.asyncDispose]();
  }
}

/** Which ranks run on one host, by numbers: that of its first rank. */
async function hostsOf(comm: Communicator): Promise<number[]> {
  const mine = new Uint8Array(NAME_BYTES);
  new TextEncoder().encodeInto(hostIdentity(), mine);
  const all = new Uint8Array(NAME_BYTES * comm.size);
  await comm.allGather(mine, all);
  const first = new Map<string, number>();
  return Array.from({ length: comm.size }, (_, rank) => {
    const name = String.fromCharCode(...all.subarray(NAME_BYTES * rank, NAME_BYTES * (rank + 1)));
    if (!first.has(name)) first.set(name, rank);
    return first.get(name)!;
  });
}

/** Checks a matrix of counts. @returns What this rank sends and receives. */
function sumsOf(caller: Caller, counts: ArrayLike<number>): { sent: number; received: number } {
  const { rank, size } = caller;
  if (counts.length !== size * size) {
    throw argumentError(caller, `counts must have ${size * size} entries`, counts.length);
  }
  let sent = 0, received = 0;
  for (let i = 0; i < counts.length; i++) {
    if (Number.isSafeInteger(counts[i]) && counts[i] >= 0) continue;
    const where = `${counts[i]} from rank ${Math.floor(i / size)} to rank ${i % size}`;
    throw argumentError(caller, "counts must be whole numbers >= 0", where);
  }
  for (let r = 0; r < size; r++) {
    sent += counts[rank * size + r];
    received += counts[r * size + rank];
  }
  return { sent, received };
}

/** A buffer whose first elements take part. */
function regionWith(caller: Caller, data: Data, length: number, what: string): Region {
  const region = regionOf(caller, data, what, new HostRegion("u8", 0, -1, undefined));
  if (region.length >= length) return firstOf(region, length);
  throw argumentError(caller, `${what} must have at least ${length} elements`, region.length);
}

/** What is known of an exchange when it begins. */
interface Begun {
  readonly start: number;
  readonly timeout_ms: number;
  readonly what: string;
  readonly record: (span: readonly [start: number, end: number]) => void;
}

/** One exchange in flight: its trace and its watchdog. */
class Running implements Operation {
  readonly completion: Exchange;
  readonly timeout_ms: number;
  readonly #begun: Begun;

  constructor(completion: Exchange, begun: Begun) {
    this.completion = completion;
    this.timeout_ms = begun.timeout_ms;
    this.#begun = begun;
  }

  finished(): void {
    this.#begun.record(this.completion.span?.() ?? [this.#begun.start, now()]);
  }

  failed(cause: unknown): Error {
    const why = cause instanceof Error ? cause.message : cause;
    return new Error(`Cannot complete ${this.#begun.what}: ${why}`, { cause });
  }

  /** The message that it waits for says who is missing. */
  async expired(): Promise<Error> {
    const { waiting } = this.completion;
    if (waiting instanceof PendingWork) waiting.checkDeadline(Infinity);
    try {
      await waiting;
    } catch (cause) {
      return this.failed(cause);
    }
    return this.failed(`it must end within ${this.timeout_ms} ms: current value is still waiting`);
  }
}
