// Page-locked host memory and what is staged in it: uploads, which return once the source may change, and downloads, which take
// their place in the stream's order when they are called. Copies straight from JavaScript's own memory would block the host.

import { addressOf, keepUntilHere } from "../../ffi/address.ts";
import { CudaError } from "../../ffi/cuda_library.ts";
import { checkCudart, CUDART, cudart, cudartError } from "../../ffi/cudart.ts";
import { libc } from "../../ffi/libc.ts";
import type { HostMemory, Stream, StreamEvent } from "../device.ts";
import { OutOfMemoryError } from "../memory_error.ts";
import type { Tensor } from "../tensor.ts";
import type { Arena } from "./arena.ts";
import { Blocks } from "./arena.ts";
import { type CudaStream, type EventPool, passing } from "./streams.ts";

/** Segments of the upload ring as long as the stream moves, and bytes of each. */
const SEGMENTS = 4, SEGMENT = 8 * 2 ** 20;
/** How long an upload waits in all for a stream that stands still, in ms. */
const PATIENCE_MS = 10;
/** Polls without a pause, and the pause between those that follow, in ms. */
const BUSY_POLLS = 200, PAUSE_MS = 0.05;
/** Bytes of the download area, of a piece of a large download, and of one unit of its bookkeeping. */
const DOWNLOADS = 32 * 2 ** 20, PIECE = 4 * 2 ** 20, UNIT = 64;
/** Pieces of one download that are under way: the pages of the target, which are made as it is written, take longest. */
const LANES = 6;
/** From this size on, other threads copy from the staging area to the target. */
const ELSEWHERE = 2 ** 20;
/** Page-locked memory that is taken at a time: it takes some 20 ms. */
const PART = 64 * 2 ** 20;

/** Page-locked host memory, which the GPU copies to and from at full speed while the host goes on. */
export class PinnedMemory implements HostMemory {
  /** Its machine address. */
  readonly address: number;
  /** Its bytes. */
  readonly buffer: ArrayBuffer;
  #live = true;

  /**
   * Takes page-locked memory; that takes about a millisecond for 4 MiB.
   *
   * @param bytes How much, 1 at least.
   * @throws {CudaError} If the system has not as much.
   */
  constructor(bytes: number) {
    if (!Number.isSafeInteger(bytes) || bytes < 1) {
      throw new RangeError(
        `Cannot take page-locked memory as its size must be a whole number of bytes >= 1: current value is ${bytes}`,
      );
    }
    const cell = new BigUint64Array(new ArrayBuffer(8));
    const code = cudart().calls.cudaHostAlloc(
      addressOf(cell.buffer),
      BigInt(bytes),
      CUDART.hostAllocPortable,
    );
    if (code !== 0) throw cudartError(code, "cudaHostAlloc", ` (${bytes} bytes)`);
    this.address = Number(cell[0]);
    const pointer = Deno.UnsafePointer.create(cell[0])!;
    this.buffer = Deno.UnsafePointerView.getArrayBuffer(pointer, bytes);
  }

  /** Enqueues a copy to the device. @param offset First byte here. @param target Where it goes. @param stream Where it runs. */
  load(offset: number, target: Tensor, stream: Stream): void {
    this.#copy(offset, target, stream as CudaStream, CUDART.hostToDevice);
  }

  /** Enqueues a copy from the device. @param source What is copied. @param offset First byte here. @param stream Where it runs. */
  store(source: Tensor, offset: number, stream: Stream): void {
    this.#copy(offset, source, stream as CudaStream, CUDART.deviceToHost);
  }

  #copy(offset: number, { address, bytes }: Tensor, { handle }: CudaStream, kind: number): void {
    const size = this.buffer.byteLength;
    if (!(Number.isSafeInteger(offset) && offset >= 0 && offset + bytes <= size)) {
      throw new RangeError(
        `Cannot copy as ${bytes} bytes must lie in the host's ${size}: current value is from ${offset} on`,
      );
    }
    const here = BigInt(this.address + offset), there = BigInt(address);
    const [to, from] = kind === CUDART.hostToDevice ? [there, here] : [here, there];
    const code = cudart().calls.cudaMemcpyAsync(to, from, BigInt(bytes), kind, handle);
    if (code !== 0) throw cudartError(code, "cudaMemcpyAsync", ` (${bytes} bytes)`);
  }

  /** Gives the memory back. No copy may be under way, and `buffer` must not be used any more. */
  [Symbol.dispose](): void {
    if (!this.#live) return;
    this.#live = false;
    checkCudart(cudart().calls.cudaFreeHost(BigInt(this.address)), "cudaFreeHost");
  }
}

const never = new Int32Array(new SharedArrayBuffer(4));

/** Waits for an event on the spot, but not beyond a time of `performance.now()`. */
function pollUntil(event: StreamEvent, end_ms: number): void {
  for (let polls = 0; !event.done() && performance.now() < end_ms; polls++) {
    if (polls > BUSY_POLLS) Atomics.wait(never, 0, 0, PAUSE_MS);
  }
}

function bytesOfView(source: ArrayBufferView): Uint8Array {
  return new Uint8Array(source.buffer, source.byteOffset, source.byteLength);
}

/** Copies page-locked bytes to an array; large ones on other threads, piece by piece. */
async function copyOut(
  address: number,
  buffer: ArrayBuffer,
  offset: number,
  target: Uint8Array,
): Promise<void> {
  if (target.length < ELSEWHERE) {
    target.set(new Uint8Array(buffer, offset, target.length));
    return;
  }
  const { memcpyElsewhere } = libc();
  const to = addressOf(target.buffer) + BigInt(target.byteOffset);
  const copies: Promise<bigint>[] = [];
  for (let at = 0; at < target.length; at += PIECE) {
    const size = BigInt(Math.min(PIECE, target.length - at));
    copies.push(memcpyElsewhere(to + BigInt(at), BigInt(address + offset + at), size));
  }
  await Promise.all(copies);
  keepUntilHere(target);
}

/** A part of the upload ring. */
interface Segment {
  readonly address: number;
  readonly bytes: Uint8Array;
  /** The end of its copies; null while it is filled for the first time. */
  end: StreamEvent | null;
}

/** Copies from and to the host on one stream. */
export class Staging {
  readonly #stream: CudaStream;
  readonly #pool: EventPool;
  readonly #calls = cudart().calls;
  /** In the order in which they were filled, seen from the present one. */
  readonly #ring: Segment[] = [];
  #present = 0;
  #filled = SEGMENT;
  #downloads: PinnedMemory | undefined;
  readonly #places = new Blocks();

  /**
   * @param stream The stream whose order the copies keep.
   * @param pool Where host waits are counted.
   */
  constructor(stream: CudaStream, pool: EventPool) {
    this.#stream = stream;
    this.#pool = pool;
  }

  /**
   * Enqueues a copy to the device. The source may change once this returns. If {@linkcode SEGMENTS} segments of earlier uploads are under
   * way, it waits for {@linkcode PATIENCE_MS} at most; should the stream stand still for longer, the ring grows.
   *
   * @param source The bytes.
   * @param address Where they go.
   */
  upload(source: ArrayBufferView, address: number): void {
    const total = source.byteLength;
    if (total === 0) return;
    const bytes = bytesOfView(source);
    let patience_ms = PATIENCE_MS;
    for (let done = 0; done < total;) {
      // A small upload stays whole.
      if (this.#filled === SEGMENT || (total <= SEGMENT / 8 && this.#filled + total > SEGMENT)) {
        patience_ms -= this.#nextSegment(patience_ms);
      }
      const size = Math.min(total - done, SEGMENT - this.#filled);
      const segment = this.#ring[this.#present];
      segment.bytes.set(
        done === 0 && size === total ? bytes : bytes.subarray(done, done + size),
        this.#filled,
      );
      this.#copy(address + done, segment.address + this.#filled, size, CUDART.hostToDevice);
      this.#filled = Math.min(SEGMENT, this.#filled + Math.ceil(size / UNIT) * UNIT);
      done += size;
    }
  }

  /** Goes on to the segment that was filled longest ago, once its copies are done, or to a new one. @returns How long it has waited, in ms. */
  #nextSegment(patience_ms: number): number {
    const ring = this.#ring;
    if (ring.length === 0) {
      this.#addSegment();
      return 0;
    }
    ring[this.#present].end = this.#stream.record();
    const oldest = (this.#present + 1) % ring.length, { end } = ring[oldest];
    const free = end!.done();
    const start_ms = performance.now();
    if (!free && ring.length >= SEGMENTS) {
      this.#pool.hostWaits++;
      pollUntil(end!, start_ms + patience_ms);
    }
    const waited_ms = performance.now() - start_ms;
    if (!free && !end!.done()) {
      try {
        this.#addSegment();
        return waited_ms;
      } catch (error) {
        if (!(error instanceof CudaError)) throw error;
        pollUntil(end!, Infinity); // the host has no memory either: nothing is left but to wait
      }
    }
    this.#present = oldest;
    this.#filled = 0;
    return waited_ms;
  }

  /** Puts a fresh segment behind the present one and goes on to it. */
  #addSegment(): void {
    const { address, buffer } = new PinnedMemory(SEGMENT);
    this.#present = this.#ring.length === 0 ? 0 : this.#present + 1;
    this.#ring.splice(this.#present, 0, { address, bytes: new Uint8Array(buffer), end: null });
    this.#filled = 0;
  }

  /**
   * A copy of device memory. It is that of the stream's present end: work enqueued after the call does not change it, and the
   * memory may be freed at once.
   *
   * @param address Where the bytes are.
   * @param target Where they go, on the host.
   * @param arena Device memory, for the copy of what is too large for the staging area.
   */
  async download(address: number, target: ArrayBufferView, arena: Arena): Promise<void> {
    this.#pool.hostWaits++;
    const bytes = bytesOfView(target);
    if (bytes.length === 0) return;
    if (this.#downloads === undefined) {
      this.#downloads = new PinnedMemory(DOWNLOADS);
      this.#places.grow(DOWNLOADS / UNIT);
    }
    const place = bytes.length <= DOWNLOADS / 2 ? this.#takePlace(bytes.length) : -1;
    if (place >= 0) return await this.#fetch(address, bytes, place);
    await this.#downloadLarge(address, bytes, arena);
  }

  /** Takes a snapshot on the device, then fetches it piece by piece; if the device has no room for one, takes pinned memory for all of it. */
  async #downloadLarge(address: number, bytes: Uint8Array, arena: Arena): Promise<void> {
    let snapshot: number;
    try {
      snapshot = arena.allocate(bytes.length);
    } catch (error) {
      if (!(error instanceof OutOfMemoryError)) throw error;
      return await this.#downloadPinned(address, bytes);
    }
    this.#copy(snapshot, address, bytes.length, CUDART.deviceToDevice);
    let next = 0;
    const fetchPieces = async () => {
      while (next < bytes.length) {
        const from = next, piece = bytes.subarray(from, from + PIECE);
        next += piece.length;
        let place = this.#takePlace(piece.length);
        while (place < 0) { // other downloads hold the area; each gives its place back without another's help
          await new Promise<void>((resolve) => setImmediate(resolve));
          place = this.#takePlace(piece.length);
        }
        await this.#fetch(snapshot + from, piece, place);
      }
    };
    try {
      // All of them have ended when the snapshot is freed, also if one has failed.
      const ends = await Promise.allSettled(Array.from({ length: LANES }, fetchPieces));
      for (const end of ends) if (end.status === "rejected") throw end.reason;
    } finally {
      arena.free(snapshot);
    }
  }

  async #downloadPinned(address: number, bytes: Uint8Array): Promise<void> {
    using stack = new DisposableStack();
    const parts: PinnedMemory[] = [];
    for (let at = 0; at < bytes.length; at += PART) {
      parts.push(stack.use(new PinnedMemory(Math.min(PART, bytes.length - at))));
    }
    parts.forEach((part, i) => {
      this.#copy(part.address, address + i * PART, part.buffer.byteLength, CUDART.deviceToHost);
    });
    await passing(this.#stream.record());
    for (const [i, { address, buffer }] of parts.entries()) {
      await copyOut(address, buffer, 0, bytes.subarray(i * PART, (i + 1) * PART));
    }
  }

  #takePlace(bytes: number): number {
    return this.#places.take(Math.ceil(bytes / UNIT));
  }

  /** Fetches into a place of the staging area, then to the target; gives the place back. */
  async #fetch(address: number, bytes: Uint8Array, place: number): Promise<void> {
    try {
      const staging = this.#downloads!;
      this.#copy(staging.address + place * UNIT, address, bytes.length, CUDART.deviceToHost);
      await passing(this.#stream.record());
      await copyOut(staging.address, staging.buffer, place * UNIT, bytes);
    } finally {
      this.#places.give(place);
    }
  }

  #copy(to: number, from: number, bytes: number, kind: number): void {
    const code = this.#calls.cudaMemcpyAsync(
      BigInt(to),
      BigInt(from),
      BigInt(bytes),
      kind,
      this.#stream.handle,
    );
    if (code !== 0) throw cudartError(code, "cudaMemcpyAsync", ` (${bytes} bytes)`);
  }
}
