// Launches of norms.cu: RMS norm alone, behind a residual connection, and its gradient; rotary positions alone and at the fused projection
// of queries, keys and values. Which kernel a width and an alignment get is decided here.

import type { Kernels } from "../device.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext, CudaKernel, ModuleSource, ParameterType } from "./context.ts";
import source from "./norms.cu" with { type: "text" };

type Norms = Pick<
  Kernels,
  "rmsNorm" | "addRmsNorm" | "rmsNormBackward" | "rope" | "splitQkv" | "joinQkv"
>;

const NORM: readonly ParameterType[] = ["ptr", "ptr", "ptr", "ptr", "i64", "i32", "f32"];
const ADD_NORM: readonly ParameterType[] = ["ptr", "ptr", ...NORM];
// deno-fmt-ignore
const BACKWARD: readonly ParameterType[] = ["ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "i64", "i32"];
// deno-fmt-ignore
const ROTATE: readonly ParameterType[] = ["ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "i64", "i32", "i32", "i32", "i32", "f32"];

/** The kernels of norms.cu. */
export const normsModule: ModuleSource = {
  name: "norms",
  overlaps: true,
  source,
  kernels: Object.fromEntries(
    ["f32", "bf16"].flatMap((dtype): [string, readonly ParameterType[]][] => [
      ...["warp", "block", "general"].flatMap((how): [string, readonly ParameterType[]][] => [
        [`rms_norm_${how}_${dtype}`, NORM],
        [`add_rms_norm_${how}_${dtype}`, ADD_NORM],
        [`rms_norm_backward_${how}_${dtype}`, BACKWARD],
      ]),
      [`add_columns_${dtype}`, ["ptr", "ptr", "i32", "i32"]],
      ...["packed", "general"].flatMap((how): [string, readonly ParameterType[]][] => [
        [`split_${how}_${dtype}`, ROTATE],
        [`join_${how}_${dtype}`, ROTATE],
      ]),
    ]),
  ),
};

/** How a norm is launched: a warp per row, a block per row with the row in registers, or a loop over any row. */
interface Ways {
  readonly warp: CudaKernel;
  readonly block: CudaKernel;
  readonly general: CudaKernel;
}

interface PerDType {
  /** Elements in 16 bytes. */
  readonly wide: number;
  readonly norm: Ways;
  readonly addNorm: Ways;
  readonly backward: Ways;
  readonly addColumns: CudaKernel;
  readonly splitPacked: CudaKernel;
  readonly splitGeneral: CudaKernel;
  readonly joinPacked: CudaKernel;
  readonly joinGeneral: CudaKernel;
}

/** Vectors of 16 bytes that a thread holds at most, as PACKS in norms.cu. */
const PACKS = 4;
/** Warps of a block whose warps have a row each. */
const WARPS = 4, BACKWARD_WARPS = 8;
/** Tables of turns that are kept: a program has one or two head widths and bases. */
const TABLES = 8;

/**
 * The kernels of rows: norms and rotary positions, in f32 and bf16.
 *
 * @param context What the rooms of the device share.
 * @returns The kernels.
 */
export function normsKernels(context: CudaContext): Norms {
  const get = (name: string) => context.kernel(normsModule, name);
  const ways = (name: string, dtype: string): Ways => ({
    warp: get(`${name}_warp_${dtype}`),
    block: get(`${name}_block_${dtype}`),
    general: get(`${name}_general_${dtype}`),
  });
  const perDType = (dtype: "f32" | "bf16"): PerDType => ({
    wide: dtype === "f32" ? 4 : 8,
    norm: ways("rms_norm", dtype),
    addNorm: ways("add_rms_norm", dtype),
    backward: ways("rms_norm_backward", dtype),
    addColumns: get(`add_columns_${dtype}`),
    splitPacked: get(`split_packed_${dtype}`),
    splitGeneral: get(`split_general_${dtype}`),
    joinPacked: get(`join_packed_${dtype}`),
    joinGeneral: get(`join_general_${dtype}`),
  });
  const f32 = perDType("f32"), bf16 = perDType("bf16");
  const of = (x: Tensor, op: string): PerDType => {
    if (x.dtype === "bf16") return bf16;
    if (x.dtype === "f32") return f32;
    throw new TypeError(
      `Cannot ${op} on the GPU as the dtype must be f32 or bf16: current value is ${x.dtype}`,
    );
  };
  const { multiprocessors } = context.properties;

  /** Launches a forward norm of x [N, D] in the way that fits; `aligned` says whether all rows begin at multiples of 16 bytes. */
  function norm(
    kernels: Ways,
    N: number,
    D: number,
    wide: number,
    aligned: boolean,
    values: readonly number[],
  ): void {
    if (N === 0) return;
    const packs = D / wide, threads = Math.ceil(packs / PACKS / 32) * 32;
    if (!aligned || D % wide !== 0 || threads > 1024) {
      kernels.general.launch(N, 1, 1, Math.min(256, Math.ceil(D / 32) * 32 || 32), 0, ...values);
    } else if (threads <= 32) {
      kernels.warp.launch(Math.ceil(N / WARPS), 1, 1, 32 * WARPS, 0, ...values);
    } else kernels.block.launch(N, 1, 1, threads, 0, ...values);
  }

  /** The frequencies of a head width and a base in turns per position, f64 [C / 2]; the most recently used last. */
  const tables = new Map<string, number>();
  let last = { headDim: 0, theta: 0, address: 0 };
  function turns(headDim: number, theta: number): number {
    if (last.headDim === headDim && last.theta === theta) return last.address;
    const key = `${headDim} ${theta}`;
    let address = tables.get(key);
    if (address === undefined) {
      const half = headDim / 2;
      const table = Float64Array.from(
        { length: half },
        (_, i) => theta ** (-i / half) / (2 * Math.PI),
      );
      address = context.allocate(table.byteLength);
      context.upload(table, address);
    }
    tables.delete(key);
    tables.set(key, address);
    if (tables.size > TABLES) {
      const [oldest, old] = tables.entries().next().value!;
      tables.delete(oldest);
      context.free(old);
    }
    last = { headDim, theta, address };
    return address;
  }

  function rotate(
    op: string,
    split: boolean,
    fused: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    options: { readonly headDim: number; readonly theta: number },
    direction: number,
  ): void {
    const per = of(fused, op), C = options.headDim, half = C / 2, N = fused.shape[0];
    const G = fused === q ? 0 : k.shape[1] / C, H = q.shape[1] / C;
    if (N === 0 || H + G === 0) return;
    if (fused.shape[1] !== (H + 2 * G) * C) {
      throw new RangeError(
        `Cannot ${op} as the fused columns must be ${(H + 2 * G) * C}: current value is ${
          fused.shape[1]
        }`,
      );
    }
    const packed = half % per.wide === 0 &&
      (fused.address | q.address | k.address | v.address) % 16 === 0;
    const kernel = split
      ? packed ? per.splitPacked : per.splitGeneral
      : packed
      ? per.joinPacked
      : per.joinGeneral;
    // enough rows for a block that angles are made for several heads at once, and few enough to fill the GPU
    const rows = Math.max(
      1,
      Math.min(Math.ceil(128 / half), Math.ceil(N / (4 * multiprocessors))),
    );
    // deno-fmt-ignore
    kernel.launch(Math.ceil(N / rows), 1, 1, 256, rows * half * 8, fused.address, q.address, k.address, v.address, positions.address,
      turns(C, options.theta), N, H, G, C, rows, direction);
  }

  return {
    rmsNorm(x, gain, out, invRms, eps): void {
      const { norm: kernels, wide } = of(x, "normalise"), [N, D] = x.shape;
      const aligned = (x.address | gain.address | out.address) % 16 === 0;
      // deno-fmt-ignore
      norm(kernels, N, D, wide, aligned, [x.address, gain.address, out.address, invRms.address, N, D, eps]);
    },

    addRmsNorm(x, y, gain, sum, out, invRms, eps): void {
      const { addNorm: kernels, wide } = of(x, "add and normalise"), [N, D] = x.shape;
      const aligned = (x.address | y.address | gain.address | sum.address | out.address) % 16 === 0;
      // deno-fmt-ignore
      norm(kernels, N, D, wide, aligned,
        [x.address, y.address, gain.address, sum.address, out.address, invRms.address, N, D, eps]);
    },

    rmsNormBackward(dOut, x, gain, invRms, dX, dGain, residual): void {
      const { backward, wide } = of(x, "take the norm's gradient"), [N, D] = x.shape;
      const { addColumns } = of(dGain, "add to the gain's gradient");
      if (N === 0 || D === 0) return;
      const beside = residual?.address ?? 0;
      const aligned = (dOut.address | x.address | gain.address | dX.address | beside) % 16 === 0;
      const threads = Math.ceil(D / wide / PACKS / 32) * 32;
      // Rows are dealt to about as many blocks as run at once; each leaves one row of partial sums for the gain.
      let kernel = backward.general, block = 256, blocks = Math.min(N, 2 * multiprocessors);
      if (aligned && D % wide === 0 && threads <= 512) {
        if (threads <= 32) {
          kernel = backward.warp, block = 32 * BACKWARD_WARPS;
          blocks = Math.min(Math.ceil(N / BACKWARD_WARPS), 2 * multiprocessors);
        } else {
          kernel = backward.block, block = threads;
          blocks = Math.min(N, Math.max(1, Math.floor(512 / threads)) * multiprocessors);
        }
      }
      const partial = context.allocate(blocks * D * 4);
      // deno-fmt-ignore
      kernel.launch(blocks, 1, 1, block, 0, dOut.address, x.address, gain.address, invRms.address, beside, dX.address, partial, N, D);
      addColumns.launch(Math.ceil(D / 32), 1, 1, 1024, 0, partial, dGain.address, blocks, D);
      context.free(partial);
    },

    rope(x, positions, options): void {
      // a projection of queries only, split and joined in place
      rotate("rotate", true, x, x, x, x, positions, options, options.inverse ? -1 : 1);
    },

    splitQkv(qkv, positions, options, q, k, v): void {
      rotate("split a projection", true, qkv, q, k, v, positions, options, 1);
    },

    joinQkv(dQ, dK, dV, positions, options, dQkv): void {
      rotate("join a projection", false, dQkv, dQ, dK, dV, positions, options, -1);
    },
  };
}
