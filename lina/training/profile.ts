// How long the pieces of a step's computation take, from the marks of steps that were made. What all ranks agree on is alike on all of them
// to the bit, so that what is planned from it is, too. Makes no steps and sets no marks itself.

import type { Communicator } from "../../collectives/types.ts";
import type { Mark } from "../../moe/gradients.ts";
import type { NodeId, StepGraph } from "../../moe/hooks.ts";
import { timesOf } from "./measures.ts";

/** Times of a step's computation. */
export interface StepProfile {
  /** Time of each compute node, in µs, by its id. */
  readonly compute_us: ReadonlyMap<NodeId, number>;
}

/**
 * Reads the marks of one step. Time between two marks belongs to the compute node that the program was at: the last one before what the second mark
 * is about. Nodes between which there is no mark share theirs: the last of them has all of it.
 *
 * @param graph The step.
 * @param marks Its marks, in order; the step has ended.
 * @returns Times of all compute nodes, of this rank.
 * @throws {RangeError} If the device has not passed a mark, or a mark is of no node of the step.
 */
export function readProfile(graph: StepGraph, marks: readonly Mark[]): StepProfile {
  const times = timesOf(marks), compute_us = new Map<NodeId, number>();
  /** For every node the last compute node before it. */
  const before: NodeId[] = [];
  /** The backward compute nodes of layers by name. */
  const backward = new Map<string, NodeId>();
  let last = -1;
  for (const node of graph.nodes) {
    before.push(last);
    if (node.kind !== "compute") continue;
    last = node.id;
    compute_us.set(node.id, 0);
    if (node.phase === "backward") backward.set(`${node.layer} ${node.name}`, node.id);
  }
  const nodeAt = ({ boundary }: Mark): NodeId | undefined => {
    switch (boundary.kind) {
      case "gradientReady":
        return before[boundary.gradient];
      case "allToAllStarts":
        return before[boundary.node];
      case "combineBackwardStarts":
        return before[backward.get(`${boundary.layer} combine`) ?? -1];
      case "layerBackwardEnds":
        return backward.get(`${boundary.layer} gate`);
      default:
        return last;
    }
  };
  for (let i = 1; i < marks.length; i++) {
    if (marks[i].boundary.kind === "allToAllEnds") continue; // a wait
    const node = nodeAt(marks[i]);
    const known = node === undefined ? undefined : compute_us.get(node);
    if (known === undefined) {
      throw new RangeError(
        `Cannot read a profile as marks must be of the step's nodes: current value is ${
          JSON.stringify(marks[i].boundary)
        }`,
      );
    }
    compute_us.set(node!, known + Math.max(0, times[i] - times[i - 1]));
  }
  return { compute_us };
}

/**
 * One profile for all ranks: of each time the median over a rank's steps, then the mean over the ranks. All ranks call it together, with as many
 * nodes.
 *
 * @param comm The ranks.
 * @param profiles Profiles of this rank's steps, one at least.
 * @returns The profile, the same bits on every rank.
 * @throws {RangeError} If there is no profile.
 */
export async function agreeProfile(
  comm: Communicator,
  profiles: readonly StepProfile[],
): Promise<StepProfile> {
  if (profiles.length === 0) {
    throw new RangeError("Cannot agree on a profile as there must be one: current value is none");
  }
  const ids = [...profiles[0].compute_us.keys()];
  const times = Float64Array.from(ids, (id) => {
    return median(profiles.map(({ compute_us }) => compute_us.get(id) ?? 0)) / comm.size;
  });
  await comm.allReduce(times);
  await comm.broadcast(times, 0); // a sum's order is the backend's
  return { compute_us: new Map(ids.map((id, i) => [id, times[i]])) };
}

function median(numbers: readonly number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
