// One shape on ranks that are running: which policies take turns, in which order, and what becomes of what they say.

import type { SchedulerName } from "../lina/training/schedulers.ts";
import type { Span } from "../trace/mod.ts";
import { layerTimeline } from "./report/layer_timeline.ts";
import type { PolicyTimeline, SlowdownSamples } from "./report/results.ts";
import type { LinksReply, Policy, TurnReply } from "./_schedule_messages.ts";
import type { Ranks } from "./_schedule_ranks.ts";
import { testbed } from "./_schedule_ranks.ts";
import {
  type Measured,
  nameOfPolicy,
  restOf,
  type Row,
  type RowKey,
  rowOf,
  slowdownSamples,
} from "./_schedule_rows.ts";
import { SHAPES } from "./_schedule_shapes.ts";

/** Policies that packing is compared by. */
const PACKED: readonly SchedulerName[] = [
  "fifo",
  "outside",
  "lina",
  "lina+pipeline",
  "planned",
  "planned+pipeline",
];
/** Policies that all-to-alls of two levels are compared by. */
const TWO_LEVEL: readonly SchedulerName[] = ["fifo", "lina", "planned"];
/** The policy whose computation has no reductions beside all-to-alls, and so is profiled. */
const PROFILED: SchedulerName = "outside";

/** What is measured with one number of ranks. */
export interface Launch {
  readonly ranks: number;
  readonly perHost: number;
  readonly device: "cpu" | "cuda";
  /** Whether links have rates. */
  readonly box: boolean;
  /** Rates in Mbit/s; all policies run at the first. */
  readonly rates: readonly number[];
  readonly policies: readonly SchedulerName[];
  /** Policies at the other rates. */
  readonly otherPolicies: readonly SchedulerName[];
  /** Sizes of micro-ops that `lina` is swept over. */
  readonly microOpBytes: readonly number[];
  /** Experts of a device. */
  readonly experts: readonly number[];
  /** Slices of the all-to-alls of pipelined policies. */
  readonly chunks: readonly number[];
  /** Whether some policies run with all-to-alls of two levels, too. */
  readonly twoLevel: boolean;
  readonly rounds: number;
  readonly steps: number;
  /** Steps of a turn before those that count. */
  readonly warm: number;
  /** Steps of a model before all turns. */
  readonly settle: number;
  /** When nothing begins any more, on performance.now()'s clock. */
  readonly end_ms: number;
  readonly progress: (text: string) => void;
}

/** What came of one rate. */
export interface Part {
  /** What has ended it too soon; null if nothing has. */
  readonly failure: unknown;
  readonly rows: readonly Row[];
  readonly timelines: readonly PolicyTimeline[];
  readonly slowdowns: readonly SlowdownSamples[];
  /** The last step of each policy: spans by rank; at the first rate only. */
  readonly traces:
    | readonly { readonly policy: string; readonly spans: readonly (readonly Span[])[] }[]
    | null;
}

/** A policy's turns so far. */
interface Contender {
  readonly policy: Policy;
  readonly swept: boolean;
  readonly turns: TurnReply[][];
}

/** The policies of a rate, unpacked ones first, for experts move between devices only when their number changes. */
function contendersOf(launch: Launch, first: boolean): Contender[] {
  const { ranks, experts, chunks, microOpBytes } = launch;
  const names = first ? launch.policies : launch.otherPolicies;
  const list: Contender[] = [];
  for (const count of experts) {
    if (count > 1 && (!first || ranks / count < 2)) continue; // no all-to-all would be left
    const these = count === 1 ? names : PACKED.filter((name) => names.includes(name));
    for (const name of these) {
      for (const slices of name.endsWith("+pipeline") ? chunks : [1]) {
        const piped = slices > 1 ? { chunks: slices } : {};
        list.push({ policy: { name, experts: count, ...piped }, swept: false, turns: [] });
      }
    }
    if (count > 1) continue;
    for (const name of launch.twoLevel ? TWO_LEVEL : []) {
      if (!names.includes(name)) continue;
      list.push({ policy: { name, experts: 1, twoLevel: true }, swept: false, turns: [] });
    }
    if (!names.includes("lina")) continue;
    for (const bytes of microOpBytes) {
      const policy = { name: "lina", experts: 1, microOpBytes: bytes } as const;
      list.push({ policy, swept: true, turns: [] });
    }
  }
  return list;
}

/**
 * Measures one shape.
 *
 * @param running The ranks.
 * @param launch What is asked for.
 * @param shape The shape's name.
 * @returns What came of one rate after another.
 */
export async function* measureShape(
  running: Ranks,
  launch: Launch,
  shape: string,
): AsyncGenerator<Part> {
  const { box, rates, progress } = launch;
  if (box) await testbed("rate", "0");
  const [made] = await running.ask({ kind: "shape", shape, settle: launch.settle });
  progress(
    `${shape}: ${(made.parameters / 1e6).toFixed(1)} M parameters a rank, loss ${
      made.loss.toFixed(4)
    }, load ${made.imbalance.toFixed(2)} after ${launch.settle} steps`,
  );
  for (const [i, mbit] of rates.entries()) {
    if (performance.now() > launch.end_ms) break;
    if (box) await testbed("rate", String(mbit));
    const part = await measureRate(running, launch, { shape, mbit, first: i === 0 });
    yield part;
    if (part.failure !== null) throw part.failure; // what was measured before is not lost
  }
  await running.ask({ kind: "free" });
}

async function measureRate(
  running: Ranks,
  launch: Launch,
  { shape, mbit, first }: {
    readonly shape: string;
    readonly mbit: number;
    readonly first: boolean;
  },
): Promise<Part> {
  const { progress, warm, ranks, perHost, device } = launch;
  // Slower links make longer steps, and their rows are beside the point.
  const rounds = first ? launch.rounds : 1;
  const steps = first ? launch.steps : Math.ceil(launch.steps / 2);
  const links = await running.ask({ kind: "links", mbit });
  progress(`${shape}, ${mbit} Mbit/s: ${describeLinks(links)}`);
  const contenders = contendersOf(launch, first);
  const rests = new Map<number, number>();
  const turn = async (policy: Policy, more: { profile?: boolean; spans?: boolean } = {}) => {
    const { profile = false, spans = false } = more;
    const begin_ms = performance.now();
    const replies = await running.ask({ kind: "turn", policy, warm, steps, profile, spans });
    const seconds = ((performance.now() - begin_ms) / 1000).toFixed(1);
    progress(`${shape}, ${mbit} Mbit/s, ${JSON.stringify(policy)}: ${seconds} s`);
    return replies;
  };
  let failure: unknown = null;
  try {
    for (let round = 0; round < rounds; round++) {
      for (const { policy, turns } of contenders) {
        if (performance.now() > launch.end_ms) break;
        if (!rests.has(policy.experts)) {
          const profiled = { name: PROFILED, experts: policy.experts };
          rests.set(policy.experts, restOf([await turn(profiled, { profile: true })]));
        }
        turns.push(await turn(policy, { spans: round === 0 && first }));
      }
    }
  } catch (error) {
    failure = error ?? new Error("unknown");
  }
  const shown = contenders.filter(({ turns }) => turns.length > 0);
  const keyOf = ({ policy }: Contender): RowKey => ({
    policy,
    shape,
    ranks,
    perHost,
    mbit,
    device,
  });
  const measuredOf = ({ policy, turns }: Contender): Measured => ({
    turns,
    links,
    rest_ms: rests.get(policy.experts)!,
  });
  const plain = shown.find(({ policy }) => policy.name === "fifo" && policy.experts === 1);
  const fifo = plain && rowOf(keyOf(plain), measuredOf(plain));
  return {
    failure,
    rows: shown.map((one) => ({
      ...rowOf(keyOf(one), measuredOf(one), fifo),
      ...(one.swept && { swept: true }),
    })),
    timelines: first
      ? shown.filter(({ swept }) => !swept).map((one) => timelineOf(one, keyOf(one)))
        .filter((timeline) => timeline !== null)
      : [],
    slowdowns: shown.filter(({ swept, policy }) => !swept && policy.experts === 1)
      .map((one) => slowdownSamples(keyOf(one), measuredOf(one))),
    traces: first
      ? shown.filter(({ swept }) => !swept).map(({ policy, turns }) => ({
        policy: policy.experts === 1
          ? nameOfPolicy(policy)
          : `${policy.name}, ${policy.experts} experts per device`,
        spans: turns[0].map(({ spans }) => spans),
      }))
      : null,
  };
}

/** A layer in the middle, of rank 0, in the first turn's last step; null if it was not recorded. */
function timelineOf({ policy, turns }: Contender, key: RowKey): PolicyTimeline | null {
  const layer = Math.floor(SHAPES[key.shape].layers / 2);
  const { shape, ranks, mbit } = key, [{ spans, steps }] = turns[0];
  const choice = { layer, policy: nameOfPolicy(policy), shape, ranks, mbit };
  const record = { spans, computing: steps.at(-1)!.computing };
  return layerTimeline(record, { ...choice, experts_per_device: policy.experts });
}

function describeLinks(links: readonly LinksReply[]): string {
  const [{ allToAll_us, allReduce_us, allToAllBeside_us, allToAll, reduction }] = links;
  const ms = (time_us: number) => (time_us / 1000).toFixed(2);
  const fit = ({ alpha_us, bytes_per_us, error }: LinksReply["allToAll"]) =>
    `${alpha_us.toFixed(0)} us + ${bytes_per_us.toFixed(0)} MB/s (± ${(100 * error).toFixed(0)} %)`;
  return `large all-to-all ${ms(allToAll_us)} ms, allReduce ${
    ms(allReduce_us)
  } ms, the first beside the second ${ms(allToAllBeside_us)} ms (${
    (allToAllBeside_us / allToAll_us).toFixed(2)
  }x); fits ${fit(allToAll)}, ${fit(reduction)}`;
}
