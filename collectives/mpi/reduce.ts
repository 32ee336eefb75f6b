// Adds up what the ranks have sent, in rank order whatever the block: `((x_0 + x_1) + x_2) + …`. So a sum over MPI has the same bits
// as over shared memory, and does not depend on how a tensor is cut. MPI_Reduce_local does the arithmetic (vectorised in both
// libraries); f16 and bf16, which it lacks, are converted to f32, reduced and rounded once.

import { checkMpi, type Mpi, type MpiDatatypeName } from "../../ffi/mpi.ts";
import { bytesOf, type DType } from "../../tensor/dtype.ts";
import type { ReduceOp } from "../types.ts";
import { type Bytes, Scratch } from "./memory.ts";

/** Elements reduced at a time, so that a piece stays in the cache while the ranks' pieces are added to it. */
const CHUNK = 8192;

/** What is reduced. */
export interface Reduction {
  /** The library. */
  readonly mpi: Mpi;
  /** Element type. */
  readonly dtype: DType;
  /** Reduction. */
  readonly op: ReduceOp;
  /** This process: its own elements are in the target, not among the slots. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
}

/**
 * `target = slot_0 op … op slot_{rank−1} op target op slot_{rank+1} op …`, then divided by the number of ranks for `avg`.
 *
 * @param what What is reduced.
 * @param slots The ranks' elements, one slot after another; they may be overwritten.
 * @param target This rank's elements, replaced by the result.
 * @param count Elements of each slot and of the target.
 */
export function reduceInRankOrder(
  what: Reduction,
  slots: Bytes,
  target: Bytes,
  count: number,
): void {
  if (what.dtype === "f16" || what.dtype === "bf16") {
    return reduceHalves(what, slots, target, count);
  }
  const { mpi, rank, size } = what;
  const datatype = mpi.datatypes[what.dtype as MpiDatatypeName];
  const op = mpi.ops[what.op === "avg" ? "sum" : what.op];
  const step = bytesOf(what.dtype);
  const slotBytes = BigInt(count * step);
  const { MPI_Reduce_local } = mpi.calls;
  for (let start = 0; start < count; start += CHUNK) {
    const n = Math.min(CHUNK, count - start);
    const own = target.address + BigInt(start * step);
    // MPI's operations commute, so the left part gathers in slot 0 and then goes into this rank's own elements.
    const left = slots.address + BigInt(start * step);
    let slot = left;
    for (let r = 1; r < rank; r++) {
      slot += slotBytes;
      checkMpi(MPI_Reduce_local(slot, left, n, datatype, op), "MPI_Reduce_local");
    }
    if (rank > 0) {
      checkMpi(MPI_Reduce_local(left, own, n, datatype, op), "MPI_Reduce_local");
      slot += slotBytes;
    }
    for (let r = rank + 1; r < size; r++) {
      slot = left + BigInt(r) * slotBytes;
      checkMpi(MPI_Reduce_local(slot, own, n, datatype, op), "MPI_Reduce_local");
    }
    if (what.op === "avg") divide(what, target, start, n);
  }
}

/** Elements of a view of bytes, from `start`. */
function elements<T>(
  array: { new (buffer: ArrayBufferLike, byteOffset: number, length: number): T },
  bytes: Bytes,
  start: number,
  length: number,
  step: number,
): T {
  return new array(bytes.view.buffer, bytes.view.byteOffset + start * step, length);
}

function divide(what: Reduction, target: Bytes, start: number, n: number): void {
  const { dtype, size } = what;
  if (dtype === "f32" || dtype === "f64") {
    // Dividing by a power of two is multiplying by its inverse, to the bit; MPI's vectorised product does that faster.
    if (Number.isInteger(Math.log2(size))) {
      const { mpi } = what;
      const at = target.address + BigInt(start * bytesOf(dtype));
      const by = inverses(dtype, size).address;
      checkMpi(
        mpi.calls.MPI_Reduce_local(by, at, n, mpi.datatypes[dtype], mpi.ops.prod),
        "MPI_Reduce_local",
      );
    } else if (dtype === "f32") {
      const x = elements(Float32Array, target, start, n, 4);
      for (let i = 0; i < n; i++) x[i] /= size;
    } else {
      const x = elements(Float64Array, target, start, n, 8);
      for (let i = 0; i < n; i++) x[i] /= size;
    }
  } else if (dtype === "i64") {
    const x = elements(BigInt64Array, target, start, n, 8);
    for (let i = 0; i < n; i++) x[i] /= BigInt(size);
  } else {
    const x = dtype === "i32"
      ? elements(Int32Array, target, start, n, 4)
      : elements(Uint8Array, target, start, n, 1);
    for (let i = 0; i < n; i++) x[i] = Math.trunc(x[i] / size);
  }
}

const inverseOf = new Map<string, Scratch>();

/** A chunk of 1/size. */
function inverses(dtype: "f32" | "f64", size: number): Scratch {
  const key = `${dtype}/${size}`;
  let found = inverseOf.get(key);
  if (found === undefined) {
    found = new Scratch(CHUNK * bytesOf(dtype));
    if (dtype === "f32") elements(Float32Array, found, 0, CHUNK, 4).fill(1 / size);
    else elements(Float64Array, found, 0, CHUNK, 8).fill(1 / size);
    inverseOf.set(key, found);
  }
  return found;
}

function reduceHalves(what: Reduction, slots: Bytes, target: Bytes, count: number): void {
  const { mpi, rank, size, dtype } = what;
  const op = mpi.ops[what.op === "avg" ? "sum" : what.op];
  using sums = new Scratch(CHUNK * 4);
  using terms = new Scratch(CHUNK * 4);
  for (let start = 0; start < count; start += CHUNK) {
    const n = Math.min(CHUNK, count - start);
    for (let r = 0; r < size; r++) {
      const to = r === 0 ? sums : terms;
      if (r === rank) widen(dtype, target, start, to, n);
      else widen(dtype, slots, r * count + start, to, n);
      if (r > 0) {
        checkMpi(
          mpi.calls.MPI_Reduce_local(terms.address, sums.address, n, mpi.datatypes.f32, op),
          "MPI_Reduce_local",
        );
      }
    }
    if (what.op === "avg") divide({ ...what, dtype: "f32" }, sums, 0, n);
    narrow(dtype, sums, target, start, n);
  }
}

/** f16 or bf16 to f32, exact. */
function widen(dtype: DType, from: Bytes, start: number, to: Bytes, n: number): void {
  if (dtype === "f16") {
    elements(Float32Array, to, 0, n, 4).set(elements(Float16Array, from, start, n, 2));
    return;
  }
  const source = elements(Uint16Array, from, start, n, 2);
  const bits = elements(Uint32Array, to, 0, n, 4);
  for (let i = 0; i < n; i++) bits[i] = source[i] << 16;
}

/** f32 to f16 or bf16, to nearest, ties to even. */
function narrow(dtype: DType, from: Bytes, to: Bytes, start: number, n: number): void {
  if (dtype === "f16") {
    elements(Float16Array, to, start, n, 2).set(elements(Float32Array, from, 0, n, 4));
    return;
  }
  const bits = elements(Uint32Array, from, 0, n, 4);
  const target = elements(Uint16Array, to, start, n, 2);
  for (let i = 0; i < n; i++) {
    const u = bits[i];
    target[i] = (u & 0x7fffffff) > 0x7f800000
      ? (u >>> 16) | 0x40 // stays a NaN
      : (u + 0x7fff + ((u >>> 16) & 1)) >>> 16;
  }
}
