// What a layer tells the step it runs in: the boundaries at which a scheduler may launch gradients, and its all-to-alls.
// The layers know only this interface; `gradients.ts` drives a `CollectiveScheduler` behind it.

import type { Work } from "../collectives/types.ts";
import type { Device, StreamEvent } from "../tensor/device.ts";

/** Which of a step's all-to-alls. */
export interface AllToAllPlace {
  /** The MoE layer. */
  readonly layer: number;
  /** Half of the step. */
  readonly phase: "forward" | "backward";
  /** Dispatch carries tokens to experts, combine carries them back; their gradients go the other way. */
  readonly role: "dispatch" | "combine";
  /** Which slice of the layer's tokens, from 0: see {@linkcode Step.chunks}. */
  readonly chunk: number;
}

/** One step of training or inference, as a layer sees it. */
export interface Step {
  /** Whether gradients will be asked for: activations are kept, dropout and noise are on. */
  readonly training: boolean;
  /** Number of the step, which seeds noise. */
  readonly number: number;
  /**
   * Whether this is the first of the passes whose gradients are summed: a backward pass then overwrites the gradients of parameters that
   * say so (`Parameter.overwrites`), so that nobody sets them to zero. Else it adds.
   */
  readonly firstPass: boolean;
  /**
   * Whether this forward pass has run before and runs again in the backward pass, as its activations were dropped: nothing is counted or
   * recorded twice. @default {false}
   */
  readonly repeated?: boolean;
  /**
   * How many contiguous slices a layer's tokens are cut into in this pass, each with all-to-alls of its own. The same on all ranks.
   * @param layer The layer.
   */
  chunks(layer: number): number;
  /**
   * Starts an all-to-all of a MoE layer, or one chunk of it: tells the scheduler and calls `start`.
   * @param where Which of the layer's all-to-alls.
   * @param start Starts it, with what it is to be ordered after: without an event, all that the device's stream holds.
   * @returns What orders the device's stream after it and tells the scheduler that it has ended: to be called once, when the rows are wanted.
   */
  allToAll(
    where: AllToAllPlace,
    start: (after?: StreamEvent) => Work,
  ): Promise<() => Promise<void>>;
  /** The backward pass of a layer's combine begins: an all-to-all is imminent. */
  combineBackwardStarts(layer: number): void;
  /** The backward pass of a layer has ended. */
  layerBackwardEnds(layer: number): void;
  /** A parameter's gradient is complete on this rank for this step. */
  gradientReady(name: string): void;
}

/**
 * A step that reduces nothing: inference, evaluation, and all passes but the last of a step that accumulates gradients.
 *
 * @param device Whose stream all-to-alls are ordered with.
 * @param options Whether gradients will be asked for, the number that seeds noise, whether gradients are overwritten, and chunks by layer.
 * @default {{training: false, number: 0, firstPass: false, chunks: none}}
 * @returns The step.
 */
export function plainStep(
  device: Device,
  options: {
    readonly training?: boolean;
    readonly number?: number;
    readonly firstPass?: boolean;
    readonly chunks?: ReadonlyMap<number, number>;
  } = {},
): Step {
  return {
    training: options.training ?? false,
    number: options.number ?? 0,
    firstPass: options.firstPass ?? false,
    chunks: (layer) => options.chunks?.get(layer) ?? 1,
    allToAll: (_where, start) => {
      const work = start();
      return Promise.resolve(async () => await work.wait(device.stream));
    },
    combineBackwardStarts: () => {},
    layerBackwardEnds: () => {},
    gradientReady: () => {},
  };
}

/**
 * Factor of the old contents of a parameter's gradient in a backward pass.
 *
 * @param parameter Whether it is overwritten.
 * @param step The step; without one it is added to.
 * @returns 0 or 1.
 */
export function gradientBeta(
  parameter: { readonly overwrites: boolean },
  step?: { readonly firstPass: boolean },
): 0 | 1 {
  return step?.firstPass && parameter.overwrites ? 0 : 1;
}

/**
 * A step for a forward pass that runs again in the backward pass.
 *
 * @param step The step that it is a part of.
 * @returns The same step, but for {@linkcode Step.repeated}.
 */
export function repeatedStep(step: Step): Step {
  return {
    training: step.training,
    number: step.number,
    firstPass: step.firstPass,
    repeated: true,
    chunks: (layer) => step.chunks(layer),
    allToAll: (where, start) => step.allToAll(where, start),
    combineBackwardStarts: (layer) => step.combineBackwardStarts(layer),
    layerBackwardEnds: (layer) => step.layerBackwardEnds(layer),
    gradientReady: (name) => step.gradientReady(name),
  };
}
