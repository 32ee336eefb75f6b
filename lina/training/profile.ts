// How long the pieces of a step's computation take, from the marks of steps that were made. What all ranks agree on is alike on all of them
// to the bit, so that what is planned from it is, too. Makes no steps and sets no marks itself.

import type { Communicator } from "../../collectives/types.ts";
import type { Mark } from "../../moe/gradients.ts";
import type { NodeId, StepGraph, StepNode } from "../../moe/hooks.ts";
import type { StepCosts } from "./links.ts";
import { timesOf } from "./measures.ts";

/** Times of a step's nodes, in µs by id. */
export interface StepProfile {
  /** Time of each compute node, the waits of the device for the host among it. */
  readonly compute_us: ReadonlyMap<NodeId, number>;
  /**
   * Time of each all-to-all with nothing beside it, 0 where it is not known. Those of the backward pass have the times of their counterparts in the
   * forward pass, beside which no gradient is reduced: the same rows travel, the same way.
   */
  readonly allToAll_us?: ReadonlyMap<NodeId, number>;
  /** How long before the end of the computation that it follows each gradient is ready. */
  readonly lead_us?: ReadonlyMap<NodeId, number>;
  /** Mean deviation of a node's time from one step to the next, as a part of it; absent where it is not known. */
  readonly jitter?: number;
}

/** A {@linkcode StepProfile} as plain data that JSON keeps. */
export interface ProfileData {
  /** `[id, time]` of each compute node. */
  readonly compute_us: readonly (readonly [NodeId, number])[];
  /** The same of all-to-alls. */
  readonly allToAll_us: readonly (readonly [NodeId, number])[];
  /** The same of gradients. */
  readonly lead_us: readonly (readonly [NodeId, number])[];
  /** Deviation from step to step. */
  readonly jitter?: number;
}

/**
 * Reads the marks of one step. Time between two marks belongs to the compute node that the program was at: the last one before what the second mark
 * is about. Nodes between which there is no mark share theirs: the last of them has all of it. What is computed again in the backward pass (blocks whose
 * activations were dropped) belongs to the node of the backward pass that it comes before; its all-to-alls are left out.
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
  const allToAll_us = new Map<NodeId, number>(), readyAt = new Map<NodeId, number>();
  /** The forward all-to-alls by what travels the same way backward. */
  const mirrored = new Map<string, NodeId>();
  let last = -1;
  for (const node of graph.nodes) {
    before.push(last);
    if (node.kind === "allToAll") {
      allToAll_us.set(node.id, 0);
      if (node.phase === "forward") mirrored.set(`${node.layer} ${node.role}`, node.id);
    }
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
  /** When each compute node was last seen to be at work. */
  const ends = new Map<NodeId, number>(), cut = new Set<NodeId>();
  const started = new Map<NodeId, number>();
  /** Whether the backward pass has begun, and the time of forward passes that were run again in it. */
  let begun = false, again_us = 0;
  for (let i = 1; i < marks.length; i++) {
    const { boundary } = marks[i], passed_us = Math.max(0, times[i] - times[i - 1]);
    begun ||= boundary.kind === "gradientReady" || boundary.kind === "combineBackwardStarts";
    const exchange = "node" in boundary ? graph.nodes[boundary.node] : undefined;
    if (begun && exchange?.kind === "allToAll" && exchange.phase === "forward") {
      if (boundary.kind === "allToAllStarts") again_us += passed_us;
      continue;
    }
    if (boundary.kind === "allToAllStarts") {
      if (boundary.chunk > 0) cut.add(boundary.node);
      else if (!started.has(boundary.node)) started.set(boundary.node, times[i]);
    } else if (boundary.kind === "allToAllEnds") {
      const begun = started.get(boundary.node);
      if (boundary.chunk === 0 && begun !== undefined && allToAll_us.get(boundary.node) === 0) {
        allToAll_us.set(boundary.node, Math.max(0, times[i] - begun));
      }
      continue; // a wait
    } else if (boundary.kind === "gradientReady") readyAt.set(boundary.gradient, times[i]);
    const node = nodeAt(marks[i]);
    const known = node === undefined ? undefined : compute_us.get(node);
    if (known === undefined) {
      throw new RangeError(
        `Cannot read a profile as marks must be of the step's nodes: current value is ${
          JSON.stringify(marks[i].boundary)
        }`,
      );
    }
    compute_us.set(node!, known + passed_us + again_us);
    again_us = 0;
    ends.set(node!, times[i]);
  }
  for (const node of graph.nodes) {
    if (node.kind !== "allToAll") continue;
    const role = node.role === "dispatch" ? "combine" : "dispatch";
    const twin = node.phase === "forward" ? node.id : mirrored.get(`${node.layer} ${role}`);
    const known = twin === undefined || cut.has(twin) ? 0 : allToAll_us.get(twin)!;
    allToAll_us.set(node.id, known);
  }
  const lead_us = new Map<NodeId, number>();
  for (const [id, ready] of readyAt) {
    const node = before[id];
    lead_us.set(
      id,
      Math.min(compute_us.get(node) ?? 0, Math.max(0, (ends.get(node) ?? ready) - ready)),
    );
  }
  return { compute_us, allToAll_us, lead_us };
}

/**
 * One profile for all ranks, of the medians over each rank's steps: between two all-to-alls computation takes what it takes on the slowest rank, as
 * the next all-to-all waits for that one; an all-to-all what it takes on the rank that came last, which waited for nobody; and a gradient leads
 * by the mean. All ranks call it together, with profiles of the same step.
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
  const [first] = profiles;
  const idsOf = (times?: ReadonlyMap<NodeId, number>) => [...times?.keys() ?? []];
  const computed = idsOf(first.compute_us), exchanged = idsOf(first.allToAll_us);
  const gradients = idsOf(first.lead_us);
  const medians = (ids: readonly NodeId[], of: keyof Omit<StepProfile, "jitter">) =>
    ids.map((id) => median(profiles.map((profile) => profile[of]?.get(id) ?? 0)));
  const typical = medians(computed, "compute_us");
  let deviation = 0, whole = 0;
  computed.forEach((id, i) => {
    whole += typical[i];
    for (const { compute_us } of profiles) {
      deviation += Math.abs((compute_us.get(id) ?? 0) - typical[i]) / profiles.length;
    }
  });
  const own = Float64Array.of(
    whole > 0 ? deviation / whole : 0,
    ...typical,
    ...medians(exchanged, "allToAll_us"),
    ...medians(gradients, "lead_us"),
  );
  const all = new Float64Array(own.length * comm.size);
  await comm.allGather(own, all);
  const row = (at: number) => Array.from({ length: comm.size }, (_, r) => all[r * own.length + at]);
  const mean = (numbers: readonly number[]) => numbers.reduce((a, b) => a + b, 0) / comm.size;
  const times = new Map(computed.map((id, i) => [id, mean(row(1 + i))]));
  // The pieces between two all-to-alls together take what they take on the slowest rank.
  for (let i = 0; i < computed.length;) {
    const next = exchanged.find((id) => id > computed[i]) ?? Infinity;
    let end = i;
    const sums: number[] = new Array(comm.size).fill(0);
    for (; end < computed.length && computed[end] < next; end++) {
      row(1 + end).forEach((time, r) => sums[r] += time);
    }
    const factor = Math.max(...sums) / mean(sums);
    for (; i < end; i++) if (factor > 1) times.set(computed[i], times.get(computed[i])! * factor);
  }
  const from = 1 + computed.length, behind = from + exchanged.length;
  return {
    compute_us: times,
    allToAll_us: new Map(exchanged.map((id, i) => [id, Math.min(...row(from + i))])),
    lead_us: new Map(gradients.map((id, i) => [id, mean(row(behind + i))])),
    ...(profiles.length > 1 && { jitter: mean(row(0)) }),
  };
}

/** What a model of a step asks for: durations and costs. */
export interface ProfiledTimes {
  /** Time of a compute node in µs. */
  compute_us(node: { readonly id: NodeId }): number;
  /** Time in µs by which a gradient is ready before the end of its computation. */
  lead_us(node: { readonly id: NodeId }): number;
  /** Costs of the collectives, those of all-to-alls as they were seen to be. */
  readonly costs: StepCosts;
}

/**
 * A profile as the timeline and the bounds take it. Where the time of an all-to-all is known, its bytes take longer than the link's by the same
 * factor whatever part of them is sent: the most loaded rank has more than the balanced case.
 *
 * @param graph The step.
 * @param profile Its profile.
 * @param costs Costs of collectives.
 * @returns Durations and costs; null if the profile lacks a compute node of the step.
 */
export function profiledTimes(
  graph: StepGraph,
  profile: StepProfile,
  costs: StepCosts,
): ProfiledTimes | null {
  for (const node of graph.nodes) {
    if (node.kind === "compute" && !profile.compute_us.has(node.id)) return null;
  }
  return {
    compute_us: ({ id }) => profile.compute_us.get(id)!,
    lead_us: ({ id }) => profile.lead_us?.get(id) ?? 0,
    costs: {
      reduction: (bytes, group) => costs.reduction(bytes, group),
      allToAll: (bytes, node) => {
        const cost = costs.allToAll(bytes, node);
        const seen_us = node ? profile.allToAll_us?.get(node.id) ?? 0 : 0;
        if (!node || seen_us === 0) return cost;
        const { latency_us, link_us } = costs.allToAll(node.bytes, node);
        if (!(link_us > 0)) return cost;
        const factor = Math.max(0, seen_us - latency_us) / link_us;
        return { ...cost, link_us: cost.link_us * factor };
      },
    },
  };
}

/**
 * A profile as plain data.
 *
 * @param profile The profile.
 * @returns What JSON keeps of it: all.
 */
export function encodeProfile(profile: StepProfile): ProfileData {
  const { compute_us, allToAll_us, lead_us, jitter } = profile;
  return {
    compute_us: [...compute_us],
    allToAll_us: [...allToAll_us ?? []],
    lead_us: [...lead_us ?? []],
    ...(jitter !== undefined && { jitter }),
  };
}

/**
 * A profile from what {@linkcode encodeProfile} made.
 *
 * @param graph The step that it must be of.
 * @param data Anything.
 * @returns The profile.
 * @throws {RangeError} If it is no profile, or not of this step: a node is missing, of another kind, or its time impossible.
 */
export function decodeProfile(graph: StepGraph, data: unknown): StepProfile {
  const { compute_us, allToAll_us, lead_us, jitter } = (data ?? {}) as Partial<ProfileData>;
  const read = (kind: StepNode["kind"], pairs: unknown): Map<NodeId, number> => {
    const times = new Map<NodeId, number>();
    for (const pair of Array.isArray(pairs) ? pairs : []) {
      const [id, time] = Array.isArray(pair) ? pair : [];
      if (graph.nodes[id]?.kind !== kind || !isTime(time)) {
        throw new RangeError(
          `Cannot take a profile as it must have times of ${kind} nodes of the step: current value is ${
            JSON.stringify(pair)
          }`,
        );
      }
      times.set(id, time);
    }
    return times;
  };
  const times = read("compute", compute_us);
  const missing = graph.nodes.find((node) => node.kind === "compute" && !times.has(node.id));
  if (missing) {
    throw new RangeError(
      `Cannot take a profile as it must have all compute nodes of the step: current value lacks node ${missing.id}`,
    );
  }
  if (jitter !== undefined && !isTime(jitter)) {
    throw new RangeError(
      `Cannot take a profile as "jitter" must be at least 0: current value is ${jitter}`,
    );
  }
  return {
    compute_us: times,
    allToAll_us: read("allToAll", allToAll_us),
    lead_us: read("gradient", lead_us),
    ...(jitter !== undefined && { jitter }),
  };
}

function isTime(value: unknown): boolean {
  return typeof value === "number" && value >= 0 && value < Infinity;
}

function median(numbers: readonly number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
