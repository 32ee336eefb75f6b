// Copies between a user's elements and shared memory, in bytes. Ordinary typed arrays and tensors in linear memory differ
// only here.

import { bytesOf } from "../../tensor/dtype.ts";
import { linearBuffer } from "../../tensor/cpu/memory.ts";
import type { Region } from "../transport.ts";

let linear: Uint8Array<ArrayBuffer> | undefined;

function memory(): Uint8Array<ArrayBuffer> {
  return linear ??= new Uint8Array(linearBuffer());
}

/**
 * Copies within linear memory.
 *
 * @param from Byte offset of the source.
 * @param to Byte offset of the destination.
 * @param bytes How many.
 */
export function copyLinear(from: number, to: number, bytes: number): void {
  if (bytes > 0) memory().copyWithin(to, from, from + bytes);
}

/** A user's elements as bytes. */
export class UserBytes {
  /** Byte offset in linear memory, or −1. */
  readonly address: number;
  /** Size of an element. */
  readonly width: number;
  /** Number of elements. */
  readonly length: number;
  readonly #bytes: Uint8Array | undefined;

  /** @param region The elements. */
  constructor(region: Region) {
    this.address = region.address;
    this.width = bytesOf(region.dtype);
    this.length = region.length;
    if (region.address < 0) {
      const { buffer, byteOffset, byteLength } = region.array!;
      this.#bytes = new Uint8Array(buffer, byteOffset, byteLength);
    }
  }

  /** Copies bytes to linear memory. @param offset From which byte on. @param to Byte offset there. @param bytes How many. */
  copyOut(offset: number, to: number, bytes: number): void {
    if (bytes <= 0) return;
    if (this.address >= 0) copyLinear(this.address + offset, to, bytes);
    else memory().set(this.#bytes!.subarray(offset, offset + bytes), to);
  }

  /** Fills bytes from linear memory. @param offset From which byte on. @param from Byte offset there. @param bytes How many. */
  copyIn(offset: number, from: number, bytes: number): void {
    if (bytes <= 0) return;
    if (this.address >= 0) copyLinear(from, this.address + offset, bytes);
    else this.#bytes!.set(memory().subarray(from, from + bytes), offset);
  }

  /** Fills bytes from an ordinary array. @param offset From which byte on. @param bytes The array. */
  fill(offset: number, bytes: Uint8Array): void {
    if (this.address >= 0) memory().set(bytes, this.address + offset);
    else this.#bytes!.set(bytes, offset);
  }

  /** Fills bytes from another user's. @param offset From which byte on. @param from The other. @param at Its first byte. @param bytes How many. */
  copyFrom(offset: number, from: UserBytes, at: number, bytes: number): void {
    if (bytes <= 0 || from === this && offset === at) return;
    if (this.address >= 0) from.copyOut(at, this.address + offset, bytes);
    else if (from.address >= 0) this.copyIn(offset, from.address + at, bytes);
    else this.#bytes!.set(from.#bytes!.subarray(at, at + bytes), offset);
  }
}
