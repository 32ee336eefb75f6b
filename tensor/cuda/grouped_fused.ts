// The experts' grouped products with their activation on a GPU: one kernel of grouped_fused.cu where that is faster, else the product's and the
// activation's in turn.

import type { Activation, RowGroups } from "../device.ts";
import {
  type GroupedActivation,
  groupedActivation,
  type GroupedActivationParts,
} from "../grouped_activation.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext, CudaKernel, ModuleSource, ParameterType } from "./context.ts";
import source from "./grouped_fused.cu" with { type: "text" };
import hopper from "./grouped_hopper.cuh" with { type: "text" };
import { type Box, GroupTables, MAP_BYTES } from "./grouped_tables.ts";
import walk from "./grouped_walk.cuh" with { type: "text" };

const KINDS: readonly Activation[] = ["relu", "gelu", "swiglu"];
const MAP: ParameterType = { bytes: MAP_BYTES };
// deno-fmt-ignore
const PARAMETERS: readonly ParameterType[] = [MAP, MAP, MAP, "ptr", "ptr", "ptr", "i32", "ptr", "ptr", "i32", "i32"];

/** The kernels of grouped_fused.cu. */
export const fusedModule: ModuleSource = {
  name: "grouped_fused",
  source: `${walk}\n#line 1 "grouped_hopper.cuh"\n${hopper}\n#line 1 "grouped_fused.cu"\n${source}`,
  kernels: Object.fromEntries(
    KINDS.flatMap((
      kind,
    ) => [[`grouped_${kind}`, PARAMETERS], [`grouped_${kind}_back`, PARAMETERS]]),
  ),
  from: 90,
  exact: true,
};

/** As in grouped_fused.cu. */
const TILE_M = 128,
  DEPTH = 64,
  THREADS = 384,
  STAGE_BYTES = (128 + 256) * DEPTH * 2,
  BLOCK_BYTES = 8192;

/** Whether calls take the fused kernels where they serve, or only tests and measurements do. */
const ENABLED: boolean = false;

/** Rows; half of a forward weight's tile; other operands and results. */
const ROWS: Box = { columns: DEPTH, rows: TILE_M }, HALF: Box = { columns: DEPTH, rows: 128 };
const SQUARE: Box = { columns: 64, rows: 64 };

/** A kernel of grouped_fused.cu and its measures there. */
interface Fused {
  readonly kernel: CudaKernel;
  readonly columns: number;
  readonly phases: number;
  readonly shared_bytes: number;
}

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
  const all = new Map<string, Fused>(KINDS.flatMap((kind) => {
    const gated = kind === "swiglu", ring = 4 * STAGE_BYTES + 4 * BLOCK_BYTES + 1024;
    return [
      [kind, {
        kernel: context.kernel(fusedModule, `grouped_${kind}`),
        columns: gated ? 128 : 256,
        phases: gated ? 8 : 12,
        shared_bytes: ring,
      }],
      [`${kind}_back`, {
        kernel: context.kernel(fusedModule, `grouped_${kind}_back`),
        columns: 256,
        phases: 11,
        shared_bytes: gated ? ring - STAGE_BYTES + 4 * BLOCK_BYTES : ring,
      }],
    ] as const;
  }));
  // Tiles drawn and blocks finished; every launch leaves zeros.
  const counter = context.allocate(8);
  context.clear(counter, 8);

  /** Enqueues a fused kernel; false if the call is not for it. `up` and `out` in the kernels' terms. */
  function fused(
    name: string,
    x: Tensor,
    weights: readonly Tensor[],
    groups: RowGroups,
    F: number,
    up: Tensor,
    out: Tensor,
    box: Box,
  ): boolean {
    const { kernel, columns, phases, shared_bytes } = all.get(name)!;
    const [R, K] = x.shape;
    if (x.dtype !== "bf16" || R === 0 || K === 0 || F === 0 || weights.length === 0) return false;
    if (K % 8 !== 0 || F % (name.startsWith("swiglu") ? 64 : 8) !== 0) return false;
    if (x.address % 16 !== 0 || up.address % 16 !== 0 || out.address % 16 !== 0) return false;
    if (force !== "fused" && (!ENABLED || Math.ceil(K / DEPTH) < phases)) return false;
    const table = tables.table(weights, box);
    if (!table.aligned) return false;
    const tiles = Math.ceil(F / columns) * (weights.length + Math.ceil(R / TILE_M));
    // deno-fmt-ignore
    kernel.launch(Math.min(multiprocessors, tiles), 1, 1, THREADS, shared_bytes, tables.map(x, ROWS), tables.map(up, SQUARE),
      tables.map(out, SQUARE), table.maps, counter, groups.offsets.address, weights.length, up.address, out.address, F, K);
    return true;
  }

  return {
    groupedGemmActivation(x, weights, groups, kind, up, active) {
      if (fused(kind, x, weights, groups, active.shape[1], up, active, HALF)) return;
      separate.groupedGemmActivation(x, weights, groups, kind, up, active);
    },
    groupedGemmActivationBackward(dY, weights, groups, kind, up, dUp) {
      const F = weights.length === 0 ? 0 : weights[0].shape[1];
      if (fused(`${kind}_back`, dY, weights, groups, F, up, dUp, SQUARE)) return;
      separate.groupedGemmActivationBackward(dY, weights, groups, kind, up, dUp);
    },
  };
}
