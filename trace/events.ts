// Spans as events of the Trace Event Format: rows on which spans nest, arrows between the all-to-alls that belong together and from a
// gradient's readiness to its micro-ops, and how much waits to be reduced. One rank's spans at a time; writes nothing (`perfetto.ts` does).
//
// What viewers ask of arrows: a start `s` and an end `f` (with `bp: "e"`) that agree in `cat`, `name` and `id`, the start not after
// the end, each at a time at which a slice of its row is open, to which it is bound. So both lie inside their slices, never on an edge
// where the slice before or after is as good.

import type { Category, Span } from "./mod.ts";

/** An event of the Trace Event Format. Times in µs. */
export type TraceEvent = Readonly<Record<string, unknown>>;

/** How a rank's events are made. */
export interface EventOptions {
  /** The rank: the process of the timeline. */
  readonly rank: number;
  /** Added to every time, in µs. @default {0} */
  readonly shift?: number;
  /** For a communicator: number of the arrows of operation 0 that leave and arrive here. @default {no arrows} */
  readonly flows?: ReadonlyMap<string, FlowIds>;
  /** Shown with the process. @default {""} */
  readonly label?: string;
}

/** Arrows between matching operations go round the ranks of a communicator, each to the next. */
export interface FlowIds {
  /** Id of the arrow that leaves this rank at operation 0. */
  readonly leaves: number;
  /** Id of the arrow that arrives at operation 0. */
  readonly arrives: number;
  /** What each later operation adds. */
  readonly stride: number;
  /** First operation that every rank has recorded. @default {0} */
  readonly first?: number;
  /** Last operation that every rank has recorded. @default {Infinity} */
  readonly last?: number;
}

/** Rows of collectives are by kind, whatever communicator carries them. */
const ROWS: Partial<Record<Category, string>> = {
  allToAll: "all-to-all",
  allReduce: "allreduce",
  comm: "other collectives",
};

/** Where micro-ops are shown. */
const MICRO_OPS = "gradients";

/** Where the moments are shown at which gradients become ready. */
const READY = "gradients ready";

/** From top to bottom; rows that are not named here come after. */
const ROW_ORDER = [
  "compute",
  "gpu",
  "all-to-all",
  READY,
  MICRO_OPS,
  "allreduce",
  "other collectives",
];

/** Numbers of the rows of one kind, which lie one under another. */
const ROWS_OF_A_KIND = 10_000;

/** Least length of what has arrows, in ns: they leave at the second of them and arrive at the last but one. */
const ARROW_NS = 4;

/** How long a readiness is drawn unless another follows sooner, and within how much they are one; ns. */
const READY_NS = 20_000, TOGETHER_NS = 1000;

/** How far two micro-ops' views of when their gradient was ready may be apart, in ns. */
const SAME_NS = 100_000;

/**
 * Whether a span is a micro-op: one that tells how long its gradient has waited.
 *
 * @param span The span.
 * @returns Whether it is drawn with its gradient's readiness.
 */
export function isMicroOp({ args }: Span): boolean {
  return typeof args?.queued_us === "number" && Number.isFinite(args.queued_us);
}

/**
 * When a span's history begins: a micro-op's with its gradient's readiness.
 *
 * @param span The span.
 * @returns Time in µs on the span's clock, never after its start.
 */
export function beginOf(span: Span): number {
  return isMicroOp(span) ? span.start - Math.max(0, span.args!.queued_us as number) : span.start;
}

/** A span with times in ns. */
interface Ticks {
  readonly span: Span;
  readonly start: number;
  readonly end: number;
  /** Whether it has arrows, which must not end on something that lies inside it: such spans share no lane while they run. */
  readonly alone: boolean;
}

/** A moment at which gradients became ready, and the micro-ops that it lets go. */
interface Readiness {
  readonly at: number;
  readonly gradients: Set<string>;
  bytes: number;
}

/** A micro-op with the moment that it comes from. */
interface MicroOpTicks extends Ticks {
  readonly ready: Readiness;
  readonly number: number;
}

/**
 * The events of one rank. On one row two spans are nested or apart; spans that would overlap in part get a row each.
 *
 * @param spans What the rank did, in any order.
 * @param options Rank and clock.
 * @returns Names of the process and its rows, then spans in order of their start, with their arrows, then counters.
 */
export function* traceEvents(
  spans: readonly Span[],
  options: EventOptions,
): Generator<TraceEvent, void> {
  const { rank: pid, shift = 0, flows } = options;
  const named = options.label ? `rank ${pid} · ${options.label}` : `rank ${pid}`;
  yield { ph: "M", pid, tid: 0, name: "process_name", args: { name: named } };
  yield { ph: "M", pid, tid: 0, name: "process_sort_index", args: { sort_index: pid } };
  const ticks = (time: number) => Math.round((time + shift) * 1000); // whole ns: rounding keeps nesting
  const all = spans.map((span): Ticks => {
    const start = ticks(span.start), end = ticks(span.end);
    const alone = span.category === "allToAll" || isMicroOp(span);
    return { span, start, end: alone ? Math.max(end, start + ARROW_NS) : end, alone };
  });
  const ready = readiness(all, ticks);
  const rows = new Rows(pid);

  const moments = [...new Set(ready.values().map((microOp) => microOp.ready))];
  for (const [i, { at, gradients, bytes }] of moments.entries()) {
    const end = Math.min(at + READY_NS, moments[i + 1]?.at ?? Infinity);
    const { tid, events } = rows.place(READY, { start: at, end, alone: true });
    yield* events;
    const [first] = gradients, more = gradients.size - 1;
    const name = more > 0 ? `${first} and ${more} more` : first;
    const args = { gradients: [...gradients].join(", "), bytes };
    yield slice({ pid, tid, cat: "allReduce" }, name, at, end, args);
  }

  // Of two that begin together the longer one is around the other.
  all.sort((a, b) => a.start - b.start || b.end - a.end);
  for (const ticks of all) {
    const { span, start, end } = ticks;
    const microOp = ready.get(ticks);
    const row = microOp || span.track === MICRO_OPS ? MICRO_OPS : ROWS[span.category] ?? span.track;
    const { tid, events } = rows.place(row, ticks);
    yield* events;
    const args = row === span.track ? span.args : { ...span.args, communicator: span.track };
    const at = { pid, tid, cat: span.category };
    yield slice(at, span.name, start, end, args);
    if (microOp) {
      const id = pid * 2 ** 32 + microOp.number; // viewers know an arrow by id, category and name, whatever the process
      const from = { pid, tid: rows.place(READY).tid, cat: "allReduce" };
      yield { ph: "s", ...from, name: "gradient", id, ts: (microOp.ready.at + 1) / 1000 };
      // At the start: the arrow's length is the time that the micro-op has waited.
      const to = { pid, tid, cat: "allReduce", name: "gradient", id };
      yield { ph: "f", bp: "e", ...to, ts: (start + 2) / 1000 };
    }
    const flow = span.category === "allToAll" ? flows?.get(span.track) : undefined;
    const sequence = span.args?.sequence;
    if (!flow || typeof sequence !== "number") continue;
    if (sequence < (flow.first ?? 0) || sequence > (flow.last ?? Infinity)) continue;
    // An all-to-all ends nowhere before it has begun everywhere, so arrows from starts to ends never point back in time.
    const id = (base: number) => base + sequence * flow.stride;
    yield { ph: "s", ...at, name: "all-to-all", id: id(flow.leaves), ts: (start + 1) / 1000 };
    const arrival = { ...at, name: "all-to-all", id: id(flow.arrives), ts: (end - 1) / 1000 };
    yield { ph: "f", bp: "e", ...arrival };
  }
  if (ready.size > 0) yield* waiting([...ready.values()], { pid, tid: rows.place(READY).tid });
}

/** A span on a row. */
function slice(
  at: Readonly<Record<string, unknown>>,
  name: string,
  start: number,
  end: number,
  args?: Readonly<Record<string, unknown>>,
): TraceEvent {
  const ts = start / 1000, dur = (end - start) / 1000;
  return { ph: "X", ...at, name, ts, dur, ...(args ? { args } : {}) };
}

/** When each micro-op's gradient became ready. Moments are in order of time and at least `TOGETHER_NS` apart. */
function readiness(
  all: readonly Ticks[],
  ticks: (time: number) => number,
): Map<Ticks, MicroOpTicks> {
  const ordered = all.filter(({ span }) => isMicroOp(span))
    .map((microOp) => ({ microOp, at: ticks(beginOf(microOp.span)) }))
    .sort((a, b) => a.at - b.at);
  const out = new Map<Ticks, MicroOpTicks>();
  /** The latest moment of each gradient. */
  const latest = new Map<string, Readiness>();
  let last: Readiness | undefined;
  for (const { microOp, at } of ordered) {
    const gradient = microOp.span.name.replace(/ \d+\.\.\d+$/, "");
    let ready = latest.get(gradient);
    if (!ready || at - ready.at > SAME_NS) {
      ready = last && at - last.at < TOGETHER_NS ? last : { at, gradients: new Set(), bytes: 0 };
    }
    ready.gradients.add(gradient);
    ready.bytes += bytesOf(microOp.span);
    latest.set(gradient, ready);
    if (!last || ready.at > last.at) last = ready;
    out.set(microOp, { ...microOp, ready, number: out.size });
  }
  return out;
}

/** Counters of the micro-ops that are ready and have not started. */
function* waiting(
  microOps: readonly MicroOpTicks[],
  at: { readonly pid: number; readonly tid: number },
): Generator<TraceEvent, void> {
  const changes = microOps.flatMap(({ span, ready, start }) => {
    const bytes = bytesOf(span);
    return [{ time: ready.at, by: 1, bytes }, { time: start, by: -1, bytes: -bytes }];
  }).sort((a, b) => a.time - b.time);
  let count = 0, bytes = 0;
  for (const [i, change] of changes.entries()) {
    count += change.by;
    bytes += change.bytes;
    if (changes[i + 1]?.time === change.time) continue;
    const event = { ph: "C", ...at, cat: "allReduce", ts: change.time / 1000 };
    yield { ...event, name: "micro-ops waiting", args: { count } };
    yield { ...event, name: "gradients waiting", args: { MB: bytes / 1e6 } };
  }
}

function bytesOf({ args }: Span): number {
  return typeof args?.bytes === "number" ? args.bytes : 0;
}

/** The rows of a rank. */
class Rows {
  readonly #pid: number;
  readonly #rows = new Map<string, { readonly place: number; readonly lanes: Lane[] }>();
  /** Rows of no known order. */
  #others = 0;

  constructor(pid: number) {
    this.#pid = pid;
  }

  /**
   * Finds a lane of a row.
   *
   * @param row The row.
   * @param span Start and end of a span in ns; without one the first lane is told.
   * @returns The number of the lane, and the events that name it if it is new.
   */
  place(
    row: string,
    span?: Pick<Ticks, "start" | "end" | "alone">,
  ): { tid: number; events: TraceEvent[] } {
    let found = this.#rows.get(row);
    if (!found) {
      const known = ROW_ORDER.indexOf(row);
      found = { place: known < 0 ? ROW_ORDER.length + this.#others++ : known, lanes: [] };
      this.#rows.set(row, found);
    }
    const { lanes } = found, events: TraceEvent[] = [];
    let lane = span ? lanes.findIndex((lane) => lane.fits(span)) : 0;
    const isNew = lane < 0 || lane >= lanes.length;
    if (isNew) lane = lanes.push(new Lane()) - 1;
    if (span) lanes[lane].add(span.end);
    // Viewers order rows by this index, or by the number of the thread.
    const sort_index = found.place * ROWS_OF_A_KIND + lane, tid = sort_index + 1;
    if (isNew) {
      const at = { ph: "M", pid: this.#pid, tid };
      const name = lane === 0 ? row : `${row} (${lane + 1})`;
      events.push({ ...at, name: "thread_name", args: { name } });
      events.push({ ...at, name: "thread_sort_index", args: { sort_index } });
    }
    return { tid, events };
  }
}

/** Spans of one row that are open at the place reached. */
class Lane {
  #open: number[] = [];

  fits({ start, end, alone }: Pick<Ticks, "start" | "end" | "alone">): boolean {
    while (this.#open.length > 0 && this.#open[this.#open.length - 1] <= start) this.#open.pop();
    return this.#open.length === 0 || (!alone && end <= this.#open[this.#open.length - 1]);
  }

  add(end: number): void {
    this.#open.push(end);
  }
}
