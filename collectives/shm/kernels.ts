// The WebAssembly side of the transport: reductions with SIMD, and one-round exchanges of small messages that return without
// having made an object. `reduce.ts` holds the plain reference of the reductions.

import { type DType, DTYPES } from "../../tensor/dtype.ts";
import { allocate, linearBuffer, linearMemory } from "../../tensor/cpu/memory.ts";
import { REDUCE_OPS, type ReduceOp } from "../types.ts";
// @ts-types="./reduce_wasm.d.ts"
import module from "./reduce_wasm.js";

/** The functions of reduce.c; addresses and sizes are bytes in linear memory. */
export interface Kernels {
  reduce(
    dtype: number,
    op: number,
    sources: number,
    ranks: number,
    out: number,
    copy: number,
    length: number,
  ): void;
  small_barrier(round: number): number;
  small_all_reduce(
    round: number,
    dtype: number,
    op: number,
    x: number,
    out: number,
    length: number,
    bytes: number,
  ): number;
  small_all_gather(round: number, x: number, out: number, bytes: number): number;
  small_all_to_all(round: number, x: number, out: number, counts: number, area: number): number;
}

let instance: Kernels | undefined;

/** The compiled functions, on the first call. @returns Them. */
export function kernels(): Kernels {
  if (instance) return instance;
  const { exports } = new WebAssembly.Instance(module, { env: { memory: linearMemory() } });
  return instance = exports as unknown as Kernels;
}

const MOST_SOURCES = 1024;
let tableAt = 0;
let table: Uint32Array;

/**
 * Reduces contributions in rank order with SIMD.
 *
 * @param dtype Element type.
 * @param op Reduction.
 * @param sources Byte offsets of the contributions in linear memory, in rank order.
 * @param out Byte offset of the result; may be one of the sources.
 * @param copy Byte offset of a second place for the result, or 0.
 * @param length Number of elements.
 */
export function reduceLinear(
  dtype: DType,
  op: ReduceOp,
  sources: readonly number[],
  out: number,
  copy: number,
  length: number,
): void {
  if (tableAt === 0) {
    tableAt = allocate(4 * MOST_SOURCES);
    table = new Uint32Array(linearBuffer(), tableAt, MOST_SOURCES);
  }
  const ranks = sources.length;
  for (let s = 0; s < ranks; s++) table[s] = sources[s];
  const code = DTYPES.indexOf(dtype), reduction = REDUCE_OPS.indexOf(op);
  (instance ?? kernels()).reduce(code, reduction, tableAt, ranks, out, copy, length);
}
