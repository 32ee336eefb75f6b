// What a training step sends: bytes from one rank to the others, by operation, when every rank has as many rows and routing is balanced
// so that each expert gets as many rows from each rank. Counted as `collectives/volume.ts` counts. With R ranks, N rows per rank and
// pass, A passes, and per MoE layer K choices, E experts on all ranks alike, width D, b bytes per element:
//
//   allToAllV   A · Σ_layers 4 · N K D b · (R − 1) / R         dispatch and combine, forward and backward
//   allGather   A · Σ_layers (R − 1) · 8 · ((C P + 2) E + 2)    the router's sums; P = K if drops go by position, else 1; C chunks
//   allReduce   Σ_micro-ops ⌊2 (R − 1) · bytes / R⌋             gradients, on a communicator of their own
//             + ⌊2 (R − 1) · 24 / R⌋                            loss, time of all-to-alls, norm of the gradients
//
// The first is why MoE training scales weakly: per rank it grows with its own rows only, and the rest does not grow with R at all beyond
// the factor (R − 1) / R, save the router's sums. Routers with noise, expert choice or a replay gather token counts, too: + 8 (R − 1)
// bytes per layer and pass. Replicas of experts are not counted here.

import type { Schedule } from "./hooks.ts";
import type { MoeLayer } from "./moe_layer.ts";
import { recordLength } from "./router_exchange.ts";

/** Sizes of a step. */
export interface VolumeOptions {
  /** Ranks R. */
  readonly ranks: number;
  /** Rows N of a rank in a pass. */
  readonly rows: number;
  /** Passes A of a step. @default {1} */
  readonly passes?: number;
  /** Width D. */
  readonly width: number;
  /** Bytes b of an element of the activations. @default {4} */
  readonly elementBytes?: number;
  /** The MoE layers' routers. */
  readonly routers: readonly MoeLayer["router"][];
  /** Chunks C that each layer's tokens are cut into. @default {1} */
  readonly chunks?: number;
  /** How gradients are reduced. */
  readonly schedule: Schedule;
}

/** Bytes that one rank sends to the others in a step. */
export interface StepVolume {
  /** Rows of tokens, to experts and back. */
  readonly allToAllV: number;
  /** Sums of the routers. */
  readonly allGather: number;
  /** Gradients of group `world`, on their own communicator. */
  readonly gradients: number;
  /** Sums at the step's end. */
  readonly allReduce: number;
}

/**
 * Bytes that one rank sends in a balanced training step, by the formulas at the head of this file.
 *
 * @param options Sizes.
 * @returns The bytes, by operation.
 */
export function stepVolume(options: VolumeOptions): StepVolume {
  const { ranks, rows, passes = 1, width, elementBytes = 4, routers, schedule } = options;
  const { chunks = 1 } = options;
  const others = ranks - 1;
  const reduced = (bytes: number) => Math.floor(2 * others * bytes / ranks);
  let allToAllV = 0, allGather = 0, gradients = 0;
  for (const { topK, experts, capacityFactor, drop } of routers) {
    allToAllV += 4 * rows * topK * width * elementBytes * others / ranks;
    const places = capacityFactor !== null && drop === "position" ? topK : 1;
    allGather += others * 8 * recordLength(chunks * places, experts);
  }
  for (const { bytes } of schedule.microOps) gradients += reduced(bytes);
  return {
    allToAllV: passes * allToAllV,
    allGather: passes * allGather,
    gradients,
    allReduce: reduced(24),
  };
}
