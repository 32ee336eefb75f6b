// The element types that tensors and collectives carry, and the typed array that holds each on the host.
// Not here: conversion kernels (tensor/cpu, tensor/cuda) and the codes that MPI or NCCL give to a type (ffi/).

/** Name of an element type: IEEE floats, bfloat16, and integers. */
export type DType = "f32" | "f64" | "f16" | "bf16" | "i32" | "u8" | "i64" | "i16";

/** A typed array that a collective or a tensor accepts. A `Uint16Array` holds the bits of bfloat16 numbers. */
export type TypedArray =
  | Float32Array
  | Float64Array
  | Float16Array
  | Uint16Array
  | Int32Array
  | Uint8Array
  | BigInt64Array
  | Int16Array;

interface TypedArrayConstructor {
  new (length: number): TypedArray;
  new (buffer: ArrayBufferLike, byteOffset?: number, length?: number): TypedArray;
}

interface DTypeInfo {
  /** Size of one element in bytes. */
  readonly bytes: number;
  /** Constructor of the host array. */
  readonly array: TypedArrayConstructor;
}

const INFO: Readonly<Record<DType, DTypeInfo>> = {
  f32: { bytes: 4, array: Float32Array as TypedArrayConstructor },
  f64: { bytes: 8, array: Float64Array as TypedArrayConstructor },
  f16: { bytes: 2, array: Float16Array as TypedArrayConstructor },
  bf16: { bytes: 2, array: Uint16Array as TypedArrayConstructor },
  i32: { bytes: 4, array: Int32Array as TypedArrayConstructor },
  u8: { bytes: 1, array: Uint8Array as TypedArrayConstructor },
  i64: { bytes: 8, array: BigInt64Array as TypedArrayConstructor },
  i16: { bytes: 2, array: Int16Array as TypedArrayConstructor },
};

/** Every element type, in a fixed order that is safe to send between ranks as an index. */
export const DTYPES: readonly DType[] = ["f32", "f64", "f16", "bf16", "i32", "u8", "i64", "i16"];

/**
 * The floating type in which sums over numbers of a type are kept.
 *
 * @param dtype The numbers' type.
 * @returns f64 for f64, else f32.
 */
export function wideDtype(dtype: DType): DType {
  return dtype === "f64" ? "f64" : "f32";
}

/**
 * Size of one element of a type.
 *
 * @param dtype The element type.
 * @returns Its size in bytes.
 *
 * @example
 * ```ts
 * import { bytesOf } from "./dtype.ts";
 * import assert from "node:assert/strict";
 *
 * assert.equal(bytesOf("bf16"), 2);
 * ```
 */
export function bytesOf(dtype: DType): number {
  return INFO[dtype].bytes;
}

/**
 * The element type that a typed array holds; a `Uint16Array` means bfloat16.
 *
 * @param array The typed array.
 * @returns Its element type.
 * @throws {TypeError} If no element type is held by such an array.
 */
export function dtypeOf(array: TypedArray): DType {
  if (array instanceof Float32Array) return "f32";
  if (array instanceof Int32Array) return "i32";
  if (array instanceof Int16Array) return "i16";
  if (array instanceof Uint8Array) return "u8";
  if (array instanceof Float64Array) return "f64";
  if (array instanceof Uint16Array) return "bf16";
  if (array instanceof Float16Array) return "f16";
  if (array instanceof BigInt64Array) return "i64";
  throw new TypeError(
    `Cannot take the data as its type must be one of ${DTYPES.join(", ")}: current value is ${
      Object.prototype.toString.call(array)
    }`,
  );
}

/**
 * A host array of a type over memory that exists already.
 *
 * @param dtype The element type.
 * @param buffer The memory.
 * @param byteOffset Where the array begins, in bytes; a multiple of the element's size.
 * @param length Number of elements.
 * @returns The view; it shares the memory.
 */
export function viewAs(
  dtype: DType,
  buffer: ArrayBufferLike,
  byteOffset: number,
  length: number,
): TypedArray {
  return new INFO[dtype].array(buffer, byteOffset, length);
}

/**
 * A new host array of zeros.
 *
 * @param dtype The element type.
 * @param length Number of elements.
 * @returns The array.
 */
export function newArray(dtype: DType, length: number): TypedArray {
  return new INFO[dtype].array(length);
}
