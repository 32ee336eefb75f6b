// Results as bench:schedule might have them, made by the model of a step instead of by a clock: for tests of the report, and to look at it where
// nothing can be measured. Timelines say that they are simulated.

import { buildStepGraph, type GradientOutline, microOpName } from "../../moe/graph.ts";
import type { ComputeNode } from "../../moe/hooks.ts";
import { stepBounds } from "../../lina/training/bounds.ts";
import { stepCosts } from "../../lina/training/links.ts";
import { createScheduler, type SchedulerName } from "../../lina/training/schedulers.ts";
import { timeline, type TimelineSpan } from "../../lina/training/timeline.ts";
import { layerOf } from "./layer_timeline.ts";
import { difference, intersection, type Interval, length, union } from "./intervals.ts";
import type { PolicyTimeline, ScheduleResults, ScheduleRow, SlowdownSamples } from "./results.ts";

/** The policies of the sample. */
export const SAMPLE_POLICIES: readonly SchedulerName[] = ["fifo", "outside", "priority", "lina"];

/** Shapes of the sample: bytes of an all-to-all and of a layer's gradients, time of the experts in µs. */
const SAMPLE_SHAPES = {
  txl: { layers: 5, allToAll: 4_000_000, gradient: 1_600_000, experts_us: 2900 },
  gpt2: { layers: 4, allToAll: 3_800_000, gradient: 1_300_000, experts_us: 2600 },
  bert2gpt2: { layers: 3, allToAll: 6_000_000, gradient: 2_600_000, experts_us: 5200 },
} as const;

const NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"];

/** Durations of computation in µs; backward takes twice as long. */
function compute_us({ name, phase }: ComputeNode, experts_us: number): number {
  const forward: Record<string, number> = {
    embedding: 60,
    attention: 1900,
    gate: 150,
    experts: experts_us,
    combine: 180,
    head: 500,
  };
  return (forward[name] ?? 100) * (phase === "backward" ? 2 : 1);
}

/**
 * Makes results.
 *
 * @param options Number of ranks and their links' rate.
 * @returns Rows, timelines and slowdowns that agree with each other; the same arguments give the same results.
 */
export function sampleResults(
  options: { readonly ranks?: number; readonly mbit?: number } = {},
): ScheduleResults {
  const ranks = options.ranks ?? 4, mbit = options.mbit ?? 10_000;
  const link = { alpha_us: 25, bytes_per_us: mbit / 8 };
  const costs = stepCosts(link, { ranks });
  const rows: ScheduleRow[] = [],
    timelines: PolicyTimeline[] = [],
    slowdowns: SlowdownSamples[] = [];
  for (const [shape, size] of Object.entries(SAMPLE_SHAPES)) {
    const gradients = (layer: number, names: readonly string[]): GradientOutline[] =>
      names.map((name) => ({
        name: `model.layers.${layer}.self_attn.${name}.weight`,
        elements: size.gradient / 4,
        elementBytes: 4,
        group: "world",
      }));
    const graph = buildStepGraph({
      layers: Array.from({ length: size.layers }, (_, layer) => ({
        moe: { allToAllBytes: size.allToAll, experts: [] },
        feedForward: gradients(layer, ["router"]),
        attention: gradients(layer, NAMES),
      })),
      head: [],
      embedding: [],
    });
    const modelled = {
      compute_us: (node: ComputeNode) => compute_us(node, size.experts_us),
      costs,
    };
    const sizes: [SchedulerName, number | undefined][] = [
      ...SAMPLE_POLICIES.map((policy): [SchedulerName, undefined] => [policy, undefined]),
      ...[0.5, 1, 2, 6, 12].map((mb): [SchedulerName, number] => ["lina", mb * 1e6]),
    ];
    let fifo_ms = NaN;
    for (const [policy, microOpBytes] of sizes) {
      const scheduler = createScheduler(policy, {
        microOpBytes,
        bucketBytes: 7_000_000,
        linkBytesPerSecond: mbit * 125_000,
      });
      const run = timeline(graph, scheduler, { ...modelled, endsTold: "at once" });
      const schedule = scheduler.plan(graph);
      const bounds = stepBounds(graph, schedule, { ...modelled, outside: policy === "outside" });
      const step_ms = run.end_us / 1000;
      if (policy === "fifo") fifo_ms = step_ms;
      const lane = (name: TimelineSpan["lane"]) => run.spans.filter((span) => span.lane === name);
      const intervals = (spans: readonly TimelineSpan[]) =>
        union(spans.map(({ start_us, end_us }): Interval => [start_us, end_us]));
      const busy = intervals(lane("compute")), allToAlls = intervals(lane("allToAll"));
      const reductions = intervals(lane("gradients"));
      const communication = union([...allToAlls, ...reductions]);
      const slow = lane("allToAll").filter(({ name }) => name.includes("backward"))
        .map(({ start_us, end_us, alone_us }) => (end_us - start_us) / alone_us);
      const mean = (phase: string) => {
        const all = lane("allToAll").filter(({ name }) => name.includes(phase));
        return all.reduce((sum, { start_us, end_us }) => sum + end_us - start_us, 0) / all.length /
          1000;
      };
      const bytes = schedule.microOps.reduce((most, { bytes }) => Math.max(most, bytes), 0);
      rows.push({
        policy,
        shape,
        ranks,
        per_host: 1,
        mbit,
        link_achieved: 0.96,
        device: "cuda",
        experts_per_device: 1,
        chunks: 1,
        micro_op_bytes: microOpBytes ?? bytes,
        ...(microOpBytes === undefined ? {} : { swept: true }),
        step_ms,
        compute_ms: length(busy) / 1000,
        exposed_a2a_ms: length(difference(allToAlls, busy)) / 1000,
        exposed_allreduce_ms: length(difference(difference(reductions, busy), allToAlls)) / 1000,
        a2a_fwd_ms: mean("forward"),
        a2a_bwd_ms: mean("backward"),
        a2a_slowdown: slow.toSorted((a, b) => a - b)[slow.length >> 1],
        a2a_ms: length(allToAlls) / 1000,
        a2a_share: length(allToAlls) / run.end_us,
        allreduce_ms: length(reductions) / 1000,
        allreduce_finish_ms: (reductions.at(-1)?.[1] ?? 0) / 1000,
        overlap: length(intersection(communication, busy)) / Math.max(1, length(communication)),
        pipelining: 0,
        link_busy: run.linkBusy_us / run.end_us,
        bound_ms: bounds.bound_us / 1000,
        floor_ms: bounds.floor_us / 1000,
        loss: 2.718281828,
        speedup: fifo_ms / step_ms,
        utilisation: length(busy) / run.end_us,
        peak_bytes: 3.1e9,
      });
      if (microOpBytes !== undefined) continue;
      slowdowns.push({ policy, shape, ranks, mbit, slowdowns: slow });
      const layers = new Map(schedule.microOps.map((microOp) => {
        const names = microOp.parts.map(({ gradient }) => {
          const node = graph.nodes[gradient];
          return node.kind === "gradient" ? node.name : "";
        });
        return [microOpName(graph, microOp), names.map(layerOf)];
      }));
      timelines.push(cut(run.spans, layers, { policy, shape, ranks, mbit, layer: 1 }));
    }
  }
  return {
    conditions: {
      command: `deno task bench:schedule --ranks ${ranks} --mbit ${mbit}`,
      machine: "a model of one rank",
      shapes: Object.fromEntries(
        Object.entries(SAMPLE_SHAPES).map(([name, { layers }]) => [name, `${layers} layers`]),
      ),
      settings: { "latency of a message": "25 µs" },
    },
    rows,
    timelines,
    slowdowns,
  };
}

/** One layer's backward pass of a modelled step. */
function cut(
  spans: readonly TimelineSpan[],
  layers: ReadonlyMap<string, readonly number[]>,
  key: Pick<PolicyTimeline, "policy" | "shape" | "ranks" | "mbit" | "layer">,
): PolicyTimeline {
  const own = (name: string) =>
    name.startsWith(`layer ${key.layer} backward`) || layers.get(name)?.includes(key.layer);
  const mine = spans.filter(({ name }) => own(name));
  const from = Math.min(...mine.map(({ asked_us }) => asked_us));
  const to = Math.max(...mine.map(({ end_us }) => end_us));
  return {
    ...key,
    simulated: true,
    done_us: to - from,
    spans: spans.filter(({ start_us, end_us }) => end_us > from && start_us < to)
      .map(({ lane, name, asked_us, start_us, end_us, bytes }) => ({
        lane,
        name: lane === "gradients" ? name : name.split(" ").slice(own(name) ? 3 : 0).join(" "),
        start_us: Math.max(0, start_us - from),
        end_us: Math.min(to, end_us) - from,
        ...(lane === "gradients" ? { queued_us: start_us - asked_us, bytes } : {}),
        own: own(name) ?? false,
      })),
  };
}
