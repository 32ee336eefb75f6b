// A model's outline for its step graph: plain data, alike on all ranks. The graph is made of it by graph.ts.

import { bytesOf } from "../tensor/dtype.ts";
import type { ModelConfig } from "./config.ts";
import { type GradientOutline, type LayerOutline, seatGradientName } from "./graph.ts";
import type { MoeLayer } from "./moe_layer.ts";
import { gradientDtype, type Parameter } from "./parameter.ts";
import { regularReplicas } from "./plan.ts";

/**
 * A parameter's gradient.
 *
 * @param parameter The parameter.
 * @returns Its outline.
 */
export function gradientOutline({ name, grad, group }: Parameter): GradientOutline {
  return { name, elements: grad.size, elementBytes: bytesOf(grad.dtype), group };
}

/**
 * The experts of a layer. Which of them a rank holds differs from rank to rank, so of their gradients there are those of seats, and only
 * where experts sit in the regular way (see `regularReplicas` of plan.ts); elsewhere replicas reduce them among themselves.
 *
 * @param layer The layer.
 * @param config Sizes of the model.
 * @param size Rows of a rank in a pass, on average, and the number of ranks.
 * @returns The outline.
 */
export function expertsOutline(
  { layer, router, store: { seats } }: MoeLayer,
  config: ModelConfig,
  size: { readonly rows: number; readonly ranks: number },
): NonNullable<LayerOutline["moe"]> {
  const { activation, hidden, width, dtype } = config;
  const replicas = regularReplicas(seats, config.experts);
  // Rows go to the replicas of a rank's own group.
  const group = size.ranks / Math.max(1, replicas), away = size.rows * (group - 1) / group;
  const allToAllBytes = Math.round(away * router.topK * width * bytesOf(dtype));
  const elements = (activation === "swiglu" ? 3 : 2) * hidden * width;
  const elementBytes = bytesOf(gradientDtype(dtype, config.gradientDtype));
  const experts = seats[0].map((_, seat): GradientOutline => {
    return { name: seatGradientName(layer, seat), elements, elementBytes, group: "replicas" };
  });
  return { allToAllBytes, experts: replicas > 1 ? experts : [] };
}
