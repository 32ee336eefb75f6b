// Host arrays on their way through a GPU: pinned memory that the processor fills and reads, and device memory that NCCL works on. A slot
// is one piece of both. Slots are reused by size and freed when the transport closes, because allocating either stalls the device.

import { checkCudart, CUDART, cudart } from "../../ffi/cudart.ts";
import type { CudaDevice } from "../../tensor/cuda/device.ts";
import type { PinnedMemory } from "../../tensor/cuda/pinned.ts";
import type { CudaStream } from "../../tensor/cuda/streams.ts";
import { bytesOf } from "../../tensor/dtype.ts";
import type { Region } from "../transport.ts";

const SMALLEST_BYTES = 4096;

/** Memory for one host array, on both sides. */
interface Slot {
  readonly bytes: number;
  /** Device address. */
  readonly device: number;
  /** Memory that the processor fills and reads. */
  readonly pinned: PinnedMemory;
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

  /** @param device Whose memory. @param stream Copies are enqueued here. */
  constructor(device: CudaDevice, stream: CudaStream) {
    this.#device = device;
    this.#stream = stream;
  }

  /** Takes a slot for a host array. @param region The array. @param filled Whether its contents go to the device. @returns The slot in use. */
  stage(region: Region, filled: boolean): Staged {
    const bytes = region.length * bytesOf(region.dtype);
    const slot = this.#take(bytes);
    if (filled && bytes > 0) {
      new Uint8Array(slot.pinned.buffer).set(bytesOfArray(region));
      copy(this.#stream, slot.device, slot.pinned.address, bytes, CUDART.hostToDevice);
    }
    return { region, address: BigInt(slot.device), slot };
  }

  /** Enqueues the way back to pinned memory. @param staged The array. */
  fetch({ region, slot }: Staged): void {
    const bytes = region.length * bytesOf(region.dtype);
    if (bytes === 0) return;
    copy(this.#stream, slot.pinned.address, slot.device, bytes, CUDART.deviceToHost);
  }

  /** Ends a use, once the device has. @param staged The array. @param written Whether it gets what {@linkcode Staging.fetch} has brought. */
  finish({ region, slot }: Staged, written: boolean): void {
    if (written && region.length > 0) {
      const bytes = bytesOfArray(region);
      bytes.set(new Uint8Array(slot.pinned.buffer, 0, bytes.byteLength));
    }
    this.#idle.get(slot.bytes)!.push(slot);
  }

  #take(bytes: number): Slot {
    let size = SMALLEST_BYTES;
    while (size < bytes) size *= 2;
    let idle = this.#idle.get(size);
    if (idle === undefined) this.#idle.set(size, idle = []);
    return idle.pop() ?? this.#allocate(size);
  }

  #allocate(bytes: number): Slot {
    const slot = {
      bytes,
      device: this.#device.allocate(bytes),
      pinned: this.#device.pinned(bytes),
    };
    this.#stream.wait(this.#device.stream.record()); // memory is handed out in the order of that stream
    return slot;
  }

  /** Frees all slots; nothing may be in flight. */
  close(): void {
    for (const { device, pinned } of [...this.#idle.values()].flat()) {
      this.#device.free(device);
      pinned[Symbol.dispose]();
    }
    this.#idle.clear();
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
