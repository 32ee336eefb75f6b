// Bytes that MPI reads and writes: a view for JavaScript and the machine address for C, of a caller's region or of scratch
// memory among the tensors. Buffers are kept alive by whoever holds the `Bytes`.

import { addressOf } from "../../ffi/mpi.ts";
import { allocate, free, linearBuffer, machineAddress } from "../../tensor/cpu/memory.ts";
import type { Region } from "../transport.ts";

/** Some bytes of host memory. */
export interface Bytes {
  /** The bytes. */
  readonly view: Uint8Array<ArrayBufferLike>;
  /** Their machine address. */
  readonly address: bigint;
}

/**
 * The bytes of a region.
 *
 * @param region A region on the host.
 * @returns Its bytes.
 * @throws {TypeError} If the region is on a GPU.
 */
export function bytesOfRegion(region: Region): Bytes {
  const { array } = region;
  if (array === null) {
    throw new TypeError(
      "Cannot send through MPI as the data must be in host memory: current value is a tensor on a GPU",
    );
  }
  const { buffer, byteOffset, byteLength } = array;
  return {
    view: new Uint8Array(buffer, byteOffset, byteLength),
    address: region.address >= 0
      ? machineAddress(region.address)
      : addressOf(buffer) + BigInt(byteOffset),
  };
}

/**
 * Part of some bytes.
 *
 * @param bytes The whole.
 * @param start First byte.
 * @param length Number of bytes.
 * @returns The part; it shares memory.
 */
export function part(bytes: Bytes, start: number, length: number): Bytes {
  return {
    view: bytes.view.subarray(start, start + length),
    address: bytes.address + BigInt(start),
  };
}

/** Below this size the C library's copy keeps what it writes in the cache, where the next reader finds it. */
const COPY_CHUNK_BYTES = 256 * 1024;

/**
 * Copies bytes in pieces, with something else to do between two of them.
 *
 * @param source Where from.
 * @param target Where to; nothing is done if it is the source.
 * @param between Called after each piece.
 */
export function copyBytes(source: Bytes, target: Bytes, between?: () => void): void {
  const length = source.view.byteLength;
  if (source.address === target.address) return;
  if (length <= COPY_CHUNK_BYTES) return target.view.set(source.view);
  for (let at = 0; at < length; at += COPY_CHUNK_BYTES) {
    target.view.set(source.view.subarray(at, Math.min(at + COPY_CHUNK_BYTES, length)), at);
    between?.();
  }
}

let kept: unknown[] | undefined;

/**
 * From now on scratch memory, and what else an operation that failed has used, is neither reused nor collected: MPI offers no way to
 * take back a message that is on its way, so it may still read or write there.
 *
 * @param what More to keep.
 */
export function keepScratch(...what: unknown[]): void {
  (kept ??= []).push(...what);
}

/** Scratch memory, which goes back to the pool of tensors when disposed. */
export class Scratch implements Bytes, Disposable {
  /** The bytes; their contents are undefined. */
  readonly view: Uint8Array<ArrayBufferLike>;
  /** Their machine address, a multiple of 64. */
  readonly address: bigint;

  /**
   * Takes memory.
   *
   * @param bytes Size.
   */
  constructor(bytes: number) {
    const offset = allocate(bytes);
    this.view = new Uint8Array(linearBuffer(), offset, bytes);
    this.address = machineAddress(offset);
  }

  /** Gives the memory back; C must have finished with it. */
  [Symbol.dispose](): void {
    if (kept === undefined) free(this.view.byteOffset);
  }
}
