// From what a user passes to a collective (typed arrays, tensors, counts) to regions that a transport can trust, with the
// errors that wrong arguments get. Nothing here knows how bytes move.

import { bytesOf, type DType, dtypeOf, type TypedArray, viewAs } from "../tensor/dtype.ts";
import { Tensor } from "../tensor/tensor.ts";
import type { Device } from "../tensor/device.ts";
import { linearBuffer, linearOffset } from "../tensor/cpu/memory.ts";
import type { Region } from "./transport.ts";
import type { Counts, Data } from "./types.ts";

/** Who calls what, for messages: `allReduce on rank 1 of world`. */
export interface Caller {
  /** Name of the operation. */
  readonly operation: string;
  /** This rank. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
  /** Name of the communicator. */
  readonly name: string;
  /** The device whose tensors are taken; null takes CPU tensors of any device object. */
  readonly device: Device | null;
}

/**
 * The error of a wrong argument.
 *
 * @param caller Who calls what.
 * @param rule What must hold: "out must have 8 elements".
 * @param value What was given.
 * @returns The error.
 */
export function argumentError(caller: Caller, rule: string, value: unknown): RangeError {
  return new RangeError(
    `Cannot run ${caller.operation} on rank ${caller.rank} of ${caller.name} as ${rule}: current value is ${value}`,
  );
}

/** Elements on the host; the view of linear memory is made when a transport asks for it. */
export class HostRegion implements Region {
  /** Element type. */
  dtype: DType;
  /** Number of elements. */
  length: number;
  /** Byte offset in linear memory, or −1. */
  address: number;
  #array: TypedArray | undefined;

  /** @param dtype Element type. @param length Elements. @param address In linear memory, or −1. @param array The ordinary array, if it is one. */
  constructor(dtype: DType, length: number, address: number, array: TypedArray | undefined) {
    this.dtype = dtype;
    this.length = length;
    this.address = address;
    this.#array = array;
  }

  /** Describes other elements from now on: the communicator reuses two regions for what is complete at once. @returns This. */
  set(dtype: DType, length: number, address: number, array: TypedArray | undefined): HostRegion {
    this.dtype = dtype;
    this.length = length;
    this.address = address;
    this.#array = array;
    return this;
  }

  /** A region of the same elements that nobody reuses. @returns It. */
  keep(): HostRegion {
    return new HostRegion(this.dtype, this.length, this.address, this.#array);
  }

  /** The elements as a typed array. */
  get array(): TypedArray {
    return this.#array ??= viewAs(this.dtype, linearBuffer(), this.address, this.length);
  }

  /** The first elements. @param length How many. @returns A region of them. */
  first(length: number): HostRegion {
    const array = this.#array?.subarray(0, length) as TypedArray | undefined;
    return new HostRegion(this.dtype, length, this.address, array);
  }
}

/**
 * Checks one argument and describes its elements.
 *
 * @param caller Who calls what.
 * @param data The argument.
 * @param what Its name in messages: `x`, `out`.
 * @param into The region that describes them if they are on the host.
 * @returns Its elements.
 * @throws {TypeError} If it is no typed array or tensor.
 * @throws {RangeError} If a tensor is disposed or lives on another device.
 */
export function regionOf(caller: Caller, data: Data, what: string, into: HostRegion): Region {
  if (data instanceof Tensor) return tensorRegion(caller, data, what, into);
  if (!ArrayBuffer.isView(data)) {
    throw new TypeError(
      argumentError(caller, `${what} must be a typed array or a tensor`, describe(data)).message,
    );
  }
  return into.set(dtypeOf(data), data.length, linearOffset(data), data);
}

function tensorRegion(caller: Caller, tensor: Tensor, what: string, into: HostRegion): Region {
  if (tensor.disposed) {
    throw argumentError(caller, `${what} must not be disposed`, "a freed tensor");
  }
  const { device, dtype, size, address } = tensor;
  if (caller.device === null ? device.kind !== "cpu" : device !== caller.device) {
    throw argumentError(
      caller,
      `${what} must be on ${caller.device?.name ?? "the CPU"}`,
      `a tensor on ${device.name}`,
    );
  }
  if (device.kind === "cpu") return into.set(dtype, size, address, undefined);
  return { dtype, length: size, array: null, address };
}

function describe(value: unknown): string {
  return value === null ? "null" : typeof value === "object" ? "an object" : String(value);
}

/**
 * The first elements of a region.
 *
 * @param region The region.
 * @param length How many, at most its length.
 * @returns A region of them.
 */
export function firstOf(region: Region, length: number): Region {
  if (length === region.length) return region;
  if (region instanceof HostRegion) return region.first(length);
  return { ...region, length };
}

/**
 * Checks that two regions hold one element type.
 *
 * @param caller Who calls what.
 * @param x The first, called `x` in the message.
 * @param out The second, called `out`.
 */
export function sameDType(caller: Caller, x: Region, out: Region): void {
  if (x.dtype !== out.dtype) {
    throw argumentError(caller, `out must be ${x.dtype} as x is`, out.dtype);
  }
}

/**
 * Checks the number of elements of a region.
 *
 * @param caller Who calls what.
 * @param region The region.
 * @param length What it must be.
 * @param what Its name in the message.
 */
export function haveLength(caller: Caller, region: Region, length: number, what: string): void {
  if (region.length !== length) {
    throw argumentError(caller, `${what} must have ${length} elements`, region.length);
  }
}

/**
 * Checks that a region divides into one block per rank.
 *
 * @param caller Who calls what.
 * @param region The region.
 * @param what Its name in the message.
 * @returns Elements of a block.
 */
export function blockOf(caller: Caller, region: Region, what: string): number {
  if (region.length % caller.size !== 0) {
    throw argumentError(
      caller,
      `${what} must have a multiple of ${caller.size} elements (one block per rank)`,
      region.length,
    );
  }
  return region.length / caller.size;
}

/**
 * Checks a rank number.
 *
 * @param caller Who calls what.
 * @param value The number.
 * @param what Its name in the message.
 */
export function beRank(caller: Caller, value: number, what: string): void {
  if (!Number.isInteger(value) || value < 0 || value >= caller.size) {
    throw argumentError(caller, `${what} must be a rank, 0 to ${caller.size - 1}`, value);
  }
}

/**
 * Checks counts and adds them up.
 *
 * @param caller Who calls what.
 * @param counts One count per rank.
 * @param what Their name in the message.
 * @returns Their sum.
 */
export function sumOf(caller: Caller, counts: Counts, what: string): number {
  if (counts.length !== caller.size) {
    throw argumentError(caller, `${what} must have ${caller.size} entries`, counts.length);
  }
  let sum = 0;
  for (let r = 0; r < counts.length; r++) {
    const n = counts[r];
    if (!(n >= 0) || (n | 0) !== n && !Number.isSafeInteger(n)) {
      throw argumentError(caller, `${what} must be whole numbers >= 0`, `${n} for rank ${r}`);
    }
    sum += n;
  }
  return sum;
}

/**
 * Checks that two regions share no byte, or that one lies in the other where the operation works in place.
 *
 * @param caller Who calls what.
 * @param x The source.
 * @param out The destination.
 * @param place At which element of `out` the source may begin; where that is below 0, `out` at as many elements of `x`. @default {none: all-to-alls cannot work in place}
 */
export function beApart(caller: Caller, x: Region, out: Region, place?: number): void {
  if (x.length === 0 || out.length === 0) return;
  let from = x.address, to = out.address;
  if (from < 0 || to < 0) {
    if (from >= 0 || to >= 0 || x.array!.buffer !== out.array!.buffer) return;
    from = x.array!.byteOffset;
    to = out.array!.byteOffset;
  }
  const width = bytesOf(x.dtype);
  if (from >= to + out.length * width || to >= from + x.length * width) return;
  if (place !== undefined && from - to === place * width) return;
  const rule = place === undefined
    ? "x and out must not overlap"
    : place === 0
    ? "x and out must begin at the same element or not overlap"
    : place > 0
    ? `x must begin at element ${place} of out or not overlap it`
    : `out must begin at element ${-place} of x or not overlap it`;
  throw argumentError(caller, rule, "memory that both use");
}
