// The MPI backend: a transport whose bytes Open MPI or MPICH carries, for CPU clusters of any size. Ranks are started by mpirun
// or by anything else that the library knows. Algorithms are in `algorithms.ts`; here are the life of a communicator and what is
// known about ranks that do not arrive. All calls are made by the main thread, and none waits for another rank except MPI_Init.

import { setImmediate, setTimeout } from "node:timers/promises";
import { addressOf, checkMpi, type Mpi, mpi, type MpiComm, type MpiGroup } from "../../ffi/mpi.ts";
import { progress } from "../progress.ts";
import type { BootContext, CollectiveRequest, Completion, Transport } from "../transport.ts";
import { timeoutOf } from "../watchdog.ts";
import { stepsOf } from "./algorithms.ts";
import { Flight, type Watcher } from "./flight.ts";
import { type Group, RequestSet } from "./requests.ts";

/** MPI_THREAD_FUNNELED: only the thread that initialized MPI calls it. */
const THREAD_FUNNELED = 1;
/** MPI_UNDEFINED is a color that differs between libraries; every rank has this one. */
const ONE_COLOR = 0;
/** A rank that waits for longer than this tells the others how far it has come, and looks who has left. */
const OVERDUE_MS = 1000;
/** A rank that fails because another has left gives that one this time to say why before the job ends. */
const YIELD_TO_CAUSE_MS = 500;

// Tags. A user's tag t is 2t; odd ones are ours: farewells, gates before communicators are made, two per collective.
const FAREWELL = 1;
const GATES = 4096;
const MOST_COLLECTIVE_TAGS = 2 ** 20;
const odd = (n: number) => 2 * n + 1;

/** What all transports of this process share. */
interface Job {
  readonly mpi: Mpi;
  readonly context: BootContext;
  /** The largest tag that MPI takes. */
  readonly tagLimit: number;
  /** Whether an operation has failed: then MPI_Finalize could wait for ever. */
  broken: boolean;
  finalized: boolean;
}

/**
 * Connects the ranks of a job through MPI.
 *
 * @param context This rank, as the launcher has numbered it.
 * @returns The transport of all ranks; closing it finalizes MPI.
 * @throws {Error} If there is no library, or it was not started with these ranks.
 */
export async function openMpi(context: BootContext): Promise<Transport> {
  await Promise.resolve(); // so that every failure is a rejection
  const library = mpi();
  const { calls, world } = library;
  const words = new Int32Array(new ArrayBuffer(64));
  const at = addressOf(words.buffer);
  checkMpi(calls.MPI_Initialized(at), "MPI_Initialized");
  if (words[0] === 0) {
    checkMpi(calls.MPI_Init_thread(0n, 0n, THREAD_FUNNELED, at), "MPI_Init_thread");
  }
  checkMpi(calls.MPI_Comm_set_errhandler(world, library.errorsReturn), "MPI_Comm_set_errhandler");
  checkMpi(calls.MPI_Comm_size(world, at), "MPI_Comm_size");
  if (words[0] !== context.size) {
    const seen = words[0];
    calls.MPI_Finalize();
    throw new Error(
      `Cannot connect through MPI as the launcher of ${library.path} (${
        firstLine(library.version)
      }) must have started ${context.size} ranks: current value is ${seen}; start them with mpirun of the same MPI, or set LINA_MPI_LIB to the library of yours`,
    );
  }
  checkMpi(calls.MPI_Comm_split(world, ONE_COLOR, context.rank, at), "MPI_Comm_split");
  const comm = library.readHandle<MpiComm>(words.buffer);
  const tagLimit = tagLimitOf(library, words);
  const job: Job = { mpi: library, context, tagLimit, broken: false, finalized: false };
  const members = [...Array(context.size).keys()];
  return new MpiTransport(job, comm, { members, id: "world", rank: context.rank });
}

function firstLine(text: string): string {
  return text.split("\n", 1)[0];
}

function tagLimitOf(library: Mpi, words: Int32Array<ArrayBuffer>): number {
  const at = addressOf(words.buffer);
  const key = library.tagUpperBoundKey;
  checkMpi(
    library.calls.MPI_Comm_get_attr(library.world, key, at, at + 16n),
    "MPI_Comm_get_attr",
  );
  const pointer = Deno.UnsafePointer.create(new BigUint64Array(words.buffer, 0, 1)[0]);
  if (words[4] === 0 || pointer === null) return 32767; // what the standard promises
  return new Deno.UnsafePointerView(pointer).getInt32();
}

/** Which ranks a transport connects. */
interface Membership {
  /** Ranks of the job, in the order of this transport. */
  readonly members: readonly number[];
  /** Name that all members agree on. */
  readonly id: string;
  /** This rank, in this transport. */
  readonly rank: number;
}

class MpiTransport implements Transport, Watcher {
  readonly backend = "mpi";
  readonly #job: Job;
  readonly #group: Group;
  readonly #membership: Membership;
  readonly #collectiveTags: number;
  readonly #flights = new Set<Flight>();
  readonly #setOf = new Map<Flight, RequestSet>();
  readonly #idleSets: RequestSet[] = [];
  /** Collectives begun here. */
  #begun = 0;
  /** What other ranks had begun when they left; −1 while they are here. */
  readonly #left: Float64Array<ArrayBuffer>;
  readonly #farewells: RequestSet;
  #farewell: Float64Array<ArrayBuffer> | undefined;
  #noted = -1;
  #closed = false;

  constructor(job: Job, comm: MpiComm, membership: Membership) {
    const size = membership.members.length;
    this.#job = job;
    this.#membership = membership;
    this.#group = { mpi: job.mpi, comm, rank: membership.rank, size };
    const room = Math.floor((job.tagLimit - odd(GATES + 1)) / 4);
    this.#collectiveTags = Math.min(room, MOST_COLLECTIVE_TAGS);
    this.#left = new Float64Array(size).fill(-1);
    this.#farewells = new RequestSet(job.mpi);
    const at = addressOf(this.#left.buffer);
    for (let r = 0; r < size; r++) {
      if (r === membership.rank) continue;
      this.#farewells.receive(this.#group, at + BigInt(8 * r), 8, r, FAREWELL);
    }
  }

  start(request: CollectiveRequest): Completion {
    const { operation, tag } = request;
    const single = operation === "send" || operation === "recv";
    const index = single ? -1 : this.#begun++;
    const requests = this.#idleSets.pop() ?? new RequestSet(this.#job.mpi);
    let tags: [number, number];
    if (single) {
      const most = Math.floor(this.#job.tagLimit / 2);
      if (tag > most) {
        throw new RangeError(
          `Cannot ${operation} as the tag must be at most ${most} on this MPI: current value is ${tag}`,
        );
      }
      tags = [2 * tag, 2 * tag];
    } else {
      const first = GATES + 1 + 2 * (index % this.#collectiveTags);
      tags = [odd(first), odd(first + 1)];
    }
    const steps = stepsOf({ group: this.#group, requests, tags }, request);
    const flight = new Flight(request, index, steps, this);
    this.#flights.add(flight);
    this.#setOf.set(flight, requests);
    flight.poll();
    return flight;
  }

  landed(flight: Flight): void {
    this.#flights.delete(flight);
    this.#idleSets.push(this.#setOf.get(flight)!);
    this.#setOf.delete(flight);
  }

  failed(flight: Flight): void {
    this.#flights.delete(flight);
    this.#job.broken = true;
  }

  overdue(flight: Flight): Error | undefined {
    const waited = performance.now() - flight.since;
    const { operation, peer } = flight.request;
    const { members, id } = this.#membership;
    for (let r = 0; r < members.length; r++) {
      const begun = this.#left[r];
      // What a rank that has left had begun still arrives; a message that it sent may be on its way for a moment.
      const never = flight.index >= 0
        ? begun >= 0 && begun <= flight.index
        : r === peer && begun >= 0 && waited > OVERDUE_MS;
      const gone = waited > OVERDUE_MS ? this.#job.context.departed?.get(members[r]) : undefined;
      if (!never && gone === undefined) continue;
      return new Error(
        `Cannot complete ${operation} of ${id} on rank ${this.#group.rank} as every rank must take part: current value is that rank ${r} ${
          gone ?? `has closed the communicator after ${begun} collectives`
        }`,
      );
    }
    if (waited > OVERDUE_MS) this.#note();
  }

  #noteKey(rank: number): string {
    return `mpi/${this.#membership.id}/begun/${rank}`;
  }

  /** Leaves the number of collectives begun here for the ranks that ask who is missing. */
  #note(): void {
    if (this.#noted === this.#begun) return;
    this.#noted = this.#begun;
    const value = new TextEncoder().encode(String(this.#begun));
    this.#job.context.store.set(this.#noteKey(this.#group.rank), value).catch(() => {});
  }

  /** Ranks that wait for anything have left a note; the others have not begun the operation, as far as can be known. */
  async missing(sequence: number): Promise<readonly number[]> {
    let index = -1;
    for (const flight of this.#flights) {
      if (flight.request.sequence !== sequence) continue;
      if (flight.index < 0) return [flight.request.peer];
      index = flight.index;
    }
    if (index < 0) return [];
    this.#note();
    await setTimeout(OVERDUE_MS / 2); // ranks that have begun to wait when this one did need a moment to say so
    const ranks = [...Array(this.#group.size).keys()].filter((r) => r !== this.#group.rank);
    const begun = await Promise.all(ranks.map((r) => this.#begunBy(r)));
    return ranks.filter((_, i) => begun[i] <= index);
  }

  async #begunBy(rank: number): Promise<number> {
    try {
      const value = await this.#job.context.store.get(this.#noteKey(rank), OVERDUE_MS / 2);
      return Number(new TextDecoder().decode(value));
    } catch {
      return 0;
    }
  }

  async split(members: readonly number[], id: string): Promise<Transport> {
    const { mpi: library, mpi: { calls }, comm } = this.#group;
    const hash = [...id].reduce((h, c) => (h * 31 + c.codePointAt(0)!) >>> 0, 7);
    await this.#gate(members, odd(1 + hash % GATES));
    // Everybody is here now, so the calls below do not wait.
    const ranks = Int32Array.from(members);
    const out = new ArrayBuffer(8), all = new ArrayBuffer(8), chosen = new ArrayBuffer(8);
    checkMpi(calls.MPI_Comm_group(comm, addressOf(all)), "MPI_Comm_group");
    checkMpi(
      calls.MPI_Group_incl(
        library.readHandle<MpiGroup>(all),
        ranks.length,
        addressOf(ranks.buffer),
        addressOf(chosen),
      ),
      "MPI_Group_incl",
    );
    const group = library.readHandle<MpiGroup>(chosen);
    const code = calls.MPI_Comm_create_group(comm, group, hash % GATES, addressOf(out));
    checkMpi(code, "MPI_Comm_create_group");
    checkMpi(calls.MPI_Group_free(addressOf(chosen)), "MPI_Group_free");
    checkMpi(calls.MPI_Group_free(addressOf(all)), "MPI_Group_free");
    return new MpiTransport(this.#job, library.readHandle<MpiComm>(out), {
      members: members.map((r) => this.#membership.members[r]),
      id,
      rank: members.indexOf(this.#group.rank),
    });
  }

  /** Resolves when all members have called it: a dissemination barrier, ⌈log2 p⌉ rounds. */
  async #gate(members: readonly number[], tag: number): Promise<void> {
    const { length } = members;
    const me = members.indexOf(this.#group.rank);
    const requests = new RequestSet(this.#job.mpi);
    const bytes = new ArrayBuffer(2);
    const at = addressOf(bytes);
    for (let hop = 1; hop < length; hop *= 2) {
      requests.receive(this.#group, at + 1n, 1, members[(me + length - hop) % length], tag);
      requests.send(this.#group, at, 1, members[(me + hop) % length], tag);
      await until(() => requests.test());
    }
  }

  abort(_why: string): void {
    this.#job.broken = true;
    this.#sayFarewell();
  }

  /** Tells the others that this rank begins no further operation. */
  #sayFarewell(): void {
    if (this.#farewell !== undefined) return;
    this.#farewell = Float64Array.of(this.#begun);
    const at = addressOf(this.#farewell.buffer);
    for (let r = 0; r < this.#group.size; r++) {
      if (r !== this.#group.rank) this.#farewells.send(this.#group, at, 8, r, FAREWELL);
    }
  }

  /** Whether nothing is in flight, or nothing can move any more. */
  #settled(): boolean {
    if (this.#job.broken) return true;
    for (const flight of this.#flights) flight.advance();
    return this.#flights.size === 0;
  }

  /** Waits until all others have said farewell, or one never will. */
  async #hearFarewells(): Promise<void> {
    const { context } = this.#job;
    const { members, id, rank } = this.#membership;
    const silent = () => members.filter((_, r) => r !== rank && this.#left[r] < 0);
    const timeout_ms = timeoutOf(undefined);
    const end = performance.now() + timeout_ms;
    let lost = Infinity; // when a rank that has left the job counts as silent: its farewell may be on its way
    await until(() => {
      if (this.#farewells.test()) return true;
      const now_ms = performance.now();
      if (lost === Infinity && silent().some((r) => context.departed?.has(r))) {
        lost = now_ms + OVERDUE_MS;
      }
      return now_ms > lost || now_ms > end;
    });
    const missing = silent();
    if (missing.length === 0) return;
    this.#job.broken = true;
    if (performance.now() < end) return; // the launcher knows what has become of them
    // Not thrown: this often runs in `await using`, where it would hide the error that has ended the block.
    console.error(
      `error: Cannot complete close of ${id} on rank ${rank} as all ranks must close it within ${timeout_ms} ms: current value is still open on rank ${
        missing.join(", rank ")
      }`,
    );
  }

  async close(): Promise<void> {
    if (this.#closed || this.#job.finalized) return;
    this.#closed = true;
    const { calls } = this.#job.mpi;
    const end = performance.now() + OVERDUE_MS;
    await until(() => this.#settled() || performance.now() > end);
    if (this.#flights.size > 0) this.#job.broken = true; // they will never complete
    this.#sayFarewell();
    if (this.#job.broken) {
      await setTimeout(YIELD_TO_CAUSE_MS);
      return;
    }
    await this.#hearFarewells();
    const even = this.#left.every((n, r) => r === this.#group.rank || n === this.#begun);
    if (!even) this.#job.broken = true; // this rank, or another, leaves in the middle: the launcher will end the job
    if (this.#job.broken) return;
    const handle = new BigUint64Array([BigInt(this.#group.comm)]);
    checkMpi(calls.MPI_Comm_free(addressOf(handle.buffer)), "MPI_Comm_free");
    if (this.#membership.id !== "world") return;
    this.#job.finalized = true;
    checkMpi(calls.MPI_Finalize(), "MPI_Finalize");
  }
}

/** Resolves when a test holds; the event loop and all operations in flight go on meanwhile. */
async function until(test: () => boolean): Promise<void> {
  for (let turn = 0; !test(); turn++) {
    progress();
    if (turn < 200) await setImmediate();
    else await setTimeout(1);
  }
}
