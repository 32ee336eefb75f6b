// What a rank did, and when: spans and counters, kept in memory and written as a Perfetto trace. Imports nothing of the
// project, so every other room can use it. Recording a span costs one object; totals per category are always kept, spans
// only while capturing.

import process from "node:process";

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

/** A finished span on one track of this rank. Times are µs on the rank's own monotonic clock. */
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

/**
 * The present time on the clock that spans use: the system's monotonic clock, which all processes of one host share.
 *
 * @returns Time in µs.
 */
export function now(): number {
  return monotonicBase + performance.now() * 1000;
}

// performance.now() starts at 0 in every process; the system's monotonic clock does not.
const monotonicBase = Number(process.hrtime.bigint()) / 1000 - performance.now() * 1000;

/** Collects the spans and totals of this process. */
export class Recorder {
  /** Whether spans are kept; totals always are. */
  capturing = false;
  /** Spans kept so far. */
  readonly spans: Span[] = [];
  #totals = new Map<Category, number>();

  /**
   * Adds a finished span.
   *
   * @param span The span.
   */
  record(span: Span): void {
    this.#totals.set(span.category, (this.#totals.get(span.category) ?? 0) + span.end - span.start);
    if (this.capturing) this.spans.push(span);
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
