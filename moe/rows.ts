// Where the rows of a batch belong, and their positions on the device, which are kept for batches of the last few shapes: those of
// training and of validation, as a rule.

import type { Device } from "../tensor/device.ts";
import { fromArray, type Tensor } from "../tensor/tensor.ts";

/** Where the rows of a batch belong: lengths of its sequences and the position of each row in its own. */
export interface Rows {
  /** First row of each sequence and, last, the number of rows. */
  readonly offsets: Int32Array;
  /** Position of each row in its sequence, i32 [N]. */
  readonly positions: Tensor;
}

/** Shapes that are kept. */
const SHAPES = 2;

/** The rows of the last few shapes. Passes may run side by side: what one of them uses stays. */
export class RowsOfShapes implements Disposable {
  readonly #device: Device;
  /** Last used first. */
  readonly #kept: SharedRows[] = [];

  /** @param device Where positions are. */
  constructor(device: Device) {
    this.#device = device;
  }

  /**
   * Rows of a shape.
   *
   * @param offsets First row of each sequence and, last, the number of rows.
   * @returns The rows; dispose of them after the pass.
   */
  take(offsets: Int32Array): Rows & Disposable {
    const place = this.#kept.findIndex((rows) => equal(rows.offsets, offsets));
    const rows = place < 0 ? new SharedRows(this.#device, offsets) : this.#kept.splice(place, 1)[0];
    this.#kept.unshift(rows);
    if (this.#kept.length > SHAPES) this.#kept.pop()!.release();
    rows.users++;
    return {
      offsets: rows.offsets,
      positions: rows.positions,
      [Symbol.dispose]: () => rows.release(),
    };
  }

  /** Lets go of what is kept. */
  [Symbol.dispose](): void {
    for (const rows of this.#kept.splice(0)) rows.release();
  }
}

/** Rows that go with their last user. */
class SharedRows implements Rows {
  readonly offsets: Int32Array;
  readonly positions: Tensor;
  /** Passes at work, and the one who keeps them. */
  users = 1;

  constructor(device: Device, offsets: Int32Array) {
    this.offsets = offsets.slice();
    this.positions = fromArray(device, positionsOf(offsets));
  }

  release(): void {
    if (--this.users === 0) this.positions[Symbol.dispose]();
  }
}

/** Positions of the rows, each counted from the start of its sequence. */
function positionsOf(offsets: Int32Array): Int32Array {
  const positions = new Int32Array(offsets[offsets.length - 1]);
  for (let s = 0; s + 1 < offsets.length; s++) {
    for (let row = offsets[s]; row < offsets[s + 1]; row++) positions[row] = row - offsets[s];
  }
  return positions;
}

function equal(a: Int32Array, b: Int32Array): boolean {
  return a.length === b.length && a.every((x, i) => x === b[i]);
}
