// A piece of memory that the ranks of one communicator share, mapped into each rank's linear memory: who its ranks are and
// whether they live, a bell to wake sleepers, the slots that collectives exchange data through, and the channels of send and
// recv. The layout is here; what moves through it is in `rounds.ts` and `channels.ts`.
//
// The memory has no name in any file system: rank 0 makes it and the others open it through /proc, so nothing is left behind
// however the job ends. macOS has no such thing; there it is a temporary file that is removed as soon as all have opened it.

import { libc } from "../../ffi/libc.ts";
import {
  allocate,
  linearBuffer,
  machineAddress,
  mapShared,
  unmapShared,
} from "../../tensor/cpu/memory.ts";
import { isAlive, startTimeOf } from "./alive.ts";

const LINUX = Deno.build.os === "linux";
const O_RDWR = 2;
const O_CLOEXEC = LINUX ? 0x80000 : 0x1000000;
const MFD_CLOEXEC = 1;
const SYS_FUTEX = Deno.build.arch === "aarch64" ? 98n : 202n;
const FUTEX_WAIT = 0n, FUTEX_WAKE = 1n;

const MAGIC = 0x4c494e41;
const LINE = 64;
const HEADER_BYTES = 4096;
const STATUS_BYTES = 128;
const ABORT_TEXT_BYTES = 2048;
const PAGE_BYTES = 65536;

// Words of the header.
const H_MAGIC = 0, H_NONCE = 1, H_JOINED = 2, H_ABORTED = 3;
// Words of a rank's status.
const S_PID = 0, S_STARTED = 1, S_CLOSED = 2, S_BEGUN = 3, S_MAIL = 8;

/** Slots per rank: one is read by the others while the next is written. A power of two. */
export const SLOTS = 2;
/** Bytes before a slot's payload: the flag, the signature of the operation, and the number of rounds it takes. */
export const SLOT_HEADER_BYTES = 16;
/** Bytes before what goes to one rank in an all-to-all: their number over all rounds, in 64 bits. */
export const AREA_HEADER_BYTES = 16;
/** Most bytes of slots in a segment, over all ranks. */
const SLOTS_BUDGET_BYTES = 64 << 20;
/** Most bytes of one slot's payload. */
const PAYLOAD_BYTES = 256 << 10;
/** Messages of one channel that a sender may be ahead of the receiver. */
export const CHANNEL_DEPTH = 2;
const CHANNELS_BUDGET_BYTES = 32 << 20;
const FRAGMENT_BYTES = 64 << 10;

/** Where the parts of a segment lie, in bytes from its start; the same on every rank. */
export interface Layout {
  /** Sleep words, one i32 per rank. */
  readonly sleepers: number;
  /** First slot. */
  readonly slots: number;
  /** From a rank's slots to the next rank's. */
  readonly rankStride: number;
  /** From a slot to the next of the same rank. */
  readonly slotStride: number;
  /** Bytes of a slot for what a rank contributes; a multiple of 64 times the number of ranks. */
  readonly payload: number;
  /** First channel. */
  readonly channels: number;
  /** From a channel to the next. */
  readonly channelStride: number;
  /** Bytes of data in a message's fragment. */
  readonly fragment: number;
  /** All of it. */
  readonly bytes: number;
}

/**
 * The layout of a segment.
 *
 * @param size Number of ranks.
 * @returns Where things are.
 */
export function layoutOf(size: number): Layout {
  const sleepers = HEADER_BYTES + size * STATUS_BYTES;
  const slots = align(sleepers + size * 4, HEADER_BYTES);
  const unit = LINE * size;
  const budget = Math.min(PAYLOAD_BYTES, SLOTS_BUDGET_BYTES / (SLOTS * size));
  const payload = Math.max(1, Math.floor(budget / unit)) * unit;
  // After the contributions there is room for the results of one rank's part of a chunk; an all-to-all has its numbers there.
  const more = Math.max(payload / size, size * AREA_HEADER_BYTES);
  const slotStride = align(SLOT_HEADER_BYTES + payload + more, LINE) + LINE;
  const rankStride = SLOTS * slotStride;
  const channels = align(slots + size * rankStride, HEADER_BYTES);
  const fragment = Math.max(
    4096,
    Math.min(FRAGMENT_BYTES, 2 ** Math.floor(Math.log2(CHANNELS_BUDGET_BYTES / (size * size * 2)))),
  );
  const channelStride = 2 * LINE + CHANNEL_DEPTH * (LINE + fragment);
  const bytes = align(channels + size * size * channelStride, PAGE_BYTES);
  return {
    sleepers,
    slots,
    rankStride,
    slotStride,
    payload,
    channels,
    channelStride,
    fragment,
    bytes,
  };
}

function align(n: number, to: number): number {
  return Math.ceil(n / to) * to;
}

/** How another process finds a segment. */
export interface SegmentAddress {
  /** Process that has it open. */
  readonly pid: number;
  /** Its descriptor there. */
  readonly fd: number;
  /** A random number that is also in the segment, to notice a wrong one. */
  readonly nonce: number;
}

function pathOf({ pid, fd, nonce }: SegmentAddress): string {
  return LINUX ? `/proc/${pid}/fd/${fd}` : `/tmp/lina-${pid}-${nonce >>> 0}`;
}

/** A mapped segment, seen by one of its ranks. */
export class Segment {
  /** This process's rank in the segment. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
  /** Where its parts are. */
  readonly layout: Layout;
  /** Byte offset of the segment in the linear memory. */
  readonly base: number;
  /** How others find it. */
  readonly address: SegmentAddress;
  /** The linear memory as 32-bit words. */
  readonly words: Int32Array = words();
  #fd: number;

  private constructor(rank: number, size: number, fd: number, address: SegmentAddress) {
    this.rank = rank;
    this.size = size;
    this.layout = layoutOf(size);
    this.#fd = fd;
    this.address = address;
    this.base = mapShared(fd, this.layout.bytes);
  }

  /**
   * Makes a segment; its maker is rank 0.
   *
   * @param size Number of ranks.
   * @returns The segment, of which this process is rank 0.
   */
  static create(size: number): Segment {
    const nonce = crypto.getRandomValues(new Int32Array(1))[0];
    let fd: number;
    if (LINUX) {
      fd = libc().memfd_create!(cString("lina"), MFD_CLOEXEC);
    } else {
      const path = pathOf({ pid: Deno.pid, fd: 0, nonce });
      Deno.openSync(path, { createNew: true, write: true, mode: 0o600 }).close();
      fd = libc().open(cString(path), O_RDWR | O_CLOEXEC, 0);
    }
    if (fd < 0) throw new Error("Cannot make shared memory: memfd_create failed");
    const { bytes } = layoutOf(size);
    if (libc().ftruncate(fd, BigInt(bytes)) !== 0) {
      throw new Error(`Cannot make ${bytes} bytes of shared memory: ftruncate failed`);
    }
    const segment = new Segment(0, size, fd, { pid: Deno.pid, fd, nonce });
    segment.words[segment.base / 4 + H_NONCE] = nonce;
    Atomics.store(segment.words, segment.base / 4 + H_MAGIC, MAGIC);
    segment.#enter();
    return segment;
  }

  /**
   * Opens a segment that rank 0 has made.
   *
   * @param rank This process's rank in it.
   * @param size Number of ranks.
   * @param address Where it is.
   * @returns The segment.
   * @throws {Error} If it cannot be opened or is another one.
   */
  static open(rank: number, size: number, address: SegmentAddress): Segment {
    const path = pathOf(address);
    const fd = libc().open(cString(path), O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) {
      throw new Error(
        `Cannot open the shared memory of rank 0 as ${path} must be readable by this process: current value is an error of open()`,
      );
    }
    const segment = new Segment(rank, size, fd, address);
    const at = segment.base / 4;
    const found = Atomics.load(segment.words, at + H_MAGIC);
    if (found !== MAGIC || segment.words[at + H_NONCE] !== address.nonce) {
      segment.unmap();
      throw new Error(
        `Cannot share memory as ${path} must be this job's: current value is foreign`,
      );
    }
    segment.#enter();
    return segment;
  }

  #enter(): void {
    const at = this.#status(this.rank);
    this.words[at + S_STARTED] = startTimeOf(Deno.pid);
    Atomics.store(this.words, at + S_PID, Deno.pid);
    Atomics.add(this.words, this.base / 4 + H_JOINED, 1);
  }

  /** Whether every rank has opened the segment. */
  get complete(): boolean {
    return Atomics.load(this.words, this.base / 4 + H_JOINED) === this.size;
  }

  /** Ranks that have not opened the segment yet. */
  get absent(): number[] {
    return [...Array(this.size).keys()]
      .filter((rank) => Atomics.load(this.words, this.#status(rank) + S_PID) === 0);
  }

  /** Gives the descriptor back; to be called once all ranks have opened the segment. */
  seal(): void {
    if (this.#fd < 0) return;
    libc().close(this.#fd);
    this.#fd = -1;
    if (this.rank === 0 && !LINUX) {
      try {
        Deno.removeSync(pathOf(this.address));
      } catch { /* somebody has tidied up the temporary folder */ }
    }
  }

  /** Gives the memory back. */
  unmap(): void {
    this.seal();
    unmapShared(this.base, this.layout.bytes);
  }

  #status(rank: number): number {
    return (this.base + HEADER_BYTES + rank * STATUS_BYTES) / 4;
  }

  /** Says that this rank has begun an operation. @param count Operations begun so far. */
  begin(count: number): void {
    this.words[this.#status(this.rank) + S_BEGUN] = count;
  }

  /** Operations that a rank has begun. @param rank Which. @returns Their number. */
  begun(rank: number): number {
    return Atomics.load(this.words, this.#status(rank) + S_BEGUN);
  }

  /** Says that this rank will start no further operation. */
  leave(): void {
    Atomics.store(this.words, this.#status(this.rank) + S_CLOSED, 1);
  }

  /**
   * Why a rank can send nothing any more.
   *
   * @param rank Which.
   * @returns The reason, or null if it lives and is in the group.
   */
  gone(rank: number): string | null {
    const at = this.#status(rank);
    const pid = Atomics.load(this.words, at + S_PID);
    if (Atomics.load(this.words, at + S_CLOSED) === 1) return "has closed the communicator";
    if (pid === 0 || isAlive(pid, this.words[at + S_STARTED])) return null;
    return `has died (process ${pid})`;
  }

  /** Leaves an address for the members of a new group. @param key Names the group. @param address Where its memory is. */
  post(key: number, address: SegmentAddress): void {
    const at = this.#status(this.rank) + S_MAIL;
    this.words.set([address.pid, address.fd, address.nonce], at + 1);
    Atomics.store(this.words, at, key);
  }

  /** The address that a rank has left. @param rank Who leaves it. @param key Names the group. @returns It, or null so far. */
  mail(rank: number, key: number): SegmentAddress | null {
    const at = this.#status(rank) + S_MAIL;
    if (Atomics.load(this.words, at) !== key) return null;
    const [pid, fd, nonce] = this.words.subarray(at + 1, at + 4);
    return { pid, fd, nonce };
  }

  /** Tells all ranks that the job ends. @param why The message. */
  abort(why: string): void {
    const text = new TextEncoder().encode(why).subarray(0, ABORT_TEXT_BYTES - 4);
    const at = this.base + LINE;
    new Uint8Array(linearBuffer(), at + 4, text.length).set(text);
    this.words[at / 4] = text.length;
    Atomics.store(this.words, this.base / 4 + H_ABORTED, 1);
    for (let r = 0; r < this.size; r++) if (r !== this.rank) this.wake(r);
  }

  /** The message of a rank that has aborted the job, or null. */
  get aborted(): string | null {
    if (Atomics.load(this.words, this.base / 4 + H_ABORTED) === 0) return null;
    const at = this.base + LINE;
    const bytes = new Uint8Array(linearBuffer(), at + 4, this.words[at / 4]);
    return new TextDecoder().decode(bytes.slice());
  }

  // The bell. A rank that goes to sleep sets its word, looks once more whether it can go on, and sleeps while the word is set.
  // Who publishes something looks at the words afterwards. All stores are sequentially consistent, so one of both notices.

  /** Sets this rank's sleep word; the caller must look at its data again, then {@linkcode sleep}. */
  drowse(): void {
    Atomics.store(this.words, (this.base + this.layout.sleepers) / 4 + this.rank, 1);
  }

  /** Sleeps until somebody wakes this rank. @param time_us At most this long, in µs. */
  sleep(time_us: number): void {
    const at = this.base + this.layout.sleepers + 4 * this.rank;
    if (LINUX) {
      timespec[0] = 0n;
      timespec[1] = BigInt(Math.round(time_us * 1000));
      libc().syscall!(SYS_FUTEX, machineAddress(at), FUTEX_WAIT, 1n, timespecAddress(), 0n, 0n);
    } else {
      libc().usleep(Math.min(time_us, 200));
    }
    Atomics.store(this.words, at / 4, 0);
  }

  /** Clears this rank's sleep word without having slept. */
  rouse(): void {
    Atomics.store(this.words, (this.base + this.layout.sleepers) / 4 + this.rank, 0);
  }

  // A process may wait for operations of several groups, but can sleep in one place only: its word in the segment of the job.
  #bell: Segment = this;
  #bellRanks: readonly number[] = [];

  /** Says where this segment's ranks sleep. @param bell The segment of the job. @param ranks This segment's ranks as ranks of the job. */
  ringAt(bell: Segment, ranks: readonly number[]): void {
    this.#bell = bell;
    this.#bellRanks = ranks;
  }

  /** A rank of this segment as rank of the job. @param rank Here. @returns There. */
  bellRank(rank: number): number {
    return this.#bellRanks[rank];
  }

  /** Wakes a rank if it sleeps. @param rank Which. */
  wake(rank: number): void {
    const bell = this.#bell;
    const at = bell.base + bell.layout.sleepers + 4 * this.#bellRanks[rank];
    if (Atomics.load(bell.words, at / 4) === 0) return;
    if (Atomics.exchange(this.words, at / 4, 0) === 0 || !LINUX) return;
    libc().syscall!(SYS_FUTEX, machineAddress(at), FUTEX_WAKE, 1n, 0n, 0n, 0n);
  }
}

let allWords: Int32Array | undefined;

function words(): Int32Array {
  return allWords ??= new Int32Array(linearBuffer());
}

let timespecAt = 0;
let timespec: BigInt64Array;

function timespecAddress(): bigint {
  return machineAddress(timespecAt);
}

/** Prepares what sleeping needs; called once by who opens the first segment. */
export function prepareSleep(): void {
  if (timespecAt !== 0) return;
  timespecAt = allocate(16);
  timespec = new BigInt64Array(linearBuffer(), timespecAt, 2);
}

function cString(text: string): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(text + "\0");
}
