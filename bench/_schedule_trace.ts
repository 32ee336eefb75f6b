// The steps that bench/schedule.ts has seen, as one Perfetto trace: policies one after another, a process per rank, on one clock.

import { traceEvents } from "../trace/events.ts";
import { flowsOf } from "../trace/perfetto.ts";
import type { Span } from "../trace/mod.ts";

/** A policy's step, by rank. */
export interface TracedStep {
  /** For readers. */
  readonly policy: string;
  /** Spans of each rank. */
  readonly spans: readonly (readonly Span[])[];
}

/** Time between two policies' steps, in µs. */
const PAUSE_US = 5000;

/**
 * Writes the steps.
 *
 * @param path The file; replaced if it exists.
 * @param steps One per policy.
 */
export async function writeTrace(path: string, steps: readonly TracedStep[]): Promise<void> {
  const byRank: Span[][] = [];
  let at_us = 0;
  for (const { policy, spans } of steps) {
    const all = spans.flat();
    if (all.length === 0) continue;
    const first = Math.min(...all.map(({ start }) => start));
    const last = Math.max(...all.map(({ end }) => end));
    const shift = at_us - first;
    spans.forEach((list, rank) => {
      (byRank[rank] ??= []).push(
        { track: "policy", name: policy, category: "wait", start: at_us, end: last + shift },
        ...list.map((span) => ({ ...span, start: span.start + shift, end: span.end + shift })),
      );
    });
    at_us = last + shift + PAUSE_US;
  }
  const events = byRank.flatMap((
    spans,
    rank,
  ) => [...traceEvents(spans, { rank, flows: flowsOf(byRank, rank) })]);
  await Deno.writeTextFile(path, JSON.stringify({ traceEvents: events, displayTimeUnit: "ms" }));
}
