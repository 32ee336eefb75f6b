// Host arrays on their way through a GPU: pinned memory that the processor fills and reads, and device memory that NCCL works on. A slot
// is one piece of both, page-locked in parts because one call for much of it would hold up the main thread. Slots are reused by size and
// freed when the transport closes, because allocating either stalls the device.

import { checkCudart, CUDART, cudart } from "../../ffi/cudart.ts";
import type { CudaDevice } from "../../tensor/cuda/device.ts";
import type { PinnedMemory } from "../../tensor/cuda/pinned.ts";
import type { CudaStream } from "../../tensor/cuda/streams.ts";
import { bytesOf } from "../../tensor/dtype.ts";
import type { Region } from "../transport.ts";

const SMALLEST_BYTES = 4096;
/** Memory that is page-locked at a time, which takes some 10 ms. */
const PART_BYTES = 32 * 2 ** 20;

/** Memory for one host array, on both sides. */
interface Slot {
  readonly bytes: number;
  /** Device address. */
  readonly device: number;
  /** Memory that the processor fills and reads: parts of `PART_BYTES`. */
  readonly pinned: readonly PinnedMemory[];
}

/** A host array that an operation in flight uses. */
export interface Staged {
  /** The array. */
  readonly region: Region;
  /** Where NCCL reads or writes it. */
  readonly address: bigint;
  /** @ignore */
  readonly slot: Slot;
}

/** The slots of a transport. */
export class Staging {
  readonly #device: CudaDevice;
  readonly #stream: CudaStream;
  readonly #idle = new Map<number, Slot[]>();
  readonly #slots: Slot[] = [];

  /** @param device Whose memory. @param stream Copies are enqueued here. */
  constructor(device: CudaDevice, stream: CudaStream) {
    this.#device = device;
    this.#stream = stream;
  }

  /** Takes a slot for a host array. @param region The array. @param filled Whether its contents go to the device. @returns The slot in use. */
  stage(region: Region, filled: boolean): Staged {
    const bytes = region.length * bytesOf(region.dtype);
    const slot = this.#take(bytes);
    if (filled) {
      const source = bytesOfArray(region);
      eachPart(slot, bytes, ({ buffer, address }, at, length) => {
        new Uint8Array(buffer).set(source.subarray(at, at + length));
        copy(this.#stream, slot.device + at, address, length, CUDART.hostToDevice);
      });
    }
    return { region, address: BigInt(slot.device), slot };
  }

  /** Enqueues the way back to pinned memory. @param staged The array. */
  fetch({ region, slot }: Staged): void {
    eachPart(slot, region.length * bytesOf(region.dtype), ({ address }, at, length) => {
      copy(this.#stream, address, slot.device + at, length, CUDART.deviceToHost);
    });
  }

  /** Ends a use, once the device has. @param staged The array. @param written Whether it gets what {@linkcode Staging.fetch} has brought. */
  finish({ region, slot }: Staged, written: boolean): void {
    if (written) {
      const target = bytesOfArray(region);
      eachPart(slot, target.byteLength, ({ buffer }, at, length) => {
        target.set(new Uint8Array(buffer, 0, length), at);
      });
    }
    this.#idle.get(slot.bytes)!.push(slot);
  }

  #take(bytes: number): Slot {
    let size = SMALLEST_BYTES;
    while (size < bytes && size < PART_BYTES) size *= 2;
    if (size < bytes) size = Math.ceil(bytes / PART_BYTES) * PART_BYTES;
    let idle = this.#idle.get(size);
    if (idle === undefined) this.#idle.set(size, idle = []);
    return idle.pop() ?? this.#allocate(size);
  }

  /** What a part of it cannot get is given back before the error is told. */
  #allocate(bytes: number): Slot {
    const device = this.#device.allocate(bytes);
    const pinned: PinnedMemory[] = [];
    try {
      for (let at = 0; at < bytes; at += PART_BYTES) {
        pinned.push(this.#device.pinned(Math.min(PART_BYTES, bytes - at)));
      }
      this.#stream.wait(this.#device.stream.record()); // memory is handed out in the order of that stream
    } catch (error) {
      for (const part of pinned) part[Symbol.dispose]();
      this.#device.free(device);
      throw error;
    }
    const slot = { bytes, device, pinned };
    this.#slots.push(slot);
    return slot;
  }

  /** Frees all slots, also those whose operation was never enqueued; nothing may be in flight. */
  close(): void {
    for (const { device, pinned } of this.#slots) {
      this.#device.free(device);
      for (const part of pinned) part[Symbol.dispose]();
    }
    this.#slots.length = 0;
    this.#idle.clear();
  }
}

function eachPart(
  { pinned }: Slot,
  bytes: number,
  use: (part: PinnedMemory, at: number, length: number) => void,
): void {
  for (let i = 0, at = 0; at < bytes; i++, at += PART_BYTES) {
    use(pinned[i], at, Math.min(PART_BYTES, bytes - at));
  }
}

/**
 * Enqueues a copy.
 *
 * @param stream Where.
 * @param to Address.
 * @param from Address.
 * @param bytes How many.
 * @param direction A value of {@linkcode CUDART}.
 */
export function copy(
  stream: CudaStream,
  to: number | bigint,
  from: number | bigint,
  bytes: number,
  direction: number,
): void {
  const { calls } = cudart();
  const code = calls.cudaMemcpyAsync(
    BigInt(to),
    BigInt(from),
    BigInt(bytes),
    direction,
    stream.handle,
  );
  checkCudart(code, "cudaMemcpyAsync");
}

function bytesOfArray(region: Region): Uint8Array {
  const { buffer, byteOffset, byteLength } = region.array!;
  return new Uint8Array(buffer, byteOffset, byteLength);
}
