// The shm transport: ranks of one machine talk through memory that they share. It needs nothing but the C library, works on
// typed arrays and tensors alike, and reduces in rank order, so that equal inputs give equal bits on every run.

import { libc } from "../../ffi/libc.ts";
import { progress, SLEEP_AFTER_SPINS } from "../progress.ts";
import { openSelf } from "../self.ts";
import { timeoutOf } from "../watchdog.ts";
import type { BootContext, CollectiveRequest, Completion, Transport } from "../transport.ts";
import { Channels, type PairOperation } from "./channels.ts";
import { RoundsOperation } from "./rounds.ts";
import { Slots } from "./slots.ts";
import { Spread } from "./spread.ts";
import { Attempt, SmallExchange } from "./small.ts";
import { prepareSleep, Segment, type SegmentAddress } from "./segment.ts";

const BOOT_KEY = "shm/world";
/** How often waiting ranks look whether the others live, in ms. */
const LIVENESS_INTERVAL_MS = 200;
/** Longest native sleep, in µs; the event loop runs in between. */
const SLEEP_US = 1000;
/** Polls without giving the core away, when there is one for every rank. */
const BUSY_POLLS = 1000;

/**
 * Connects the ranks of a job on one machine. All ranks call it.
 *
 * @param context This rank and the store through which it finds the others.
 * @returns The transport of all ranks.
 * @throws {Error} If the memory cannot be shared, or a rank does not come in time.
 */
export async function openShm(context: BootContext): Promise<Transport> {
  const { rank, size, store, departed } = context;
  const timeout_ms = timeoutOf(context.timeout_ms);
  if (size === 1) return openSelf();
  prepareSleep();
  spread = new Spread(rank, size);
  let segment: Segment;
  if (rank === 0) {
    segment = Segment.create(size);
    await store.set(BOOT_KEY, new TextEncoder().encode(JSON.stringify(segment.address)));
  } else {
    const text = new TextDecoder().decode(await store.get(BOOT_KEY, timeout_ms));
    segment = Segment.open(rank, size, JSON.parse(text) as SegmentAddress);
  }
  const members = [...Array(size).keys()];
  await joined(segment, "the job", members, (r) => departed?.get(r) ?? null, timeout_ms);
  return new ShmTransport(segment, segment, members, departed);
}

/** Why a rank of a group that is being made will not come, or null. */
type Gone = (rank: number) => string | null;

/** Waits until all members, who are known by their ranks in the group that this one is made of, have opened a segment. */
async function joined(
  segment: Segment,
  what: string,
  members: readonly number[],
  gone: Gone,
  timeout_ms: number,
): Promise<void> {
  const awaited = () => segment.absent.map((rank) => members[rank]);
  await until(() => segment.complete, { what, awaited, gone, timeout_ms });
  segment.seal();
}

/** What is waited for, whose ranks it takes, and for how long. */
interface Meeting {
  readonly what: string;
  readonly awaited: () => readonly number[];
  readonly gone: Gone;
  readonly timeout_ms: number;
}

async function until(
  met: () => boolean,
  { what, awaited, gone, timeout_ms }: Meeting,
): Promise<void> {
  const began = performance.now();
  let nextLivenessCheck = began + LIVENESS_INTERVAL_MS;
  for (let turn = 0; !met(); turn++) {
    const now_ms = performance.now();
    if (now_ms > began + timeout_ms) {
      throw new Error(
        `Cannot connect as all ranks must join ${what} within ${timeout_ms} ms: current value is still waiting; not arrived: rank ${
          awaited().join(", rank ")
        }`,
      );
    }
    if (now_ms > nextLivenessCheck) {
      nextLivenessCheck = now_ms + LIVENESS_INTERVAL_MS;
      const lost = awaited().find((rank) => gone(rank) !== null);
      if (lost !== undefined && !met()) {
        throw new Error(
          `Cannot connect as rank ${lost} must join ${what}: current value is that it ${
            gone(lost)
          }`,
        );
      }
    }
    if (turn > 100) libc().usleep(200);
    progress();
    await new Promise((resolve) => setImmediate(resolve)); // the global: importing node:timers takes 6 ms
  }
}

let spread: Spread | undefined; // of this process
const open = new Set<ShmTransport>();

class ShmTransport implements Transport {
  readonly backend = "shm";
  readonly segment: Segment;
  /** Where this process sleeps, whatever it waits for: the segment of the whole job. */
  readonly #bell: Segment;
  readonly #departed: ReadonlyMap<number, string> | undefined; // by rank of the job
  readonly #slots: Slots;
  readonly #channels: Channels;
  readonly #small: SmallExchange;
  readonly #busyPolls: number;
  readonly #queue: ShmCompletion[] = []; // collectives in the order of their calls
  readonly #splitting = new Map<number, Promise<void>>();
  /** How far `now` came with the operation that is started next. */
  #attempt = Attempt.None;
  #failure: Error | undefined;
  #nextLivenessCheck = 0;

  constructor(
    segment: Segment,
    bell: Segment,
    bellRanks: readonly number[],
    departed: ReadonlyMap<number, string> | undefined,
  ) {
    this.segment = segment;
    this.#departed = departed;
    this.#bell = bell;
    segment.ringAt(bell, bellRanks);
    this.#slots = new Slots(segment);
    this.#channels = new Channels(segment);
    const yields = bell.size > navigator.hardwareConcurrency;
    this.#busyPolls = yields ? 0 : BUSY_POLLS;
    this.#small = new SmallExchange(this.#slots, bell, yields);
    open.add(this);
  }

  now(request: CollectiveRequest): boolean {
    const slots = this.#slots;
    if (this.#queue.length > 0 || this.#failure !== undefined || !slots.writable(slots.round)) {
      return false;
    }
    this.segment.begin(request.sequence + 1);
    this.#attempt = this.#small.start(request);
    if (this.#attempt !== Attempt.Complete) return false;
    this.#attempt = Attempt.None;
    slots.next();
    return true;
  }

  start(request: CollectiveRequest): Completion {
    const { operation } = request;
    if (operation === "send" || operation === "recv") {
      const pair = operation === "send"
        ? this.#channels.send(request)
        : this.#channels.recv(request);
      return new ShmCompletion(this, pair, null, request.peer);
    }
    if (this.#attempt === Attempt.None) this.segment.begin(request.sequence + 1);
    const slots = this.#slots;
    if (this.#attempt === Attempt.Asleep) slots.wakeAll();
    const rounds = new RoundsOperation(slots, request, this.#attempt !== Attempt.None);
    this.#attempt = Attempt.None;
    const completion = new ShmCompletion(this, rounds, rounds, -1);
    this.#queue.push(completion);
    return completion;
  }

  /** Moves a collective on if it is its turn. @returns Whether it is complete. */
  advance(completion: ShmCompletion, operation: PairOperation): boolean {
    if (this.#failure) throw this.#failure;
    if (completion.rounds !== null && this.#queue[0] !== completion) return false;
    try {
      if (!operation.poll()) return false;
    } catch (cause) {
      throw this.#fail(cause as Error);
    }
    if (completion.rounds !== null) this.#queue.shift();
    return true;
  }

  #fail(cause: Error): Error {
    this.#failure ??= cause;
    return cause;
  }

  /** One step of waiting; see {@linkcode Completion.idle}. */
  idle(completion: ShmCompletion, spins: number): void {
    if (spins < SLEEP_AFTER_SPINS) {
      if (spins === this.#busyPolls) spread?.missed();
      if (spins >= this.#busyPolls) libc().sched_yield();
      return;
    }
    this.#checkOthers(completion);
    const bell = this.#bell;
    bell.drowse();
    if (progress() || this.#failure) bell.rouse();
    else bell.sleep(SLEEP_US);
  }

  /** Fails this transport if a rank that is waited for is gone, or one has aborted the job. */
  #checkOthers(completion: ShmCompletion): void {
    const now_ms = performance.now();
    if (now_ms < this.#nextLivenessCheck || this.#failure) return;
    this.#nextLivenessCheck = now_ms + LIVENESS_INTERVAL_MS;
    const why = this.segment.aborted;
    if (why !== null) {
      this.#fail(new Error(why));
      return;
    }
    const head = completion.rounds === null ? completion : this.#queue[0] ?? completion;
    for (const rank of head.awaited()) {
      const reason = this.#goneFrom(this.segment, rank);
      // It may have done its part just before it went: what is there is taken first.
      if (reason !== null && !progress() && head.awaited().includes(rank)) {
        this.#fail(
          new Error(`rank ${rank} must take part: current value is that it ${reason}`),
        );
        return;
      }
    }
  }

  #goneFrom(segment: Segment, rank: number): string | null {
    return segment.gone(rank) ?? this.#departed?.get(segment.bellRank(rank)) ?? null;
  }

  async split(members: readonly number[], id: string): Promise<Transport> {
    if (members.length === 1) return openSelf();
    const parent = this.segment;
    const rank = members.indexOf(parent.rank);
    const size = members.length;
    const key = keyOf(id);
    const timeout_ms = timeoutOf(undefined);
    const gone = (r: number) => this.#goneFrom(parent, r);
    let segment: Segment | undefined;
    if (rank === 0) {
      // One letter-box per rank: the members of an earlier group must have opened it first.
      const earlier = [...this.#splitting.values()];
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#splitting.set(key, promise);
      await Promise.all(earlier);
      try {
        segment = Segment.create(size);
        parent.post(key, segment.address);
        await joined(segment, id, members, gone, timeout_ms);
      } finally {
        this.#splitting.delete(key);
        resolve();
      }
    } else {
      let address: SegmentAddress | null = null;
      await until(
        () => (address = parent.mail(members[0], key)) !== null,
        { what: id, awaited: () => [members[0]], gone, timeout_ms },
      );
      segment = Segment.open(rank, size, address!);
      await joined(segment, id, members, gone, timeout_ms);
    }
    return new ShmTransport(
      segment,
      this.#bell,
      members.map((r) => parent.bellRank(r)),
      this.#departed,
    );
  }

  missing(sequence: number): readonly number[] {
    const { rank, size } = this.segment;
    const ranks = [];
    for (let q = 0; q < size; q++) {
      if (q !== rank && ((this.segment.begun(q) - sequence - 1) | 0) < 0) ranks.push(q);
    }
    return ranks;
  }

  abort(why: string): void {
    for (const transport of open) transport.segment.abort(why);
  }

  close(): Promise<void> {
    open.delete(this);
    this.#failure ??= new Error("the communicator must be open: current value is closed");
    this.segment.leave();
    this.#small.close();
    // The others may still read what this rank has shown them; its own mapping may go, unless this process sleeps there.
    if (this.segment !== this.#bell) this.segment.unmap();
    return Promise.resolve();
  }
}

class ShmCompletion implements Completion {
  readonly rounds: RoundsOperation | null;
  readonly #transport: ShmTransport;
  readonly #operation: PairOperation;
  readonly #peer: number;

  constructor(
    transport: ShmTransport,
    operation: PairOperation,
    rounds: RoundsOperation | null,
    peer: number,
  ) {
    this.#transport = transport;
    this.#operation = operation;
    this.rounds = rounds;
    this.#peer = peer;
  }

  poll(): boolean {
    return this.#transport.advance(this, this.#operation);
  }

  idle(spins: number): void {
    this.#transport.idle(this, spins);
  }

  /** Ranks without which this cannot go on. */
  awaited(): readonly number[] {
    return this.rounds?.awaited() ?? [this.#peer];
  }
}

/** A number for a group's name that differs from 0. */
function keyOf(id: string): number {
  let hash = 0x811c9dc5;
  for (let i = 0; i < id.length; i++) hash = Math.imul(hash ^ id.charCodeAt(i), 0x01000193);
  return hash | 1;
}
