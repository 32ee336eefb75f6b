// The experts' grouped products with their activation on a GPU: one kernel of grouped_fused.cu where that is faster, else the product's and the
// activation's in turn.

import type { ActivationBackwardOptions, RowGroups } from "../device.ts";
import {
  type GroupedActivation,
  groupedActivation,
  type GroupedActivationParts,
} from "../grouped_activation.ts";
import type { Tensor } from "../tensor.ts";
import activations from "./activations.cuh" with { type: "text" };
import type { CudaContext, CudaKernel, ModuleSource, ParameterType } from "./context.ts";
import source from "./grouped_fused.cu" with { type: "text" };
import hopper from "./grouped_hopper.cuh" with { type: "text" };
import { type Box, GroupTables, MAP_BYTES } from "./grouped_tables.ts";
import walk from "./grouped_walk.cuh" with { type: "text" };

const MAP: ParameterType = { bytes: MAP_BYTES };
// deno-fmt-ignore
const PARAMETERS: readonly ParameterType[] = [MAP, MAP, MAP, "ptr", "ptr", "ptr", "i32", "ptr", "ptr", "i32", "i32"];
/** With scales: them, where sums of their gradients go, and rows. */
const SCALED_PARAMETERS: readonly ParameterType[] = [...PARAMETERS, "ptr", "ptr", "i32"];

/**
 * A kernel of grouped_fused.cu: columns of the hidden width in a tile, and in how many phases its results are treated. SwiGLU's has 12 of less
 * work each, which take as long as 8 of the others.
 */
interface Shape {
  readonly columns: number;
  readonly phases: number;
}

/** As in grouped_fused.cu, phases as above. */
const SHAPES: Readonly<Record<string, Shape>> = {
  relu: { columns: 256, phases: 12 },
  gelu: { columns: 256, phases: 12 },
  swiglu: { columns: 128, phases: 8 },
  relu_back: { columns: 256, phases: 11 },
  gelu_back: { columns: 256, phases: 11 },
};
const TILE_M = 128, DEPTH = 64, THREADS = 384;
/** Threads of a block that adds up the scales' gradients. */
const ADD_THREADS = 64;
/** Four stages, two blocks of results per consumer, and room to begin at a multiple of 1024. */
const SHARED = 4 * (128 + 256) * DEPTH * 2 + 4 * 8192 + 1024;

/** The kernels of grouped_fused.cu. */
export const fusedModule: ModuleSource = {
  name: "grouped_fused",
  overlaps: true,
  source: [
    activations,
    walk,
    `#line 1 "grouped_hopper.cuh"`,
    hopper,
    `#line 1 "grouped_fused.cu"`,
    source,
  ].join("\n"),
  kernels: {
    grouped_relu: SCALED_PARAMETERS,
    grouped_gelu: SCALED_PARAMETERS,
    grouped_swiglu: SCALED_PARAMETERS,
    grouped_relu_back: PARAMETERS,
    grouped_gelu_back: PARAMETERS,
    grouped_relu_back_scaled: SCALED_PARAMETERS,
    grouped_gelu_back_scaled: SCALED_PARAMETERS,
    grouped_scale_gradients: ["ptr", "ptr", "ptr", "i32", "i32", "i32"],
  },
  from: 90,
  exact: true,
};

/** Rows; half of a forward weight's tile; other operands and results. */
const ROWS: Box = { columns: DEPTH, rows: TILE_M }, HALF: Box = { columns: DEPTH, rows: 128 };
const SQUARE: Box = { columns: 64, rows: 64 };

/**
 * Grouped products with an activation on a GPU.
 *
 * A fused kernel treats a tile's results in `phases` while the next tile is multiplied in K / 64 steps, one phase a step. So it is taken where
 * there are as many steps as phases: with fewer, results hold up the tensor cores, which costs about what the other kernel's memory traffic does.
 *
 * @param context The GPU.
 * @param parts Its other kernels.
 * @param force Takes the fused kernels wherever they can serve, or never; for tests and measurements. @default {undefined}
 * @returns The kernels.
 */
export function groupedActivationKernels(
  context: CudaContext,
  parts: GroupedActivationParts,
  force?: "fused" | "separate",
): GroupedActivation {
  const separate = groupedActivation(parts);
  if (force === "separate" || !context.has(fusedModule)) return separate;
  const tables = new GroupTables(context), { multiprocessors } = context.properties;
  const plain = new Map<string, CudaKernel>(), scaled = new Map<string, CudaKernel>();
  for (const name of Object.keys(SHAPES)) {
    const kernel = context.kernel(fusedModule, `grouped_${name}`), back = name.endsWith("_back");
    if (back) plain.set(name, kernel);
    scaled.set(name, back ? context.kernel(fusedModule, `grouped_${name}_scaled`) : kernel);
  }
  const addUp = context.kernel(fusedModule, "grouped_scale_gradients");
  // Tiles drawn and blocks finished; every launch leaves zeros.
  const counter = context.allocate(8);
  context.clear(counter, 8);

  /** Enqueues a fused kernel; false if the call is not for it. `up` and `out` in the kernels' terms. */
  function fused(
    name: string,
    x: Tensor,
    weights: readonly Tensor[],
    groups: RowGroups,
    up: Tensor,
    out: Tensor,
    box: Box,
    { scales, dScales }: ActivationBackwardOptions,
  ): boolean {
    const { columns, phases } = SHAPES[name];
    const [R, F] = out.shape, K = x.shape[1], G = weights.length;
    if (x.dtype !== "bf16" || R === 0 || K === 0 || F === 0 || G === 0) return false;
    if (K % 8 !== 0 || F % (name === "swiglu" ? 64 : 8) !== 0) return false;
    if (x.address % 16 !== 0 || up.address % 16 !== 0 || out.address % 16 !== 0) return false;
    if (force !== "fused" && Math.ceil(K / DEPTH) < phases) return false;
    const table = tables.table(weights, box);
    if (!table.aligned) return false;
    const tiles = Math.ceil(F / columns),
      blocks = Math.min(multiprocessors, tiles * (G + Math.ceil(R / TILE_M)));
    const upMap = tables.map(up, SQUARE),
      outMap = tables.map(out, SQUARE),
      offsets = groups.offsets.address;
    const simple = scales === undefined && dScales === undefined ? plain.get(name) : undefined;
    if (simple) {
      // deno-fmt-ignore
      simple.launch(blocks, 1, 1, THREADS, SHARED, tables.map(x, ROWS), upMap, outMap, table.maps, counter, offsets, G,
        up.address, out.address, F, K);
      return true;
    }
    const parts = dScales === undefined ? 0 : context.allocate(4 * tiles * R);
    // deno-fmt-ignore
    scaled.get(name)!.launch(blocks, 1, 1, THREADS, SHARED, tables.map(x, ROWS), upMap, outMap, table.maps, counter, offsets, G,
      up.address, out.address, F, K, scales?.address ?? 0, parts, R);
    if (dScales !== undefined) {
      // deno-fmt-ignore
      addUp.launch(Math.ceil(R / ADD_THREADS), 1, 1, ADD_THREADS, 0, parts, dScales.address, offsets, G, tiles, R);
      context.free(parts);
    }
    return true;
  }

  return {
    groupedGemmActivation(x, weights, groups, kind, up, active, scales) {
      if (fused(kind, x, weights, groups, up, active, HALF, { scales })) return;
      separate.groupedGemmActivation(x, weights, groups, kind, up, active, scales);
    },
    groupedGemmActivationBackward(dY, weights, groups, kind, up, dUp, options = {}) {
      // SwiGLU's gradient is left to two kernels (bench/NOTES.md).
      if (
        kind !== "swiglu" &&
        fused(`${kind}_back`, dY, weights, groups, up, dUp, SQUARE, options)
      ) {
        return;
      }
      separate.groupedGemmActivationBackward(dY, weights, groups, kind, up, dUp, options);
    },
  };
}
