// The report of bench:schedule as one HTML file: timelines, tables and charts as inline SVG, with the paper's numbers beside ours and the
// conditions under which was measured. No script, no font, nothing outside the file. It draws what the results have and says what they lack.

import { byRate, gainsSvg, slowdownSvg, splitSvg, sweepsOf, sweepSvg } from "./charts.ts";
import { lossSpread, verdicts } from "./marks.ts";
import { DIFFERENCES, FIGURE_3, FIGURE_7, PRIORITY_GAIN } from "./paper.ts";
import {
  type Conditions,
  parseResults,
  type PolicyTimeline,
  type ScheduleResults,
  type ScheduleRow,
} from "./results.ts";
import {
  bestOf,
  type Group,
  groupsOf,
  isValid,
  median,
  placeOf,
  quickest,
  rateText,
  speedupOf,
} from "./rows.ts";
import { STYLE } from "./style.ts";
import { escape, type Markup } from "./svg.ts";
import { percent, policyTable, table, table1, table3, table4, times } from "./tables.ts";
import { doneOf, timelinesSvg, timelinesText } from "./timelines.ts";

/** A part of the report that may be asked for alone. */
export type Part =
  | "policies"
  | "marks"
  | "split"
  | "figure 3"
  | "figure 7"
  | "figure 14"
  | "figure 15"
  | "table 1"
  | "table 3"
  | "table 4"
  | "conditions";

/** All parts in their order. */
export const PARTS: readonly Part[] = [
  "figure 7",
  "policies",
  "split",
  "marks",
  "figure 3",
  "figure 14",
  "figure 15",
  "table 1",
  "table 3",
  "table 4",
  "conditions",
];

/** Options of {@linkcode scheduleHtml}. */
export interface ReportOptions {
  /** What is shown. @default {everything} */
  readonly parts?: readonly Part[];
  /** Heading. @default {"Training schedules compared"} */
  readonly title?: string;
}

/**
 * The report.
 *
 * @param measured What was measured.
 * @param options What is shown of it.
 * @returns The text of an HTML file.
 *
 * @example
 * ```ts
 * import { scheduleHtml } from "./schedule_html.ts";
 * import assert from "node:assert/strict";
 *
 * const row = { policy: "fifo", shape: "txl", ranks: 4, per_host: 1, mbit: 10_000, device: "cuda" };
 * const rows = [{ ...row, experts_per_device: 1, step_ms: 29 }];
 * assert.ok(scheduleHtml({ conditions: {}, rows }).startsWith("<!doctype html>"));
 * ```
 */
export function scheduleHtml(measured: ScheduleResults, options: ReportOptions = {}): string {
  const results = parseResults(JSON.stringify(measured), "the results"); // numbers that are none are absent now
  const title = options.title ?? "Training schedules compared";
  const groups = groupsOf(results.rows);
  const shown = options.parts ?? PARTS;
  const whole = options.parts === undefined;
  const body = shown.map((part) => SECTIONS[part](results, groups)).filter((section) => section);
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escape(title)}</title>
<style>
${STYLE}
</style>
</head>
<body>
<main>
<h1>${escape(title)}</h1>
${whole ? introduction(results.conditions) + tiles(groups) : ""}
${body.join("\n")}
</main>
</body>
</html>
`;
}

/**
 * The drawings of a part, each as a file of its own: they show light or dark as the page has it that they are on.
 *
 * @param measured What was measured.
 * @param part The part.
 * @returns Texts of SVG files; none if the part has no drawing.
 */
export function scheduleSvgs(measured: ScheduleResults, part: Part): string[] {
  const page = scheduleHtml(measured, { parts: [part] });
  const font =
    `svg{font-family:system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;background:var(--ground)}`;
  return [...page.matchAll(/(<svg [^>]*)>(.*?)<\/svg>/gs)].map(([, head, content]) => {
    const [, width, height] = /viewBox="0 0 ([\d.]+) ([\d.]+)"/.exec(head)!;
    const style = escape(`${STYLE}\n${font}`).replaceAll("&#34;", '"');
    return `${head} width="${width}" height="${height}">\n<style>${style}</style>${content}</svg>\n`;
  });
}

function introduction({ machine, date }: Conditions): Markup {
  const where = [machine, date].filter((text) => text !== undefined).map((text) => escape(text!));
  return `<p>How long a step of Mixture-of-Experts training takes when its all-to-alls (tokens to experts and back) and its
allreduces (gradients) share a link, by the policy that decides which goes when. Everything is measured on ranks that share real, rate-limited
links${
    where.length > 0 ? ` (${where.join(", ")})` : ""
  }; what the paper reports stands beside it.</p>
`;
}

/** The few numbers that say most. */
function tiles(groups: readonly Group[]): Markup {
  const gains = (policy: string) =>
    groups.flatMap(({ rows }) => {
      const best = bestOf(rows, policy);
      const gain = best && speedupOf(best, rows);
      return gain === undefined ? [] : [gain];
    });
  const range = (values: readonly number[], digits: number, unit: string) => {
    const [low, high] = [Math.min(...values), Math.max(...values)].map((v) => v.toFixed(digits));
    return low === high ? `${low}${unit}` : `${low} to ${high}${unit}`;
  };
  const of = (policy: string, key: "a2a_slowdown" | "a2a_share") =>
    groups.flatMap(({ rows }) => bestOf(rows, policy)?.[key] ?? []);
  const entries: [string, string][] = [];
  const lina = gains("lina"), planned = gains("planned");
  if (lina.length > 0) {
    entries.push([range(lina, 2, "x"), "lina over fifo; the paper: 1.36 to 1.42x"]);
  }
  if (planned.length > 0) entries.push([range(planned, 2, "x"), "planned over fifo"]);
  const before = of("fifo", "a2a_slowdown"), after = of("lina", "a2a_slowdown");
  if (before.length > 0 && after.length > 0) {
    const shown = `${median(before).toFixed(2)}x → ${median(after).toFixed(2)}x`;
    entries.push([
      shown,
      `slowdown of a backward all-to-all, fifo → lina; the paper's baseline: ${FIGURE_3.median}x`,
    ]);
  }
  const share = of("fifo", "a2a_share").map((part) => part * 100);
  if (share.length > 0) {
    entries.push([
      range(share, 0, " %"),
      "all-to-alls' part of fifo's step; the paper: 33 to 45 %",
    ]);
  }
  if (entries.length === 0) return "";
  const shown = entries.map(([value, label]) =>
    `<div class="tile"><b>${escape(value)}</b><span>${escape(label)}</span></div>`
  );
  return `<div class="tiles">${shown.join("")}</div>`;
}

/** A warning where links of what is drawn have not reached their rate. */
function voidNote(
  rows: readonly ScheduleRow[],
  of: { readonly shape?: string; readonly ranks: number; readonly mbit: number },
): Markup {
  const found = rows.find((row) =>
    row.void !== undefined && row.ranks === of.ranks && row.mbit === of.mbit &&
    (of.shape === undefined || row.shape === of.shape)
  );
  return found ? `<p class="note bad">Void: ${escape(found.void!)}.</p>` : "";
}

/** What a part needs, where the results lack it. */
function lacking(heading: string, what: string): Markup {
  return `<section><h2>${
    escape(heading)
  }</h2><p class="note">Nothing valid was measured: it needs ${escape(what)}.</p></section>`;
}

function figure(drawing: Markup, caption: Markup): Markup {
  return `<figure><div class="scroll">${drawing}</div><figcaption>${caption}</figcaption></figure>`;
}

const SECTIONS: Readonly<
  Record<Part, (results: ScheduleResults, groups: readonly Group[]) => Markup>
> = {
  "figure 7": ({ timelines = [], rows }) => figure7(timelines, rows),
  policies: (_, groups) => {
    if (groups.length === 0) return lacking("Policies", "rows");
    const losses = groups.map(({ title, rows }) => ({ title, spread: lossSpread(rows) }))
      .filter(({ spread }) => spread !== undefined);
    const most = Math.max(0, ...losses.map(({ spread }) => spread!));
    const note = losses.length === 0
      ? ""
      : `<p class="note">Losses after the last step agree between policies with as many experts on a device to ${
        most === 0 ? "every bit" : `${most.toExponential(1)} relative`
      }.</p>`;
    const best = groups.map((group) => {
      const kept = new Set(quickest(group.rows));
      return { ...group, rows: group.rows.filter((row) => kept.has(row) || !isValid(row)) };
    });
    const all = best.every(({ rows }, i) => rows.length === groups[i].rows.length)
      ? ""
      : `<details><summary>Every size of micro-ops</summary>${policyTable(groups)}</details>`;
    return `<section><h2>Policies</h2>${policyTable(best)}${note}${all}</section>`;
  },
  split: (_, groups) => {
    const drawings = groups.flatMap((group) => {
      const drawing = splitSvg(group);
      return drawing ? [`<h3>${escape(group.title)}</h3>` + figure(drawing, "")] : [];
    });
    if (drawings.length === 0) return lacking("What a step is spent on", "the parts of a step");
    return `<section><h2>What a step is spent on</h2>
<p>The median step of every policy, split into computation, all-to-all time that no computation hides, and allreduce time that neither hides. The
dashed tick is the floor, max(compute, bytes / rate), which no schedule beats; the solid one the longest path through the step under the rules of
the policy's class, with every collective at its time alone.</p>${drawings.join("")}</section>`;
  },
  marks: (_, groups) => {
    const all = verdicts(groups);
    if (all.length === 0) return "";
    const byMark = [...Map.groupBy(all, ({ mark }) => mark)];
    return `<section><h2>Marks</h2>${
      table([
        { head: "of", left: true, cell: ({ group }) => escape(group) },
        { head: "measured", left: true, cell: ({ measured }) => escape(measured) },
        {
          head: "",
          left: true,
          cell: ({ kept }) =>
            kept ? '<span class="good">✓ kept</span>' : '<span class="bad">✗ missed</span>',
        },
      ], byMark.map(([title, rows]) => ({ title, rows })))
    }</section>`;
  },
  "figure 3": ({ slowdowns = [], rows }) => {
    const heading = "How much slower a backward all-to-all is than alone (the paper's Figure 3)";
    const drawings = byRate(slowdowns).flatMap(({ title, items }) => {
      const drawing = slowdownSvg(items, `Slowdown of backward all-to-alls: ${title}`);
      const note = voidNote(rows, items[0]);
      return drawing ? [`<h3>${escape(title)}</h3>` + note + figure(drawing, "")] : [];
    });
    if (drawings.length === 0) return lacking(heading, "slowdowns of single all-to-alls");
    return `<section><h2>${heading}</h2>
<p>Cumulative distribution over all steps, layers and shapes: a curve further left is better, and at 1 gradients cost all-to-alls nothing. The
paper's baseline has a median of ${FIGURE_3.median}x and a worst case of ${FIGURE_3.worst}x over 1500 all-to-alls on 16 GPUs.</p>${
      drawings.join("")
    }</section>`;
  },
  "figure 14": (_, groups) => {
    const heading = "What every part gains (the paper's Figure 14)";
    const drawing = gainsSvg(groups);
    if (!drawing) return lacking(heading, "fifo and another policy with one expert on a device");
    return `<section><h2>${heading}</h2>
<p>One expert on a device. <code>outside</code> reduces gradients between the MoE layers only (the paper's “fixed”: smallest gain);
<code>priority</code> adds strict priority of all-to-alls (the paper: ${PRIORITY_GAIN}x in the mean); <code>lina</code>
adds micro-ops (the
paper: dashed); <code>+pipeline</code> overlaps slices of an all-to-all with the experts (the paper: limited without packing);
<code>planned</code> is one order from a measured model of link and step, agreed by all ranks.</p>${
      figure(drawing, "")
    }</section>`;
  },
  "figure 15": (_, groups) => {
    const heading = "The size of micro-ops (the paper's Figure 15)";
    const drawings = byRate(sweepsOf(groups).map((sweep) => ({ ...sweep.group, sweep })))
      .map(({ title, items }) => {
        const drawing = sweepSvg(items.map(({ sweep }) => sweep))!;
        return `<h3>${escape(title)}</h3>` + figure(drawing, "");
      });
    if (drawings.length === 0) return lacking(heading, "lina with two sizes of micro-ops at least");
    return `<section><h2>${heading}</h2>
<p>Small micro-ops pay their latency many times, large ones keep all-to-alls waiting. The paper's default of 30 MB takes 2.4 ms of its link; over
50 MB (4 ms) two of its models are slower, under 10 MB (0.8 ms) it sees “heavy transmission overhead”.</p>${
      drawings.join("")
    }</section>`;
  },
  "table 1": (_, groups) =>
    paperTable("What all-to-alls cost the baseline (the paper's Table 1)", table1(groups), "fifo"),
  "table 3": (_, groups) =>
    paperTable(
      "Pipelining efficiency (the paper's Table 3)",
      table3(groups),
      "lina+pipeline, with one expert on a device and with several",
    ),
  "table 4": (_, groups) =>
    paperTable("Utilisation and memory (the paper's Table 4)", table4(groups), "fifo and lina"),
  conditions: ({ conditions }, groups) => conditionsHtml(conditions, groups),
};

function paperTable(heading: string, content: Markup | null, needs: string): Markup {
  return content === null
    ? lacking(heading, needs)
    : `<section><h2>${escape(heading)}</h2>${content}</section>`;
}

function figure7(timelines: readonly PolicyTimeline[], rows: readonly ScheduleRow[]): Markup {
  const heading = "One layer's backward pass (the paper's Figure 7)";
  const drawings = [
    ...Map.groupBy(
      timelines.filter(({ spans }) => spans.length > 0),
      ({ shape, ranks, mbit, layer }) =>
        `${shape}, ${ranks} ranks, ${rateText(mbit)}, layer ${layer}`,
    ),
  ].map(([title, own]) => {
    const ordered = own.toSorted((a, b) =>
      (a.experts_per_device ?? 1) - (b.experts_per_device ?? 1) ||
      placeOf(a.policy) - placeOf(b.policy)
    );
    const paper = FIGURE_7.map(({ scheme, policy, ms }) => {
      const ours = own.find((timeline) =>
        timeline.policy === policy && (timeline.experts_per_device ?? 1) === 1
      );
      return { scheme, policy, ms, ours: ours && doneOf(ours) / 1000 };
    });
    const [base] = paper;
    type Row = (typeof paper)[number];
    const beside = table<Row>([
      { head: "scheme in the paper", left: true, cell: ({ scheme }) => escape(scheme) },
      { head: "done at ms", cell: ({ ms }) => ms.toFixed(1) },
      { head: "of its baseline", cell: ({ ms }) => times(ms / base.ms) },
      { head: "ours", left: true, cell: ({ policy }) => escape(policy) },
      { head: "done at ms", cell: ({ ours }) => ours?.toFixed(1) },
      {
        head: "of fifo",
        cell: ({ ours }) => ours && base.ours ? times(ours / base.ours) : undefined,
      },
    ], [{ rows: paper }]);
    return `<h3>${escape(title)}</h3>` + voidNote(rows, own[0]) +
      figure(
        timelinesSvg(ordered, `Timelines: ${title}`),
        `Done after: ${timelinesText(ordered)}.`,
      ) +
      (base.ours ? beside : "");
  });
  if (drawings.length === 0) return lacking(heading, "timelines");
  const simulated = timelines.some((own) => own.simulated)
    ? ' <strong class="bad">Some of it is simulated, not measured, and says so.</strong>'
    : " Measured on one rank.";
  return `<section><h2>${heading}</h2>
<p>The same layer under every policy on one time scale, from the moment at which its first all-to-all could start until its computation is through
and its last gradient reduced.${simulated} An all-to-all is stretched where gradients are reduced beside it, waits where they go first, and a
gradient waits where it is kept from that.</p>${drawings.join("")}</section>`;
}

function conditionsHtml(conditions: Conditions, groups: readonly Group[]): Markup {
  const { machine, date, gpu_share, command, shapes = {}, settings = {} } = conditions;
  const entries: [string, string][] = [];
  if (machine !== undefined) entries.push(["machine", machine]);
  if (date !== undefined) entries.push(["date", date]);
  if (gpu_share !== undefined) entries.push(["part of the GPU for a rank", `${gpu_share} %`]);
  for (const { title, rows } of groups) {
    const reached = rows.flatMap(({ link_achieved }) => link_achieved ?? []);
    if (reached.length > 0) {
      entries.push([`links, ${title}`, `reached ${percent(median(reached))} of their rate`]);
    }
  }
  for (const [name, value] of Object.entries(shapes)) {
    entries.push([`shape ${name}`, String(value)]);
  }
  for (const [name, value] of Object.entries(settings)) entries.push([name, String(value)]);
  const list = entries.map(([name, value]) => `<dt>${escape(name)}</dt><dd>${escape(value)}</dd>`);
  const repeat = command === undefined
    ? ""
    : `<h3>Command</h3><pre><code>${escape(command)}</code></pre>`;
  const differences = DIFFERENCES.map((text) => `<li>${escape(text)}</li>`);
  return `<section><h2>Conditions</h2>${list.length > 0 ? `<dl>${list.join("")}</dl>` : ""}${repeat}
<h3>What differs from the paper's</h3><ul>${differences.join("")}</ul></section>`;
}
