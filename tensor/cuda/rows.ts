// Launches of rows.cu: gather, scatter-add, and the weighted sum of a token's expert rows with its gradient. How wide the accesses are, and
// how many threads share a row, is decided here.

import type { Kernels } from "../device.ts";
import { bytesOf } from "../dtype.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext, CudaKernel, ModuleSource, ParameterType } from "./context.ts";
import source from "./rows.cu" with { type: "text" };
import { Sorter } from "./sort.ts";

type Rows = Pick<
  Kernels,
  "gatherRows" | "scatterAddRows" | "combineRows" | "combineRowsBackward"
>;

const GATHER: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i64", "i64", "i32", "i32"];
// deno-fmt-ignore
const SCATTER: readonly ParameterType[] = ["ptr", "ptr", "ptr", "ptr", "ptr", "i32", "i32", "i32"];
const SCATTER_REST: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i32", "i32", "i32"];
// deno-fmt-ignore
const COMBINE: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i32", "ptr", "ptr", "i64", "i32", "i64", "i32"];
// deno-fmt-ignore
const BACKWARD: readonly ParameterType[] = ["ptr", "ptr", "ptr", "ptr", "i32", "ptr", "ptr", "i64", "i32", "i64"];

/** Choices that are in flight at once in the wide kernels, and units of 16 bytes of each. */
const FORWARD_WAYS = [[1, 4], [2, 2], [4, 1], [8, 1]], BACKWARD_WAYS = [1, 2, 4];
/** Sizes of a unit that rows are gathered by. */
const UNITS = [16, 4, 2, 1];
/** Threads of a block. */
const THREADS = 256;
/** Items of a piece, as in rows.cu. */
const PIECE = 128;

/** The kernels of rows.cu. */
export const rowsModule: ModuleSource = {
  name: "rows",
  overlaps: true,
  source,
  kernels: Object.fromEntries([
    ...UNITS.map((unit) => [`gather_rows_${unit}`, GATHER] as const),
    ...["f32_f32", "bf16_f32", "bf16_bf16"].flatMap((dtypes) => [
      [`scatter_add_${dtypes}`, SCATTER] as const,
      [`scatter_add_${dtypes}_wide`, SCATTER] as const,
    ]),
    ...["f32", "bf16"].flatMap((dtype) => [
      [`scatter_rest_${dtype}`, SCATTER_REST] as const,
      [`combine_${dtype}`, COMBINE] as const,
      ...FORWARD_WAYS.map(([way]) => [`combine_${dtype}_wide${way}`, COMBINE] as const),
      [`combine_backward_${dtype}`, BACKWARD] as const,
      ...BACKWARD_WAYS.map((way) => [`combine_backward_${dtype}_wide${way}`, BACKWARD] as const),
    ]),
  ]),
};

/** Kernels of one dtype. */
interface PerDType {
  /** Elements in 16 bytes. */
  readonly wide: number;
  readonly combine: CudaKernel;
  readonly combineWide: readonly CudaKernel[];
  readonly backward: CudaKernel;
  readonly backwardWide: readonly CudaKernel[];
}

/**
 * The kernels that move rows.
 *
 * @param context The GPU.
 * @returns The kernels; gathering in every dtype, the others in f32 and bf16.
 */
export function rowsKernels(context: CudaContext): Rows {
  const get = (name: string) => context.kernel(rowsModule, name);
  const gathers = UNITS.map((unit) => get(`gather_rows_${unit}`));
  const scatters = new Map(
    ["f32_f32", "bf16_f32", "bf16_bf16"].map((dtypes) => [dtypes, {
      plain: get(`scatter_add_${dtypes}`),
      wide: get(`scatter_add_${dtypes}_wide`),
      rest: get(`scatter_rest_${dtypes.split("_")[1]}`),
    }]),
  );
  const perDType = (dtype: string, wide: number): PerDType => ({
    wide,
    combine: get(`combine_${dtype}`),
    combineWide: FORWARD_WAYS.map(([way]) => get(`combine_${dtype}_wide${way}`)),
    backward: get(`combine_backward_${dtype}`),
    backwardWide: BACKWARD_WAYS.map((way) => get(`combine_backward_${dtype}_wide${way}`)),
  });
  const f32 = perDType("f32", 4), bf16 = perDType("bf16", 8);
  const sorter = new Sorter(context);

  function of(op: string, x: Tensor): PerDType {
    if (x.dtype === "bf16") return bf16;
    if (x.dtype === "f32") return f32;
    throw new TypeError(
      `Cannot ${op} as the dtype of the rows must be f32 or bf16: current value is ${x.dtype}`,
    );
  }

  return {
    gatherRows(x, rows, out) {
      const count = rows.size;
      if (out.size === 0) return;
      const bytes = out.size / count * bytesOf(x.dtype);
      let way = 0;
      while ((bytes | x.address % 16 | out.address % 16) % UNITS[way] !== 0) way++;
      const units = bytes / UNITS[way], shift = threadsShift(units, 4);
      // More than the cache holds: then the rows of x, which may be read again, shall have it.
      const streams = out.bytes > context.properties.l2_bytes / 2 ? 1 : 0;
      // deno-fmt-ignore
      gathers[way].launch(blocks(count, shift), 1, 1, THREADS, 0, x.address, rows.address, out.address, count, units, shift, streams);
    },
    scatterAddRows(x, rows, out) {
      const count = rows.size;
      if (count === 0 || out.size === 0) return;
      const width = x.size / count, all = out.size / width;
      const kernels = scatters.get(`${x.dtype}_${out.dtype}`);
      if (!kernels) {
        throw new TypeError(
          `Cannot scatter rows as the dtypes must be f32 or bf16, and f32 or that of the rows: current value is ${x.dtype} to ${out.dtype}`,
        );
      }
      const wide = x.dtype === "bf16" ? 8 : 4;
      const aligned = width % wide === 0 && (x.address | out.address) % 16 === 0;
      const columns = Math.ceil(width / (aligned ? 32 * wide : 32));
      const kernel = aligned ? kernels.wide : kernels.plain, pieces = Math.ceil(count / PIECE);
      const { keys, order, memory } = sorter.sortRows(rows.address, count, all);
      try {
        const parts = context.allocate(4 * pieces * width);
        // deno-fmt-ignore
        kernel.launch(Math.ceil(count / 8), columns, 1, THREADS, 0, x.address, keys, order, out.address, parts, count, all, width);
        // deno-fmt-ignore
        kernels.rest.launch(pieces - 1, Math.ceil(width / 128), 1, 128, 0, keys, out.address, parts, count, all, width);
        context.free(parts);
      } finally {
        context.free(memory);
      }
    },
    combineRows(y, slots, weights, out, residual) {
      const kernels = of("combine rows", y), [tokens, choices] = slots.shape;
      if (out.size === 0) return;
      const width = y.shape[1], from = residual ? residual.address : 0;
      const aligned = width % kernels.wide === 0 && isAligned(y, out) &&
        (!residual || isAligned(residual));
      const way = choices <= 1 ? 0 : choices === 2 ? 1 : choices <= 4 ? 2 : 3;
      const shift = aligned ? threadsShift(width / kernels.wide, FORWARD_WAYS[way][1]) : 5;
      const kernel = aligned ? kernels.combineWide[way] : kernels.combine;
      // deno-fmt-ignore
      kernel.launch(blocks(tokens, shift), 1, 1, THREADS, 0, y.address, slots.address, weights ? weights.address : 0,
        weightKind(weights), from, out.address, tokens, choices, width, shift);
    },
    combineRowsBackward(dOut, y, slots, weights, dY, dWeights) {
      const kernels = of("take the combination's gradient", y), [tokens, choices] = slots.shape;
      // As many rows as choices: then every row has one. Else rows are left over, or choices without a row.
      if (y.size > 0 && y.shape[0] !== slots.size) context.clear(dY.address, dY.bytes);
      if (slots.size === 0) return;
      const width = y.shape[1];
      const aligned = width % kernels.wide === 0 && isAligned(dOut, y, dY);
      const way = choices <= 1 ? 0 : choices === 2 ? 1 : 2;
      const kernel = aligned ? kernels.backwardWide[way] : kernels.backward;
      // deno-fmt-ignore
      kernel.launch(Math.ceil(tokens / 8), 1, 1, THREADS, 0, dOut.address, y.address, slots.address, weights.address,
        weightKind(weights), dY.address, dWeights.address, tokens, choices, width);
    },
  };
}

/** log2 of the threads for a row of `units` units, of which a thread takes `each` at a time. */
function threadsShift(units: number, each: number): number {
  const wanted = Math.ceil(units / each);
  return Math.min(8, wanted <= 1 ? 0 : 32 - Math.clz32(wanted - 1));
}

/** Blocks for rows of 2 ** shift threads each. */
function blocks(rows: number, shift: number): number {
  return Math.ceil(rows * 2 ** shift / THREADS);
}

function isAligned(...tensors: Tensor[]): boolean {
  return tensors.every(({ address }) => address % 16 === 0);
}

/** As weight_at in rows.cu has it. */
function weightKind(weights: Tensor | null): number {
  if (weights === null) return 0;
  if (weights.dtype === "f32") return 1;
  if (weights.dtype === "bf16") return 2;
  throw new TypeError(
    `Cannot combine rows as the dtype of the weights must be f32 or bf16: current value is ${weights.dtype}`,
  );
}
