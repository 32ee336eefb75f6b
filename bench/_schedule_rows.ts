// From what ranks saw to the rows of bench/schedule.ts: medians over steps, and what they are held against. Pure; no measuring lives here.
//
//   step_ms           the slowest rank's step, from call to the end of the device's work; median over steps
//   a2a_fwd/bwd_ms    one all-to-all (one slice of it, if it is cut) on the stream of a rank; medians over ranks and steps, and p95
//   a2a_slowdown      backward: from the moment at which the last rank has begun to the end, / what the fitted link says of the busiest rank's bytes
//   a2a_share         a rank's all-to-alls / its step
//   allreduce_ms      a rank's micro-ops or buckets, summed; allreduce_finish_ms: when the last of them ended, from the step's begin
//   overlap           part of all communication during which the rank's compute stream is not waiting
//   pipelining        the same of all-to-alls alone
//   link_busy         part of the step in which anything is on its way; link_used: bytes / (nominal rate · step)
//   bound_ms, floor_ms    as lina/training/bounds.ts has them, plus the part of the step that no schedule touches: optimizer, sums, batches
//   host_ms           processor time of the rank's program thread in a step
//   host_share        the host's time that the schedule took, asking, launching, noticing and marking, / the step

import { intersection, type Interval, length, union } from "./report/intervals.ts";
import type { ScheduleRow, SlowdownSamples } from "./report/results.ts";
import type {
  AllToAllSample,
  LinksReply,
  Policy,
  StepSample,
  TurnReply,
} from "./_schedule_messages.ts";

/** What a row is of. */
export interface RowKey {
  readonly policy: Policy;
  readonly shape: string;
  readonly ranks: number;
  readonly perHost: number;
  readonly mbit: number;
  readonly device: "cpu" | "cuda";
}

/** What was measured of it. */
export interface Measured {
  /** Turns, each with the replies of all ranks. */
  readonly turns: readonly (readonly TurnReply[])[];
  /** What each rank's links did at this rate. */
  readonly links: readonly LinksReply[];
  /** Time of a step that no schedule touches, in ms. */
  readonly rest_ms: number;
}

/** A row and what only this benchmark has. */
export interface Row extends ScheduleRow {
  /** Bytes / (nominal rate · step); absent without a rate. */
  readonly link_used?: number;
  /** Median processor time of a rank's program thread in a step, in ms. */
  readonly host_ms?: number;
  /** What the model of a step foretells, in ms. */
  readonly predicted_ms?: number;
  /** Micro-ops or buckets of a step. */
  readonly micro_ops: number;
  /** Load of the most loaded expert / mean. */
  readonly imbalance: number;
  /** Steps that were measured. */
  readonly steps: number;
}

/** Part of its nominal rate that a link must reach. */
const LEAST_ACHIEVED = 0.9;

/** Value at a part of the sorted numbers; NaN of none. */
export function quantile(numbers: readonly number[], q: number): number {
  if (numbers.length === 0) return NaN;
  const sorted = numbers.toSorted((a, b) => a - b), at = q * (sorted.length - 1);
  const low = Math.floor(at);
  return sorted[low] + (at - low) * (sorted[Math.ceil(at)] - sorted[low]);
}

/** The median; NaN of none. */
export function median(numbers: readonly number[]): number {
  return quantile(numbers, 0.5);
}

/** What links reached of a nominal rate: the better of a large all-to-all and a large allReduce, alone; undefined without a rate. */
export function achievedOf(links: readonly LinksReply[], mbit: number): number | undefined {
  if (mbit === 0 || links.length === 0) return undefined;
  const rate = mbit / 8; // bytes per µs
  const slowest = (bytes: (reply: LinksReply) => number, time: (reply: LinksReply) => number) =>
    Math.min(...links.map((reply) => bytes(reply) / time(reply))) / rate;
  return Math.max(
    slowest((reply) => reply.allToAll_bytes, (reply) => reply.allToAll_us),
    slowest((reply) => reply.allReduce_bytes, (reply) => reply.allReduce_us),
  );
}

/** Time of a step that no schedule touches: before the pass, and after its last computation and reduction; median, in ms. */
export function restOf(turns: readonly (readonly TurnReply[])[]): number {
  return median(
    samplesOf(turns).flatMap((step) => {
      const begin = step.computing[0]?.[0] ?? step.begin_us;
      const end = Math.max(
        step.computing.at(-1)?.[1] ?? step.end_us,
        ...step.microOps.map(([, end]) => end),
      );
      return (step.end_us - step.begin_us - (end - begin)) / 1000;
    }),
  );
}

function samplesOf(turns: readonly (readonly TurnReply[])[]): StepSample[] {
  return turns.flatMap((replies) => replies.flatMap(({ steps }) => steps));
}

const nameOf = ({ layer, phase, role, chunk }: AllToAllSample) =>
  `${layer} ${phase} ${role} ${chunk}`;

/** Slowdowns of the backward all-to-alls of one step, of which every rank's sample is given. */
export function slowdownsOf(step: readonly StepSample[], link: LinksReply["allToAll"]): number[] {
  const tables = step.map(({ allToAlls }) => new Map(allToAlls.map((one) => [nameOf(one), one])));
  const messages = step.length - 1, slowdowns: number[] = [];
  for (const [name, one] of tables[0]) {
    if (one.phase !== "backward") continue;
    const all = tables.map((table) => table.get(name)!);
    // What a rank receives in a dispatch it sends in the combine of the same slice.
    const opposite = nameOf({ ...one, role: one.role === "dispatch" ? "combine" : "dispatch" });
    const back = tables.map((table) => table.get(opposite)!);
    if ([...all, ...back].includes(undefined!)) continue;
    const bytes = Math.max(...all.map(({ bytes }) => bytes), ...back.map(({ bytes }) => bytes));
    const begin = Math.max(...all.map(({ start_us }) => start_us));
    const end = Math.max(...all.map(({ end_us }) => end_us));
    const alone = messages * link.alpha_us + bytes / link.bytes_per_us;
    if (end > begin && alone > 0) slowdowns.push((end - begin) / alone);
  }
  return slowdowns;
}

/** All slowdowns of a policy. */
export function slowdownSamples(key: RowKey, measured: Measured): SlowdownSamples {
  const { policy, shape, ranks, mbit } = key;
  const slowdowns = stepsOf(measured.turns).flatMap((step) =>
    slowdownsOf(step, measured.links[0].allToAll)
  );
  return { policy: nameOfPolicy(policy), shape, ranks, mbit, slowdowns };
}

/** Every step's samples, by rank. */
function stepsOf(turns: readonly (readonly TurnReply[])[]): StepSample[][] {
  return turns.flatMap((replies) =>
    replies[0].steps.map((_, i) => replies.map(({ steps }) => steps[i]))
  );
}

/**
 * A row.
 *
 * @param key What it is of.
 * @param measured What was measured.
 * @param fifo Unpacked `fifo` under the same conditions, if it was measured.
 * @returns The row.
 */
export function rowOf(
  key: RowKey,
  measured: Measured,
  fifo?: Pick<Row, "step_ms">,
): Row {
  const { policy, mbit } = key, { turns, links, rest_ms } = measured;
  const steps = stepsOf(turns), samples = samplesOf(turns);
  const times = steps.map((step) =>
    Math.max(...step.map(({ begin_us, end_us }) => (end_us - begin_us) / 1000))
  );
  const step_ms = median(times);
  const plan = turns.at(-1)![0].plan;
  const all = (phase: AllToAllSample["phase"]) =>
    samples.flatMap(({ allToAlls }) =>
      allToAlls.filter((one) => one.phase === phase)
        .map(({ start_us, end_us }) => (end_us - start_us) / 1000)
    );
  const forward = all("forward"), backward = all("backward");
  const parts = samples.map(partsOf);
  const of = (value: (part: Parts) => number) => median(parts.map(value));
  const achieved = achievedOf(links, mbit);
  const bytes = of((part) => part.bytes);
  const host = samples.flatMap(({ hostCpu_ms }) => hostCpu_ms === null ? [] : [hostCpu_ms]);
  const host_ms = host.length > 0 ? median(host) : undefined;
  return {
    policy: nameOfPolicy(policy),
    shape: key.shape,
    ranks: key.ranks,
    per_host: key.perHost,
    mbit,
    link_achieved: achieved,
    device: key.device,
    experts_per_device: policy.experts,
    chunks: plan.chunks,
    micro_op_bytes: policy.name.startsWith("planned")
      ? null
      : policy.microOpBytes ?? plan.microOpBytes,
    micro_ops: plan.microOps,
    step_ms,
    step_quartiles_ms: [quantile(times, 0.25), quantile(times, 0.75)],
    compute_ms: of((part) => part.compute_ms),
    exposed_a2a_ms: of((part) => part.exposedAllToAll_ms),
    exposed_allreduce_ms: of((part) => part.exposedReduction_ms),
    a2a_fwd_ms: median(forward),
    a2a_fwd_p95_ms: quantile(forward, 0.95),
    a2a_bwd_ms: median(backward),
    a2a_bwd_p95_ms: quantile(backward, 0.95),
    a2a_slowdown: median(steps.flatMap((step) => slowdownsOf(step, links[0].allToAll))),
    a2a_ms: of((part) => part.allToAll_ms),
    a2a_share: of((part) => part.share),
    allreduce_ms: of((part) => part.reduction_ms),
    allreduce_finish_ms: of((part) => part.finish_ms),
    overlap: of((part) => part.overlap),
    pipelining: of((part) => part.pipelining),
    link_busy: of((part) => part.linkBusy),
    link_used: mbit === 0 ? undefined : bytes / (mbit * 125 * step_ms),
    bytes,
    bound_ms: plan.bounds ? plan.bounds.bound_us / 1000 + rest_ms : undefined,
    floor_ms: plan.bounds ? plan.bounds.floor_us / 1000 + rest_ms : undefined,
    predicted_ms: plan.bounds ? plan.bounds.predicted_us / 1000 + rest_ms : undefined,
    host_ms,
    host_share: median(samples.map(({ schedule_us }) => schedule_us)) / 1000 / step_ms,
    utilisation: of((part) => part.compute_ms) / step_ms,
    loss: turns.at(-1)![0].steps.at(-1)!.loss,
    imbalance: median(samples.map(({ imbalance }) => imbalance)),
    speedup: fifo === undefined ? undefined : fifo.step_ms / step_ms,
    peak_bytes: Math.max(...turns.flat().map(({ peak_bytes }) => peak_bytes)),
    steps: steps.length,
    void: achieved !== undefined && achieved < LEAST_ACHIEVED
      ? `links reached ${achieved.toFixed(2)} of their rate`
      : undefined,
  };
}

/** How rows and timelines call a policy. */
export function nameOfPolicy({ name, twoLevel }: Policy): string {
  return twoLevel ? `${name}, two-level` : name;
}

/** What one rank's step consists of. */
interface Parts {
  readonly compute_ms: number;
  readonly allToAll_ms: number;
  readonly reduction_ms: number;
  readonly exposedAllToAll_ms: number;
  readonly exposedReduction_ms: number;
  readonly share: number;
  readonly finish_ms: number;
  readonly overlap: number;
  readonly pipelining: number;
  readonly linkBusy: number;
  readonly bytes: number;
}

function partsOf(step: StepSample): Parts {
  const step_us = step.end_us - step.begin_us;
  const spans = step.allToAlls.map(({ start_us, end_us }): Interval => [start_us, end_us]);
  const allToAlls = union(spans);
  const reductions = union(step.microOps.map(([start, end]): Interval => [start, end]));
  const both = union([...allToAlls, ...reductions]), computing = union(step.computing);
  const busy = union([...allToAlls, ...computing]);
  const ratio = (part: number, whole: number) => whole > 0 ? part / whole : 0;
  return {
    compute_ms: length(computing) / 1000,
    allToAll_ms: length(spans) / 1000,
    reduction_ms: step.microOps.reduce((sum, [start, end]) => sum + end - start, 0) / 1000,
    exposedAllToAll_ms: (length(allToAlls) - length(intersection(allToAlls, computing))) / 1000,
    exposedReduction_ms: (length(reductions) - length(intersection(reductions, busy))) / 1000,
    share: length(spans) / step_us,
    finish_ms: (Math.max(step.begin_us, ...step.microOps.map(([, end]) => end)) - step.begin_us) /
      1000,
    overlap: ratio(length(intersection(both, computing)), length(both)),
    pipelining: ratio(length(intersection(allToAlls, computing)), length(allToAlls)),
    linkBusy: length(both) / step_us,
    bytes: step.allToAlls.reduce((sum, { bytes }) => sum + bytes, 0) +
      step.microOps.reduce((sum, [, , bytes]) => sum + bytes, 0),
  };
}
