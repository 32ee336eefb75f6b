// The linear memory of a CPU rank: one WebAssembly memory that holds every CPU tensor and, mapped in at its top, the memory
// shared with other ranks. So the same SIMD kernels, typed arrays, Atomics and C libraries reach both, at addresses that
// never move. 4 GiB are reserved; the system hands out pages when they are first touched.

import { libc } from "../../ffi/libc.ts";
import { OutOfMemoryError } from "../memory_error.ts";

const PAGE_BYTES = 65536;
const PAGES = 65536;
const ALIGN = 64;
/** mmap's flags differ between systems. */
const MAP_SHARED = 1, MAP_PRIVATE = 2, MAP_FIXED = 0x10;
const MAP_ANONYMOUS = Deno.build.os === "darwin" ? 0x1000 : 0x20;
const PROT_READ_WRITE = 3;
const MAP_FAILED = 0xffffffffffffffffn;
/** Linux: back this memory with 2 MiB pages. */
const MADV_HUGEPAGE = 14;

/** Bytes of the linear memory: the most that the tensors and shared segments of one CPU rank can take together. */
export const CAPACITY_BYTES: number = PAGES * PAGE_BYTES;

let memory: WebAssembly.Memory | undefined;
let base = 0n;

function open(): WebAssembly.Memory {
  memory = new WebAssembly.Memory({ initial: PAGES, maximum: PAGES });
  base = BigInt(Deno.UnsafePointer.value(Deno.UnsafePointer.of(new Uint8Array(memory.buffer))));
  // Large pages halve the time in which the kernel copies 1 MiB from rank to rank. It is a wish: a refusal does no harm.
  if (Deno.build.os === "linux") libc().madvise(base, BigInt(CAPACITY_BYTES), MADV_HUGEPAGE);
  return memory;
}

/** The WebAssembly memory, created at the first call. @returns It; it never grows, so views of it stay valid. */
export function linearMemory(): WebAssembly.Memory {
  return memory ?? open();
}

/** The buffer of the linear memory. @returns It; it is never detached. */
export function linearBuffer(): ArrayBuffer {
  return (memory ?? open()).buffer as ArrayBuffer;
}

/**
 * Where a host array lies in the linear memory.
 *
 * @param array Any view.
 * @returns Its byte offset there, or −1 for ordinary memory. Never creates the linear memory.
 */
export function linearOffset(array: ArrayBufferView): number {
  return memory !== undefined && array.buffer === memory.buffer ? array.byteOffset : -1;
}

/**
 * The machine address of a place in the linear memory, for calls into C libraries.
 *
 * @param offset Byte offset in the linear memory.
 * @returns The address.
 */
export function machineAddress(offset: number): bigint {
  if (!memory) open();
  return base + BigInt(offset);
}

// Blocks: sizes are rounded to a class (eight classes per power of two), a freed block waits in its class for the next request
// of it. Training asks for the same sizes every step, so nothing fragments and a request costs a map look-up.
// The first 64 KiB hold the stack of the compiled kernels (kernels/build.sh).
const HEAP_START = PAGE_BYTES;
let heapEnd = HEAP_START;
let sharedStart = CAPACITY_BYTES;
const freeBlocks = new Map<number, number[]>();
const liveBytes = new Map<number, number>();
let used = 0, peak = 0;

function classOf(bytes: number): number {
  const n = Math.max(bytes, ALIGN);
  const step = Math.max(ALIGN, 2 ** (Math.floor(Math.log2(n)) - 3));
  return Math.ceil(n / step) * step;
}

/**
 * Takes a block of the linear memory.
 *
 * @param bytes Least size in bytes.
 * @returns Its byte offset, a multiple of 64; contents are undefined.
 * @throws {OutOfMemoryError} If the linear memory is full.
 */
export function allocate(bytes: number): number {
  if (!memory) open();
  let size = classOf(bytes);
  let offset = freeBlocks.get(size)?.pop();
  if (offset === undefined) {
    if (heapEnd + size <= sharedStart) {
      offset = heapEnd;
      heapEnd += size;
    } else {
      size = reclaimable(size);
      offset = freeBlocks.get(size)!.pop()!;
    }
  }
  liveBytes.set(offset, size);
  used += size;
  if (used > peak) peak = used;
  return offset;
}

/** The smallest larger class with a free block, for when the top of the heap has been reached. */
function reclaimable(size: number): number {
  let best = Infinity;
  for (const [other, list] of freeBlocks) {
    if (other > size && other < best && list.length > 0) best = other;
  }
  if (best === Infinity) {
    throw new OutOfMemoryError(
      `Cannot allocate ${size} bytes on the CPU as one rank's tensors must fit in ${CAPACITY_BYTES} bytes: current value is ${used} bytes in use; a smaller batch, more ranks or recomputed activations take less`,
    );
  }
  return best;
}

/**
 * Gives a block back.
 *
 * @param offset What {@linkcode allocate} returned.
 * @throws {RangeError} If no live block begins there.
 */
export function free(offset: number): void {
  const size = liveBytes.get(offset);
  if (size === undefined) {
    throw new RangeError(`Cannot free as the offset must be a block's: current value is ${offset}`);
  }
  liveBytes.delete(offset);
  const list = freeBlocks.get(size);
  if (list) list.push(offset);
  else freeBlocks.set(size, [offset]);
  used -= size;
}

/** Bytes in use, taken from the heap, in use at most, and still to be had. @returns The four counts. */
export function heapStats(): { used: number; reserved: number; peak: number; free: number } {
  const reserved = heapEnd - HEAP_START;
  return { used, reserved, peak, free: sharedStart - heapEnd + reserved - used };
}

/** Makes the present use the peak. */
export function resetPeak(): void {
  peak = used;
}

/**
 * Maps a file descriptor's memory, shared with other processes, into the linear memory.
 *
 * @param fd The descriptor.
 * @param bytes Its size, a multiple of 64 KiB.
 * @returns The byte offset at which the shared memory lies.
 * @throws {Error} If the system refuses or the linear memory is full.
 */
export function mapShared(fd: number, bytes: number): number {
  if (!memory) open();
  const offset = takeShared(bytes);
  const flags = MAP_SHARED | MAP_FIXED;
  const at = libc().mmap(base + BigInt(offset), BigInt(bytes), PROT_READ_WRITE, flags, fd, 0n);
  if (at === MAP_FAILED) {
    releaseShared(offset, bytes);
    throw new Error(`Cannot map ${bytes} bytes of shared memory: mmap failed`);
  }
  return offset;
}

/**
 * Puts private pages where {@linkcode mapShared} had mapped shared ones, and makes the room free again.
 *
 * @param offset What mapShared returned.
 * @param bytes The size that was given to it.
 */
export function unmapShared(offset: number, bytes: number): void {
  const flags = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS;
  libc().mmap(base + BigInt(offset), BigInt(bytes), PROT_READ_WRITE, flags, -1, 0n);
  releaseShared(offset, bytes);
}

const sharedHoles: { offset: number; bytes: number }[] = [];

function takeShared(bytes: number): number {
  if (bytes <= 0 || bytes % PAGE_BYTES !== 0) {
    throw new RangeError(
      `Cannot map shared memory as its size must be a multiple of ${PAGE_BYTES} bytes: current value is ${bytes}`,
    );
  }
  const hole = sharedHoles.findIndex((h) => h.bytes === bytes);
  if (hole >= 0) return sharedHoles.splice(hole, 1)[0].offset;
  if (sharedStart - bytes < heapEnd) {
    throw new RangeError(
      `Cannot map ${bytes} bytes of shared memory as they must fit beside the tensors: current value is ${
        sharedStart - heapEnd
      } bytes free`,
    );
  }
  sharedStart -= bytes;
  return sharedStart;
}

function releaseShared(offset: number, bytes: number): void {
  sharedHoles.push({ offset, bytes });
}
