// What bench:schedule measures, as it is written with --json and as the report reads it. Types, and a reader that says what a file
// lacks; nothing is measured or drawn here.

/** One policy on one shape. What was not measured is absent, and shown so. Times are medians over steps of the slowest rank. */
export interface ScheduleRow {
  /** `fifo`, `outside`, `priority`, `lina`, `lina+pipeline`, `planned`, `planned+pipeline`. */
  readonly policy: string;
  /** Name of the model's shape, as in {@linkcode Conditions.shapes}. */
  readonly shape: string;
  /** Number of ranks, which is also the number of experts of a layer. */
  readonly ranks: number;
  /** Ranks that share a link. */
  readonly per_host: number;
  /** Nominal rate of a link each way in Mbit/s; 0 is no limit. */
  readonly mbit: number;
  /** Part of the nominal rate that the links reached, measured alone; below 0.9 the row is void. */
  readonly link_achieved?: number;
  /** `cpu`, `cuda`. */
  readonly device: string;
  /** Experts that a rank holds; 1 is unpacked. */
  readonly experts_per_device: number;
  /** Slices of an all-to-all; 1 is not pipelined. */
  readonly chunks?: number;
  /** Most bytes of a micro-op, or of a bucket; null where every micro-op has a size of its own. */
  readonly micro_op_bytes?: number | null;
  /** Whether the size of its micro-ops is one of a sweep, not the policy's own. @default {false} */
  readonly swept?: boolean;
  /** Time of a training step in ms. */
  readonly step_ms: number;
  /** Quartiles of it. */
  readonly step_quartiles_ms?: readonly [number, number];
  /** Time of the step in which the device computes, in ms. */
  readonly compute_ms?: number;
  /** Time in which an all-to-all runs and nothing computes, in ms. */
  readonly exposed_a2a_ms?: number;
  /** Time in which only gradients are reduced, in ms. */
  readonly exposed_allreduce_ms?: number;
  /** One all-to-all of the forward half, in ms. */
  readonly a2a_fwd_ms?: number;
  /** Its 95th percentile. */
  readonly a2a_fwd_p95_ms?: number;
  /** One all-to-all of the backward half, in ms. */
  readonly a2a_bwd_ms?: number;
  /** Its 95th percentile. */
  readonly a2a_bwd_p95_ms?: number;
  /** Backward all-to-alls: time / time alone at the same sizes, median. */
  readonly a2a_slowdown?: number;
  /** All all-to-alls of a step, in ms. */
  readonly a2a_ms?: number;
  /** All-to-alls' part of the step. */
  readonly a2a_share?: number;
  /** Sum of a step's reductions, in ms. */
  readonly allreduce_ms?: number;
  /** When the last gradient is reduced, in ms from the step's start. */
  readonly allreduce_finish_ms?: number;
  /** Part of the communication's time during which the rank computes. */
  readonly overlap?: number;
  /** Part of the compute lane that is busy while an all-to-all of a MoE layer runs: the paper's pipelining efficiency. */
  readonly pipelining?: number;
  /** Part of the step in which the link carries bytes. */
  readonly link_busy?: number;
  /** Bytes / (nominal rate · step). */
  readonly link_used?: number;
  /** Bytes that leave a rank in a step. */
  readonly bytes?: number;
  /** Step that the model of lina/training/timeline.ts foretells, in ms. */
  readonly predicted_ms?: number;
  /** Critical-path bound of the policy's class in ms. */
  readonly bound_ms?: number;
  /** max(compute, bytes / rate) in ms: no schedule beats it. */
  readonly floor_ms?: number;
  /** Loss after the last step; alike for all policies. */
  readonly loss?: number;
  /** Step of unpacked `fifo` on the same shape, ranks and rate / this step. */
  readonly speedup?: number;
  /** Host time that scheduling takes, as part of the step. */
  readonly host_share?: number;
  /** Time of the device that partitioning (copies to and fro) takes, as part of the step. */
  readonly partition_share?: number;
  /** Part of the step in which the device is busy with computation, whole run: utilisation. */
  readonly utilisation?: number;
  /** Most device memory in use on a rank in bytes. */
  readonly peak_bytes?: number;
  /** Memory of the device that is a rank's share, in bytes. */
  readonly memory_bytes?: number;
  /** Why the row says nothing: `links reached 0.84 of their rate`. */
  readonly void?: string;
}

/** Rows of a timeline from top to bottom. */
export type Lane = "compute" | "allToAll" | "gradients";

/** Something that ran. Times in µs from the timeline's start. */
export interface LaneSpan {
  /** Row. */
  readonly lane: Lane;
  /** For readers: `experts`, `combine 0/2`, a gradient's name and elements. */
  readonly name: string;
  /** Start. */
  readonly start_us: number;
  /** End. */
  readonly end_us: number;
  /** Time from readiness to the start, for gradients. */
  readonly queued_us?: number;
  /** Bytes that were reduced or sent. */
  readonly bytes?: number;
  /** Whether it belongs to the layer shown; others run beside it and are drawn paler. @default {true} */
  readonly own?: boolean;
}

/** One layer's backward pass under one policy, measured on one rank. */
export interface PolicyTimeline {
  /** As in {@linkcode ScheduleRow}. */
  readonly policy: string;
  /** As in {@linkcode ScheduleRow}. */
  readonly shape: string;
  /** As in {@linkcode ScheduleRow}. */
  readonly ranks: number;
  /** As in {@linkcode ScheduleRow}. */
  readonly mbit: number;
  /** As in {@linkcode ScheduleRow}. @default {1} */
  readonly experts_per_device?: number;
  /** The layer. */
  readonly layer: number;
  /** The rank. @default {0} */
  readonly rank?: number;
  /** Whether the times come from a model instead of a clock. @default {false} */
  readonly simulated?: boolean;
  /** When the layer's backward pass ended: its last computation, all-to-all or reduction. @default {the last end of its spans} */
  readonly done_us?: number;
  /** What ran. */
  readonly spans: readonly LaneSpan[];
}

/** Slowdowns of single all-to-alls: time / time alone at the same sizes. */
export interface SlowdownSamples {
  /** As in {@linkcode ScheduleRow}. */
  readonly policy: string;
  /** As in {@linkcode ScheduleRow}. */
  readonly shape: string;
  /** As in {@linkcode ScheduleRow}. */
  readonly ranks: number;
  /** As in {@linkcode ScheduleRow}. */
  readonly mbit: number;
  /** One number per all-to-all of the backward half, over steps and ranks. */
  readonly slowdowns: readonly number[];
}

/** Under which conditions was measured. */
export interface Conditions {
  /** The command that repeats it. */
  readonly command?: string;
  /** When, as ISO 8601 has it. */
  readonly date?: string;
  /** The machine in words: GPU, cores. */
  readonly machine?: string;
  /** Part of the GPU that a rank may use, in percent. */
  readonly gpu_share?: number;
  /** What each shape is: `8 layers, d 512, ff 2048, …`. */
  readonly shapes?: Readonly<Record<string, string>>;
  /** Anything else worth knowing, by name: versions, NCCL settings, steps, repeats. */
  readonly settings?: Readonly<Record<string, string | number | boolean>>;
}

/** What `bench:schedule --json` writes. */
export interface ScheduleResults {
  /** Under which conditions. */
  readonly conditions: Conditions;
  /** One per policy, shape, ranks, rate, micro-op size and packing. */
  readonly rows: readonly ScheduleRow[];
  /** One per policy for one shape, or for several. */
  readonly timelines?: readonly PolicyTimeline[];
  /** For the distribution of slowdowns. */
  readonly slowdowns?: readonly SlowdownSamples[];
}

/**
 * Reads what {@linkcode ScheduleResults} is written as.
 *
 * @param json The text of a file.
 * @param name Its name, for errors.
 * @returns The results. A step that is no positive number makes its row void; a file of rows alone has no conditions.
 * @throws {TypeError} If the text is no JSON, or a row lacks what tells it from others.
 */
export function parseResults(json: string, name: string): ScheduleResults {
  const problem = (what: string) => new TypeError(`Cannot read ${name} as ${what}`);
  let value: unknown;
  try {
    value = JSON.parse(json);
  } catch (error) {
    throw problem(`it must be JSON: ${(error as Error).message}`);
  }
  const file = (Array.isArray(value) ? { rows: value } : value) as Partial<ScheduleResults> | null;
  const list = <T>(key: keyof ScheduleResults): readonly T[] => {
    const found = file?.[key] ?? (key === "rows" ? undefined : []);
    if (!Array.isArray(found)) throw problem(`"${key}" must be a list`);
    return found;
  };
  const rows = list<ScheduleRow>("rows").map((row, i): ScheduleRow => {
    for (const key of ["policy", "shape"] as const) {
      if (typeof row?.[key] !== "string") throw problem(`row ${i} must have a text "${key}"`);
    }
    for (const key of ["ranks", "mbit"] as const) {
      if (typeof row[key] !== "number") throw problem(`row ${i} must have a number "${key}"`);
    }
    const usual: Partial<ScheduleRow> = { per_host: 1, experts_per_device: 1, device: "cuda" };
    const known: ScheduleRow = { ...usual, ...present(row) };
    const valid = known.step_ms > 0;
    return valid ? known : { ...known, step_ms: NaN, void: row.void ?? "no step was measured" };
  });
  const timelines = list<PolicyTimeline>("timelines");
  for (const [i, { spans }] of timelines.entries()) {
    if (!Array.isArray(spans)) throw problem(`timeline ${i} must have a list "spans"`);
  }
  const slowdowns = list<SlowdownSamples>("slowdowns");
  for (const [i, own] of slowdowns.entries()) {
    if (!Array.isArray(own.slowdowns)) throw problem(`sample ${i} must have a list "slowdowns"`);
  }
  return { conditions: file!.conditions ?? {}, rows, timelines, slowdowns };
}

/** No time, size or ratio is larger: what is has no meaning, and no place in a drawing. */
const MOST = 1e15;

/** A row without numbers that are none, as which JSON writes null, and without times and sizes that cannot be. */
function present(row: ScheduleRow): ScheduleRow {
  const entries = Object.entries(row).filter(([key, value]) => {
    if (typeof value !== "number") return value !== null || key === "micro_op_bytes";
    return Math.abs(value) < MOST && (value >= 0 || !/(_ms|bytes)$/.test(key));
  });
  return Object.fromEntries(entries) as unknown as ScheduleRow;
}
