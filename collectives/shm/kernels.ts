// Reductions over linear memory.

import type { DType } from "../../tensor/dtype.ts";
import type { ReduceOp } from "../types.ts";
import { reduceReference } from "./reduce.ts";

/** Reduces. See reduceReference. */
export function reduceLinear(
  dtype: DType,
  op: ReduceOp,
  sources: readonly number[],
  out: number,
  length: number,
): void {
  reduceReference(dtype, op, sources, out, length);
}
