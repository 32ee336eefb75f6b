// Launches of grouped_hopper.cu: a grid that fills the GPU once, tensor maps of the operands, and tables of the groups' matrices.

import type { RowGroups } from "../device.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext, ModuleSource, ParameterType } from "./context.ts";
import source from "./grouped_hopper.cu" with { type: "text" };
import shared from "./grouped_hopper.cuh" with { type: "text" };
import { type Box, type GroupTables, MAP_BYTES } from "./grouped_tables.ts";
import walk from "./grouped_walk.cuh" with { type: "text" };

/** One grouped product; see grouped_walk.cuh for the modes and letters. */
export interface GroupedCall {
  readonly mode: 0 | 1 | 2;
  /** x of modes 0 and 1, dy of mode 2. */
  readonly a: Tensor;
  /** x of mode 2. */
  readonly b: Tensor | null;
  /** Weights of modes 0 and 1, gradients of mode 2. */
  readonly matrices: readonly Tensor[];
  readonly groups: RowGroups;
  /** Result of modes 0 and 1. */
  readonly out: Tensor | null;
  /** R in modes 0 and 1. */
  readonly m: number;
  readonly n: number;
  /** R in mode 2. */
  readonly k: number;
  readonly beta: number;
}

/** A grouped product by Hopper's kernel; false if the call is not for it. */
export type HopperGrouped = (call: GroupedCall) => boolean;

const MAP: ParameterType = { bytes: MAP_BYTES };
// deno-fmt-ignore
const PARAMETERS: readonly ParameterType[] = [MAP, MAP, MAP, "ptr", "ptr", "ptr", "i32", "ptr", "ptr", "i32", "i32", "i32", "f32"];

/** The kernels of grouped_hopper.cu. */
export const hopperModule: ModuleSource = {
  name: "grouped_hopper",
  overlaps: true,
  source:
    `${walk}\n#line 1 "grouped_hopper.cuh"\n${shared}\n#line 1 "grouped_hopper.cu"\n${source}`,
  kernels: {
    grouped_0: PARAMETERS,
    grouped_1: PARAMETERS,
    grouped_2: PARAMETERS,
    grouped_2_f32: PARAMETERS,
  },
  from: 90,
  exact: true,
};

/** As in grouped_hopper.cu: a tile, stages, elements of the reduction in one. */
const TILE_M = 128, TILE_N = 256, STAGES = 4, DEPTH = 64;
const THREADS = 384;
/** Stages, two buffers of results per consumer, and room to begin at a multiple of 1024. */
const SHARED = STAGES * (TILE_M + TILE_N) * DEPTH * 2 + 4 * 8192 + 1024;

/** Rows of modes 0 and 1. */
const ROWS: Box = { columns: DEPTH, rows: TILE_M };
/** A weight of mode 0. */
const WEIGHT: Box = { columns: DEPTH, rows: TILE_N };
/** Other bf16 operands and results: 64 by 64 elements; results in f32. */
const SQUARE: Box = { columns: 64, rows: 64 }, SQUARE_F32: Box = { columns: 32, rows: 64 };
const NO_MAP = new Uint8Array(MAP_BYTES);

/**
 * The grouped product on Hopper, for bf16 whose rows all begin at multiples of 16 bytes.
 *
 * @param context The GPU.
 * @param tables Where matrices and their tensor maps are found.
 * @returns The product; null if the GPU is not a Hopper.
 */
export function hopperGrouped(context: CudaContext, tables: GroupTables): HopperGrouped | null {
  if (!context.has(hopperModule)) return null;
  const kernels = [0, 1, 2].map((mode) => context.kernel(hopperModule, `grouped_${mode}`));
  const wide = context.kernel(hopperModule, "grouped_2_f32");
  const { multiprocessors } = context.properties;
  // Tiles drawn and blocks finished; every launch leaves zeros.
  const counter = context.allocate(8);
  context.clear(counter, 8);

  return ({ mode, a, b, matrices, groups, out, m, n, k, beta }) => {
    const inner = mode === 2 ? m : k, f32 = mode === 2 && matrices[0].dtype === "f32";
    if (inner % 8 !== 0 || n % 8 !== 0 || a.address % 16 !== 0) return false;
    if ((b ?? out!).address % 16 !== 0) return false;
    const box = f32 ? SQUARE_F32 : mode === 0 ? WEIGHT : SQUARE;
    const table = tables.table(matrices, box);
    if (!table.aligned) return false;
    const aMap = tables.map(a, mode === 2 ? SQUARE : ROWS);
    const bMap = mode === 2 ? tables.map(b!, SQUARE) : NO_MAP;
    const outMap = mode === 2 ? NO_MAP : tables.map(out!, SQUARE);
    const tiles = Math.ceil(n / TILE_N) *
      (mode === 2
        ? matrices.length * Math.ceil(m / TILE_M)
        : matrices.length + Math.ceil(m / TILE_M));
    const blocks = Math.min(multiprocessors, tiles);
    // deno-fmt-ignore
    (f32 ? wide : kernels[mode]).launch(blocks, 1, 1, THREADS, SHARED, aMap, bMap, outMap, table.maps, counter,
      groups.offsets.address, matrices.length, out?.address ?? 0, table.addresses, m, n, k, beta);
    return true;
  };
}
