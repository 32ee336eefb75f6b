// What a rank did, and when: spans and counters, kept in memory and written as a Perfetto trace. Imports nothing of the
// project, so every other room can use it. Recording a span costs one object; totals per category are always kept, spans
// only while capturing.

/** What a span is about; totals are kept per category. */
export type Category =
  | "compute"
  | "gemm"
  | "allToAll"
  | "allReduce"
  | "comm" // any other collective
  | "wait" // the host waits
  | "io";

/** Values shown with a span. */
export type SpanArgs = Readonly<Record<string, string | number | boolean>>;

/** A finished span on one track of this rank. Times are µs on the clock of {@linkcode now}. */
export interface Span {
  /** Row of the timeline: `compute`, `dispatch`, `gradients`, … */
  readonly track: string;
  /** What ran. */
  readonly name: string;
  /** What it is about. */
  readonly category: Category;
  /** Start in µs. */
  readonly start: number;
  /** End in µs. */
  readonly end: number;
  /** Values shown with the span. */
  readonly args?: SpanArgs;
}

/** Times count from here, so that the µs of a double have digits to spare. */
const EPOCH_MS = Date.UTC(2026, 0, 1);

// performance.now() alone starts at 0 in every process, and so does process.hrtime() in Deno. The system's time at that
// start is exact to about a µs, so the processes of one host share this clock; it never steps back within a process.
const origin_ms = performance.timeOrigin - EPOCH_MS;

/**
 * The present time on the clock that spans use: monotonic, and shared by all processes of one host to about a µs.
 *
 * @returns Time in µs.
 */
export function now(): number {
  return (origin_ms + performance.now()) * 1000;
}

/** Collects the spans and totals of this process. */
export class Recorder {
  /** Whether spans are kept; totals always are. */
  capturing = false;
  /** Whether a GPU's all-to-alls are timed by the GPU even while no spans are kept, for some µs of the host's time each. */
  timed = false;
  /** Spans kept so far. */
  readonly spans: Span[] = [];
  /** Most spans that are kept; a span takes about 200 bytes. @default {500,000} */
  limit = 500_000;
  /** Spans that found no room. */
  dropped = 0;
  #totals = new Map<Category, number>();

  /**
   * Adds a finished span.
   *
   * @param span The span.
   */
  record(span: Span): void {
    this.#totals.set(span.category, (this.#totals.get(span.category) ?? 0) + span.end - span.start);
    if (!this.capturing) return;
    if (this.spans.length < this.limit) this.spans.push(span);
    else this.dropped++;
  }

  /** Forgets the spans; totals stay. */
  clearSpans(): void {
    this.spans.length = 0;
    this.dropped = 0;
  }

  /**
   * Time spent in a category since the last {@linkcode Recorder.resetTotals}.
   *
   * @param category The category.
   * @returns The sum in µs; spans that overlap count twice.
   */
  total(category: Category): number {
    return this.#totals.get(category) ?? 0;
  }

  /** Sets every total to 0. */
  resetTotals(): void {
    this.#totals.clear();
  }
}

/** The recorder of this process. */
export const recorder: Recorder = new Recorder();
