// The gradients of experts that have replicas in the regular way, as the reducer takes them: one per seat of a layer, with the ranks that
// have the same experts in the same seats. Where experts sit otherwise, their store reduces them (`ExpertStore.reduceReplicas`).

import type { Communicator } from "../collectives/types.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { seatGradientName } from "./graph.ts";
import type { StepGraph } from "./hooks.ts";
import type { MoeLayer } from "./moe_layer.ts";
import { ReplicaGroups } from "./replica_groups.ts";

/** The gradient of a seat on this rank. */
export interface SeatGradient {
  /** Name of its node. */
  readonly name: string;
  /** Its layer. */
  readonly layer: number;
  /** The expert's flat block [up | down]. */
  readonly grad: Tensor;
  /** The ranks that have the same expert in this seat. */
  readonly comm: Communicator;
  /** Names of the parameters that it is the gradient of. */
  readonly parameters: readonly string[];
}

/**
 * The gradients of group `replicas` of a graph. Makes their communicators where there are none yet; all ranks call it together.
 *
 * @param graph The step.
 * @param layers The model's MoE layers.
 * @param world The ranks that experts sit on.
 * @returns One for each node of group `replicas`.
 */
export async function seatGradients(
  graph: StepGraph,
  layers: readonly MoeLayer[],
  world: Communicator,
): Promise<SeatGradient[]> {
  const names = new Set<string>();
  for (const node of graph.nodes) {
    if (node.kind === "gradient" && node.group === "replicas") names.add(node.name);
  }
  const groups = ReplicaGroups.of(world);
  const seats: SeatGradient[] = [];
  for (const { layer, store } of layers) {
    if (!names.has(seatGradientName(layer, 0))) continue;
    const held = store.seats[world.rank];
    await groups.open(store.seats.flat().map((expert) => store.holders(expert)));
    const gradients = store.seatGradients;
    held.forEach((expert, seat) => {
      seats.push({
        name: seatGradientName(layer, seat),
        layer,
        grad: gradients[seat],
        comm: groups.get(store.holders(expert))!,
        parameters: store.parameters.filter((p) => p.expert!.id === expert).map(({ name }) => name),
      });
    });
  }
  return seats;
}
