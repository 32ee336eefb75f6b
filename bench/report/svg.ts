// Small parts that the charts of the report are made of: text, lines, boxes and axes as strings of SVG. Colours are classes, so that one style
// sheet (style.ts) gives them for light, dark and printed pages. Not a plotting library.

/** A string of SVG or HTML that needs no more escaping. */
export type Markup = string;

/**
 * Escapes text for element content and attribute values of HTML and SVG.
 *
 * @param text Any text.
 * @returns It, without characters that mean something, or that XML forbids.
 */
export function escape(text: string): Markup {
  return text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`)
    // deno-lint-ignore no-control-regex -- characters that XML forbids
    .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "").toWellFormed();
}

/** Widths of characters at 1 px of font size; rather too large, so that nothing overlaps. */
const CHARACTER = 0.6, NARROW_CHARACTER = 0.34;

/**
 * About how wide a text is.
 *
 * @param content The text.
 * @param size Size of the font in px. @default {12}
 * @returns Width in px.
 */
export function textWidth(content: string, size: number = 12): number {
  const narrow = content.match(/[iljtfrI.,:;'|()\[\]/! ]/g)?.length ?? 0;
  return (narrow * NARROW_CHARACTER + (content.length - narrow) * CHARACTER) * size;
}

/** How a text is set. */
export interface TextStyle {
  /** Which end is at x. @default {"start"} */
  readonly anchor?: "start" | "middle" | "end";
  /** Classes of style.ts. */
  readonly class?: string;
  /** Size of the font in px. @default {12} */
  readonly size?: number;
}

/** A number as coordinates have it. */
export function f(value: number): string {
  return String(Math.round(value * 100) / 100);
}

/**
 * A text.
 *
 * @param x Where it begins, ends or has its middle.
 * @param y Its base line.
 * @param content The text, not escaped.
 * @param style Its looks.
 * @returns The element.
 */
export function text(x: number, y: number, content: string, style: TextStyle = {}): Markup {
  const anchor = style.anchor && style.anchor !== "start" ? ` text-anchor="${style.anchor}"` : "";
  const name = style.class ? ` class="${style.class}"` : "";
  const size = style.size && style.size !== 12 ? ` font-size="${style.size}"` : "";
  return `<text x="${f(x)}" y="${f(y)}"${anchor}${name}${size}>${escape(content)}</text>`;
}

/**
 * A straight line.
 *
 * @param from Where it begins.
 * @param to Where it ends.
 * @param name Classes of style.ts.
 * @returns The element.
 */
export function line(
  from: readonly [number, number],
  to: readonly [number, number],
  name: string,
): Markup {
  return `<line x1="${f(from[0])}" y1="${f(from[1])}" x2="${f(to[0])}" y2="${
    f(to[1])
  }" class="${name}"/>`;
}

/** A box. Sizes below 0 are drawn as 0. */
export interface Box {
  /** Left edge. */
  readonly x: number;
  /** Upper edge. */
  readonly y: number;
  /** Width. */
  readonly width: number;
  /** Height. */
  readonly height: number;
}

/**
 * A box.
 *
 * @param box Where.
 * @param name Classes of style.ts.
 * @param title Shown while a pointer rests on it; not escaped.
 * @returns The element.
 */
export function rect({ x, y, width, height }: Box, name: string, title?: string): Markup {
  const at = `x="${f(x)}" y="${f(y)}" width="${f(Math.max(0, width))}" height="${
    f(Math.max(0, height))
  }"`;
  return title === undefined
    ? `<rect ${at} class="${name}"/>`
    : `<rect ${at} class="${name}"><title>${escape(title)}</title></rect>`;
}

/** A scale from values to px. */
export interface Scale {
  /** Place of a value in px. */
  (value: number): number;
  /** Round values for marks, within the scale. */
  readonly ticks: readonly number[];
}

/**
 * A linear scale.
 *
 * @param domain Least and greatest value.
 * @param range Where they are, in px.
 * @param count About how many marks. @default {6}
 * @returns The scale.
 */
export function linear(
  domain: readonly [number, number],
  range: readonly [number, number],
  count: number = 6,
): Scale {
  const length = domain[1] - domain[0];
  const [low, high] = length > 0 && length < Infinity ? domain : [0, 1];
  const factor = (range[1] - range[0]) / (high - low);
  const place = (value: number) => range[0] + (value - low) * factor;
  return Object.assign(place, { ticks: roundTicks(low, high, count) });
}

/**
 * A logarithmic scale.
 *
 * @param domain Least and greatest value, above 0.
 * @param range Where they are, in px.
 * @returns The scale; marks at 1, 2 and 5 times powers of ten.
 */
export function logarithmic(
  domain: readonly [number, number],
  range: readonly [number, number],
): Scale {
  const low = Math.log(domain[0]);
  const high = domain[1] > domain[0] ? Math.log(domain[1]) : low + 1;
  const place = (value: number) =>
    range[0] + (Math.log(value) - low) / (high - low) * (range[1] - range[0]);
  const ticks: number[] = [];
  for (let power = Math.floor(low / Math.LN10); power <= Math.ceil(high / Math.LN10); power++) {
    for (const digit of [1, 2, 5]) {
      const value = digit * 10 ** power;
      if (value >= domain[0] * 0.999 && value <= domain[1] * 1.001) ticks.push(value);
    }
  }
  return Object.assign(place, { ticks });
}

/** Multiples of 1, 2 or 5 times a power of ten within a range. */
function roundTicks(low: number, high: number, count: number): number[] {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5].map((m) => m * power).find((s) => s >= rough * 0.999) ?? 10 * power;
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  const places = Array.from({ length: Math.min(last - first + 1, 4 * count) }, (_, i) => first + i);
  return places.map((place) => Number((place * step).toPrecision(12)));
}

/**
 * A whole drawing that grows with the page.
 *
 * @param size Width and height in its own px.
 * @param label What it shows, for readers that see no pictures; not escaped.
 * @param content Its elements.
 * @returns The element.
 */
export function svg(
  size: { readonly width: number; readonly height: number },
  label: string,
  content: readonly Markup[],
): Markup {
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${f(size.width)} ${
    f(size.height)
  }" role="img" aria-label="${escape(label)}" font-size="12">\n${content.join("\n")}\n</svg>`;
}

/** An entry of a legend. */
export interface LegendEntry {
  /** What it means; not escaped. */
  readonly label: string;
  /** Classes of its mark. */
  readonly class: string;
  /** Form of the mark. @default {"box"} */
  readonly kind?: "box" | "line" | "tick" | "bar";
}

/**
 * A legend in lines.
 *
 * @param entries What is explained.
 * @param box Where it begins, and how wide it may be.
 * @returns The elements, and the height that they take.
 */
export function legend(
  entries: readonly LegendEntry[],
  box: { readonly x: number; readonly y: number; readonly width: number },
): { readonly content: Markup[]; readonly height: number } {
  const content: Markup[] = [];
  let x = box.x, y = box.y;
  for (const entry of entries) {
    const width = 24 + textWidth(entry.label) + 16;
    if (x > box.x && x + width > box.x + box.width) {
      x = box.x;
      y += 18;
    }
    const kind = entry.kind ?? "box";
    if (kind === "box") content.push(rect({ x, y: y + 2, width: 16, height: 10 }, entry.class));
    else if (kind === "bar") content.push(rect({ x, y: y + 6, width: 16, height: 3 }, entry.class));
    else if (kind === "line") content.push(line([x, y + 7], [x + 18, y + 7], entry.class));
    else content.push(line([x + 8, y], [x + 8, y + 14], entry.class));
    content.push(text(x + 23, y + 11, entry.label, { class: "dim" }));
    x += width;
  }
  return { content, height: y - box.y + 18 };
}
