// What goes into a MoE layer and what comes out of it: plain data. The layer is moe_layer.ts.
//
// Shape letters: N tokens of this rank, D model width, F hidden width, E experts, K choices per token, R ranks.

import type { Communicator, Data, OperationOptions, Work } from "../collectives/types.ts";
import type { Activation, Device } from "../tensor/device.ts";
import type { DType } from "../tensor/dtype.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { ExpertsSaved } from "./experts.ts";
import type { FeedForwardSaved } from "./feed_forward.ts";
import type { ExpertPlacement } from "./hooks.ts";
import type { RouterOptions } from "./router.ts";
import type { Routed } from "./router_host.ts";
import type { ExpertChoices } from "./router_expert_choice.ts";
import type { Shown } from "./shown.ts";

export type { MoeShown, MoeStats, Shown } from "./shown.ts";

/** How a MoE layer is made; all but the device is alike on all ranks. */
export interface MoeLayerOptions {
  /** Where weights and activations live. */
  readonly device: Device;
  /** The ranks that hold the experts and whose tokens make the global batch. */
  readonly comm: Communicator;
  /** Number of the layer. */
  readonly layer: number;
  /** Model width D. */
  readonly width: number;
  /** Hidden width F of an expert. */
  readonly hidden: number;
  /** Number of experts E. */
  readonly experts: number;
  /** How tokens find their experts. */
  readonly router: RouterOptions;
  /** Between the two layers of an expert. @default {"swiglu"} */
  readonly activation?: Activation;
  /** Experts that every token meets; they are one network of that many times F. @default {0} */
  readonly sharedExperts?: number;
  /** Where experts sit. @default {staticPlacement()} */
  readonly placement?: ExpertPlacement;
  /** Carries rows between ranks in place of the communicator's own all-to-all. @default {null} */
  readonly exchange?: RowExchange | null;
  /** Whether the experts' activation is computed again in the backward pass instead of kept. @default {false} */
  readonly recompute?: boolean;
  /** Seed of weights and noise. @default {0} */
  readonly seed?: number;
  /** Standard deviation of the first weights. @default {0.02} */
  readonly initStd?: number;
  /** Standard deviation of the first weights back to the model width. @default {initStd} */
  readonly downStd?: number;
  /** Element type of weights and activations; the gate computes in f32 at least. @default {"f32"} */
  readonly dtype?: DType;
  /** Element type of the gradients of experts, shared ones included: see `gradientDtype` of parameter.ts. @default {"f32"; "f64" for f64} */
  readonly gradientDtype?: DType;
}

/** An all-to-all that may take another way than the communicator's, as one in two levels does. */
export interface RowExchange {
  /**
   * As `Communicator.allToAllV`, but for the counts: elements from each rank to each, [R, R], by source, then destination; alike on all ranks.
   */
  allToAllV(send: Data, counts_RR: readonly number[], recv: Data, options?: OperationOptions): Work;
}

/** What the backward pass of a layer needs. */
export interface MoeSaved {
  /** The input; not owned. */
  readonly x_ND: Tensor;
  /** Where every row goes, with what weight, and the way back to the gate; owned. */
  readonly routed: Routed;
  /** What the experts keep of each slice: their rows, hidden rows, weights of rows; owned. */
  readonly experts: readonly ExpertsSaved[];
  /** Outputs of the experts in the send order, by slice; owned. None where the weights met the hidden rows. */
  readonly outputs: readonly Tensor[];
  /** What the shared experts keep; owned. */
  readonly shared: FeedForwardSaved | null;
}

/** What the forward pass returns. */
export interface MoeResult {
  /** Output [N, D]; the caller's. */
  readonly out_ND: Tensor;
  /** What the backward pass needs; give it to `backward` or to `release`. */
  readonly saved: MoeSaved;
  /** Losses and load: read them by `readShown` of shown.ts, which may wait for the device, or give them to `dropShown`. */
  readonly shown: Shown;
}

/** Takes the place of the router's choice, or watches it: see routing_record.ts. */
export interface RoutingTap {
  /** Gives the experts of tokens `firstToken` on of the global batch, in place of the router. */
  replay?(layer: number, firstToken: number, tokens: number): ExpertChoices;
  /** Is told the experts of this rank's tokens, before drops. */
  record?(layer: number, choice: ExpertChoices): void;
}
