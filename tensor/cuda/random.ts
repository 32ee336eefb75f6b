// First values of weights, drawn on the device: a model of billions of parameters begins in milliseconds.

import type { Kernels } from "../device.ts";
import type { CudaContext, ModuleSource, ParameterType } from "./context.ts";
import source from "./random.cu" with { type: "text" };

const PARAMETERS: readonly ParameterType[] = ["ptr", "i64", "i32", "i32", "f32"];

/** The kernels of random.cu. */
export const randomModule: ModuleSource = {
  name: "random",
  overlaps: true,
  source,
  kernels: { normal_f32: PARAMETERS, normal_bf16: PARAMETERS },
};

/**
 * Kernels that draw numbers.
 *
 * @param context The GPU.
 * @returns The kernels.
 */
export function randomKernels(context: CudaContext): Pick<Kernels, "normal"> {
  const f32 = context.kernel(randomModule, "normal_f32");
  const bf16 = context.kernel(randomModule, "normal_bf16");
  return {
    normal(out, key, std) {
      if (out.size === 0) return;
      if (out.dtype !== "f32" && out.dtype !== "bf16") {
        throw new TypeError(
          `Cannot draw numbers as the dtype of out must be f32 or bf16 on a GPU: current value is ${out.dtype}`,
        );
      }
      const pairs = Math.ceil(out.size / 2);
      (out.dtype === "f32" ? f32 : bf16).launch(
        Math.ceil(pairs / 256),
        1,
        1,
        256,
        0,
        out.address,
        out.size,
        key[0] | 0,
        key[1] | 0,
        std,
      );
    },
  };
}
