// Launches of sort.cu: stable counting sorts on the device, of rows by their number and of choices by their expert. The host neither waits
// nor learns the result; scratch memory is given back in the order of the stream.

import type { CudaContext, CudaKernel, ModuleSource } from "./context.ts";
import source from "./sort.cu" with { type: "text" };

/** The kernels of sort.cu. */
export const sortModule: ModuleSource = {
  name: "sort",
  overlaps: true,
  source,
  // deno-fmt-ignore
  kernels: {
    sort_count: ["ptr", "i64", "i32", "i32", "i32", "i32", "i32", "ptr"],
    sort_place_choices: ["ptr", "i64", "i32", "i32", "i32", "ptr", "i32", "ptr", "ptr", "i32", "i32", "i64", "ptr", "ptr", "ptr", "ptr", "ptr"],
    sort_place_items: ["ptr", "ptr", "i64", "i32", "i32", "i32", "i32", "i32", "i32", "ptr", "i32", "ptr", "ptr"],
  },
};

/** Threads of a block: 8 warps, as sort.cu has it. */
const THREADS = 256;
/** Items of a tile are a multiple of this, and tiles about as many as a GPU has multiprocessors at most. */
const TILE = 256, MOST_TILES = 128;
/** Most bits of a digit: its counters of 8 warps fit into shared memory. */
const MOST_BITS = 9;

/** Where choices are placed; addresses, 0 for null. */
export interface ChoicePlacing {
  /** Experts i32 [n]. */
  readonly experts: number;
  /** Number of choices n. */
  readonly size: number;
  /** Number of experts E. */
  readonly bins: number;
  /** K. */
  readonly choices: number;
  /** First row of each expert, i32 [E]. */
  readonly starts: number;
  /** Pieces i32 [pieceCount, 3]. */
  readonly pieces: number;
  /** Number of pieces. */
  readonly pieceCount: number;
  /** Length of tokens. */
  readonly rows: number;
  /** Weights of the choices, f32 [n]. */
  readonly weights: number;
  /** Out: i32 [n]. */
  readonly slots: number;
  /** Out: i32 [rows]. */
  readonly tokens: number;
  /** Out: i32 [E + 1]. */
  readonly offsets: number;
  /** Out: the weights by row, f32 [rows]. */
  readonly scales: number;
}

/** Sorts on the device. */
export class Sorter {
  readonly #context: CudaContext;
  readonly #count: CudaKernel;
  readonly #placeChoices: CudaKernel;
  readonly #placeItems: CudaKernel;

  /**
   * @param context The GPU.
   */
  constructor(context: CudaContext) {
    this.#context = context;
    this.#count = context.kernel(sortModule, "sort_count");
    this.#placeChoices = context.kernel(sortModule, "sort_place_choices");
    this.#placeItems = context.kernel(sortModule, "sort_place_items");
  }

  /**
   * Places choices by expert.
   *
   * @param p What, and where.
   */
  placeChoices(p: ChoicePlacing): void {
    const { context, tiles, tile } = this.#layout(p.size);
    const counts = context.allocate(4 * tiles * p.bins);
    const bits = bitsOf(p.bins);
    // deno-fmt-ignore
    this.#count.launch(tiles, 1, 1, THREADS, 4 * p.bins, p.experts, p.size, tile, 0, 0x7fffffff, -1, p.bins, counts);
    // deno-fmt-ignore
    this.#placeChoices.launch(tiles, 1, 1, THREADS, sharedBytes(p.bins), p.experts, p.size, tile, p.bins, bits, counts, tiles,
      p.starts, p.pieces, p.pieceCount, p.choices, p.rows, p.weights, p.slots, p.tokens, p.offsets, p.scales);
    context.free(counts);
  }

  /**
   * Sorts row numbers, keeping the order of equal ones. Negative numbers count as `rows` and come last.
   *
   * @param keys Address of i32 [size].
   * @param size Number of items, at least 1.
   * @param rows Number of rows: keys are below.
   * @returns Addresses of the keys in order and of their places before, i32 [size] each, and of the memory that they are in: give it back.
   */
  sortRows(
    keys: number,
    size: number,
    rows: number,
  ): { readonly keys: number; readonly order: number; readonly memory: number } {
    const { context, tiles, tile } = this.#layout(size);
    const all = bitsOf(rows + 1), passes = Math.ceil(all / MOST_BITS);
    const bits = Math.ceil(all / passes), bins = 2 ** bits;
    // Passes write to two buffers of keys and order in turn; behind them lie the counts.
    const buffers = Math.min(2, passes), counts_bytes = 4 * tiles * bins;
    const memory = context.allocate(8 * size * buffers + counts_bytes);
    const counts = memory + 8 * size * buffers;
    let from = { keys, order: 0 };
    for (let pass = 0; pass < passes; pass++) {
      const shift = pass * bits, start = memory + pass % 2 * 8 * size;
      const to = { keys: start, order: start + 4 * size };
      // deno-fmt-ignore
      this.#count.launch(tiles, 1, 1, THREADS, 4 * bins, from.keys, size, tile, shift, bins - 1, rows, bins, counts);
      // deno-fmt-ignore
      this.#placeItems.launch(tiles, 1, 1, THREADS, sharedBytes(bins), from.keys, from.order, size, tile, shift, bins - 1,
        rows, bins, bits, counts, tiles, to.keys, to.order);
      from = to;
    }
    return { ...from, memory };
  }

  #layout(size: number): { context: CudaContext; tiles: number; tile: number } {
    const tile = Math.ceil(size / (MOST_TILES * TILE)) * TILE || TILE;
    return { context: this.#context, tiles: Math.max(1, Math.ceil(size / tile)), tile };
  }
}

/** Bits that numbers below `count` have. */
function bitsOf(count: number): number {
  return Math.max(1, 32 - Math.clz32(count - 1));
}

/** Shared memory of a placing block: a counter per warp and bin, two numbers per bin, and scratch. */
function sharedBytes(bins: number): number {
  return 4 * (10 * bins + 8);
}
