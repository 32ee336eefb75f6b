// Writes what all ranks did as one timeline that ui.perfetto.dev and chrome://tracing open: a process per rank, a row per kind of
// work, arrows between the all-to-alls that belong together. The format is the Trace Event Format in JSON. The file is written as it
// comes; rank 0 never holds another rank's spans.

import { measureClockOffset, type Ranks } from "./clock.ts";
import { type Category, now, type Recorder, recorder as ownRecorder, type Span } from "./mod.ts";

/** Options of {@linkcode writeTrace}. */
export interface TraceOptions {
  /** The ranks; every one calls. @default {this process alone} */
  readonly ranks?: Ranks;
  /** Whose spans. @default {the recorder of this process} */
  readonly recorder?: Recorder;
  /** The clock of the spans in µs, for the measurement between hosts. @default {now} */
  readonly clock?: () => number;
  /** Shown with the process. @default {""} */
  readonly label?: string;
}

/** An event of the Trace Event Format. Times in µs. */
export type TraceEvent = Readonly<Record<string, unknown>>;

/** Rows of collectives are by kind, whatever communicator carries them. */
const ROWS: Partial<Record<Category, string>> = {
  allToAll: "all-to-all",
  allReduce: "allreduce",
  comm: "other collectives",
};

/** From top to bottom; rows that are not named here come after. */
const ROW_ORDER = ["compute", "all-to-all", "allreduce", "other collectives"];

/** Characters that go to rank 0, or to the file, at once. */
const CHUNK = 512 * 1024;

/**
 * Writes the spans of all ranks to one file. Every rank calls it at the same point.
 *
 * @param path The file, written by rank 0; replaced if it exists.
 * @param options Ranks and recorder.
 * @returns Once this rank is done.
 * @throws {Error} On rank 0, if the file cannot be written.
 *
 * @example
 * ```ts
 * import { now, Recorder } from "./mod.ts";
 * import { writeTrace } from "./perfetto.ts";
 * import assert from "node:assert/strict";
 *
 * const recorder = new Recorder();
 * recorder.capturing = true;
 * const start = now();
 * recorder.record({ track: "compute", name: "gemm", category: "gemm", start, end: now() });
 * const path = Deno.makeTempFileSync();
 * await writeTrace(path, { recorder });
 * const { traceEvents } = JSON.parse(Deno.readTextFileSync(path));
 * assert.ok(traceEvents.some((event: { name: string }) => event.name === "gemm"));
 * Deno.removeSync(path);
 * ```
 */
export async function writeTrace(path: string, options: TraceOptions = {}): Promise<void> {
  const recorder = options.recorder ?? ownRecorder;
  const { ranks } = options;
  const rank = ranks?.rank ?? 0, size = ranks?.size ?? 1;
  const offset = ranks ? await measureClockOffset(ranks, options.clock ?? now) : 0;
  let first = Infinity;
  for (const span of recorder.spans) first = Math.min(first, span.start + offset);
  const groups = communicators(recorder.spans);
  const all = await exchangeNames(ranks, groups);
  const starts = await gatherNumber(ranks, first);
  const origin = Math.min(...starts.filter(Number.isFinite), Infinity);
  const events = traceEvents(recorder.spans, {
    rank,
    shift: Number.isFinite(origin) ? offset - origin : 0,
    flows: ranks ? ring(all, rank) : undefined,
    label: options.label,
  });
  const dropped = (await gatherNumber(ranks, recorder.dropped)).reduce((sum, n) => sum + n, 0);
  if (rank > 0) {
    for (const text of pieces(events)) await sendText(ranks!, text);
    await sendText(ranks!, "");
    return;
  }
  const file = new TraceFile(path, { dropped_spans: dropped, ranks: size });
  for (const text of pieces(events)) file.add(text);
  for (let peer = 1; peer < size; peer++) {
    // A full disk must not leave the others waiting: what they send is taken in any case.
    for (;;) {
      const text = await recvText(ranks!, peer);
      if (text === "") break;
      file.add(text);
    }
  }
  file.finish();
}

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
}

/**
 * The events of one rank. On one row two spans are nested or apart; spans that would overlap in part get a row each.
 *
 * @param spans What the rank did, in any order.
 * @param options Rank and clock.
 * @returns Names of the process and its rows, then spans in order of their start, with their arrows.
 */
export function* traceEvents(
  spans: readonly Span[],
  options: EventOptions,
): Generator<TraceEvent, void> {
  const { rank: pid, shift = 0 } = options;
  const named = options.label ? `rank ${pid} · ${options.label}` : `rank ${pid}`;
  yield { ph: "M", pid, tid: 0, name: "process_name", args: { name: named } };
  yield { ph: "M", pid, tid: 0, name: "process_sort_index", args: { sort_index: pid } };
  const ticks = (time: number) => Math.round((time + shift) * 1000); // whole ns: rounding keeps nesting
  // Of two that begin together the longer one is around the other.
  const sorted = spans.map((span) => ({ span, start: ticks(span.start), end: ticks(span.end) }))
    .sort((a, b) => a.start - b.start || b.end - a.end);
  const rows = new Map<string, Lane[]>();
  const tids = new Map<string, number>();
  for (const { span, start, end } of sorted) {
    const row = ROWS[span.category] ?? span.track;
    const lanes = rows.get(row) ?? [];
    rows.set(row, lanes);
    let lane = lanes.findIndex((lane) => lane.fits(start, end));
    if (lane < 0) lane = lanes.push(new Lane()) - 1;
    lanes[lane].add(end);
    const name = lane === 0 ? row : `${row} (${lane + 1})`;
    let tid = tids.get(name);
    if (tid === undefined) {
      const place = ROW_ORDER.indexOf(row);
      tid = tids.size + 1;
      tids.set(name, tid);
      yield { ph: "M", pid, tid, name: "thread_name", args: { name } };
      const sort_index = (place < 0 ? ROW_ORDER.length : place) * 100 + lane;
      yield { ph: "M", pid, tid, name: "thread_sort_index", args: { sort_index } };
    }
    const args = row === span.track ? span.args : { ...span.args, communicator: span.track };
    const at = { pid, tid, cat: span.category };
    yield {
      ph: "X",
      ...at,
      name: span.name,
      ts: start / 1000,
      dur: (end - start) / 1000,
      ...(args ? { args } : {}),
    };
    const flow = span.category === "allToAll" ? options.flows?.get(span.track) : undefined;
    const sequence = span.args?.sequence;
    if (!flow || typeof sequence !== "number" || end === start) continue;
    // An all-to-all ends nowhere before it has begun everywhere, so arrows from starts to ends never point back in time.
    const id = (base: number) => base + sequence * flow.stride;
    yield { ph: "s", ...at, name: "all-to-all", id: id(flow.leaves), ts: start / 1000 };
    const arrival = { ...at, name: "all-to-all", id: id(flow.arrives), ts: (end - 1) / 1000 };
    yield { ph: "f", bp: "e", ...arrival };
  }
}

/** Spans of one row that are open at the place reached. */
class Lane {
  #open: number[] = [];

  fits(start: number, end: number): boolean {
    while (this.#open.length > 0 && this.#open[this.#open.length - 1] <= start) this.#open.pop();
    return this.#open.length === 0 || end <= this.#open[this.#open.length - 1];
  }

  add(end: number): void {
    this.#open.push(end);
  }
}

/** Names of the communicators that all-to-alls of these spans used. */
function communicators(spans: readonly Span[]): string[] {
  const names = new Set<string>();
  for (const { category, track, args } of spans) {
    if (category === "allToAll" && typeof args?.sequence === "number") names.add(track);
  }
  return [...names];
}

/** Ids of arrows round each communicator's ranks: those that used it, in order. */
function ring(names: readonly (readonly string[])[], rank: number): Map<string, FlowIds> {
  const size = names.length;
  const flows = new Map<string, FlowIds>();
  const all = [...new Set(names.flat())].sort();
  all.forEach((name, place) => {
    const members = names.flatMap((used, r) => used.includes(name) ? [r] : []);
    const me = members.indexOf(rank);
    if (me < 0 || members.length < 2) return;
    const before = members[(me + members.length - 1) % members.length];
    const base = (place + 1) * 2 ** 40; // room for 2⁴⁰ / size operations; ids stay below 2⁵³ for 8000 communicators
    flows.set(name, { leaves: base + rank, arrives: base + before, stride: size });
  });
  return flows;
}

function* pieces(events: Iterable<TraceEvent>): Generator<string, void> {
  let text = "";
  for (const event of events) {
    text += (text ? ",\n" : "") + JSON.stringify(event);
    if (text.length >= CHUNK) {
      yield text;
      text = "";
    }
  }
  if (text) yield text;
}

/** The file: under a temporary name until it is whole. The first error is kept for the end. */
class TraceFile {
  readonly #path: string;
  readonly #temporary: string;
  readonly #other: Readonly<Record<string, unknown>>;
  #file: Deno.FsFile | undefined;
  #empty = true;
  #error: unknown;

  constructor(path: string, other: Readonly<Record<string, unknown>>) {
    this.#path = path;
    this.#temporary = `${path}.tmp`;
    this.#other = other;
    try {
      this.#file = Deno.openSync(this.#temporary, { write: true, create: true, truncate: true });
    } catch (error) {
      this.#error = error;
    }
    this.#append('{"displayTimeUnit":"ms","traceEvents":[\n');
  }

  add(events: string): void {
    this.#append(this.#empty ? events : ",\n" + events);
    this.#empty = false;
  }

  #append(text: string): void {
    if (this.#error !== undefined || !this.#file) return;
    try {
      const bytes = new TextEncoder().encode(text);
      for (let at = 0; at < bytes.length;) at += this.#file.writeSync(bytes.subarray(at));
    } catch (error) {
      this.#error = error;
    }
  }

  finish(): void {
    this.#append(`\n],"otherData":${JSON.stringify(this.#other)}}\n`);
    this.#file?.close();
    if (this.#error === undefined) return Deno.renameSync(this.#temporary, this.#path);
    if (this.#file) Deno.removeSync(this.#temporary);
    throw new Error(`Cannot write the trace ${this.#path}: ${(this.#error as Error).message}`, {
      cause: this.#error,
    });
  }
}

async function gatherNumber(ranks: Ranks | undefined, value: number): Promise<number[]> {
  if (!ranks) return [value];
  const out = new Float64Array(ranks.size);
  await ranks.allGather(Float64Array.of(value), out);
  return [...out];
}

async function exchangeNames(
  ranks: Ranks | undefined,
  names: readonly string[],
): Promise<string[][]> {
  if (!ranks) return [[...names]];
  const codes = [...JSON.stringify(names)].map((c) => c.codePointAt(0)!);
  const width = Math.max(...await gatherNumber(ranks, codes.length));
  const out = new Float64Array(width * ranks.size);
  const own = new Float64Array(width).fill(0x20);
  own.set(codes);
  await ranks.allGather(own, out);
  return Array.from(
    { length: ranks.size },
    (_, r) => JSON.parse(String.fromCodePoint(...out.subarray(r * width, (r + 1) * width))),
  );
}

async function sendText(ranks: Ranks, text: string): Promise<void> {
  const bytes = new TextEncoder().encode(text);
  await ranks.send(Float64Array.of(bytes.length), 0);
  if (bytes.length > 0) await ranks.send(bytes, 0);
}

async function recvText(ranks: Ranks, from: number): Promise<string> {
  const length = new Float64Array(1);
  await ranks.recv(length, from);
  const bytes = new Uint8Array(length[0]);
  if (bytes.length > 0) await ranks.recv(bytes, from);
  return new TextDecoder().decode(bytes);
}
