// Launches of loss.cu: softmax, its gradient, and cross-entropy, one block per row. How many threads a row gets, and how much of it stays in
// shared memory, is decided here.

import type { Kernels } from "../device.ts";
import type { DType } from "../dtype.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext, CudaKernel, ModuleSource, ParameterType } from "./context.ts";
import source from "./loss.cu" with { type: "text" };

type Loss = Pick<Kernels, "softmax" | "softmaxBackward" | "crossEntropy">;

const SOFTMAX: readonly ParameterType[] = ["ptr", "ptr", "i32"];
const SOFTMAX_BACKWARD: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i32"];
const CROSS_ENTROPY: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i32", "f32", "i32"];

/** The kernels of loss.cu. */
export const lossModule: ModuleSource = {
  name: "loss",
  overlaps: true,
  source,
  kernels: Object.fromEntries(
    ["f32", "bf16"].flatMap((dtype): [string, readonly ParameterType[]][] => [
      [`softmax_${dtype}`, SOFTMAX],
      [`softmax_backward_${dtype}`, SOFTMAX_BACKWARD],
      [`cross_entropy_${dtype}`, CROSS_ENTROPY],
    ]),
  ),
};

interface PerDType {
  /** Elements in 16 bytes. */
  readonly wide: number;
  readonly softmax: CudaKernel;
  readonly softmaxBackward: CudaKernel;
  readonly crossEntropy: CudaKernel;
}

/** Most threads of a block of crossEntropy, and blocks that a multiprocessor is meant to hold (see its launch bounds). */
const LOSS_THREADS = 512, LOSS_BLOCKS = 3;
/** Part of a row that stays in shared memory between the two passes. */
const STAGED_PART = 0.56;
/** Shared memory that the kernel and the system take of a block besides the staged packs, in bytes. */
const RESERVED_BYTES = 2048;

/**
 * The softmax and loss kernels of a GPU.
 *
 * @param context The GPU.
 * @returns The kernels; f32 and bf16.
 */
export function lossKernels(context: CudaContext): Loss {
  const perDType = (dtype: DType, wide: number): PerDType => ({
    wide,
    softmax: context.kernel(lossModule, `softmax_${dtype}`),
    softmaxBackward: context.kernel(lossModule, `softmax_backward_${dtype}`),
    crossEntropy: context.kernel(lossModule, `cross_entropy_${dtype}`),
  });
  const f32 = perDType("f32", 4), bf16 = perDType("bf16", 8);
  // Part of a row stays in shared memory, the rest in the L2 cache: together they are faster than either. Rows too long for that with
  // LOSS_BLOCKS blocks on a multiprocessor get two, and half of the shared memory each (bench/NOTES.md).
  const room_bytes = context.properties.sharedMemory_bytes;
  const third_bytes = Math.floor(room_bytes / LOSS_BLOCKS) - RESERVED_BYTES;
  const half_bytes = Math.floor(room_bytes / 2) - RESERVED_BYTES;

  /** Packs of a row that stay in shared memory. */
  function stagedOf(packs: number): number {
    const wanted = Math.ceil(packs * STAGED_PART);
    if (wanted * 16 <= third_bytes) return wanted;
    return Math.min(packs, Math.floor(half_bytes / 16));
  }

  function of(op: string, x: Tensor): PerDType {
    if (x.dtype === "bf16") return bf16;
    if (x.dtype === "f32") return f32;
    throw new TypeError(
      `Cannot ${op} as the dtype of the rows must be f32 or bf16: current value is ${x.dtype}`,
    );
  }

  /** Threads for a row: four packs each where that suffices, whole warps, a power of two. */
  function threads(width: number, wide: number, most: number): number {
    const warps = Math.ceil(width / (wide * 4 * 32));
    return Math.min(most, 32 * 2 ** Math.ceil(Math.log2(Math.max(1, warps))));
  }

  return {
    softmax(x, out) {
      const { softmax, wide } = of("take the softmax", x), width = x.shape.at(-1)!;
      if (x.size === 0) return;
      const rows = x.size / width;
      softmax.launch(rows, 1, 1, threads(width, wide, 1024), 0, x.address, out.address, width);
    },
    softmaxBackward(dY, y, dX) {
      const { softmaxBackward, wide } = of("take the softmax's gradient", y);
      const width = y.shape.at(-1)!;
      if (y.size === 0) return;
      // deno-fmt-ignore
      softmaxBackward.launch(y.size / width, 1, 1, threads(width, wide, 1024), 0, dY.address, y.address, dX.address, width);
    },
    crossEntropy(logits, targets, losses, scale) {
      const { crossEntropy, wide } = of("take the cross-entropy", logits);
      const [rows, width] = logits.shape;
      if (logits.size === 0) return;
      const staged = stagedOf(Math.floor(width / wide));
      // deno-fmt-ignore
      crossEntropy.launch(rows, 1, 1, threads(width, wide, LOSS_THREADS), staged * 16,
        logits.address, targets.address, losses.address, width, scale, staged);
    },
  };
}
