// Puts the kernels of the rooms together: which modules are compiled when a device is made, and which room has which kernel.

import type { Kernels } from "../device.ts";
import type { RoutingKernels } from "../routing_kernels.ts";
import {
  attentionBackwardModule,
  attentionGeneralModule,
  attentionHopperModule,
  attentionKernels,
  attentionModule,
} from "./attention.ts";
import type { CudaContext, ModuleSource } from "./context.ts";
import { elementwiseKernels, elementwiseModule } from "./elementwise.ts";
import { gateCombineModule, gateHopperModule, gateKernels, gateModule } from "./gate.ts";
import { gemmKernels } from "./gemm.ts";
import { lossKernels, lossModule } from "./loss.ts";
import { groupedKernels, groupedModule } from "./grouped.ts";
import { fusedModule, groupedActivationKernels } from "./grouped_fused.ts";
import { hopperModule } from "./grouped_hopper.ts";
import { normsKernels, normsModule } from "./norms.ts";
import { optimizerKernels, optimizerModule } from "./optimizer.ts";
import { randomKernels, randomModule } from "./random.ts";
import { routingKernels, routingModule } from "./routing.ts";
import { rowsKernels, rowsModule } from "./rows.ts";
import { sortModule } from "./sort.ts";

/** Every `.cu` module of the library. */
export const CUDA_MODULES: readonly ModuleSource[] = [
  elementwiseModule,
  lossModule,
  optimizerModule,
  attentionModule,
  attentionBackwardModule,
  attentionGeneralModule,
  attentionHopperModule,
  gateModule,
  gateCombineModule,
  gateHopperModule,
  groupedModule,
  hopperModule,
  fusedModule,
  normsModule,
  randomModule,
  routingModule,
  rowsModule,
  sortModule,
];

const ROOMS: readonly ((context: CudaContext) => Partial<Kernels>)[] = [
  attentionKernels,
  elementwiseKernels,
  gemmKernels,
  lossKernels,
  optimizerKernels,
  groupedKernels,
  normsKernels,
  randomKernels,
  rowsKernels,
];

const ROUTING_ROOMS: readonly ((context: CudaContext) => Partial<RoutingKernels>)[] = [
  gateKernels,
  routingKernels,
];

/** Joins what the rooms have. */
function join<T extends object>(
  context: CudaContext,
  rooms: readonly ((context: CudaContext) => Partial<T>)[],
): T {
  return Object.assign({}, ...rooms.map((room) => room(context))) as T;
}

/**
 * The kernels of a GPU.
 *
 * @param context The GPU, its modules loaded.
 * @returns Kernels for tensors on it.
 */
export function cudaKernels(context: CudaContext): Kernels {
  const kernels = join<Kernels>(context, ROOMS);
  return Object.assign(kernels, groupedActivationKernels(context, kernels));
}

/**
 * The routing kernels of a GPU.
 *
 * @param context The GPU, its modules loaded.
 * @returns Kernels for tensors on it.
 */
export function cudaRoutingKernels(context: CudaContext): RoutingKernels {
  return join<RoutingKernels>(context, ROUTING_ROOMS);
}
