// The loss curve of a run as one SVG file: raw and smoothed training loss, validation points, and a dashed line for a baseline.
// Written by hand, with no font, script or style outside the file; not a general plotting library.

/** One step of a run, as `metrics.jsonl` has it; other properties are ignored. */
export interface LossRow {
  /** Number of the step. */
  readonly step: number;
  /** Training loss. */
  readonly loss?: number;
  /** Validation loss, at the steps that have one. */
  readonly val_loss?: number | null;
}

/** Options of {@linkcode lossSvg}. */
export interface LossSvgOptions {
  /** Heading. @default {"Loss"} */
  readonly title?: string;
  /** Small line under the heading. */
  readonly subtitle?: string;
  /** Unit of the loss, for the axis. @default {"nats per byte"} */
  readonly unit?: string;
  /** A loss to compare with, drawn as a dashed line. */
  readonly baseline?: { readonly label: string; readonly loss: number };
  /** Width in pixels. @default {960} */
  readonly width?: number;
  /** Height in pixels. @default {540} */
  readonly height?: number;
}

const TRAIN = "#2563eb", VALIDATION = "#db2777", BASELINE = "#64748b";
const INK = "#0f172a", FAINT_INK = "#64748b", GRID = "#e2e8f0";
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";

/**
 * Draws the loss of a run.
 *
 * @param rows Steps in ascending order; losses that are not finite are left out.
 * @param options Texts, baseline and size.
 * @returns The text of an SVG file.
 *
 * @example
 * ```ts
 * import { lossSvg } from "./loss_svg.ts";
 * import assert from "node:assert/strict";
 *
 * const svg = lossSvg([{ step: 1, loss: 5.5 }, { step: 2, loss: 4.9, val_loss: 5 }]);
 * assert.ok(svg.startsWith("<svg "));
 * ```
 */
export function lossSvg(rows: readonly LossRow[], options: LossSvgOptions = {}): string {
  const width = options.width ?? 960, height = options.height ?? 540;
  const title = options.title ?? "Loss";
  const box = {
    left: 64,
    right: width - 132,
    top: options.subtitle ? 104 : 88,
    bottom: height - 56,
  };
  const train = points(rows, (row) => row.loss);
  const validation = points(rows, (row) => row.val_loss);
  const smooth = smoothed(train);
  const baseline = options.baseline && Number.isFinite(options.baseline.loss)
    ? options.baseline
    : undefined;

  const steps = [...train, ...validation].map((p) => p.x);
  const xTicks = ticks(low(steps, 0), high(steps, 1), Math.max(3, Math.floor(width / 130)), true);
  const xRange = { from: low(steps, 0), to: Math.max(high(steps, 1), low(steps, 0) + 1) };
  const losses = [...train, ...validation].map((p) => p.y);
  if (baseline) losses.push(baseline.loss);
  const bottom = low(losses, 0);
  // A flat curve gets a range too: a thousandth of its value, so that ticks are numbers that differ.
  const top = Math.max(high(losses, 1), bottom + Math.max(1e-6, Math.abs(bottom) * 1e-3));
  const yTicks = ticks(bottom, top, Math.max(3, Math.floor(height / 75)), false);
  const yGap = yTicks[1] - yTicks[0];
  // The range reaches to whole ticks, so that the curve never touches the frame.
  const yRange = {
    from: Math.floor(bottom / yGap + 1e-9) * yGap,
    to: Math.ceil(top / yGap - 1e-9) * yGap,
  };
  const x = (step: number) =>
    box.left + (step - xRange.from) / (xRange.to - xRange.from) * (box.right - box.left);
  const y = (loss: number) =>
    box.bottom - (loss - yRange.from) / (yRange.to - yRange.from) * (box.bottom - box.top);

  const out: string[] = [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" ` +
    `role="img" aria-label="${escapeXml(title)}" font-family="${FONT}" font-size="13">`,
    `<rect width="${width}" height="${height}" rx="10" fill="#ffffff"/>`,
    text(box.left - 36, 38, title, { size: 20, weight: 600 }),
  ];
  if (options.subtitle) out.push(text(box.left - 36, 60, options.subtitle, { fill: FAINT_INK }));

  const digits = Math.max(0, Math.min(6, Math.ceil(-Math.log10(yGap) - 1e-9)));
  const tickCount = Math.round((yRange.to - yRange.from) / yGap);
  for (let i = 0; i <= tickCount; i++) {
    const t = yRange.from + i * yGap;
    const edge = i === 0;
    out.push(line(box.left, y(t), box.right, y(t), edge ? "#94a3b8" : GRID));
    out.push(
      text(box.left - 10, y(t) + 4.5, t.toFixed(digits), { anchor: "end", fill: FAINT_INK }),
    );
  }
  for (const t of xTicks) {
    out.push(line(x(t), box.bottom, x(t), box.bottom + 5, "#94a3b8"));
    out.push(
      text(x(t), box.bottom + 21, t.toLocaleString("en-US"), { anchor: "middle", fill: FAINT_INK }),
    );
  }
  out.push(
    text((box.left + box.right) / 2, height - 12, "step", { anchor: "middle", fill: FAINT_INK }),
    text(box.left - 36, box.top - 14, options.unit ?? "nats per byte", { fill: FAINT_INK }),
  );

  if (baseline) {
    const at = y(baseline.loss);
    out.push(
      `<line x1="${box.left}" y1="${f(at)}" x2="${box.right}" y2="${f(at)}" stroke="${BASELINE}" ` +
        `stroke-width="1.5" stroke-dasharray="7 5"/>`,
    );
  }
  const thinned = thin(train, Math.ceil(box.right - box.left));
  if (train.length > 1) {
    out.push(
      path(thinned, x, y, TRAIN, 1, 0.38),
      path(thin(smooth, 600), x, y, TRAIN, 2.5, 1),
    );
  } else if (train.length === 1) out.push(dot(x(train[0].x), y(train[0].y), TRAIN));
  if (validation.length > 1) out.push(path(thin(validation, 600), x, y, VALIDATION, 1.5, 0.6));
  for (const p of thin(validation, 80)) out.push(dot(x(p.x), y(p.y), VALIDATION));
  if (train.length + validation.length === 0) {
    out.push(text((box.left + box.right) / 2, (box.top + box.bottom) / 2, "no finite loss yet", {
      anchor: "middle",
      fill: FAINT_INK,
    }));
  }

  out.push(...endLabels(box, smooth, validation, baseline, y));
  out.push(...legend(box, [
    ...(train.length > 0
      ? [{ label: "training (smoothed)", color: TRAIN, kind: "line" as const }]
      : []),
    ...(validation.length > 0
      ? [{ label: "validation", color: VALIDATION, kind: "dot" as const }]
      : []),
    ...(baseline ? [{ label: baseline.label, color: BASELINE, kind: "dash" as const }] : []),
  ]));
  out.push("</svg>");
  return out.join("\n") + "\n";
}

interface Point {
  readonly x: number;
  readonly y: number;
}

interface Box {
  readonly left: number;
  readonly right: number;
  readonly top: number;
  readonly bottom: number;
}

function points(
  rows: readonly LossRow[],
  value: (row: LossRow) => number | null | undefined,
): Point[] {
  return rows.flatMap((row) => {
    const y = value(row);
    return typeof y === "number" && Number.isFinite(y) && Number.isFinite(row.step)
      ? [{ x: row.step, y }]
      : [];
  });
}

/**
 * The mean over a window of about a fortieth of the curve on either side, which narrows towards the ends: unlike a running
 * average it does not lag behind a loss that falls.
 */
function smoothed(curve: readonly Point[]): Point[] {
  const half = Math.max(1, Math.round(curve.length / 40));
  const sums = new Float64Array(curve.length + 1);
  for (let i = 0; i < curve.length; i++) sums[i + 1] = sums[i] + curve[i].y;
  return curve.map((p, i) => {
    // The last point takes what lies before it, so that the label beside it is no single noisy step.
    const back = Math.min(half, i), ahead = Math.min(half, curve.length - 1 - i);
    const reach = i >= curve.length - half
      ? { back, ahead }
      : { back: Math.min(back, ahead), ahead: Math.min(back, ahead) };
    const from = i - reach.back, to = i + reach.ahead + 1;
    return { x: p.x, y: (sums[to] - sums[from]) / (to - from) };
  });
}

/** Of each run of points that falls on one pixel only the first, lowest, highest and last. */
function thin(curve: readonly Point[], pixels: number): readonly Point[] {
  if (curve.length <= pixels * 4) return curve;
  const out: Point[] = [];
  const run = Math.ceil(curve.length / pixels);
  for (let i = 0; i < curve.length; i += run) {
    const part = curve.slice(i, i + run);
    const lowest = part.reduce((a, b) => b.y < a.y ? b : a);
    const highest = part.reduce((a, b) => b.y > a.y ? b : a);
    const keep = new Set([part[0], lowest, highest, part[part.length - 1]]);
    out.push(...part.filter((p) => keep.has(p)));
  }
  return out;
}

/** Round values inside a range, at most about `count`: steps of 1, 2 or 5 times a power of ten. */
function ticks(from: number, to: number, count: number, whole: boolean): number[] {
  const rough = Math.max((to - from) / count, whole ? 1 : 1e-9);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough - 1e-12)!;
  const out: number[] = [];
  for (let i = Math.ceil(from / step - 1e-9); i * step <= to + step * 1e-9; i++) {
    out.push(i * step + 0);
  }
  while (out.length < 2) out.push((out.at(-1) ?? Math.floor(from / step) * step) + step);
  return out;
}

/** The last value of each curve beside its end; labels that would overlap are pushed apart. */
function endLabels(
  box: Box,
  train: readonly Point[],
  validation: readonly Point[],
  baseline: { readonly loss: number } | undefined,
  y: (loss: number) => number,
): string[] {
  const labels: { at: number; label: string; fill: string }[] = [];
  const add = (loss: number, word: string, fill: string) =>
    labels.push({ at: y(loss), label: `${loss.toFixed(3)} ${word}`, fill });
  if (train.length > 0) add(train.at(-1)!.y, "train", TRAIN);
  if (validation.length > 0) add(validation.at(-1)!.y, "val", VALIDATION);
  if (baseline) add(baseline.loss, "baseline", BASELINE);
  labels.sort((a, b) => a.at - b.at);
  for (let i = 1; i < labels.length; i++) {
    labels[i].at = Math.max(labels[i].at, labels[i - 1].at + 16);
  }
  let floor = box.bottom + 4;
  for (let i = labels.length - 1; i >= 0; i--) {
    labels[i].at = Math.min(labels[i].at, floor);
    floor = labels[i].at - 16;
  }
  return labels.map((l) =>
    text(box.right + 10, l.at + 4.5, l.label, { fill: l.fill, weight: 600 })
  );
}

function legend(
  box: Box,
  entries: readonly { label: string; color: string; kind: "line" | "dot" | "dash" }[],
): string[] {
  const out: string[] = [];
  // Laid out from the right edge; 6.9 px is the mean width of a character at 13 px.
  let right = box.right + 112;
  for (const entry of entries.toReversed()) {
    const left = right - entry.label.length * 6.9 - 30;
    const dash = entry.kind === "dash" ? ` stroke-dasharray="6 4"` : "";
    out.push(
      `<line x1="${f(left)}" y1="33" x2="${
        f(left + 22)
      }" y2="33" stroke="${entry.color}" stroke-width="2.5"${dash}/>`,
      text(left + 29, 37.5, entry.label, { fill: INK }),
    );
    if (entry.kind === "dot") out.push(dot(left + 11, 33, entry.color));
    right = left - 18;
  }
  return out;
}

function path(
  curve: readonly Point[],
  x: (step: number) => number,
  y: (loss: number) => number,
  color: string,
  width: number,
  opacity: number,
): string {
  const d = curve.map((p, i) => `${i === 0 ? "M" : "L"}${f(x(p.x))} ${f(y(p.y))}`).join("");
  return `<path d="${d}" fill="none" stroke="${color}" stroke-width="${width}" stroke-opacity="${opacity}" ` +
    `stroke-linejoin="round" stroke-linecap="round"/>`;
}

function dot(x: number, y: number, color: string): string {
  return `<circle cx="${f(x)}" cy="${
    f(y)
  }" r="4" fill="${color}" stroke="#ffffff" stroke-width="1.5"/>`;
}

function line(x1: number, y1: number, x2: number, y2: number, color: string): string {
  return `<line x1="${f(x1)}" y1="${f(y1)}" x2="${f(x2)}" y2="${f(y2)}" stroke="${color}"/>`;
}

function text(
  x: number,
  y: number,
  content: string,
  style: { anchor?: "end" | "middle"; fill?: string; size?: number; weight?: number } = {},
): string {
  const anchor = style.anchor ? ` text-anchor="${style.anchor}"` : "";
  const size = style.size ? ` font-size="${style.size}"` : "";
  const weight = style.weight ? ` font-weight="${style.weight}"` : "";
  return `<text x="${f(x)}" y="${f(y)}" fill="${style.fill ?? INK}"${anchor}${size}${weight}>${
    escapeXml(content)
  }</text>`;
}

function low(values: readonly number[], otherwise: number): number {
  return values.length > 0 ? values.reduce((a, b) => Math.min(a, b)) : otherwise;
}

function high(values: readonly number[], otherwise: number): number {
  return values.length > 0 ? values.reduce((a, b) => Math.max(a, b)) : otherwise;
}

function f(value: number): string {
  return String(Math.round(value * 100) / 100);
}

function escapeXml(text: string): string {
  return text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`)
    // deno-lint-ignore no-control-regex -- characters that XML forbids
    .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "");
}
