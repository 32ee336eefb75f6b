// The counterpart of the paper's Figure 7: one layer's backward pass under every policy, one under another on one time scale. Lanes are
// computation, all-to-alls and gradients; spans of other layers that run meanwhile are pale.

import { type Interval, union } from "./intervals.ts";
import type { Lane, LaneSpan, PolicyTimeline } from "./results.ts";
import { escape, f, legend, line, linear, type Markup, rect, svg, text, textWidth } from "./svg.ts";

/** Rows of a panel. */
export const LANES: readonly (readonly [lane: Lane, label: string])[] = [
  ["compute", "compute"],
  ["allToAll", "all-to-all"],
  ["gradients", "gradients"],
];

/** The drawing in px. */
const WIDTH = 1040, LEFT = 96, RIGHT = 24, TOP = 64;
const LANE_HEIGHT = 24, LANE_GAP = 5, TITLE = 26, PANEL_GAP = 20;
/** Spans narrower than this that nearly touch are drawn as one. */
const NARROW = 1.2;

/** Where a span is drawn. */
export interface Drawn {
  /** The spans: several that are too narrow for one each. */
  readonly spans: readonly LaneSpan[];
  /** Left edge in px. */
  readonly x: number;
  /** Width in px. */
  readonly width: number;
}

/**
 * Brings spans to px, narrow neighbours and pieces of one computation together, so that a drawing has no more boxes than pixels.
 *
 * @param spans Spans of one lane.
 * @param x Scale from µs to px.
 * @returns Boxes from the left, which overlap only where spans do.
 */
export function boxes(spans: readonly LaneSpan[], x: (time_us: number) => number): Drawn[] {
  const out: { spans: LaneSpan[]; x: number; width: number }[] = [];
  for (const span of spans.toSorted((a, b) => a.start_us - b.start_us)) {
    const left = x(span.start_us), width = x(span.end_us) - left;
    const last = out.at(-1);
    const near = last && left - last.x - last.width < 0.5 &&
      (span.own ?? true) === (last.spans[0].own ?? true);
    // One piece of computation is many kernels.
    const same = near && span.lane === "compute" && span.name === last.spans[0].name;
    const joins = near && (same || (width < NARROW && last.width < 3 * NARROW));
    if (joins) {
      last.spans.push(span);
      last.width = Math.max(last.width, left + width - last.x);
    } else out.push({ spans: [span], x: left, width });
  }
  return out;
}

/** When a timeline's layer is done. */
export function doneOf({ done_us, spans }: PolicyTimeline): number {
  return done_us ?? spans.reduce((last, { end_us }) => Math.max(last, end_us), 0);
}

/**
 * Draws timelines.
 *
 * @param timelines One per policy, of one shape, in the order in which they are drawn.
 * @param title What it is of; not escaped.
 * @returns An SVG element.
 */
export function timelinesSvg(timelines: readonly PolicyTimeline[], title: string): Markup {
  const last = timelines.reduce((most, own) => Math.max(most, doneOf(own)), 1);
  const x = linear([0, last / 1000], [LEFT, WIDTH - RIGHT - 40], 10);
  const panel = TITLE + LANES.length * (LANE_HEIGHT + LANE_GAP);
  const bottom = TOP + timelines.length * (panel + PANEL_GAP);
  const height = bottom + 40;
  const out: Markup[] = [];
  out.push(
    ...legend([
      { label: "compute", class: "compute" },
      { label: "all-to-all", class: "allToAll" },
      { label: "reduction of this layer's gradients", class: "gradients" },
      { label: "other layers", class: "gradients beside" },
      { label: "a gradient of this layer is ready and waits", class: "waits", kind: "bar" },
      { label: "this layer is done", class: "done", kind: "tick" },
    ], { x: LEFT, y: 8, width: WIDTH - LEFT - RIGHT }).content,
  );
  for (const tick of x.ticks) {
    out.push(line([x(tick), TOP], [x(tick), bottom - PANEL_GAP + 6], "grid"));
    out.push(text(x(tick), bottom + 4, String(tick), { anchor: "middle", class: "dim" }));
  }
  out.push(
    text(
      (LEFT + WIDTH - RIGHT) / 2,
      bottom + 24,
      "ms since the layer's first all-to-all could start",
      {
        anchor: "middle",
        class: "dim",
      },
    ),
  );
  timelines.forEach((own, i) => {
    const top = TOP + i * (panel + PANEL_GAP);
    out.push(...drawPanel(own, { top, x: (time_us) => x(time_us / 1000), letter: i }));
  });
  return svg({ width: WIDTH, height }, title, out);
}

function drawPanel(
  timeline: PolicyTimeline,
  { top, x, letter }: { top: number; x: (time_us: number) => number; letter: number },
): Markup[] {
  const done_us = doneOf(timeline);
  const end = x(done_us);
  const name = `(${String.fromCharCode(97 + letter % 26)}) ${timeline.policy}${
    (timeline.experts_per_device ?? 1) > 1
      ? `, ${timeline.experts_per_device} experts a device`
      : ""
  }${timeline.simulated ? ", simulated" : ""}`;
  const out: Markup[] = [text(LEFT, top + 17, name, { class: "strong", size: 13 })];
  const lanesTop = top + TITLE;
  LANES.forEach(([lane, label], row) => {
    const y = lanesTop + row * (LANE_HEIGHT + LANE_GAP);
    const width = WIDTH - RIGHT - LEFT;
    out.push(text(LEFT - 10, y + 16, label, { anchor: "end", class: "dim" }));
    out.push(rect({ x: LEFT, y, width, height: LANE_HEIGHT }, "lane"));
    const spans = timeline.spans.filter((span) => span.lane === lane);
    for (const together of clustersOf(boxes(spans, x))) {
      const levels = levelsOf(together);
      levels.forEach((drawn, level) => {
        const height = LANE_HEIGHT / levels.length;
        const place = { lane, y: y + level * height, height };
        for (const box of drawn) out.push(...drawBox(box, place));
      });
    }
    if (lane === "gradients") {
      for (const [from, to] of waits(spans)) {
        const height = 3.5;
        out.push(
          rect({ x: x(from), y: y + LANE_HEIGHT + 1, width: x(to) - x(from), height }, "waits"),
        );
      }
    }
  });
  const bottom = lanesTop + LANES.length * (LANE_HEIGHT + LANE_GAP);
  out.push(line([end, top + 8], [end, bottom], "done"));
  const label = `${(done_us / 1000).toFixed(1)} ms`;
  // To the left of the line, clear of the panel's name where the layer is done early.
  const fits = end - textWidth(label, 13) - 6 > LEFT + textWidth(name, 13) + 8;
  out.push(
    text(fits ? end - 6 : end + 6, top + 17, label, {
      anchor: fits ? "end" : "start",
      class: "strong",
      size: 13,
    }),
  );
  return out;
}

/** How far boxes may reach into one another and still be apart, in px. */
const TOUCH = 0.5;

/** Boxes from the left, parted where none goes on. */
function clustersOf(drawn: readonly Drawn[]): Drawn[][] {
  const clusters: Drawn[][] = [];
  let end = -Infinity;
  for (const box of drawn) {
    if (box.x >= end - TOUCH) clusters.push([]);
    clusters.at(-1)!.push(box);
    end = Math.max(end, box.x + box.width);
  }
  return clusters;
}

/** Most levels of a lane. */
const LEVELS = 6;

/**
 * Boxes that would overlap, on levels of their own: operations that run at once, or whose times are the host's.
 *
 * @param drawn Boxes from the left.
 * @returns Those of each level; one level at least.
 */
export function levelsOf(drawn: readonly Drawn[]): Drawn[][] {
  const levels: Drawn[][] = [[]];
  for (const box of drawn) {
    const fits = (level: Drawn[]) => {
      const last = level.at(-1);
      return !last || last.x + last.width <= box.x + TOUCH;
    };
    const level = levels.find(fits);
    if (level) level.push(box);
    else if (levels.length < LEVELS) levels.push([box]);
    else levels[LEVELS - 1].push(box);
  }
  return levels;
}

function drawBox(
  { spans, x, width }: Drawn,
  { lane, y, height }: { lane: Lane; y: number; height: number },
): Markup[] {
  const [first] = spans;
  const beside = first.own === false;
  const name = `${lane} ${width > 4 ? "span" : "narrow"}${beside ? " beside" : ""}`;
  const box = { x, y, width: Math.max(width, 1.4), height };
  const out = [rect(box, name, titleOf(spans))];
  const label = shortName(first, lane);
  const one = spans.every(({ name }) => name === first.name);
  if (one && !beside && height > 14 && width > textWidth(label, 11) + 6) {
    out.push(text(x + width / 2, y + 16, label, { anchor: "middle", class: "in", size: 11 }));
  }
  return out;
}

/** What fits into a box: of a gradient's name the part that tells it from others. */
function shortName({ name }: LaneSpan, lane: Lane): string {
  if (lane !== "gradients") return name;
  const [parameter, ...rest] = name.split(" ");
  const parts = parameter.split(".").filter((part) => part !== "weight");
  const last = parts.at(-1) ?? parameter;
  const shown = /^\d+$/.test(last) ? parts.slice(-2).join(" ") : last;
  return [shown, ...rest.filter(() => rest[0] === "and")].join(" ");
}

function titleOf(spans: readonly LaneSpan[]): string {
  const shown = spans.slice(0, 4).map((span) => {
    const ms = (time_us: number) => (time_us / 1000).toFixed(3);
    const bytes = span.bytes === undefined ? "" : `, ${(span.bytes / 1e6).toFixed(2)} MB`;
    const queued = span.queued_us === undefined ? "" : `, waited ${ms(span.queued_us)} ms`;
    return `${span.name}: ${ms(span.start_us)} to ${ms(span.end_us)} ms${bytes}${queued}`;
  });
  if (spans.length > 4) shown.push(`and ${spans.length - 4} more`);
  return shown.join("\n");
}

/** When a gradient of the layer was ready and not reduced yet. */
function waits(spans: readonly LaneSpan[]): Interval[] {
  return union(
    spans.filter(({ own, queued_us }) => own !== false && queued_us !== undefined)
      .map(({ start_us, queued_us }): Interval => [Math.max(0, start_us - queued_us!), start_us]),
  );
}

/**
 * A table of when the layer is done, for those who see no picture.
 *
 * @param timelines As they are drawn.
 * @returns A sentence, escaped.
 */
export function timelinesText(timelines: readonly PolicyTimeline[]): Markup {
  return escape(
    timelines.map((own) => {
      const experts = own.experts_per_device ?? 1;
      const name = experts > 1 ? `${own.policy} with ${experts} experts` : own.policy;
      return `${name} ${f(doneOf(own) / 1000)} ms`;
    }).join(", "),
  );
}
