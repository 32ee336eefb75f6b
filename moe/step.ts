// What a layer tells the step it runs in: the boundaries at which a scheduler may launch gradients, and its all-to-alls.
// The layers know only this interface; `gradients.ts` drives a `CollectiveScheduler` behind it.

import type { Work } from "../collectives/types.ts";
import type { Device } from "../tensor/device.ts";

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
   * Runs an all-to-all of a MoE layer: tells the scheduler, starts it, and orders the device after it.
   * @param where Which of the layer's all-to-alls.
   * @param start Starts it.
   */
  allToAll(
    where: {
      readonly layer: number;
      readonly phase: "forward" | "backward";
      readonly role: "dispatch" | "combine";
    },
    start: () => Work,
  ): Promise<void>;
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
 * @param options Whether gradients will be asked for, the number that seeds noise, and whether gradients are overwritten.
 * @default {{training: false, number: 0, firstPass: false}}
 * @returns The step.
 */
export function plainStep(
  device: Device,
  options: {
    readonly training?: boolean;
    readonly number?: number;
    readonly firstPass?: boolean;
  } = {},
): Step {
  return {
    training: options.training ?? false,
    number: options.number ?? 0,
    firstPass: options.firstPass ?? false,
    allToAll: async (_where, start) => {
      await start().wait(device.stream);
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
    allToAll: (where, start) => step.allToAll(where, start),
    combineBackwardStarts: (layer) => step.combineBackwardStarts(layer),
    layerBackwardEnds: (layer) => step.layerBackwardEnds(layer),
    gradientReady: (name) => step.gradientReady(name),
  };
}
