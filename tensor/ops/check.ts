// Checks that every operation makes before a kernel runs, and the span it records after. Written for the path where
// nothing is wrong: comparisons only, and no text is built until a check has failed.

import { type Category, now, recorder } from "../../trace/mod.ts";
import type { ActivationBackwardOptions, Device, RowGroups } from "../device.ts";
import { bytesOf, type DType } from "../dtype.ts";
import type { Tensor } from "../tensor.ts";

/** Throws as `Cannot <op> as <what>: current value is <value>`. */
export function fail(op: string, what: string, value: unknown): never {
  throw new RangeError(`Cannot ${op} as ${what}: current value is ${value}`);
}

/** A tensor must be alive, on this device, of this dtype. */
export function alive(op: string, name: string, x: Tensor, device: Device, dtype: DType): void {
  if (x.disposed) fail(op, `${name} must be alive`, `a disposed tensor [${x.shape}]`);
  if (x.device !== device) fail(op, `${name} must be on ${device.name}`, x.device.name);
  if (x.dtype !== dtype) {
    throw new TypeError(
      `Cannot ${op} as the dtype of ${name} must be ${dtype}: current value is ${x.dtype}`,
    );
  }
}

/** The tensor that decides device and dtype must be alive and of a floating type. */
export function lead(op: string, name: string, x: Tensor): void {
  if (x.disposed) fail(op, `${name} must be alive`, `a disposed tensor [${x.shape}]`);
  const { dtype } = x;
  if (dtype !== "f32" && dtype !== "f64" && dtype !== "f16" && dtype !== "bf16") {
    throw new TypeError(
      `Cannot ${op} as the dtype of ${name} must be floating: current value is ${dtype}`,
    );
  }
}

/** A tensor must be alive, like `x` in device and dtype, and a matrix of these sizes. */
export function matrix(
  op: string,
  name: string,
  m: Tensor,
  like: Tensor,
  rows: number,
  columns: number,
): void {
  alive(op, name, m, like.device, like.dtype);
  const { shape } = m;
  if (shape.length !== 2 || shape[0] !== rows || shape[1] !== columns) {
    fail(op, `${name} must have shape [${rows},${columns}]`, `[${shape}]`);
  }
}

/** A tensor must be alive, like `like` in device and dtype, and have this number of elements. */
export function elements(op: string, name: string, x: Tensor, like: Tensor, size: number): void {
  alive(op, name, x, like.device, like.dtype);
  if (x.size !== size) fail(op, `${name} must have ${size} elements`, `[${x.shape}]`);
}

/** A tensor of indices or positions must be alive, i32, on the device, and have this number of elements. */
export function indices(op: string, name: string, x: Tensor, like: Tensor, size: number): void {
  alive(op, name, x, like.device, "i32");
  if (x.size !== size) fail(op, `${name} must have ${size} elements`, `[${x.shape}]`);
}

/** Factors of rows, or their gradients, are as many as rows and in the dtype of statistics, where there are any. */
export function rowScales(
  op: string,
  name: string,
  scales: Tensor | undefined,
  like: Tensor,
  rows: number,
): void {
  if (scales) statistics(op, name, scales, like, rows);
}

/** The scales of an activation's gradient, where there are any, and theirs share no memory with each other or the other tensors. */
export function disjointScales(
  op: string,
  options: ActivationBackwardOptions | undefined,
  dX: Tensor,
  dOut: Tensor,
  x: Tensor,
): void {
  const scales = options?.scales, dScales = options?.dScales;
  if (scales) disjoint(op, "scales", dX, scales);
  if (!dScales) return;
  if (scales) disjoint(op, "scales", dScales, scales);
  disjoint(op, "dScales", dX, dScales);
  disjoint(op, "dScales", dOut, dScales);
  disjoint(op, "dScales", x, dScales);
}

/** A tensor must have two dimensions. */
export function isMatrix(op: string, name: string, x: Tensor): void {
  if (x.shape.length !== 2) fail(op, `${name} must be a matrix`, `[${x.shape}]`);
}

/** The dtype in which statistics of a tensor are kept: f64 for f64, else f32. */
export function statistics(
  op: string,
  name: string,
  x: Tensor,
  like: Tensor,
  size: number,
): void {
  alive(op, name, x, like.device, like.dtype === "f64" ? "f64" : "f32");
  if (x.size !== size) fail(op, `${name} must have ${size} elements`, `[${x.shape}]`);
}

/** A tensor must be alive, on the device and have this number of elements, in the dtype of `like` or, where that has 16 bits, in f32. */
export function wide(op: string, name: string, x: Tensor, like: Tensor, size: number): void {
  const half = like.dtype === "bf16" || like.dtype === "f16";
  alive(op, name, x, like.device, half && x.dtype === "f32" ? "f32" : like.dtype);
  if (x.size !== size) fail(op, `${name} must have ${size} elements`, `[${x.shape}]`);
}

/** Like {@linkcode wide}, for a matrix of these sizes. */
export function wideMatrix(
  op: string,
  name: string,
  m: Tensor,
  like: Tensor,
  rows: number,
  columns: number,
): void {
  wide(op, name, m, like, m.size);
  const { shape } = m;
  if (shape.length !== 2 || shape[0] !== rows || shape[1] !== columns) {
    fail(op, `${name} must have shape [${rows},${columns}]`, `[${shape}]`);
  }
}

/** An output must not share memory with an input. */
export function disjoint(op: string, name: string, out: Tensor, x: Tensor): void {
  if (
    out.address < x.address + x.size * bytesOf(x.dtype) &&
    x.address < out.address + out.size * bytesOf(out.dtype)
  ) {
    fail(op, `out must not overlap ${name}`, `[${out.shape}] over [${x.shape}]`);
  }
}

/** Like {@linkcode disjoint}, but the same tensor is allowed: the operation then works in place. */
export function disjointOrSame(op: string, name: string, out: Tensor, x: Tensor): void {
  if (out.address !== x.address) disjoint(op, name, out, x);
}

/** Row groups must be as many as `count`, on the device; their offsets must ascend up to `rows`, where the host knows them. */
export function rowGroups(
  op: string,
  groups: RowGroups,
  like: Tensor,
  count: number,
  rows: number,
): void {
  const { offsets, host } = groups;
  alive(op, "offsets", offsets, like.device, "i32");
  if (offsets.size !== count + 1) {
    fail(op, `offsets must have ${count + 1} entries`, offsets.size);
  }
  if (host) ascending(op, host, count, rows);
}

/** Offsets must be `groups + 1` ascending row numbers from 0 up to `rows`. */
export function ascending(op: string, offsets: Int32Array, groups: number, rows: number): void {
  if (offsets.length !== groups + 1) {
    fail(op, `offsets must have ${groups + 1} entries`, offsets.length);
  }
  let last = 0;
  for (let g = 0; g <= groups; g++) {
    if (offsets[g] < last) fail(op, "offsets must ascend from 0", `[${offsets}]`);
    last = offsets[g];
  }
  if (last > rows) fail(op, `offsets must end at ${rows} at most`, last);
}

/** Length of a row of a tensor of at least one dimension. */
export function rowWidth(op: string, name: string, x: Tensor): number {
  const { shape } = x;
  if (shape.length === 2) return shape[1];
  if (shape.length === 0) fail(op, `${name} must have rows`, "a scalar");
  let width = 1;
  for (let i = 1; i < shape.length; i++) width *= shape[i];
  return width;
}

/** Records that a kernel ran from `start` until now; on a device that works asynchronously, its launch. */
export function ran(name: string, category: Category, start: number): void {
  recorder.record({ track: "compute", name, category, start, end: now() });
}
