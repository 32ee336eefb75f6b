// Elementwise reduction of several sources in linear memory, in rank order: ((x0 + x1) + x2) + …, whatever the number of
// elements, so that all ranks get equal bits. f16 and bf16 are added in f32 and rounded once. An average divides at the end,
// integers toward zero. Here is the plain reference; `kernels.ts` does the same with SIMD.

import type { DType } from "../../tensor/dtype.ts";
import { linearBuffer } from "../../tensor/cpu/memory.ts";
import type { ReduceOp } from "../types.ts";

/**
 * Reduces in plain TypeScript.
 *
 * @param dtype Element type.
 * @param op Reduction.
 * @param sources Byte offsets of the contributions in linear memory, in rank order.
 * @param out Byte offset of the result; may be one of the sources.
 * @param length Number of elements.
 */
export function reduceReference(
  dtype: DType,
  op: ReduceOp,
  sources: readonly number[],
  out: number,
  length: number,
): void {
  const view = (at: number) => viewOf(dtype, at, length);
  const inputs = sources.map(view), result = view(out);
  if (dtype === "i64") return reduceBig(op, inputs as BigInt64Array[], result as BigInt64Array);
  const round = dtype === "f64" || dtype === "i32" || dtype === "u8"
    ? (x: number) => x
    : Math.fround;
  const times = dtype === "i32" ? Math.imul : (a: number, b: number) => round(a * b);
  for (let i = 0; i < length; i++) {
    let x = decode(dtype, inputs[0][i] as number);
    for (let s = 1; s < inputs.length; s++) {
      const y = decode(dtype, inputs[s][i] as number);
      if (op === "min") x = Math.min(x, y);
      else if (op === "max") x = Math.max(x, y);
      else if (op === "prod") x = dtype === "u8" ? (x * y) & 255 : times(x, y);
      else x = round(x + y);
    }
    if (op === "avg") {
      x = x / inputs.length;
      x = dtype === "i32" || dtype === "u8" ? Math.trunc(x) : round(x);
    }
    result[i] = encode(dtype, x);
  }
}

function reduceBig(op: ReduceOp, inputs: BigInt64Array[], result: BigInt64Array): void {
  for (let i = 0; i < result.length; i++) {
    let x = inputs[0][i];
    for (let s = 1; s < inputs.length; s++) {
      const y = inputs[s][i];
      if (op === "min") x = x < y ? x : y;
      else if (op === "max") x = x > y ? x : y;
      else if (op === "prod") x = BigInt.asIntN(64, x * y);
      else x = BigInt.asIntN(64, x + y);
    }
    result[i] = op === "avg" ? x / BigInt(inputs.length) : x;
  }
}

const bits = new Uint32Array(1);
const float = new Float32Array(bits.buffer);

function decode(dtype: DType, x: number): number {
  if (dtype !== "bf16") return x;
  bits[0] = x << 16;
  return float[0];
}

/** What must be stored for a number; typed arrays round f16, f32 and wrap integers themselves. */
function encode(dtype: DType, x: number): number {
  if (dtype !== "bf16") return x;
  float[0] = x;
  if (Number.isNaN(x)) return (bits[0] >>> 16) | 0x40;
  return (bits[0] + 0x7fff + ((bits[0] >>> 16) & 1)) >>> 16;
}

type NumberArray =
  | Float32Array
  | Float64Array
  | Float16Array
  | Uint16Array
  | Int32Array
  | Uint8Array
  | BigInt64Array;

function viewOf(dtype: DType, at: number, length: number): NumberArray {
  const buffer = linearBuffer();
  switch (dtype) {
    case "f32":
      return new Float32Array(buffer, at, length);
    case "f64":
      return new Float64Array(buffer, at, length);
    case "f16":
      return new Float16Array(buffer, at, length);
    case "bf16":
      return new Uint16Array(buffer, at, length);
    case "i32":
      return new Int32Array(buffer, at, length);
    case "u8":
      return new Uint8Array(buffer, at, length);
    case "i64":
      return new BigInt64Array(buffer, at, length);
    case "i16":
      throw new TypeError(
        `Cannot reduce as the dtype must hold numbers: current value is ${dtype}`,
      );
  }
}
