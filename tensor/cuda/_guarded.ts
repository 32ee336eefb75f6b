// Tensors for tests of kernels: numbers at any distance from an aligned address, with guards before and behind that must stay as they are,
// and results compared with what the reference kernels compute in f64.

import assert from "node:assert/strict";
import { cpuDevice, hostView } from "../cpu/device.ts";
import { fromBf16, toBf16 } from "../cpu/reference/elementwise.ts";
import type { Device } from "../device.ts";
import { type DType, newArray, type TypedArray } from "../dtype.ts";
import { empty, fromArray, type Shape, sizeOf, type Tensor } from "../tensor.ts";

/** Elements of each guard. */
const GUARD = 16;
/** What they hold: exact in every dtype. */
const GUARD_VALUE = 93;

/**
 * Numbers in [−2, 2) from a seed.
 *
 * @param seed The seed.
 * @returns A function that gives the next one.
 */
export function random(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = Math.imul(state ^ (state >>> 15), 0x2c1b3c6d) + 0x6d2b79f5 | 0;
    const bits = Math.imul(state ^ (state >>> 13), 0x297a2d39);
    return ((bits ^ (bits >>> 15)) >>> 0) / 2 ** 30 - 2;
  };
}

/**
 * So many numbers.
 *
 * @param size How many.
 * @param next What gives each.
 * @returns The numbers.
 */
export function numbers(size: number, next: () => number): number[] {
  return Array.from({ length: size }, next);
}

/**
 * A host array of a dtype.
 *
 * @param dtype The dtype.
 * @param values The numbers; rounded to it.
 * @returns The array.
 */
export function encode(dtype: DType, values: ArrayLike<number>): TypedArray {
  const array = newArray(dtype, values.length);
  for (let i = 0; i < values.length; i++) {
    if (dtype === "i64") array[i] = BigInt(values[i]);
    else array[i] = dtype === "bf16" ? toBf16(values[i]) : values[i];
  }
  return array;
}

/**
 * The numbers of a host array.
 *
 * @param dtype Its dtype.
 * @param array The array.
 * @returns The numbers.
 */
export function decode(dtype: DType, array: TypedArray): number[] {
  return Array.from(
    array as ArrayLike<number | bigint>,
    (x) => dtype === "bf16" ? fromBf16(x as number) : Number(x),
  );
}

/** A tensor between guards. */
export class Guarded implements Disposable {
  /** The tensor. */
  readonly tensor: Tensor;
  readonly #whole: Tensor;
  readonly #before: number;

  /**
   * @param device Where.
   * @param dtype Element type.
   * @param shape Sizes of the dimensions.
   * @param values Its elements.
   * @param misalign Elements between an aligned address and the first element.
   */
  constructor(
    device: Device,
    dtype: DType,
    shape: Shape,
    values: ArrayLike<number>,
    misalign: number,
  ) {
    const size = sizeOf(shape);
    this.#before = GUARD + misalign;
    const all = new Array<number>(this.#before + size + GUARD).fill(GUARD_VALUE);
    for (let i = 0; i < size; i++) all[this.#before + i] = values[i];
    this.#whole = empty(device, [all.length], dtype);
    device.write(encode(dtype, all), this.#whole);
    this.tensor = this.#whole.rows(this.#before, this.#before + size).reshape(...shape);
  }

  /** The elements, once it is certain that the guards are as they were. */
  async read(what: string): Promise<number[]> {
    const { dtype, size } = this.tensor;
    const all = decode(dtype, await this.#whole.toArray());
    all.forEach((x, i) => {
      if (i >= this.#before && i < this.#before + size) return;
      assert.equal(x, GUARD_VALUE, `${what}: element ${i - this.#before} of ${size} was written`);
    });
    return all.slice(this.#before, this.#before + size);
  }

  [Symbol.dispose](): void {
    this.#whole[Symbol.dispose]();
  }
}

/**
 * A tensor of the CPU in f64 with the numbers that another dtype would hold.
 *
 * @param dtype Dtype that rounds the numbers.
 * @param shape Sizes of the dimensions.
 * @param values The numbers.
 * @returns The tensor.
 */
export function exact(dtype: DType, shape: Shape, values: ArrayLike<number>): Tensor {
  return fromArray(cpuDevice(), new Float64Array(decode(dtype, encode(dtype, values))), shape);
}

/**
 * The numbers of a CPU tensor in f64.
 *
 * @param tensor The tensor.
 * @returns The numbers.
 */
export function exactNumbers(tensor: Tensor): Float64Array {
  return hostView(tensor) as Float64Array;
}

/**
 * Checks results of a kernel that computes in f32 against exact ones.
 *
 * @param actual Results.
 * @param expected What they are in f64.
 * @param options The dtype they were stored in; their name; the error that computing in f32 may make,
 * relative to the largest, or to `scale` where that is larger.
 */
export function assertNear(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  options: {
    readonly dtype: DType;
    readonly what: string;
    readonly tolerance?: number;
    readonly scale?: number;
  },
): void {
  const { dtype, what, tolerance = 2e-6, scale = 0 } = options;
  let largest = scale;
  for (let i = 0; i < expected.length; i++) {
    if (Number.isFinite(expected[i])) largest = Math.max(largest, Math.abs(expected[i]));
  }
  assert.equal(actual.length, expected.length, what);
  for (let i = 0; i < expected.length; i++) {
    if (Object.is(actual[i], expected[i]) || actual[i] === expected[i]) continue;
    const rounding = dtype === "bf16" ? Math.abs(expected[i]) * 2 ** -8 : 0;
    const allowed = rounding + tolerance * largest;
    if (!(Math.abs(actual[i] - expected[i]) <= allowed)) {
      assert.fail(`${what}[${i}] of ${expected.length}: ${actual[i]} instead of ${expected[i]}`);
    }
  }
}
