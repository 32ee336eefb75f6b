// Where schedulers and placements plug in: plain data that describes a training step, and two interfaces that decide on it.
// The model runs with the plain implementations of `moe/` (first in, first out; static placement); `lina/` brings others.
// Policies are pure: the engine and a simulator call the same functions.

/** Reference to a node of a {@linkcode StepGraph}. */
export type NodeId = number;

/** A piece of computation between collectives. */
export interface ComputeNode {
  /** Which kind of node. */
  readonly kind: "compute";
  /** Index in the graph. */
  readonly id: NodeId;
  /** Layer, or −1 outside the blocks. */
  readonly layer: number;
  /** Half of the step. */
  readonly phase: "forward" | "backward";
  /** What it computes: `attention`, `gate`, `experts`, `combine`, `head`, … */
  readonly name: string;
  /** Nodes that must be complete before. */
  readonly after: readonly NodeId[];
}

/** An all-to-all of a MoE layer. */
export interface AllToAllNode {
  /** Which kind of node. */
  readonly kind: "allToAll";
  /** Index in the graph. */
  readonly id: NodeId;
  /** Layer. */
  readonly layer: number;
  /** Half of the step. */
  readonly phase: "forward" | "backward";
  /** Dispatch carries tokens to experts, combine carries them back; their gradients go the other way. */
  readonly role: "dispatch" | "combine";
  /** Bytes that this rank sends to others, as the balanced case has it. */
  readonly bytes: number;
  /** Nodes that must be complete before. */
  readonly after: readonly NodeId[];
}

/** A gradient that is to be reduced over ranks. */
export interface GradientNode {
  /** Which kind of node. */
  readonly kind: "gradient";
  /** Index in the graph. */
  readonly id: NodeId;
  /** The parameter's name; for a seat of experts, what `seatGradientName` of graph.ts gives. */
  readonly name: string;
  /** Elements. */
  readonly elements: number;
  /** Size in bytes, in the dtype that is reduced. */
  readonly bytes: number;
  /**
   * Over which ranks: all, or those whose seats hold the same experts. A gradient of `replicas` is that of one seat, whichever expert sits in
   * it on which rank; a graph has them only where every expert of the layer has as many replicas and ranks meet in whole groups.
   */
  readonly group: "world" | "replicas";
  /** Nodes that must be complete before. */
  readonly after: readonly NodeId[];
}

/** A node of a step graph. */
export type StepNode = ComputeNode | AllToAllNode | GradientNode;

/** One training step in program order, alike on all ranks. */
export interface StepGraph {
  /** Nodes; `nodes[i].id === i`. */
  readonly nodes: readonly StepNode[];
}

/** A part of a gradient that is reduced by one collective. */
export interface MicroOpPart {
  /** The gradient's node. */
  readonly gradient: NodeId;
  /** First element. */
  readonly start: number;
  /** Element after the last. */
  readonly end: number;
}

/** One allreduce: a part of a gradient (micro-op), a whole one, or several of one group together (a bucket). */
export interface MicroOp {
  /** What is reduced, in order; the collective is launched once every gradient of it is ready. */
  readonly parts: readonly MicroOpPart[];
  /** Sum of the parts in bytes. */
  readonly bytes: number;
}

/** What a scheduler decides once per graph. */
export interface Schedule {
  /** Every element of every gradient exactly once, in the order in which they are launched. */
  readonly microOps: readonly MicroOp[];
  /**
   * Chunks that the all-to-alls of each layer are cut into, by layer: contiguous slices of its tokens, so a layer's four all-to-alls are cut
   * alike. Whole numbers; 1 where absent.
   */
  readonly chunks: ReadonlyMap<number, number>;
  /**
   * Starts each all-to-all once the device is past the micro-ops launched before it; a micro-op launched after an all-to-all is behind
   * it in any case, as the device's stream is. Needs one order that all ranks share, so only with pace `program`. @default {false}
   */
  readonly exclusive?: boolean;
}

/**
 * What has just happened. With pace `program`, and on a CPU, it is told as the host passes it, in the order of the program: all but
 * `microOpEnds` come in the same order on all ranks. With pace `device` on a GPU it is told when the device passes it.
 * An all-to-all starts and ends once per chunk, from 0; those of one layer may overlap.
 */
export type Boundary =
  | { readonly kind: "gradientReady"; readonly gradient: NodeId }
  | { readonly kind: "allToAllStarts"; readonly node: NodeId; readonly chunk: number }
  | { readonly kind: "allToAllEnds"; readonly node: NodeId; readonly chunk: number }
  | { readonly kind: "combineBackwardStarts"; readonly layer: number }
  | { readonly kind: "layerBackwardEnds"; readonly layer: number }
  | { readonly kind: "microOpEnds" }
  | { readonly kind: "stepEnds" };

/** What a launch decision may look at. */
export interface LaunchState {
  /** The schedule in force. */
  readonly schedule: Schedule;
  /** Index of the next micro-op to launch. */
  readonly next: number;
  /** Micro-ops from `next` on whose gradients are all ready. */
  readonly ready: number;
  /** Micro-ops launched and not seen to be complete; 0 with pace `program`. */
  readonly running: number;
  /** All-to-alls, or chunks of them, started and not complete; 0 with pace `program`. */
  readonly allToAlls: number;
  /** Whether a combine's backward has begun and its all-to-all has not, or not the last chunk of it: one is imminent. */
  readonly imminent: boolean;
  /** Whether the backward pass of a MoE layer's feed-forward part runs: from `combineBackwardStarts` to `layerBackwardEnds`. */
  readonly insideMoe: boolean;
}

/**
 * Decides how a step's collectives interleave. `plan` runs once per graph and must give the same result on every rank; `launch` says at
 * every boundary how many of the ready micro-ops go now. Micro-ops always go in the order of the schedule, on a communicator of their own,
 * so the order on each communicator is agreed whatever `launch` says. At `stepEnds` all that is left goes.
 */
export interface CollectiveScheduler {
  /** Name for traces and tables. */
  readonly name: string;
  /**
   * What `launch` is told. `program`: what the program does; `microOpEnds` is not told, `running` and `allToAlls` are 0, so every rank
   * decides alike. `device`: what is running now, too, as this rank's device has it, so ranks may decide differently: a GPU's boundaries and
   * ends are told as the device passes them; a CPU's host tells of a micro-op's end at the first boundary after it. Micro-ops of a `device`
   * schedule have one part each: packing would queue behind the host's lead over a GPU. @default {"program"}
   */
  readonly pace?: "program" | "device";
  /** Partitions gradients and all-to-alls. */
  plan(graph: StepGraph): Schedule;
  /** How many of the ready micro-ops to launch now, 0 to `state.ready`. */
  launch(boundary: Boundary, state: LaunchState): number;
}

/** Which ranks hold which experts of a layer, and how tokens are split over replicas. */
export interface PlacementPlan {
  /** `seats[rank]` lists the experts that the rank holds, each at most once, in the order in which its rows are laid out. */
  readonly seats: readonly (readonly number[])[];
  /**
   * How many of the `count` rows that `source` has for `expert` go to each of its replicas, in ascending order of rank.
   * The sum is `count`. With one replica: `[count]`.
   */
  split(source: number, expert: number, count: number): readonly number[];
}

/** What a placement may look at before layer `layer` runs. */
export interface PlacementContext {
  /** Layer, from 0. */
  readonly layer: number;
  /** Number of experts E. */
  readonly experts: number;
  /** Number of expert-parallel ranks. */
  readonly ranks: number;
  /** Rows per (source rank, expert), [ranks · E], exchanged by allGather, or null before the gate has spoken. */
  readonly counts: Int32Array | null;
}

/** Decides where experts sit. Must give the same plan on every rank. */
export interface ExpertPlacement {
  /** Name for traces and tables. */
  readonly name: string;
  /** The placement for this layer and batch. */
  plan(context: PlacementContext): PlacementPlan;
}
