// Writes what all ranks did as one timeline that ui.perfetto.dev and chrome://tracing open: a process per rank, a row per kind of
// work, arrows between the all-to-alls that belong together and from gradients to their micro-ops. The format is the Trace Event Format
// in JSON (`events.ts`). The file is written as it comes; rank 0 never holds another rank's spans.

import { measureClockOffset, type Ranks } from "./clock.ts";
import { beginOf, type FlowIds, type TraceEvent, traceEvents } from "./events.ts";
import { now, type Recorder, recorder as ownRecorder, type Span } from "./mod.ts";

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
  /** Most spans in the file; what has no room is counted in its `dropped_spans`. @default {1,000,000} */
  readonly limit?: number;
}

/** Spans that viewers in a browser can take. */
const LIMIT = 1_000_000;

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
  const spans = keptSpans(recorder.spans, Math.floor((options.limit ?? LIMIT) / size));
  let first = Infinity;
  for (const span of spans) first = Math.min(first, beginOf(span) + offset);
  const all = await exchangeRecorded(ranks, communicators(spans));
  const starts = await gatherNumber(ranks, first);
  const origin = Math.min(...starts.filter(Number.isFinite), Infinity);
  const events = traceEvents(spans, {
    rank,
    shift: Number.isFinite(origin) ? offset - origin : 0,
    flows: ranks ? ring(all, rank) : undefined,
    label: options.label,
  });
  const lost = recorder.dropped + recorder.spans.length - spans.length;
  const dropped = (await gatherNumber(ranks, lost)).reduce((sum, n) => sum + n, 0);
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

/**
 * The spans that a trace has room for: collectives from the first on, then what takes longest.
 *
 * @param spans All spans.
 * @param most How many are kept.
 * @returns Those, in the order in which they were.
 */
export function keptSpans(spans: readonly Span[], most: number): readonly Span[] {
  if (spans.length <= most) return spans;
  const isCollective = ({ category }: Span) =>
    category === "allToAll" || category === "allReduce" || category === "comm";
  const places = [...spans.keys()].sort((i, j) => {
    const a = spans[i], b = spans[j], first = isCollective(a);
    if (first !== isCollective(b)) return first ? -1 : 1;
    return first ? a.start - b.start : b.end - b.start - (a.end - a.start);
  });
  return places.slice(0, most).sort((i, j) => i - j).map((i) => spans[i]);
}

/**
 * Arrows between the all-to-alls of ranks whose spans are all at hand, for the `flows` of `traceEvents`.
 *
 * @param spans The spans of each rank.
 * @param rank Whose arrows.
 * @returns Ids of arrows by communicator.
 */
export function flowsOf(spans: readonly (readonly Span[])[], rank: number): Map<string, FlowIds> {
  return ring(spans.map(communicators), rank);
}

/** An all-to-all's communicator, and the first and last operation of it that were recorded. */
type Recorded = readonly [communicator: string, first: number, last: number];

/** The communicators that all-to-alls of these spans used. */
function communicators(spans: readonly Span[]): Recorded[] {
  const found = new Map<string, [number, number]>();
  for (const { category, track, args } of spans) {
    const sequence = args?.sequence;
    if (category !== "allToAll" || typeof sequence !== "number") continue;
    const [first, last] = found.get(track) ?? [Infinity, -Infinity];
    found.set(track, [Math.min(first, sequence), Math.max(last, sequence)]);
  }
  return [...found].map(([name, [first, last]]) => [name, first, last]);
}

/** Ids of arrows round each communicator's ranks: those that used it, in order, for the operations that all of them have recorded. */
function ring(recorded: readonly (readonly Recorded[])[], rank: number): Map<string, FlowIds> {
  const size = recorded.length;
  const flows = new Map<string, FlowIds>();
  const all = [...new Set(recorded.flatMap((own) => own.map(([name]) => name)))].sort();
  all.forEach((name, place) => {
    const members = recorded.flatMap((own, rank) =>
      own.filter(([used]) => used === name).map(([, first, last]) => ({ rank, first, last }))
    );
    const me = members.findIndex((member) => member.rank === rank);
    if (me < 0 || members.length < 2) return;
    const before = members[(me + members.length - 1) % members.length];
    const base = (place + 1) * 2 ** 40; // room for 2⁴⁰ / size operations; ids stay below 2⁵³ for 8000 communicators
    flows.set(name, {
      leaves: base + rank,
      arrives: base + before.rank,
      stride: size,
      first: Math.max(...members.map(({ first }) => first)),
      last: Math.min(...members.map(({ last }) => last)),
    });
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

async function exchangeRecorded(
  ranks: Ranks | undefined,
  recorded: readonly Recorded[],
): Promise<Recorded[][]> {
  if (!ranks) return [[...recorded]];
  const codes = [...JSON.stringify(recorded)].map((c) => c.codePointAt(0)!);
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
