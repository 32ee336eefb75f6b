// Puts the kernels of the rooms together: which modules are compiled when a device is made, and which room has which kernel.

import type { Kernels, RoutingKernels } from "../device.ts";
import type { CudaContext, ModuleSource } from "./context.ts";
import { gemmKernels } from "./gemm.ts";

/** Every `.cu` module of the library. */
export const CUDA_MODULES: readonly ModuleSource[] = [];

/** Kernels that throw when they are called, by their names. */
function missing<T extends object>(): T {
  return new Proxy({} as T, {
    get: (_, name) => () => {
      throw new Error(
        `Cannot run ${String(name)} on the GPU as its kernel must be built: it is not`,
      );
    },
  });
}

/**
 * The kernels of a GPU.
 *
 * @param context The GPU, its modules loaded.
 * @returns Kernels for tensors on it.
 */
export function cudaKernels(context: CudaContext): Kernels {
  return Object.setPrototypeOf({ ...gemmKernels(context) }, missing<Kernels>());
}

/**
 * The routing kernels of a GPU.
 *
 * @param context The GPU, its modules loaded.
 * @returns Kernels for tensors on it.
 */
export function cudaRoutingKernels(_context: CudaContext): RoutingKernels {
  return missing<RoutingKernels>();
}
