// What a GPU offers beside the kernels of every device (device.ts): a router that needs no host. Kernels here are unchecked, too;
// `tensor/ops/routing.ts` checks.

import type { Tensor } from "./tensor.ts";

/** Most experts that {@linkcode RoutingKernels} take, and most choices of a token. */
export const MOST_EXPERTS = 1024, MOST_CHOICES = 16;

/** How a router scores and chooses; see moe/router.ts for the formulas. */
export interface RouteOptions {
  /** E. */
  readonly experts: number;
  /** K. */
  readonly choices: number;
  /** How scores are made of logits. */
  readonly scores: "softmax" | "sigmoid";
  /** Whether a token's weights are divided by their sum. */
  readonly renormalise: boolean;
  /** Factor of the weights. */
  readonly scale: number;
  /** Groups of neighbouring experts (sigmoid); 1 for none. */
  readonly groups: number;
  /** Groups that a token may reach. */
  readonly groupLimit: number;
  /** Whether the balance loss counts first choices only (GShard). */
  readonly firstOnly: boolean;
}

/** Coefficients of the router's losses in its gradient. */
export interface RouteBackwardOptions extends RouteOptions {
  /** Of the balance loss, the caller's factor applied. */
  readonly auxLoss: number;
  /** Of the z loss, the caller's factor applied. */
  readonly zLoss: number;
  /** Ranks R whose records are given. */
  readonly ranks: number;
}

/**
 * Kernels of a router on a GPU. Ties go to the expert of lower index, as on the host. Letters as in `Kernels` of device.ts. The *record* of a
 * rank is what its routing adds to the global batch, f64 [3 E + 2]: choices per expert [E], choices per expert that the balance loss
 * counts [E], normalised scores per expert [E], squared log-sum-exps, tokens (the layout of moe/router_exchange.ts with one place). Sums are in a fixed
 * order: equal inputs give equal bits.
 */
export interface RoutingKernels {
  /** `logits = x gateᵀ`, x [N, D] f32 or bf16, gate [E, D] f32, logits f32 [N, E], exact to f32 rounding. */
  gate(x: Tensor, gate: Tensor, logits: Tensor): void;
  /** `dGate += dLogitsᵀ x`: dLogits f32 [N, E], x [N, D] f32 or bf16, dGate f32 [E, D]. */
  gateWeightGrad(dLogits: Tensor, x: Tensor, dGate: Tensor): void;
  /**
   * The gradient of a router's input in one pass, the sum of each token's rows and the gate's part:
   * `out[n] = Σ_k y[slots[n,k]] + dLogits[n] gate + beta · out[n]`, beta being 0 by default; a negative slot adds nothing. y [S, D] f32 or bf16,
   * slots i32 [N, K], dLogits f32 [N, E], gate f32 [E, D], out [N, D] like y.
   */
  combineRowsGate(
    y: Tensor,
    slots: Tensor,
    dLogits: Tensor,
    gate: Tensor,
    out: Tensor,
    options?: { readonly beta?: 0 | 1 },
  ): void;
  /**
   * Scores and chooses in one pass: experts i32 [N, K], best first; weights f32 [N, K]; lse f32 [N]; the record. `bias` f32 [E] is the
   * selection bias of a sigmoid router, or null.
   */
  route(
    logits: Tensor,
    bias: Tensor | null,
    options: RouteOptions,
    out: {
      readonly experts: Tensor;
      readonly weights: Tensor;
      readonly lse: Tensor;
      readonly record: Tensor;
    },
  ): void;
  /**
   * Gradient of the weights and of the losses: writes dLogits f32 [N, E]. `records` f64 [R, at least 3 E + 2] begin with those of all ranks; dWeights f32 [N, K], or
   * with slots i32 [N, K] the rows' f32 [S], of which a choice takes that of its slot, 0 for a negative one.
   */
  routeBackward(
    dWeights: Tensor,
    saved: {
      readonly logits: Tensor;
      readonly lse: Tensor;
      readonly experts: Tensor;
      readonly records: Tensor;
      readonly slots?: Tensor;
    },
    options: RouteBackwardOptions,
    dLogits: Tensor,
  ): void;
  /**
   * Choices per expert in each of the first n of C slices of the tokens, the c-th of which begins at token ⌊c N / C⌋: experts i32 [N, K], −1 for
   * none; counts f64 [n, E].
   */
  countSlices(experts: Tensor, slices: number, counts: Tensor): void;
  /**
   * A stable counting sort of the choices: the n-th choice of expert e (in order of token, then place) takes row `starts[e] + n`; with
   * `starts` null, experts lie in ascending order. Writes slots i32 [N, K] and tokens i32 [S], the inverse; S = N K rows. With `offsets` i32 [E + 1], also writes the first row of each
   * expert and, last, S (ascending order only). A choice of −1 gets slot −1. With weights f32 [N, K] and scales f32 [S], also
   * `scales[slots[n,k]] = weights[n,k]`.
   *
   * Replicas: `starts` may be i32 [P, 3], a list of pieces (expert, first choice, first row) sorted by expert, then first choice: choices of the
   * expert from `first choice` on take rows from `first row` on, until its next piece.
   */
  placeRows(
    experts: Tensor,
    layout: { readonly experts: number; readonly starts: Tensor | null; readonly weights?: Tensor },
    out: {
      readonly slots: Tensor;
      readonly tokens: Tensor;
      readonly offsets: Tensor | null;
      readonly scales?: Tensor;
    },
  ): void;
  /** `out[slots[n,k]] = x[n]`: a token's row to each of its choices; slots i32 [N, K], a negative one gets none; x [N, D], out [S, D]. */
  spreadRows(x: Tensor, slots: Tensor, out: Tensor): void;
  /**
   * Index arrays between rank-major and expert-major rows, from counts i32 [R, L] of rows per (source rank, seat): expert-major row i is
   * rank-major row `toExpertMajor[i]`, rank-major row i is expert-major row `toRankMajor[i]`; both i32 [M].
   */
  majorOrders(counts: Tensor, toExpertMajor: Tensor, toRankMajor: Tensor): void;
}
