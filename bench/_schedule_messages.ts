// What bench/schedule.ts and its ranks tell each other, as JSON lines. Types only. Times are µs on the clock that all processes of a host
// share, unless a name says otherwise.

import type { SchedulerName } from "../lina/training/schedulers.ts";
import type { Span } from "../trace/mod.ts";

/** A policy, its sizes, and how experts are packed. */
export interface Policy {
  /** Name of the scheduler. */
  readonly name: SchedulerName;
  /** Experts of a device. */
  readonly experts: number;
  /** Most bytes of a micro-op; the scheduler's own choice if absent. */
  readonly microOpBytes?: number;
  /** Slices of an all-to-all, for pipelining. */
  readonly chunks?: number;
  /** Whether all-to-alls go inside hosts first, then between them. @default {false} */
  readonly twoLevel?: boolean;
}

/** What a rank is asked to do; all ranks are asked together. */
export type Request =
  /** Measure links of this rate. */
  | { readonly kind: "links"; readonly mbit: number }
  /** Make a model, and train it until its load is about even. */
  | { readonly kind: "shape"; readonly shape: string; readonly settle: number }
  /** Train for some steps from where the shape was made, under a policy. */
  | {
    readonly kind: "turn";
    readonly policy: Policy;
    /** Steps before those that are measured. */
    readonly warm: number;
    readonly steps: number;
    /** Whether the computation's times are taken from these steps, for what is planned and for bounds. */
    readonly profile: boolean;
    /** Whether the last step's spans are wanted. */
    readonly spans: boolean;
  }
  /** Free the model. */
  | { readonly kind: "free" };

/** A link as the model of lina/training/links.ts has it. */
export interface FittedLink {
  readonly alpha_us: number;
  readonly bytes_per_us: number;
  readonly error: number;
}

/** What links do. */
export interface LinksReply {
  /** Median times alone, and together, of 8 MiB all-to-alls and 32 MiB allReduces; smaller ones on processors. */
  readonly allToAll_us: number;
  readonly allReduce_us: number;
  readonly allToAllBeside_us: number;
  /** Bytes that leave a rank in each. */
  readonly allToAll_bytes: number;
  readonly allReduce_bytes: number;
  /** Fits over many sizes. */
  readonly allToAll: FittedLink;
  readonly reduction: FittedLink;
}

/** What a rank says of its model. */
export interface ShapeReply {
  /** Parameters that this rank holds. */
  readonly parameters: number;
  /** Load of the most loaded expert / mean. */
  readonly imbalance: number;
  readonly loss: number;
}

/** An all-to-all of a MoE layer. */
export interface AllToAllSample {
  readonly start_us: number;
  readonly end_us: number;
  /** Bytes that left the rank. */
  readonly bytes: number;
  readonly layer: number;
  readonly phase: "forward" | "backward";
  readonly role: "dispatch" | "combine";
  readonly chunk: number;
}

/** Start and end. */
export type Interval = readonly [start_us: number, end_us: number];

/** A step, as one rank saw it. */
export interface StepSample {
  readonly begin_us: number;
  readonly end_us: number;
  readonly loss: number;
  readonly imbalance: number;
  /** Time that the thread of the program was on a processor, in ms; NaN (null in JSON) where the system does not tell. */
  readonly hostCpu_ms: number | null;
  /** The host's time that the schedule took: asking, launching, noticing. */
  readonly schedule_us: number;
  readonly allToAlls: readonly AllToAllSample[];
  /** Start, end, bytes that left the rank. */
  readonly microOps: readonly (readonly [start_us: number, end_us: number, bytes: number])[];
  /** When the compute stream was not waiting, from the pass's begin to its end. */
  readonly computing: readonly Interval[];
}

/** What a policy makes of a shape, alike on all ranks. */
export interface PlanReply {
  readonly microOps: number;
  /** Most bytes of one. */
  readonly microOpBytes: number;
  /** Most slices of an all-to-all. */
  readonly chunks: number;
  /** Lower bounds and what the model of a step says, from the begin of the pass; null before there is a profile. */
  readonly bounds: {
    readonly bound_us: number;
    readonly floor_us: number;
    readonly compute_us: number;
    readonly link_us: number;
    readonly predicted_us: number;
  } | null;
}

/** What a turn was. */
export interface TurnReply {
  readonly plan: PlanReply;
  readonly steps: readonly StepSample[];
  readonly peak_bytes: number;
  /** The last step's spans, if asked for. */
  readonly spans: readonly Span[];
}

/** Replies by request. */
export interface Replies {
  readonly links: LinksReply;
  readonly shape: ShapeReply;
  readonly turn: TurnReply;
  readonly free: null;
}
