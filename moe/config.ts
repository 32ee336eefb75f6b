// The sizes of a language model, checked once before anything is allocated. Plain data: it is written into checkpoints as JSON.

import type { Activation } from "../tensor/device.ts";
import { type DType, wideDtype } from "../tensor/dtype.ts";
import { gradientDtype } from "./parameter.ts";
import { createRouter, type RouterOptions } from "./router.ts";

/** Sizes and constants of a Mixture-of-Experts language model. */
export interface ModelConfig {
  /** Number of tokens V. */
  readonly vocab: number;
  /** Model width D. */
  readonly width: number;
  /** Number of layers. */
  readonly layers: number;
  /** Query heads H. */
  readonly heads: number;
  /** Key and value heads G; divides H. */
  readonly kvHeads: number;
  /** Width C of one head; even. */
  readonly headDim: number;
  /** Hidden width F of an expert or of a dense feed-forward network. */
  readonly hidden: number;
  /** Experts E of each MoE layer; 0 makes every layer dense. */
  readonly experts: number;
  /** How tokens find their experts. */
  readonly router: RouterOptions;
  /** Experts that every token passes, besides the routed ones; 0 for none. */
  readonly sharedExperts: number;
  /** Layers at the start that are dense although the others are not. */
  readonly denseLayers: number;
  /** Activation of the experts and dense networks. */
  readonly activation: Activation;
  /** Whether the head shares the embedding's weights. */
  readonly tied: boolean;
  /** Base of the rotary angles. */
  readonly ropeTheta: number;
  /** Added to the mean square in norms. */
  readonly normEps: number;
  /** Standard deviation of the first weights. */
  readonly initStd: number;
  /** Element type of weights and activations. */
  readonly dtype: DType;
  /**
   * Element type of the gradients of matrices, embedding and head included: f32 (f64 for f64), or that of the weights, which is bf16 for a bf16
   * model. Those of the norms' gains and the gates, which are small, and which every token adds to, are f32 at least. It may change
   * when a run goes on.
   */
  readonly gradientDtype: DType;
}

/** What must be given of a configuration; the rest has defaults. */
export type ModelOptions =
  & Partial<ModelConfig>
  & Pick<ModelConfig, "vocab" | "width" | "layers" | "heads">;

/**
 * Fills in and checks a configuration.
 *
 * @param options The sizes; without others `kvHeads` is `heads`, `headDim` is `width / heads`, `hidden` is `4 · width`,
 * the network is dense and gradients are f32 (f64 for f64); with experts the router is Mixtral's top-2.
 * @returns The whole configuration.
 * @throws {RangeError} If a size is impossible; the message names it.
 *
 * @example
 * ```ts
 * import { modelConfig } from "./config.ts";
 * import assert from "node:assert/strict";
 *
 * const config = modelConfig({ vocab: 256, width: 64, layers: 2, heads: 4, experts: 8 });
 * assert.equal(config.headDim, 16);
 * ```
 */
export function modelConfig(options: ModelOptions): ModelConfig {
  const { width, heads } = options;
  const config: ModelConfig = {
    kvHeads: heads,
    headDim: width / heads,
    hidden: 4 * width,
    experts: 0,
    router: { kind: "softmax", topK: 2 },
    sharedExperts: 0,
    denseLayers: 0,
    activation: "swiglu",
    tied: false,
    ropeTheta: 10_000,
    normEps: 1e-5,
    initStd: 0.02,
    dtype: "f32",
    ...options,
    gradientDtype: options.gradientDtype ?? wideDtype(options.dtype ?? "f32"),
  };
  for (const name of ["vocab", "width", "layers", "heads", "kvHeads", "hidden"] as const) {
    demand(
      Number.isSafeInteger(config[name]) && config[name] >= 1,
      name,
      "a whole number >= 1",
      config[name],
    );
  }
  for (const name of ["experts", "sharedExperts", "denseLayers"] as const) {
    demand(
      Number.isSafeInteger(config[name]) && config[name] >= 0,
      name,
      "a whole number >= 0",
      config[name],
    );
  }
  if (options.headDim === undefined) {
    demand(width % heads === 0, "heads", `a divisor of the width ${width}`, heads);
  }
  const { headDim, kvHeads } = config;
  demand(
    Number.isSafeInteger(headDim) && headDim >= 2 && headDim % 2 === 0,
    "headDim",
    "an even whole number >= 2, as rotary positions turn pairs",
    headDim,
  );
  demand(heads % kvHeads === 0, "kvHeads", `a divisor of the ${heads} heads`, kvHeads);
  demand(
    config.denseLayers <= config.layers,
    "denseLayers",
    `at most ${config.layers}`,
    config.denseLayers,
  );
  demand(
    ["swiglu", "relu", "gelu"].includes(config.activation),
    "activation",
    "swiglu, relu or gelu",
    config.activation,
  );
  demand(
    ["f32", "f64", "bf16", "f16"].includes(config.dtype),
    "dtype",
    "f32, f64, bf16 or f16",
    config.dtype,
  );
  gradientDtype(config.dtype, config.gradientDtype);
  for (const name of ["ropeTheta", "normEps", "initStd"] as const) {
    demand(Number.isFinite(config[name]) && config[name] > 0, name, "a number > 0", config[name]);
  }
  if (config.experts > 0) createRouter(config.router, config.experts);
  return config;
}

/**
 * What makes two models the same, as far as their weights go: for checkpoints. Coefficients of losses, capacity and noise may change
 * when a run goes on.
 *
 * @param config The sizes.
 * @returns Plain data.
 */
export function modelDescription(config: ModelConfig): object {
  const { router, initStd: _, gradientDtype: __, ...sizes } = config;
  if (config.experts === 0) return sizes;
  const full = createRouter(router, config.experts);
  const { kind, topK, renormalise, scale, groups, groupLimit } = full;
  const choice = { kind, topK, renormalise, scale, groups, groupLimit };
  // With expert choice the capacity is what decides how many experts a token has.
  const capacity = kind === "expertChoice" ? { capacityFactor: full.capacityFactor } : {};
  return { ...sizes, router: { ...choice, ...capacity } };
}

/**
 * How many parameters a model has.
 *
 * @param config The sizes.
 * @returns All of them, and those that one token meets.
 */
export function countParameters(
  config: ModelConfig,
): { readonly total: number; readonly active: number } {
  const { vocab, width, layers, heads, kvHeads, headDim, hidden, experts, sharedExperts } = config;
  const expert = (config.activation === "swiglu" ? 3 : 2) * width * hidden;
  const common = (config.tied ? 1 : 2) * vocab * width + width +
    layers * (2 * width + 2 * width * headDim * (heads + kvHeads));
  const dense = experts === 0 ? layers : config.denseLayers;
  const base = common + dense * expert;
  if (experts === 0) return { total: base, active: base };
  const router = createRouter(config.router, experts);
  const always = base + (layers - dense) * (experts * width + sharedExperts * expert);
  const routed = (layers - dense) * expert;
  const perToken = router.kind === "expertChoice" ? router.capacityFactor! : router.topK;
  return { total: always + experts * routed, active: Math.round(always + perToken * routed) };
}

function demand(holds: boolean, name: string, what: string, value: unknown): void {
  if (holds) return;
  throw new RangeError(
    `Cannot make a model as "${name}" must be ${what}: current value is ${value}`,
  );
}
