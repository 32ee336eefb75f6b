// Tables of the rotary positions' cosines and sines, in linear memory. A table grows to the highest position asked for and
// is then shared by all calls with the same head width and base.

import { allocate, free, linearBuffer } from "./memory.ts";

interface Table {
  readonly offset: number;
  readonly positions: number;
}

const tables = new Map<string, Table>();

/**
 * A table with C/2 cosines, then C/2 sines of `position · theta^(−2i/C)` for every position from 0.
 *
 * @param dtype f32 or f64.
 * @param C Width of a head.
 * @param theta Base of the frequencies.
 * @param positions The positions that will be looked up.
 * @returns Byte offset of the table.
 * @throws {RangeError} If a position is negative.
 */
export function turns(dtype: string, C: number, theta: number, positions: Int32Array): number {
  let highest = 0;
  for (let i = 0; i < positions.length; i++) {
    if (positions[i] > highest) highest = positions[i];
    else if (positions[i] < 0) {
      throw new RangeError(
        `Cannot rotate as every position must be >= 0: current value is ${positions[i]}`,
      );
    }
  }
  const key = `${dtype} ${C} ${theta}`;
  const table = tables.get(key);
  if (table && highest < table.positions) return table.offset;
  if (table) free(table.offset);
  const grown = make(dtype, C, theta, Math.max(256, 2 ** Math.ceil(Math.log2(highest + 1))));
  tables.set(key, grown);
  return grown.offset;
}

function make(dtype: string, C: number, theta: number, positions: number): Table {
  const offset = allocate(positions * C * (dtype === "f32" ? 4 : 8)), half = C / 2;
  const view = dtype === "f32"
    ? new Float32Array(linearBuffer(), offset, positions * C)
    : new Float64Array(linearBuffer(), offset, positions * C);
  for (let position = 0; position < positions; position++) {
    for (let i = 0; i < half; i++) {
      const angle = position * theta ** (-2 * i / C);
      view[position * C + i] = Math.cos(angle);
      view[position * C + half + i] = Math.sin(angle);
    }
  }
  return { offset, positions };
}
