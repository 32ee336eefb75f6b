// AdamW with decoupled decay, the learning rate's course, and clipping by the global norm. Each rank updates the parameters that it
// holds: replicated ones alike on all ranks, an expert where it sits now. Moments of experts are the expert store's, and move with them.

import type { AdamWUpdate, Stream } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { type Tensor, TensorScope } from "../tensor/tensor.ts";
import type { CheckpointTensor } from "./checkpoint.ts";
import { OffloadedUpdates, offloadStreams } from "./offload.ts";
import { createMoments, freeMoments, type Moments, type Parameter } from "./parameter.ts";
import { namedTensor } from "./weights.ts";

/** Course of the learning rate: a linear warm-up, then half a cosine down to a floor. */
export interface LearningRateOptions {
  /** Highest rate. */
  readonly peak: number;
  /** Steps until the highest rate. */
  readonly warmup: number;
  /** Steps of the whole run. */
  readonly steps: number;
  /** Rate at the end, as a part of the highest. @default {0.1} */
  readonly floor?: number;
}

/**
 * The learning rate of a step.
 *
 * @param step Number of the step, from 1.
 * @param options The course.
 * @returns The rate; after the last step it stays at the floor.
 *
 * @example
 * ```ts
 * import { learningRate } from "./optimizer.ts";
 * import assert from "node:assert/strict";
 *
 * const course = { peak: 1, warmup: 10, steps: 100, floor: 0.1 };
 * assert.equal(learningRate(5, course), 0.5);
 * assert.equal(learningRate(10, course), 1);
 * assert.equal(learningRate(100, course), 0.1);
 * ```
 */
export function learningRate(step: number, options: LearningRateOptions): number {
  const { peak, warmup, steps } = options;
  const low = peak * (options.floor ?? 0.1);
  if (step < warmup) return peak * step / warmup;
  if (step >= steps) return low;
  const progress = (step - warmup) / (steps - warmup);
  return low + (peak - low) * (1 + Math.cos(Math.PI * progress)) / 2;
}

/** Constants of {@linkcode AdamW}. */
export interface AdamWSettings {
  /** Decay of the first moment. @default {0.9} */
  readonly beta1?: number;
  /** Decay of the second moment. @default {0.95} */
  readonly beta2?: number;
  /** Added to the root of the second moment. @default {1e-8} */
  readonly eps?: number;
  /** Decoupled weight decay, of matrices only. @default {0.1} */
  readonly weightDecay?: number;
}

/** AdamW (Loshchilov and Hutter) over a set of parameters. */
export class AdamW implements Disposable {
  /** Updates done so far; a resumed run sets it. */
  steps = 0;
  readonly #parameters: () => readonly Parameter[];
  /** Moments by name of their parameter, of those that have none themselves. */
  readonly #moments = new Map<string, Moments>();
  readonly #settings: Required<AdamWSettings>;
  /** What was updated last, and the updates: made anew only when experts have moved. */
  #updated: readonly Parameter[] = [];
  #gradients: readonly Tensor[] = [];
  #overwritten: readonly AdamWUpdate[] = [];
  #added: readonly AdamWUpdate[] = [];
  /** Experts whose moments are in host memory; null if there are none. */
  #offloaded: OffloadedUpdates | null = null;
  #streams: [Stream, Stream] | null = null;

  /**
   * Makes moments of zeros for the parameters that bring none.
   *
   * @param parameters What to update; asked again in every step, as experts may move in between.
   * @param settings Constants.
   */
  constructor(parameters: () => readonly Parameter[], settings: AdamWSettings = {}) {
    this.#parameters = parameters;
    this.#settings = { beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1, ...settings };
    using scope = new TensorScope();
    for (const { name, value, moments, offloaded } of parameters()) {
      if (!moments && !offloaded) this.#moments.set(name, createMoments(value));
    }
    scope.keep(this);
  }

  /**
   * The moments of a parameter.
   *
   * @param parameter One of those that are updated.
   * @returns Its moments.
   * @throws {Error} If it came later and brought none, or has them in host memory.
   */
  momentsOf({ name, moments }: Parameter): Moments {
    const found = moments ?? this.#moments.get(name);
    if (!found) {
      throw new Error(`Cannot update ${name} as it must have moments: current value has none`);
    }
    return found;
  }

  /**
   * The moments of a parameter for a checkpoint, wherever they are.
   *
   * @param parameter One of those that are updated.
   * @param owner The rank that writes them.
   * @returns `<name>.moment1`, `<name>.moment2` and, for bf16 weights, `<name>.residual`.
   */
  tensorsOf(parameter: Parameter, owner: number): CheckpointTensor[] {
    const { name, offloaded, value: { shape } } = parameter;
    if (!offloaded) {
      return Object.entries(this.momentsOf(parameter)).flatMap(([kind, tensor]) =>
        tensor ? [namedTensor(`${name}.${kind}`, tensor, owner)] : []
      );
    }
    const { memory: { moments }, start, end } = offloaded;
    if (moments?.place !== "host") {
      throw new Error(`Cannot read the moments of ${name} as its experts have moved since`);
    }
    return moments.layout.parts.map(({ kind, dtype }) => ({
      name: `${name}.${kind}`,
      owner,
      dtype,
      shape,
      read: async () => (await moments.read(kind, start, end))!,
      write: (array) => moments.write(kind, start, array),
    }));
  }

  /**
   * One update of every parameter. Gradients that no backward pass overwrites (`Parameter.overwrites`) are zero afterwards.
   *
   * @param lr Learning rate.
   * @param gradScale Factor applied to the gradients first, f32 [1] on the device: see `ops.clipScale`. If it is not finite, no weight
   * and no moment changes.
   */
  update(lr: number, gradScale: Tensor): void {
    const step = ++this.steps;
    const { beta1, beta2, eps } = this.#settings;
    this.#prepare();
    const options = { lr, beta1, beta2, eps, step, gradScale };
    this.#offloaded?.begin();
    ops.adamW(this.#overwritten, { ...options, zeroGradient: false });
    ops.adamW(this.#added, { ...options, zeroGradient: true });
    this.#offloaded?.run((update) => ops.adamW([update], { ...options, zeroGradient: false }));
  }

  /**
   * Adds the squared norms of the gradients that this rank answers for: each gradient is counted by one rank, however many hold it, so
   * that all ranks get the same sum to the bit and weights cannot drift apart.
   *
   * @param counts Whether this rank is the one that counts a parameter.
   * @param sum f64 [1], where the squares are added: to be summed over ranks.
   */
  addSquaredNorms(counts: (parameter: Parameter) => boolean, sum: Tensor): void {
    this.#prepare();
    ops.sumSquares(this.#gradients.filter((_, i) => counts(this.#updated[i])), sum);
  }

  #prepare(): void {
    const parameters = this.#parameters();
    const last = this.#updated;
    if (parameters === last) return;
    if (parameters.length === last.length && parameters.every((p, i) => p === last[i])) return;
    const updates = (overwrites: boolean) =>
      parameters.filter((parameter) => {
        return parameter.overwrites === overwrites && !parameter.offloaded;
      }).map((parameter) => ({
        parameter: parameter.value,
        gradient: parameter.grad,
        ...this.momentsOf(parameter),
        weightDecay: parameter.decay ? this.#settings.weightDecay : 0,
      }));
    this.#overwritten = updates(true);
    this.#added = updates(false);
    this.#gradients = parameters.map(({ grad }) => grad);
    this.#prepareOffloaded(parameters);
    this.#updated = parameters;
  }

  #prepareOffloaded(parameters: readonly Parameter[]): void {
    const experts = [...new Set(parameters.flatMap(({ offloaded }) => offloaded?.memory ?? []))];
    this.#offloaded?.[Symbol.dispose]();
    this.#offloaded = null;
    if (experts.length === 0) return;
    this.#streams ??= offloadStreams(experts[0].weights.device);
    this.#offloaded = new OffloadedUpdates(experts, this.#settings.weightDecay, this.#streams);
  }

  /** Frees the moments, but for those that are the parameters' own. */
  [Symbol.dispose](): void {
    this.#offloaded?.[Symbol.dispose]();
    this.#offloaded = null;
    this.#moments.forEach(freeMoments);
  }
}
