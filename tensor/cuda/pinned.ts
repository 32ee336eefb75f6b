// Page-locked host memory and what is staged in it: uploads, which return once the source may change, and downloads, which take
// their place in the stream's order when they are called. Copies straight from JavaScript's own memory would block the host.

import { addressOf } from "../../ffi/address.ts";
import { checkCudart, CUDART, cudart, cudartError } from "../../ffi/cudart.ts";
import type { Arena } from "./arena.ts";
import { Blocks, OutOfMemoryError } from "./arena.ts";
import { type CudaEvent, type CudaStream, type EventPool, passing } from "./streams.ts";

/** Segments of the upload ring and bytes of each. */
const SEGMENTS = 4, SEGMENT = 8 * 2 ** 20;
/** Bytes of the download area, of a piece of a large download, and of one unit of its bookkeeping. */
const DOWNLOADS = 32 * 2 ** 20, PIECE = 8 * 2 ** 20, UNIT = 64;

/** Page-locked host memory, which the GPU copies to and from at full speed while the host goes on. */
export class PinnedMemory implements Disposable {
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

  /** Gives the memory back. No copy may be under way, and `buffer` must not be used any more. */
  [Symbol.dispose](): void {
    if (!this.#live) return;
    this.#live = false;
    checkCudart(cudart().calls.cudaFreeHost(BigInt(this.address)), "cudaFreeHost");
  }
}

function bytesOfView(source: ArrayBufferView): Uint8Array {
  return new Uint8Array(source.buffer, source.byteOffset, source.byteLength);
}

/** Copies from and to the host on one stream. */
export class Staging {
  readonly #stream: CudaStream;
  readonly #pool: EventPool;
  readonly #calls = cudart().calls;
  #ring: PinnedMemory | undefined;
  #ringBytes = new Uint8Array(0);
  #segment = 0;
  #filled = 0;
  readonly #segmentEvents: (CudaEvent | null)[] = new Array(SEGMENTS).fill(null);
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
   * Enqueues a copy to the device. The source may change once this returns. It waits only while {@linkcode SEGMENTS} segments of
   * earlier uploads are under way.
   *
   * @param source The bytes.
   * @param address Where they go.
   */
  upload(source: ArrayBufferView, address: number): void {
    const total = source.byteLength;
    if (total === 0) return;
    if (this.#ring === undefined) {
      this.#ring = new PinnedMemory(SEGMENTS * SEGMENT);
      this.#ringBytes = new Uint8Array(this.#ring.buffer);
    }
    const bytes = bytesOfView(source);
    for (let done = 0; done < total;) {
      // A small upload stays whole.
      if (this.#filled === SEGMENT || (total <= SEGMENT / 8 && this.#filled + total > SEGMENT)) {
        this.#nextSegment();
      }
      const size = Math.min(total - done, SEGMENT - this.#filled);
      const offset = this.#segment * SEGMENT + this.#filled;
      this.#ringBytes.set(
        done === 0 && size === total ? bytes : bytes.subarray(done, done + size),
        offset,
      );
      this.#copy(address + done, this.#ring.address + offset, size, CUDART.hostToDevice);
      this.#filled = Math.min(SEGMENT, this.#filled + Math.ceil(size / UNIT) * UNIT);
      done += size;
    }
  }

  /** Goes on to the segment that was filled longest ago, once its copies are done. */
  #nextSegment(): void {
    this.#segmentEvents[this.#segment] = this.#stream.record();
    this.#segment = (this.#segment + 1) % SEGMENTS;
    this.#filled = 0;
    const event = this.#segmentEvents[this.#segment];
    if (event === null || event.done()) return;
    this.#pool.hostWaits++;
    const cell = new Int32Array(new SharedArrayBuffer(4));
    for (let polls = 0; !event.done(); polls++) if (polls > 200) Atomics.wait(cell, 0, 0, 0.05);
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
      using pinned = new PinnedMemory(bytes.length);
      this.#copy(pinned.address, address, bytes.length, CUDART.deviceToHost);
      await passing(this.#stream.record());
      bytes.set(new Uint8Array(pinned.buffer));
      return;
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
      await Promise.all([fetchPieces(), fetchPieces()]); // one copies on the host while the other's transfer runs
    } finally {
      arena.free(snapshot);
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
      bytes.set(new Uint8Array(staging.buffer, place * UNIT, bytes.length));
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
