// Tables in device memory that tell a grouped product where the groups' matrices are, and the tensor maps of rows. Both are kept by
// what they say, not by who asks: a table is made once per list of addresses, and the same list later costs a comparison. A
// step's tensors come back at the addresses of the step before, so in steady state nothing is uploaded. Only where the number of rows
// changes, as it does among ranks, are their maps made again, in the memory of older ones.

import { bytesOf } from "../dtype.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext } from "./context.ts";

/** Bytes of a tensor map. */
export const MAP_BYTES = 128;
/** Tables that are kept; the oldest go first. */
const KEPT = 1024;
/** Maps that are kept of a box: a few in each of 2⁶ places, of which the one that was not used for longest goes first. */
const PLACES = 64, WAYS = 8;

/** What a table holds besides addresses: tensor maps of boxes of so many rows and columns. */
export interface Box {
  /** Columns of a box; rows of 128 bytes at most. */
  readonly columns: number;
  /** Rows of a box. */
  readonly rows: number;
}

/** One list of matrices of equal shape on the device. */
export interface Table {
  /** Address of the matrices' tensor maps, one after another; 0 without a box. */
  readonly maps: number;
  /** Address of the matrices' addresses, u64 [G]. */
  readonly addresses: number;
  /** Whether all matrices begin at multiples of 16 bytes. */
  readonly aligned: boolean;
}

interface KeptTable extends Table {
  readonly of: Float64Array;
  readonly shape: readonly [number, number];
}

/** Tensor maps of one box, in memory that is taken once. An address may have several: tensors of other shapes come to lie there. */
class Maps {
  /** Address, rows and columns of each. */
  readonly #of = new Float64Array(3 * PLACES * WAYS);
  readonly #maps: readonly Uint8Array[];
  /** When each was used last, in calls. */
  readonly #used = new Float64Array(PLACES * WAYS);
  #calls = 0;

  constructor() {
    const memory = new ArrayBuffer(MAP_BYTES * PLACES * WAYS);
    this.#maps = Array.from(
      { length: PLACES * WAYS },
      (_, i) => new Uint8Array(memory, MAP_BYTES * i, MAP_BYTES),
    );
  }

  /** The map of a matrix, if it is here. */
  find(address: number, rows: number, columns: number): Uint8Array | null {
    const of = this.#of, first = WAYS * placeOf(address, rows, columns);
    for (let i = first; i < first + WAYS; i++) {
      if (of[3 * i] !== address || of[3 * i + 1] !== rows || of[3 * i + 2] !== columns) continue;
      this.#used[i] = ++this.#calls;
      return this.#maps[i];
    }
    return null;
  }

  /** Takes the map of a matrix over. */
  add(address: number, rows: number, columns: number, map: Uint8Array): Uint8Array {
    const used = this.#used, first = WAYS * placeOf(address, rows, columns);
    let i = first;
    for (let other = first + 1; other < first + WAYS; other++) if (used[other] < used[i]) i = other;
    used[i] = ++this.#calls;
    this.#of[3 * i] = address;
    this.#of[3 * i + 1] = rows;
    this.#of[3 * i + 2] = columns;
    this.#maps[i].set(map);
    return this.#maps[i];
  }
}

/** The place of a map: six bits in which addresses that are multiples of 512, as most are, differ. */
function placeOf(address: number, rows: number, columns: number): number {
  return Math.imul((address / 512) ^ Math.imul(rows, 31) ^ columns, 0x9e3779b1) >>> 26;
}

/** The tables and maps of a device. */
export class GroupTables {
  readonly #context: CudaContext;
  /** Per box, by the first matrix's address. */
  readonly #tables = new Map<Box | null, Map<number, KeptTable>>();
  readonly #maps = new Map<Box, Maps>();

  /** @param context The GPU. */
  constructor(context: CudaContext) {
    this.#context = context;
  }

  /**
   * The table of some matrices of equal shape.
   *
   * @param matrices The matrices; one at least.
   * @param box What their tensor maps load or store, always the same object for the same box; null for addresses only.
   * @returns Their table, until the next call.
   */
  table(matrices: readonly Tensor[], box: Box | null): Table {
    let kept = this.#tables.get(box);
    if (kept === undefined) this.#tables.set(box, kept = new Map());
    const first = matrices[0].address, known = kept.get(first);
    if (known !== undefined) {
      if (says(known, matrices)) return known;
      this.#drop(kept, first, known);
    }
    if (kept.size >= KEPT) {
      const [[oldest, table]] = kept;
      this.#drop(kept, oldest, table);
    }
    const made = this.#make(matrices, box);
    kept.set(first, made);
    return made;
  }

  /**
   * The tensor map of a bf16 or f32 matrix.
   *
   * @param matrix The matrix; at a multiple of 16 bytes, its rows too.
   * @param box What is loaded or stored at once, always the same object for the same box.
   * @returns The map's bytes: good for one launch, which takes up to eight maps of a box.
   */
  map(matrix: Tensor, box: Box): Uint8Array {
    let kept = this.#maps.get(box);
    if (kept === undefined) this.#maps.set(box, kept = new Maps());
    const { address } = matrix, rows = matrix.shape[0], columns = matrix.shape[1];
    return kept.find(address, rows, columns) ??
      kept.add(address, rows, columns, this.#encode(matrix, box));
  }

  #make(matrices: readonly Tensor[], box: Box | null): KeptTable {
    const of = Float64Array.from(matrices, (matrix) => matrix.address);
    const aligned = of.every((address) => address % 16 === 0);
    const maps_bytes = box !== null && aligned ? MAP_BYTES * of.length : 0;
    const bytes = new Uint8Array(maps_bytes + 8 * of.length);
    if (box !== null && aligned) {
      matrices.forEach((matrix, g) => bytes.set(this.#encode(matrix, box), MAP_BYTES * g));
    }
    new BigUint64Array(bytes.buffer, maps_bytes).set(BigUint64Array.from(of, BigInt));
    const start = this.#context.allocate(bytes.length);
    this.#context.upload(bytes, start);
    return {
      maps: maps_bytes > 0 ? start : 0,
      addresses: start + maps_bytes,
      aligned,
      of,
      shape: [matrices[0].shape[0], matrices[0].shape[1]],
    };
  }

  #drop(kept: Map<number, KeptTable>, first: number, table: KeptTable): void {
    kept.delete(first);
    this.#context.free(table.maps || table.addresses);
  }

  #encode(matrix: Tensor, box: Box): Uint8Array {
    const [rows, columns] = matrix.shape;
    return this.#context.tensorMap({
      dtype: matrix.dtype as "bf16" | "f32",
      address: matrix.address,
      sizes: [columns, rows],
      strides_bytes: [bytesOf(matrix.dtype) * columns],
      box: [box.columns, box.rows],
      swizzle: "128B",
    });
  }
}

/** Whether a table is that of these matrices. */
function says(table: KeptTable, matrices: readonly Tensor[]): boolean {
  const { of, shape } = table;
  if (of.length !== matrices.length) return false;
  if (shape[0] !== matrices[0].shape[0] || shape[1] !== matrices[0].shape[1]) return false;
  for (let g = 0; g < of.length; g++) if (of[g] !== matrices[g].address) return false;
  return true;
}
