import assert from "node:assert/strict";
import fc from "fast-check";
import { sampleResults } from "./_sample.ts";
import { lossSpread, verdicts } from "./marks.ts";
import {
  type LaneSpan,
  parseResults,
  type PolicyTimeline,
  type ScheduleResults,
  type ScheduleRow,
} from "./results.ts";
import { bestOf, groupsOf, quickest, speedupOf } from "./rows.ts";
import { type Part, PARTS, scheduleHtml, scheduleSvgs } from "./schedule_html.ts";
import { escape, linear } from "./svg.ts";
import { boxes, LANES, levelsOf, timelinesSvg } from "./timelines.ts";

const SAMPLE = sampleResults();

/** Elements that need no end. */
const VOID_ELEMENTS = new Set(["meta", "br"]);

/**
 * Checks that markup is made of whole, properly nested elements with escaped text, and that it runs and loads nothing.
 * Returns the elements by name.
 */
function checkMarkup(html: string): Map<string, Record<string, string>[]> {
  const found = new Map<string, Record<string, string>[]>();
  const open: string[] = [];
  const body = html.replace(/^<!doctype html>\n/, "").replace(/<style>[^<]*<\/style>/, "");
  let at = 0;
  for (
    const match of body.matchAll(/<(\/?)([a-z][a-z0-9]*)((?:\s+[\w:-]+="[^"<>]*")*)\s*(\/?)>/gi)
  ) {
    assert.doesNotMatch(body.slice(at, match.index), /[<>]/, "text is escaped");
    at = match.index + match[0].length;
    const [, end, name, attributes, closed] = match;
    if (end) assert.equal(open.pop(), name);
    else {
      const own = [...attributes.matchAll(/([\w:-]+)="([^"]*)"/g)].map(([, k, v]) => [k, v]);
      found.set(name, [...found.get(name) ?? [], Object.fromEntries(own)]);
      if (!closed && !VOID_ELEMENTS.has(name)) open.push(name);
    }
  }
  assert.doesNotMatch(body.slice(at), /[<>]/);
  assert.deepEqual(open, []);
  assert.equal(found.has("script"), false);
  for (const elements of found.values()) {
    for (const attributes of elements) {
      for (const [key, value] of Object.entries(attributes)) {
        assert.ok(!/^on|^(src|href)$/.test(key), key);
        if (/^(x|y|x1|x2|y1|y2|width|height)$/.test(key)) {
          assert.ok(Number.isFinite(Number(value)), `${key} ${value}`);
        }
        assert.doesNotMatch(value, /NaN|undefined|Infinity/);
      }
    }
  }
  assert.doesNotMatch(html, /url\(|@import/);
  return found;
}

Deno.test("the report has every part, in whole elements, and nothing from outside", () => {
  const html = scheduleHtml(SAMPLE);
  const found = checkMarkup(html);
  assert.ok(html.startsWith("<!doctype html>\n"));
  assert.match(html, /name="viewport"/);
  assert.match(html, /prefers-color-scheme:dark/);
  assert.match(html, /@media print/);
  for (const n of [3, 7, 14, 15]) assert.match(html, new RegExp(`Figure ${n}\\b`));
  for (const n of [1, 3, 4]) assert.match(html, new RegExp(`Table ${n}\\b`));
  // Timelines of three shapes, what a step is spent on in three, slowdowns, gains, sweep.
  assert.equal(found.get("svg")!.length, 3 + 3 + 1 + 1 + 1);
  for (const drawing of found.get("svg")!) assert.ok(drawing["aria-label"].length > 10);
  assert.match(html, /simulated/, "what is not measured says so");
  assert.match(html, /29\.0/, "the paper's numbers are there");
  assert.match(html, /deno task bench:schedule/);
  // As it is measured, nothing is called simulated.
  const timelines = SAMPLE.timelines!.map((own) => ({ ...own, simulated: false }));
  assert.doesNotMatch(scheduleHtml({ ...SAMPLE, timelines }), /simulated/);
});

Deno.test("every part alone is a page", () => {
  for (const part of PARTS) checkMarkup(scheduleHtml(SAMPLE, { parts: [part], title: part }));
  const only = (part: Part) => scheduleHtml(SAMPLE, { parts: [part] });
  assert.doesNotMatch(only("table 1"), /<svg/);
  assert.match(only("table 1"), /1145/);
  assert.match(only("figure 15"), /3 MB = 2\.4 ms/);
});

Deno.test("a drawing alone is a file with its own style", () => {
  const all = scheduleSvgs(SAMPLE, "figure 7");
  assert.equal(all.length, 3);
  for (const text of all) {
    assert.match(
      text,
      /^<svg xmlns="http:\/\/www\.w3\.org\/2000\/svg" .* width="1040" height="[\d.]+">\n<style>/,
    );
    checkMarkup(text);
    assert.match(text, /--compute:/);
  }
  assert.deepEqual(scheduleSvgs(SAMPLE, "table 1"), []);
});

Deno.test("text from results is escaped, wherever it is", () => {
  const evil = `<img src=x onerror="a">&'"</style><script>`;
  const row = { ...SAMPLE.rows[0], policy: evil, shape: evil };
  const results: ScheduleResults = {
    conditions: {
      command: evil,
      date: evil,
      machine: evil,
      shapes: { [evil]: evil },
      settings: { [evil]: evil },
    },
    rows: [row, { ...row, policy: "fifo" }, { ...row, policy: "lina", void: evil }],
    timelines: [{
      ...SAMPLE.timelines![0],
      shape: evil,
      policy: evil,
      spans: LANES.map(([lane]): LaneSpan => ({ lane, name: evil, start_us: 0, end_us: 5000 })),
    }],
    slowdowns: [{ policy: evil, shape: evil, ranks: 4, mbit: 10_000, slowdowns: [1, 2, 3] }],
  };
  const html = scheduleHtml(results, { title: evil });
  checkMarkup(html);
  assert.doesNotMatch(html, /<img|<script/);
  assert.equal(escape(`<a b='"&`), "&#60;a b=&#39;&#34;&#38;");
  fc.assert(
    fc.property(fc.string({ unit: "binary" }), (text) => {
      assert.doesNotMatch(escape(text), /[<>"']/);
      checkMarkup(scheduleHtml({ ...results, conditions: { machine: text } }, { title: text }));
    }),
    { numRuns: 30 },
  );
});

Deno.test("nothing measured, void rows and missing policies: a page that says so", () => {
  const empty = scheduleHtml({ conditions: {}, rows: [] });
  checkMarkup(empty);
  assert.match(empty, /Nothing valid was measured: it needs timelines/);
  assert.match(empty, /Nothing valid was measured: it needs fifo/);
  const gone = SAMPLE.rows.map((row) => ({ ...row, void: "links reached 0.61 of their rate" }));
  const html = scheduleHtml({ conditions: {}, rows: gone });
  checkMarkup(html);
  assert.match(html, /void: links reached 0\.61/);
  assert.deepEqual(verdicts(groupsOf(gone)), []);
  assert.doesNotMatch(html, /<svg/);
  const drawn = scheduleHtml({ ...SAMPLE, rows: gone });
  checkMarkup(drawn);
  assert.equal(drawn.match(/Void: links reached 0\.61/g)!.length, 3 + 1, "timelines and slowdowns");
  for (const policy of ["fifo", "lina"]) {
    const rows = SAMPLE.rows.filter((row) => row.policy !== policy);
    const timelines = SAMPLE.timelines!.filter((own) => own.policy !== policy);
    checkMarkup(scheduleHtml({ ...SAMPLE, rows, timelines }));
  }
});

const rowArbitrary = fc.record({
  policy: fc.constantFrom("fifo", "outside", "lina", "lina+pipeline", "planned", "else", "lina, x"),
  shape: fc.constantFrom("a", "b"),
  ranks: fc.constantFrom(4, 8),
  per_host: fc.constantFrom(1, 2),
  mbit: fc.constantFrom(0, 5000),
  device: fc.constantFrom("cpu", "cuda"),
  experts_per_device: fc.constantFrom(1, 2, 4),
  step_ms: fc.constantFrom(NaN, 0, -1, 1e-9, 12.5, 1e9, Infinity),
}, {});
const anyNumber = fc.option(fc.oneof(fc.double(), fc.nat(100)), { nil: undefined });
const extraArbitrary = fc.record({
  micro_op_bytes: fc.option(fc.nat(1e8), { nil: null }),
  chunks: anyNumber,
  compute_ms: anyNumber,
  exposed_a2a_ms: anyNumber,
  exposed_allreduce_ms: anyNumber,
  bound_ms: anyNumber,
  floor_ms: anyNumber,
  loss: anyNumber,
  pipelining: anyNumber,
  utilisation: anyNumber,
  a2a_share: anyNumber,
  a2a_slowdown: anyNumber,
  peak_bytes: anyNumber,
});

Deno.test("whatever the rows have, the page is whole", () => {
  const slowdowns = fc.array(fc.record({
    policy: fc.constantFrom("fifo", "lina"),
    shape: fc.constant("a"),
    ranks: fc.constant(4),
    mbit: fc.constant(5000),
    slowdowns: fc.array(fc.oneof(fc.double(), fc.double({ min: 0.9, max: 3, noNaN: true }))),
  }));
  fc.assert(
    fc.property(fc.array(fc.tuple(rowArbitrary, extraArbitrary)), slowdowns, (pairs, slowdowns) => {
      const rows = pairs.map(([row, extra]) => ({ ...row, ...extra }) as ScheduleRow);
      checkMarkup(scheduleHtml({ conditions: {}, rows, slowdowns }));
    }),
    { numRuns: 150, endOnFailure: true },
  );
});

/** Timelines whose spans may be anywhere, from less than a pixel to all of the time. */
const timelineArbitrary = fc.record({
  policy: fc.constantFrom("fifo", "lina", "planned+pipeline"),
  shape: fc.constant("a"),
  ranks: fc.constant(4),
  mbit: fc.constant(10_000),
  layer: fc.nat(9),
  spans: fc.array(
    fc.record({
      lane: fc.constantFrom("compute" as const, "allToAll" as const, "gradients" as const),
      name: fc.string(),
      start_us: fc.nat(30_000),
      dur: fc.oneof(fc.nat(5), fc.nat(20_000)),
      queued_us: fc.option(fc.nat(40_000), { nil: undefined }),
      own: fc.boolean(),
    }),
    { maxLength: 60 },
  ),
}).map(({ spans, ...rest }): PolicyTimeline => ({
  ...rest,
  spans: spans.map(({ dur, ...span }) => ({ ...span, end_us: span.start_us + dur })),
}));

Deno.test("every span lies inside its lane and the drawing", () => {
  fc.assert(
    fc.property(fc.array(timelineArbitrary, { minLength: 1, maxLength: 4 }), (timelines) => {
      const drawing = timelinesSvg(timelines, "property");
      const found = checkMarkup(drawing);
      const [, width, height] = /viewBox="0 0 ([\d.]+) ([\d.]+)"/.exec(drawing)!.map(Number);
      const rects = found.get("rect")!.map((own) => ({
        x: Number(own.x),
        y: Number(own.y),
        width: Number(own.width),
        height: Number(own.height),
        class: own.class,
      }));
      const lanes = rects.filter((own) => own.class === "lane");
      assert.equal(lanes.length, 3 * timelines.length);
      const inside = (own: typeof rects[number]) =>
        lanes.findIndex((lane) =>
          own.y >= lane.y && own.y + own.height <= lane.y + lane.height + 0.01 &&
          own.x >= lane.x - 0.01 && own.x + own.width <= lane.x + lane.width + 0.61
        );
      for (const own of rects.filter((own) => /span|narrow/.test(own.class))) {
        const lane = inside(own);
        assert.ok(lane >= 0, JSON.stringify(own));
        assert.equal(own.class.split(" ")[0], LANES[lane % 3][0]);
      }
      for (const own of rects) {
        assert.ok(own.x >= 0 && own.x + own.width <= width && own.y + own.height <= height);
      }
      // The same time is at the same place in every panel, and every span is in some box.
      const shown = rects.filter((own) => /span|narrow/.test(own.class)).length;
      assert.ok(shown <= timelines.reduce((sum, { spans }) => sum + spans.length, 0));
    }),
    { numRuns: 100 },
  );
});

Deno.test("boxes hold every span, and are no more than the pixels allow", () => {
  const x = linear([0, 1_000_000], [0, 1000]);
  const spans = Array.from({ length: 50_000 }, (_, i): LaneSpan => ({
    lane: "gradients",
    name: String(i),
    start_us: i * 20,
    end_us: i * 20 + 18,
  }));
  const drawn = boxes(spans, x);
  assert.ok(drawn.length <= 1000, String(drawn.length));
  assert.deepEqual(drawn.flatMap((box) => box.spans.map(({ name }) => name)), [
    ...spans.map(({ name }) => name),
  ]);
  const one = spans.map((span) => ({ ...span, lane: "compute" as const, name: "experts" }));
  assert.equal(boxes(one, x).length, 1, "kernels of one piece of computation are one box");
  const wide = boxes([
    { lane: "compute", name: "a", start_us: 0, end_us: 90_000 },
    { lane: "compute", name: "b", start_us: 90_000, end_us: 100_000, own: false },
  ], x);
  assert.deepEqual(wide.map(({ x, width }) => [x, width]), [[0, 90], [90, 10]]);
});

Deno.test("levelsOf(): boxes of one level do not overlap, and none is lost", () => {
  const arbitrary = fc.array(fc.tuple(fc.nat(100), fc.integer({ min: 1, max: 30 })));
  fc.assert(fc.property(arbitrary, (list) => {
    const drawn = list.sort((a, b) => a[0] - b[0]).map(([x, width]) => ({ spans: [], x, width }));
    const levels = levelsOf(drawn);
    assert.equal(levels.flat().length, drawn.length);
    for (const level of levels.slice(0, 5)) {
      level.forEach((box, i) => {
        assert.ok(i === 0 || level[i - 1].x + level[i - 1].width <= box.x + 0.5);
      });
    }
    const deepest = Math.max(
      1,
      ...drawn.map(({ x }) =>
        drawn.filter((other) => other.x <= x && x < other.x + other.width).length
      ),
    );
    assert.equal(levels.length, Math.min(6, deepest));
  }));
});

Deno.test("rows: groups, the quickest of a sweep, speedups", () => {
  const groups = groupsOf(SAMPLE.rows);
  assert.deepEqual(groups.map(({ title }) => title), [
    "txl, 4 ranks, 10 Gbit/s",
    "gpt2, 4 ranks, 10 Gbit/s",
    "bert2gpt2, 4 ranks, 10 Gbit/s",
  ]);
  for (const { rows } of groups) {
    assert.deepEqual(quickest(rows).map(({ policy }) => policy), [
      "fifo",
      "outside",
      "priority",
      "lina",
    ]);
    const fifo = bestOf(rows, "fifo")!, lina = bestOf(rows, "lina", 1, { swept: true })!;
    assert.ok(rows.every((row) => row.policy !== "lina" || row.step_ms >= lina.step_ms));
    assert.ok(!bestOf(rows, "lina")!.swept, "its own size");
    assert.equal(speedupOf(lina, rows), fifo.step_ms / lina.step_ms);
    assert.equal(bestOf(rows, "lina", 2), undefined);
  }
});

Deno.test("marks are kept or missed by the numbers", () => {
  const base = SAMPLE.rows.find(({ policy }) => policy === "fifo")!;
  const row = (policy: string, step_ms: number, more: Partial<ScheduleRow> = {}): ScheduleRow => ({
    ...base,
    policy,
    step_ms,
    a2a_share: 0.4,
    bound_ms: 69,
    host_share: 0.01,
    ...more,
  });
  const kept = (rows: ScheduleRow[], mark: RegExp) =>
    verdicts(groupsOf(rows)).filter((verdict) => mark.test(verdict.mark))
      .map(({ kept, measured }) => `${kept} ${measured}`);
  const rows = [
    row("fifo", 100, { a2a_slowdown: 1.9 }),
    row("outside", 80),
    row("lina", 75, { a2a_slowdown: 1.08 }),
    row("planned", 72, { host_share: 0.03 }),
  ];
  assert.deepEqual(kept(rows, /33 to 45/), ["true 40.0 %"]);
  assert.deepEqual(kept(rows, /lina reaches/), ["true 0.920"]);
  assert.deepEqual(kept(rows, /lina is quicker/), ["true 1.067x of outside"]);
  assert.deepEqual(kept(rows, /1\.1x/), ["true 1.08x; fifo 1.90x"]);
  assert.deepEqual(kept(rows, /planned reaches/), ["true 0.958"]);
  assert.deepEqual(kept(rows, /planned is no slower/), ["true 1.042x of lina"]);
  assert.deepEqual(kept(rows, /host time/), ["false 3.0 %, planned"]);
  const slower = rows.map((own) => own.policy === "planned" ? { ...own, step_ms: 79 } : own);
  assert.deepEqual(kept(slower, /planned is no slower/), ["false 0.949x of lina"]);
  assert.deepEqual(kept(rows, /packed/), []);
  const packed = [
    ...rows,
    row("fifo", 70, { experts_per_device: 2 }),
    row("lina+pipeline", 60, { experts_per_device: 2, bound_ms: 57, pipelining: 0.81 }),
  ];
  assert.deepEqual(kept(packed, /packed/), [
    "true 0.950, lina+pipeline, 2 experts",
    "true 1.67x; equally packed fifo 1.43x",
    "true 81.0 %, lina+pipeline, 2 experts",
  ]);
  assert.equal(lossSpread(rows), 0);
  assert.equal(lossSpread([rows[0]]), undefined);
  const other = [...rows.slice(1), { ...rows[0], loss: base.loss! * (1 + 1e-6) }];
  assert.ok(Math.abs(lossSpread(other)! - 1e-6) < 1e-9);
});

Deno.test("results are read as they were written; what they lack is said", () => {
  const read = parseResults(JSON.stringify(SAMPLE), "f.json");
  assert.deepEqual(read, JSON.parse(JSON.stringify(SAMPLE)));
  const [row] = SAMPLE.rows;
  const gone = parseResults(JSON.stringify([{ ...row, step_ms: NaN, loss: NaN }]), "f").rows[0];
  assert.equal(gone.void, "no step was measured");
  assert.equal("loss" in gone, false);
  const refused = (json: string, why: RegExp) =>
    assert.throws(() => parseResults(json, "f.json"), (error: Error) => {
      assert.ok(error instanceof TypeError);
      assert.match(error.message, /^Cannot read f\.json as /);
      return why.test(error.message);
    });
  refused("{", /must be JSON/);
  refused("{}", /"rows" must be a list/);
  refused("null", /"rows" must be a list/);
  refused("[{}]", /row 0 must have a text "policy"/);
  refused("[null]", /row 0 must have a text "policy"/);
  refused(JSON.stringify([{ ...row, ranks: "4" }]), /row 0 must have a number "ranks"/);
  refused(JSON.stringify({ rows: [], timelines: [{}] }), /timeline 0 must have a list "spans"/);
});
