// The router of a MoE layer: from logits to each token's experts and their weights, and back from the weights' gradient to the logits'.
// Pure functions on host arrays. What depends on the tokens of other ranks (losses, capacity, expert choice) comes in as data;
// router_exchange.ts fetches it. No weights here: logits are `x W_gᵀ`, which the layer computes, in f32 at least.
//
// Shape letters: N tokens of this rank, E experts, K choices per token.

import type { ExpertChoices } from "./router_expert_choice.ts";
import {
  balanceLossBackward,
  balanceSlope,
  type RouterSums,
  zLossBackward,
} from "./router_losses.ts";
import { addGaussian, jitter, type NoiseKey, noiseSource } from "./router_noise.ts";
import {
  groupLimitedTopK,
  sigmoidScores,
  sigmoidWeights,
  sigmoidWeightsBackward,
} from "./router_sigmoid.ts";
import {
  keepSeconds,
  type SecondExpert,
  softmaxScores,
  softmaxWeights,
  softmaxWeightsBackward,
  topK,
  topTwo,
} from "./router_softmax.ts";

/** What every router takes. */
export interface CommonRouterOptions {
  /** Coefficient of the balance loss. @default {0} */
  readonly auxLoss?: number;
  /** Coefficient of the z loss. @default {0} */
  readonly zLoss?: number;
  /** While training, logits are multiplied by uniform numbers in [1 − jitter, 1 + jitter]. @default {0} */
  readonly jitter?: number;
  /** While training, normal numbers of this standard deviation are added to the logits. @default {0} */
  readonly noise?: number;
  /** While training, an expert takes at most ⌈factor · tokens · K / E⌉ rows of the global batch; null drops nothing. @default {null} */
  readonly capacityFactor?: number | null;
  /** Which choices go beyond the capacity; router_capacity.ts states the rules. @default {"position"} */
  readonly drop?: "position" | "probability";
}

/** Switch Transformer: the best expert, weighted by its softmax score. */
export interface SwitchOptions extends CommonRouterOptions {
  /** Which router. */
  readonly kind: "switch";
}

/** GShard: two experts with weights that sum to 1; the balance loss counts first choices only. */
export interface GShardOptions extends CommonRouterOptions {
  /** Which router. */
  readonly kind: "gshard";
  /** How the second expert is chosen while training. @default {"greedy"} */
  readonly second?: SecondExpert;
}

/** The K best softmax scores, as Mixtral (renormalised) and Qwen2-MoE (not) have it. */
export interface SoftmaxOptions extends CommonRouterOptions {
  /** Which router. */
  readonly kind: "softmax";
  /** K, experts per token. */
  readonly topK: number;
  /** Whether a token's weights sum to 1. @default {true} */
  readonly renormalise?: boolean;
}

/** DeepSeek-V3: sigmoid scores, a selection bias in place of a balance loss, groups of experts. */
export interface SigmoidOptions extends CommonRouterOptions {
  /** Which router. */
  readonly kind: "sigmoid";
  /** K, experts per token. */
  readonly topK: number;
  /** Whether a token's scores are divided by their sum. @default {true} */
  readonly renormalise?: boolean;
  /** Factor of the weights. @default {1} */
  readonly scale?: number;
  /** Step of the selection bias; 0 leaves it alone. @default {0.001} */
  readonly biasRate?: number;
  /** Groups of neighbouring experts; divides E. @default {1} */
  readonly groups?: number;
  /** Groups that a token may reach. @default {groups} */
  readonly groupLimit?: number;
}

/** Every expert chooses its tokens: ⌈capacityFactor · tokens / E⌉ of the global batch. Not for causal models. */
export interface ExpertChoiceOptions
  extends Pick<CommonRouterOptions, "zLoss" | "jitter" | "noise"> {
  /** Which router. */
  readonly kind: "expertChoice";
  /** Experts that a token has on average. */
  readonly capacityFactor: number;
}

/** How tokens find their experts. */
export type RouterOptions =
  | SwitchOptions
  | GShardOptions
  | SoftmaxOptions
  | SigmoidOptions
  | ExpertChoiceOptions;

const KINDS: readonly string[] = ["switch", "gshard", "softmax", "sigmoid", "expertChoice"];

/** Router options with every default filled in. */
export interface Router {
  /** Which router. */
  readonly kind: RouterOptions["kind"];
  /** E. */
  readonly experts: number;
  /** K; for expert choice 1, and each batch has its own. */
  readonly topK: number;
  /** Whether a token's weights are divided by their sum. */
  readonly renormalise: boolean;
  /** How GShard's second expert is chosen. */
  readonly second: SecondExpert;
  /** Factor of sigmoid weights. */
  readonly scale: number;
  /** Step of the selection bias. */
  readonly biasRate: number;
  /** Groups of experts. */
  readonly groups: number;
  /** Groups that a token may reach. */
  readonly groupLimit: number;
  /** Coefficient of the balance loss. */
  readonly auxLoss: number;
  /** Coefficient of the z loss. */
  readonly zLoss: number;
  /** Half width of multiplicative noise. */
  readonly jitter: number;
  /** Standard deviation of additive noise. */
  readonly noise: number;
  /** Capacity factor, or null. */
  readonly capacityFactor: number | null;
  /** Drop rule. */
  readonly drop: "position" | "probability";
}

/**
 * Checks router options and fills in defaults.
 *
 * @param options The options.
 * @param experts E.
 * @returns The router.
 * @throws {RangeError} If a number is out of range, such as K > E.
 */
export function createRouter(options: RouterOptions, experts: number): Router {
  const o: Partial<Omit<SigmoidOptions, "kind"> & Omit<GShardOptions, "kind">> & {
    readonly kind: RouterOptions["kind"];
  } = options;
  const groups = o.groups ?? 1;
  const router: Router = {
    kind: o.kind,
    experts,
    topK: o.kind === "gshard" ? 2 : o.topK ?? 1,
    renormalise: o.kind === "gshard" ||
      ((o.kind === "softmax" || o.kind === "sigmoid") && (o.renormalise ?? true)),
    second: o.second ?? "greedy",
    scale: o.scale ?? 1,
    biasRate: o.kind === "sigmoid" ? o.biasRate ?? 0.001 : 0,
    groups,
    groupLimit: o.groupLimit ?? groups,
    auxLoss: o.auxLoss ?? 0,
    zLoss: o.zLoss ?? 0,
    jitter: o.jitter ?? 0,
    noise: o.noise ?? 0,
    capacityFactor: o.capacityFactor ?? null,
    drop: o.drop ?? "position",
  };
  check(KINDS.includes(router.kind), "kind", `one of ${KINDS.join(", ")}`, router.kind);
  check(Number.isInteger(experts) && experts >= 1, "experts", "a whole number >= 1", experts);
  const { topK, groupLimit, capacityFactor } = router;
  check(
    Number.isInteger(topK) && topK >= 1 && topK <= experts,
    "experts per token",
    `a whole number in 1..${experts}, the number of experts`,
    topK,
  );
  check(
    Number.isInteger(groups) && groups >= 1 && experts % groups === 0,
    "groups",
    `a divisor of ${experts} experts`,
    groups,
  );
  check(
    Number.isInteger(groupLimit) && groupLimit >= 1 && groupLimit <= groups &&
      groupLimit * (experts / groups) >= topK,
    "groupLimit",
    `a whole number in 1..${groups} whose groups hold ${topK} experts`,
    groupLimit,
  );
  check(
    capacityFactor === null || (capacityFactor > 0 && capacityFactor < Infinity),
    "capacityFactor",
    "a number > 0 or null",
    capacityFactor,
  );
  check(
    router.kind !== "expertChoice" || capacityFactor !== null,
    "capacityFactor",
    "a number > 0 for expert choice",
    capacityFactor,
  );
  check(router.jitter >= 0 && router.jitter < 1, "jitter", "in 0..1", router.jitter);
  for (const name of ["auxLoss", "zLoss", "noise", "biasRate"] as const) {
    check(router[name] >= 0 && router[name] < Infinity, name, "a number >= 0", router[name]);
  }
  return router;
}

function check(ok: boolean, name: string, must: string, value: unknown): void {
  if (!ok) {
    throw new RangeError(
      `Cannot make a router as ${name} must be ${must}: current value is ${value}`,
    );
  }
}

/** What the router has decided for the tokens of one rank, before any choice is dropped, and what its gradient needs. */
export interface Routing {
  /** N. */
  readonly tokens: number;
  /** K. */
  readonly choices: number;
  /** Chosen experts [N, K], the best first; −1 for none. */
  readonly experts_NK: Int32Array;
  /** Their weights [N, K]; 0 for none. */
  readonly weights_NK: Float64Array;
  /** Scores [N, E]: softmax or sigmoid of the logits. */
  readonly scores_NE: Float64Array;
  /** The logits that scores were made of, noise included. */
  readonly logits_NE: Float64Array;
  /** Log-sum-exp of each token's logits; zeros for a sigmoid router without z loss. */
  readonly lse_N: Float64Array;
  /** The noise that was applied, or null. */
  readonly noise: NoiseKey | null;
}

/** Scores of the experts, before any has been chosen. */
export type Scores = Pick<Routing, "logits_NE" | "scores_NE" | "lse_N" | "noise">;

/**
 * Scores of all experts: noise, then softmax or sigmoid.
 *
 * @param router The router.
 * @param logits_NE Logits; noise is added in place.
 * @param noise What noise is drawn from while training, else null.
 * @returns The scores.
 */
export function scoreExperts(
  router: Router,
  logits_NE: Float64Array,
  noise: NoiseKey | null,
): Scores {
  const { experts } = router;
  if (noise && router.jitter > 0) {
    jitter(logits_NE, { experts, jitter: router.jitter, key: noise });
  }
  if (noise && router.noise > 0) {
    addGaussian(logits_NE, { experts, std: router.noise, key: noise });
  }
  if (router.kind !== "sigmoid") return { logits_NE, ...softmaxScores(logits_NE, experts), noise };
  const scores_NE = sigmoidScores(logits_NE, experts);
  const lse_N = router.zLoss > 0
    ? softmaxScores(logits_NE, experts).lse_N
    : new Float64Array(logits_NE.length / experts);
  return { logits_NE, scores_NE, lse_N, noise };
}

/**
 * Chooses each token's experts. Expert choice has its own function, chooseByExpert, because it looks at all ranks' tokens.
 *
 * @param router The router; not of kind `expertChoice`.
 * @param scores Scores of all experts.
 * @param bias_E Selection bias of a sigmoid router.
 * @returns Experts [N, K].
 */
export function chooseExperts(router: Router, scores: Scores, bias_E: Float64Array): ExpertChoices {
  const { experts, topK: choices } = router;
  switch (router.kind) {
    case "gshard": {
      const uniform = scores.noise ? noiseSource(scores.noise, 4) : null;
      const experts_NK = topTwo(scores.logits_NE, experts, router.second, uniform);
      return { choices, experts_NK };
    }
    case "sigmoid":
      return {
        choices,
        experts_NK: groupLimitedTopK(scores.scores_NE, bias_E, {
          experts,
          choices,
          groups: router.groups,
          groupLimit: router.groupLimit,
        }),
      };
    default:
      return { choices, experts_NK: topK(scores.logits_NE, experts, choices) };
  }
}

/**
 * Weights of chosen experts, wherever the choice came from.
 *
 * @param router The router.
 * @param scores Scores of all experts.
 * @param choice The chosen experts.
 * @returns The routing of this rank's tokens.
 */
export function weighExperts(router: Router, scores: Scores, choice: ExpertChoices): Routing {
  const { experts_NK, choices } = choice;
  const options = { ...choice, experts: router.experts, renormalise: router.renormalise };
  const weights_NK = router.kind === "sigmoid"
    ? sigmoidWeights(scores.scores_NE, { ...options, scale: router.scale })
    : softmaxWeights(scores.logits_NE, scores.scores_NE, options);
  return { ...scores, tokens: scores.lse_N.length, choices, experts_NK, weights_NK };
}

/**
 * The choices that the router keeps of those that it has weighed: all, but for GShard's random second experts. A choice that is not kept
 * is dropped like one beyond the capacity: the weights of the token's other experts stay as they are.
 *
 * @param router The router.
 * @param routing The routing of this rank's tokens.
 * @returns Experts [N, K]; −1 for none.
 */
export function keptExperts(router: Router, routing: Routing): Int32Array {
  const { experts_NK, weights_NK, choices, noise } = routing;
  if (router.second !== "random" || !noise || choices !== 2) return experts_NK;
  return keepSeconds(experts_NK, weights_NK, noiseSource(noise, 4));
}

/**
 * Gradient of the router: from the weights' gradient and the losses to the logits.
 *
 * @param router The router.
 * @param routing What the forward pass decided.
 * @param dWeights_NK Gradient of the weights; 0 where a choice was dropped.
 * @param losses Sums over the global batch, and the factor that the caller gives the losses.
 * @returns Gradient of the logits [N, E], before noise.
 */
export function routeBackward(
  router: Router,
  routing: Routing,
  dWeights_NK: Float64Array,
  losses: { readonly sums: RouterSums; readonly scale: number },
): Float64Array {
  const { experts, renormalise, scale } = router;
  const { experts_NK, choices, scores_NE, logits_NE } = routing;
  const dLogits_NE = new Float64Array(logits_NE.length);
  const choice = { experts_NK, choices, experts, renormalise };
  if (router.kind === "sigmoid") {
    sigmoidWeightsBackward(dWeights_NK, scores_NE, { ...choice, scale }, dLogits_NE);
  } else {
    softmaxWeightsBackward(dWeights_NK, routing.weights_NK, scores_NE, choice, dLogits_NE);
  }
  const { sums } = losses;
  if (router.auxLoss > 0 && sums.tokens > 0) {
    const slope_E = balanceSlope(sums, router.auxLoss * losses.scale);
    const kind = router.kind === "sigmoid" ? "sigmoid" : "softmax";
    balanceLossBackward(scores_NE, slope_E, kind, dLogits_NE);
  }
  if (router.zLoss > 0 && sums.tokens > 0) {
    const factor = router.zLoss * losses.scale / sums.tokens;
    zLossBackward(logits_NE, routing.lse_N, factor, dLogits_NE);
  }
  if (routing.noise && router.jitter > 0) {
    jitter(dLogits_NE, { experts, jitter: router.jitter, key: routing.noise });
  }
  return dLogits_NE;
}
