// The experts' matrix products over uneven row groups. Three ways, chosen by what the call allows and what was measured (bench/NOTES.md): Hopper's
// kernel (grouped_hopper.ts) for bf16 in multiples of 16 bytes; the kernels of grouped.cu for every other GPU and size; one cuBLAS product
// per group where the offsets are known to the host. The first two read the offsets on the device.

import type { Kernels } from "../device.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext, CudaKernel, ModuleSource, ParameterType } from "./context.ts";
import { gemmOf } from "./gemm.ts";
import source from "./grouped.cu" with { type: "text" };
import { type GroupedCall, hopperGrouped } from "./grouped_hopper.ts";
import { GroupTables } from "./grouped_tables.ts";
import walk from "./grouped_walk.cuh" with { type: "text" };

/** Ways to compute a grouped product. */
export type GroupedWay = "hopper" | "portable" | "loop";

/** A grouped product. */
type Grouped = Pick<Kernels, "groupedGemm" | "groupedGemmWeightGrad">;

const PARAMETERS: readonly ParameterType[] = [
  ...["ptr", "ptr", "ptr", "ptr", "i32", "ptr", "ptr", "i32", "i32", "i32", "f32"] as const,
];
const NAMES = [0, 1, 2].flatMap((mode) => [
  `grouped_${mode}_f32`,
  ...(mode === 2 ? ["bf16", "bf16_f32"] : ["bf16"]).flatMap((types) => [
    `grouped_${mode}_${types}`,
    `grouped_${mode}_${types}_any`,
  ]),
]);

/** The kernels of grouped.cu. */
export const groupedModule: ModuleSource = {
  name: "grouped",
  overlaps: true,
  source: `${walk}\n#line 1 "grouped.cu"\n${source}`,
  kernels: Object.fromEntries(NAMES.map((name) => [name, PARAMETERS])),
};

/** As in grouped.cu: sides of tiles, and the shared memory of a block in bytes (stages x operands x side x depth x bytes). */
const BF16_SIDE = 128, F32_SIDE = 64, SHARED = 4 * 2 * 128 * 32 * 2;
/** Blocks that fit a multiprocessor. */
const BF16_BLOCKS = 2, F32_BLOCKS = 4;

/**
 * The grouped products of a GPU.
 *
 * @param context The GPU.
 * @param force The one way to take, where it can serve the call; for tests and measurements. @default {undefined}
 * @returns The kernels.
 */
export function groupedKernels(context: CudaContext, force?: GroupedWay): Grouped {
  const tables = new GroupTables(context);
  const hopper = force === "portable" || force === "loop" ? null : hopperGrouped(context, tables);
  const kernels = new Map<string, CudaKernel>(
    NAMES.map((name) => [name, context.kernel(groupedModule, name)]),
  );
  const { multiprocessors } = context.properties;

  function portable(call: GroupedCall): void {
    const { mode, a, b, matrices, groups, out, m, n, k, beta } = call;
    const table = tables.table(matrices, null);
    const f32 = a.dtype === "f32", outDtype = (out ?? matrices[0]).dtype;
    // Rows of every operand in multiples of 16 bytes.
    const aligned = table.aligned && a.address % 16 === 0 && n % 8 === 0 &&
      (mode === 2 ? m : k) % 8 === 0 && (b ?? out)!.address % 16 === 0;
    const name = f32
      ? `grouped_${mode}_f32`
      : `grouped_${mode}_bf16${mode === 2 && outDtype === "f32" ? "_f32" : ""}${
        aligned ? "" : "_any"
      }`;
    const side = f32 ? F32_SIDE : BF16_SIDE, units = Math.ceil(n / side);
    const tiles = mode === 2
      ? matrices.length * Math.ceil(m / side) * units
      : (Math.ceil(m / side) + matrices.length) * units;
    const blocks = Math.min(tiles, multiprocessors * (f32 ? F32_BLOCKS : BF16_BLOCKS));
    // deno-fmt-ignore
    kernels.get(name)!.launch(blocks, 1, 1, 256, f32 ? 0 : SHARED, a.address, b?.address ?? 0, table.addresses,
      groups.offsets.address, matrices.length, out?.address ?? 0, table.addresses, m, n, k, beta);
  }

  function loop(call: GroupedCall, host: Int32Array): void {
    const { mode, a, b, matrices, out, m, n, k, beta } = call;
    const blas = gemmOf(context), dtype = a.dtype as "f32" | "bf16";
    const size = dtype === "f32" ? 4 : 2;
    for (let g = 0; g < matrices.length; g++) {
      const first = host[g], rows = host[g + 1] - first, matrix = matrices[g];
      if (mode === 2) {
        if (rows === 0) {
          if (beta === 0) context.clear(matrix.address, matrix.bytes);
          else if (beta === 1) continue;
        }
        // deno-fmt-ignore
        if (rows > 0 || beta !== 0) blas.product(true, false, m, n, rows, 1, a.address + first * m * size, m,
          b!.address + first * n * size, n, beta, matrix.address, n, dtype, matrix.dtype as "f32" | "bf16");
      } else if (rows > 0) {
        // deno-fmt-ignore
        blas.product(false, mode === 0, rows, n, k, 1, a.address + first * k * size, k, matrix.address, mode === 0 ? k : n,
          beta, out!.address + first * n * size, n, dtype, dtype);
      }
    }
  }

  function run(call: GroupedCall): void {
    const { a, matrices, groups: { host }, m, n, k, mode, beta } = call;
    if (matrices.length === 0 || n === 0 || m === 0) return;
    if (mode === 2 && k === 0 && beta === 1) return;
    const known = host !== null && k > 0;
    if (force === "loop" && known) return loop(call, host);
    if (force !== "portable") {
      if (hopper !== null && a.dtype === "bf16" && k > 0 && hopper(call)) return;
      // cuBLAS beats the portable kernels wherever it may be used.
      if (known) return loop(call, host);
    }
    portable(call);
  }

  return {
    groupedGemm(x, weights, groups, out, options = {}) {
      const { transposeWeight = false, beta = 0 } = options;
      // deno-fmt-ignore
      check("multiply groups", x, weights, [x.dtype]);
      run({
        mode: transposeWeight ? 1 : 0,
        a: x,
        b: null,
        matrices: weights,
        groups,
        out,
        m: out.shape[0],
        n: out.shape[1],
        k: x.shape[1],
        beta,
      });
    },
    groupedGemmWeightGrad(dy, x, groups, grads, options = {}) {
      check("take the weights' gradients", x, grads, [x.dtype, "f32"]);
      run({
        mode: 2,
        a: dy,
        b: x,
        matrices: grads,
        groups,
        out: null,
        m: dy.shape[1],
        n: x.shape[1],
        k: x.shape[0],
        beta: options.beta ?? 1,
      });
    },
  };
}

/** Throws if dtypes are not those of the kernels. */
function check(
  op: string,
  x: Tensor,
  matrices: readonly Tensor[],
  allowed: readonly string[],
): void {
  if (x.dtype !== "f32" && x.dtype !== "bf16") {
    throw new TypeError(
      `Cannot ${op} on the GPU as the dtype must be f32 or bf16: current value is ${x.dtype}`,
    );
  }
  if (matrices.length > 0 && !allowed.includes(matrices[0].dtype)) {
    throw new TypeError(
      `Cannot ${op} on the GPU as the matrices' dtype must be ${
        allowed.join(" or ")
      }: current value is ${matrices[0].dtype}`,
    );
  }
}
