// One layer's backward pass, cut out of what a rank recorded of a step, and how a step's time splits into computation and communication that
// nothing hides. From spans as trace/ has them; measures nothing itself.

import type { Span } from "../../trace/mod.ts";
import { difference, intersection, type Interval, length, union } from "./intervals.ts";
import type { LaneSpan, PolicyTimeline } from "./results.ts";

/** What a rank did in one step. Times in µs on one clock. */
export interface StepRecord {
  /** Spans of the recorder; all-to-alls and micro-ops are told by their args. */
  readonly spans: readonly Span[];
  /** When the device computed. @default {the spans of the GPU, or of the host if there is none} */
  readonly computing?: readonly Interval[];
}

/** Which timeline is wanted. */
export interface TimelineChoice
  extends Pick<PolicyTimeline, "policy" | "shape" | "ranks" | "mbit" | "layer"> {
  /** As in {@linkcode PolicyTimeline}. */
  readonly experts_per_device?: number;
  /** As in {@linkcode PolicyTimeline}. */
  readonly rank?: number;
}

/**
 * Cuts one layer's backward pass out of a step: from the moment at which its first all-to-all could start, as the computation before it has
 * ended, until its computation is through and its last gradient reduced. What other layers do meanwhile is in it too, and says so.
 *
 * @param record What a rank did.
 * @param choice The layer, and what the timeline is of.
 * @returns The timeline, or null if the record has no backward all-to-all of the layer.
 */
export function layerTimeline(record: StepRecord, choice: TimelineChoice): PolicyTimeline | null {
  const { layer } = choice;
  const allToAlls = record.spans.filter(({ category }) => category === "allToAll")
    .toSorted((a, b) => a.start - b.start);
  const own = allToAlls.filter(({ args }) => args?.layer === layer && args.phase === "backward");
  if (own.length === 0) return null;
  const first = own[0].start;
  const last = own.reduce((latest, { end }) => Math.max(latest, end), first);
  const next = allToAlls.find(({ start }) => start >= last)?.start ?? Infinity;
  const before = allToAlls.reduce((at, { end }) => end <= first ? Math.max(at, end) : at, 0);
  const gradients = record.spans.filter(({ track }) => track === "gradients");
  const busy = computing(record);

  // The layer's own computation ends where the next layer's all-to-all begins, or with the pass.
  let done = busy.reduce((at, [start, end]) => start < next ? Math.max(at, end) : at, last);
  done = Math.max(Math.min(done, next), last);
  for (const span of gradients) if (isOf(span, layer)) done = Math.max(done, span.end);
  // Where the all-to-all has to wait for micro-ops, that time is the layer's.
  const asked = busy.reduce((at, [start, end]) => start < first ? Math.min(end, first) : at, first);
  const from = Math.max(before, asked);
  const shift = (time: number) => Math.min(Math.max(time, from), done) - from;
  const spans: LaneSpan[] = [];
  const add = (span: LaneSpan) => {
    const start_us = shift(span.start_us), end_us = shift(span.end_us);
    if (end_us > start_us) spans.push({ ...span, start_us, end_us });
  };
  const parts = [
    { until: first, name: "combine" },
    { until: last, name: "experts" },
    { until: next, name: "gate, attention" },
    { until: Infinity, name: "next layers", own: false },
  ];
  for (const [start, end] of busy) {
    let at = start;
    for (const { until, ...part } of parts) {
      if (until <= at) continue;
      const end_us = Math.min(end, until);
      add({ lane: "compute", start_us: at, end_us, ...part });
      at = end_us;
      if (at >= end) break;
    }
  }
  for (const { name, start, end, args } of allToAlls) {
    const isOwn = args?.layer === layer && args.phase === "backward";
    const shown = typeof args?.role === "string" ? `${args.role}${chunkOf(name)}` : name;
    add({
      lane: "allToAll",
      name: isOwn ? shown : name,
      start_us: start,
      end_us: end,
      ...bytesOf(args?.bytes),
      ...(isOwn ? {} : { own: false }),
    });
  }
  for (const span of gradients) {
    const { name, start, end, args } = span;
    const queued_us = args?.queued_us;
    add({
      lane: "gradients",
      name,
      start_us: start,
      end_us: end,
      ...bytesOf(args?.bytes),
      ...(typeof queued_us === "number" ? { queued_us } : {}),
      ...(isOf(span, layer) ? {} : { own: false }),
    });
  }
  spans.sort((a, b) => a.start_us - b.start_us);
  return { ...choice, done_us: done - from, spans };
}

/** How a step's time is spent. Times in ms. */
export interface StepSplit {
  /** The device computes. */
  readonly compute_ms: number;
  /** An all-to-all runs and the device computes nothing. */
  readonly exposed_a2a_ms: number;
  /** Only gradients are reduced. */
  readonly exposed_allreduce_ms: number;
  /** Part of the communication's time during which the device computes; 0 without communication. */
  readonly overlap: number;
  /** Part of the all-to-alls' time during which the device computes; 0 without all-to-alls. */
  readonly pipelining: number;
  /** Part of the time during which the device computes. */
  readonly utilisation: number;
}

/**
 * How a step's time splits.
 *
 * @param record What a rank did.
 * @param step Start and end of the step in µs.
 * @returns The parts; what is left of the step is neither computation nor communication.
 */
export function stepSplit(record: StepRecord, step: Interval): StepSplit {
  const inside = (intervals: Iterable<Interval>) => intersection(union(intervals), [step]);
  const of = (test: (span: Span) => boolean) =>
    inside(record.spans.filter(test).map(({ start, end }): Interval => [start, end]));
  const busy = inside(computing(record));
  const allToAlls = of(({ category }) => category === "allToAll");
  const gradients = of(({ track }) => track === "gradients");
  const communication = union([...allToAlls, ...gradients]);
  const part = (some: number, whole: number) => whole > 0 ? some / whole : 0;
  return {
    compute_ms: length(busy) / 1000,
    exposed_a2a_ms: length(difference(allToAlls, busy)) / 1000,
    exposed_allreduce_ms: length(difference(difference(gradients, busy), allToAlls)) / 1000,
    overlap: part(length(intersection(communication, busy)), length(communication)),
    pipelining: part(length(intersection(allToAlls, busy)), length(allToAlls)),
    utilisation: part(length(busy), step[1] - step[0]),
  };
}

/** When the device computed. */
function computing({ spans, computing }: StepRecord): Interval[] {
  if (computing) return union(computing);
  const row = spans.some(({ track }) => track === "gpu") ? "gpu" : "compute";
  return union(
    spans.filter(({ track, category }) =>
      track === row && (category === "compute" || category === "gemm")
    ).map(({ start, end }): Interval => [start, end]),
  );
}

/** Whether a micro-op has a gradient of the layer: buckets hold those of layers from the first's down to the last's. */
function isOf({ name, args }: Span, layer: number): boolean {
  const first = layerOf(name);
  const last = typeof args?.last === "string" ? layerOf(args.last) : first;
  return last <= layer && layer <= first;
}

/**
 * The layer of a gradient.
 *
 * @param name The gradient's name, or a micro-op's that begins with it.
 * @returns The layer; −1 of the embedding, which is ready after all, and `Infinity` of the head, which is ready before.
 */
export function layerOf(name: string): number {
  const layer = /\blayers\.(\d+)\./.exec(name)?.[1];
  return layer !== undefined ? Number(layer) : /\bembed/.test(name) ? -1 : Infinity;
}

/** ` 1/2` of `layer 3 backward combine 1/2`; nothing if it is whole. */
function chunkOf(name: string): string {
  const chunk = / \d+\/(\d+)$/.exec(name);
  return chunk && chunk[1] !== "1" ? chunk[0] : "";
}

function bytesOf(bytes: unknown): { bytes?: number } {
  return typeof bytes === "number" ? { bytes } : {};
}
