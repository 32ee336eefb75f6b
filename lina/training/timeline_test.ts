import assert from "node:assert/strict";
import fc from "fast-check";
import { Fifo } from "../../moe/fifo.ts";
import { buildStepGraph, type GradientOutline, groupOf } from "../../moe/graph.ts";
import type { CollectiveScheduler, StepGraph } from "../../moe/hooks.ts";
import { randomGraph, randomOptions, randomScheduler } from "../../tests/lib/random_steps.ts";
import { type CollectiveCost, type StepCosts, stepCosts } from "./links.ts";
import { createScheduler, type SchedulerName } from "./schedulers.ts";
import { timeline, type TimelineOptions, type TimelineSpan } from "./timeline.ts";

function near(actual: number, expected: number): void {
  const bound = 1e-9 * Math.max(1, Math.abs(expected));
  assert.ok(Math.abs(actual - expected) <= bound, `${actual} instead of ${expected}`);
}

function lane(spans: readonly TimelineSpan[], name: TimelineSpan["lane"]): TimelineSpan[] {
  return spans.filter((span) => span.lane === name);
}

function gradient(name: string, elements: number): GradientOutline {
  return { name, elements, elementBytes: 1, group: "world" };
}

/** Costs without latency: an all-to-all of n bytes takes n µs, a micro-op 1 µs per byte. */
const PLAIN: StepCosts = {
  allToAll: (bytes): CollectiveCost => ({ latency_us: 0, link_us: bytes, bytes }),
  reduction: (bytes): CollectiveCost => ({ latency_us: 0, link_us: bytes, bytes }),
};

/**
 * One MoE layer; in the backward pass the head's gradient of 304 bytes is ready at 0, combine takes 100 µs, each all-to-all 200 µs alone,
 * the experts 100 µs, the gate 100 µs, attention 100 µs. All of the forward pass takes no time.
 */
const LAYER: StepGraph = buildStepGraph({
  layers: [{ moe: { allToAllBytes: 200, experts: [] }, feedForward: [], attention: [] }],
  head: [gradient("head", 304)],
  embedding: [],
});
const LAYER_OPTIONS: TimelineOptions = {
  compute_us: ({ phase, layer }) => phase === "backward" && layer === 0 ? 100 : 0,
  costs: PLAIN,
};

/** The spans of the backward pass of {@linkcode LAYER}: lane, start and end, after the forward pass's two all-to-alls. */
function backward(
  name: SchedulerName,
  options: Partial<TimelineOptions> & { microOpBytes?: number },
) {
  const { microOpBytes, ...rest } = options;
  const { spans } = timeline(LAYER, createScheduler(name, { microOpBytes }), {
    ...LAYER_OPTIONS,
    ...rest,
  });
  return spans.filter(({ start_us, end_us }) => start_us >= 400 && end_us > start_us)
    .map((span) => [span.lane, span.start_us - 400, span.end_us - 400]);
}

Deno.test("timeline: fifo shares the link fairly with the all-to-all", () => {
  // 100 of 304 µs alone, then 200 at half the rate while the all-to-all lasts, then the 4 that are left.
  assert.deepEqual(backward("fifo", {}), [
    ["compute", 0, 100],
    ["gradients", 0, 504],
    ["allToAll", 100, 500],
    ["compute", 500, 600],
    ["allToAll", 600, 800],
    ["compute", 800, 900],
    ["compute", 900, 1000],
  ]);
});

Deno.test("timeline: an exclusive all-to-all waits for what was launched before it", () => {
  const scheduler: CollectiveScheduler = {
    name: "ordered",
    plan: (graph) => ({ ...new Fifo().plan(graph), exclusive: true }),
    launch: (_, { ready }) => ready,
  };
  const { spans } = timeline(LAYER, scheduler, LAYER_OPTIONS);
  const first = lane(spans, "allToAll")[2];
  assert.deepEqual([first.asked_us, first.start_us, first.end_us], [500, 704, 904]);
  // Nothing is launched in the layer, so the reduction comes before it or after.
  assert.deepEqual(backward("outside", {}), [
    ["compute", 0, 100],
    ["gradients", 0, 304],
    ["allToAll", 304, 504],
    ["compute", 504, 604],
    ["allToAll", 604, 804],
    ["compute", 804, 904],
    ["compute", 904, 1004],
  ]);
});

Deno.test("timeline: lina's micro-ops go one at a time, none once a combine has begun", () => {
  const lanes = (spans: unknown[][]) => spans.filter(([lane]) => lane !== "compute");
  // Parts of 64 bytes: the first at once, the next when the experts start. That it has ended is told after the next boundary, the
  // second all-to-all's start, so nothing goes then.
  assert.deepEqual(lanes(backward("lina", { microOpBytes: 64 })), [
    ["gradients", 0, 64],
    ["allToAll", 100, 300],
    ["gradients", 300, 364],
    ["allToAll", 400, 600],
    ["gradients", 600, 664],
    ["gradients", 700, 764],
    ["gradients", 800, 848],
  ]);
  // Told at once, another fits into the experts, and delays the all-to-all by what is left of it: 28 µs, shared.
  assert.deepEqual(lanes(backward("lina", { microOpBytes: 64, endsTold: "at once" })), [
    ["gradients", 0, 64],
    ["allToAll", 100, 300],
    ["gradients", 300, 364],
    ["gradients", 364, 456],
    ["allToAll", 400, 628],
    ["gradients", 628, 692],
    ["gradients", 692, 740],
  ]);
});

Deno.test("timeline: chunks leave at once, and each returns behind its experts", () => {
  const cut: CollectiveScheduler = {
    name: "cut",
    plan: (graph) => ({ ...new Fifo().plan(graph), exclusive: true, chunks: new Map([[0, 2]]) }),
    launch: ({ kind }, { ready }) => kind === "allToAllEnds" || kind === "stepEnds" ? ready : 0,
  };
  const { spans, boundaries } = timeline(LAYER, cut, LAYER_OPTIONS);
  const back = spans.filter(({ start_us }) => start_us >= 400)
    .map((span) => [span.lane, span.start_us - 400, span.end_us - 400, span.name]);
  // The gradient of 304 µs is launched when the first chunk has arrived: it waits for the second, and the way back waits for it.
  assert.deepEqual(back.filter(([, start, end]) => end > start), [
    ["compute", 0, 100, "layer 0 backward combine"],
    ["allToAll", 100, 200, "layer 0 backward combine 0/2"],
    ["compute", 200, 250, "layer 0 backward experts 0/2"],
    ["allToAll", 200, 300, "layer 0 backward combine 1/2"],
    ["compute", 300, 350, "layer 0 backward experts 1/2"],
    ["gradients", 300, 604, "head"],
    ["allToAll", 604, 704, "layer 0 backward dispatch 0/2"],
    ["allToAll", 704, 804, "layer 0 backward dispatch 1/2"],
    ["compute", 804, 904, "layer 0 backward gate"],
    ["compute", 904, 1004, "layer 0 backward attention"],
  ]);
  const told = boundaries.flatMap(({ boundary, at_us }) =>
    at_us >= 400 && boundary.kind.startsWith("allToAll") && "chunk" in boundary
      ? [`${boundary.kind} ${boundary.chunk} ${at_us - 400}`]
      : []
  );
  assert.deepEqual(told.slice(-8), [
    "allToAllStarts 0 100",
    "allToAllStarts 1 100",
    "allToAllEnds 0 200",
    "allToAllStarts 0 250",
    "allToAllEnds 1 300",
    "allToAllStarts 1 350",
    "allToAllEnds 0 704",
    "allToAllEnds 1 804",
  ]);
});

Deno.test("timeline: a gradient that leads is launched before its computation has ended", () => {
  const options = { ...LAYER_OPTIONS, compute_us: () => 100, lead_us: () => 30 };
  const { spans, boundaries } = timeline(LAYER, new Fifo(), options);
  const head = spans.find(({ name }) => name === "backward head")!;
  const [reduction] = lane(spans, "gradients");
  assert.deepEqual([reduction.start_us, head.end_us - head.start_us], [head.end_us - 30, 100]);
  const ready = boundaries.find(({ boundary }) => boundary.kind === "gradientReady")!;
  assert.equal(ready.at_us, head.end_us - 30);
  assert.equal(boundaries.at(-1)!.boundary.kind, "stepEnds");
  // Never before the computation begins.
  const early = timeline(LAYER, new Fifo(), { ...options, lead_us: () => 1e6 });
  assert.equal(lane(early.spans, "gradients")[0].start_us, head.start_us);
});

Deno.test("timeline: what is told through a pump comes late, and an all-to-all of one's own may have begun by then", () => {
  const told = (pump_us: number) =>
    backward("lina", { microOpBytes: 64, pump_us })
      .filter(([lane]) => lane === "gradients").map(([, start]) => start);
  assert.deepEqual(told(0)[0], 0);
  assert.deepEqual(
    told(0),
    backward("lina", { microOpBytes: 64, endsTold: "at once" })
      .filter(([lane]) => lane === "gradients").map(([, start]) => start),
  );
  // Told 20 us late of the gradient, of the all-to-all's end and of each micro-op's.
  assert.deepEqual(told(20).slice(0, 3), [20, 320, 404]);
  const { end_us } = timeline(LAYER, new Fifo(), { ...LAYER_OPTIONS, pump_us: 1000 });
  assert.equal(end_us, timeline(LAYER, new Fifo(), LAYER_OPTIONS).end_us, "not with pace program");
});

Deno.test("timeline: what ends together with a piece of computation has ended at its boundary", () => {
  const graph = buildStepGraph({
    layers: [{ feedForward: [gradient("b", 50)], attention: [] }],
    head: [gradient("a", 100), gradient("c", 50)],
    embedding: [],
  });
  const { spans } = timeline(graph, createScheduler("priority"), {
    compute_us: ({ phase }) => phase === "backward" ? 100 : 0,
    costs: PLAIN,
  });
  const starts = lane(spans, "gradients").map(({ name, start_us }) => [name, start_us]);
  assert.deepEqual(starts, [["a", 100], ["c", 200], ["b", 400]]);
});

Deno.test("timeline: latency leaves the link to others", () => {
  const costs: StepCosts = {
    ...PLAIN,
    reduction: (bytes) => ({ latency_us: 150, link_us: bytes, bytes }),
  };
  // Bytes of the reduction start at 150; the all-to-all has had 50 of its 200 µs by then. From 550 on the next one shares.
  assert.deepEqual(backward("fifo", { costs }).slice(1, 3), [
    ["gradients", 0, 658],
    ["allToAll", 100, 450],
  ]);
});

Deno.test("timeline: everything happens once, nothing beats the link, and all bytes cross it", () => {
  fc.assert(fc.property(randomGraph, randomScheduler, randomOptions, (graph, make, options) => {
    const scheduler = make();
    const { microOps, chunks } = scheduler.plan(graph);
    const chunksOf = ({ layer }: { layer: number }) => chunks.get(layer) ?? 1;
    const all = timeline(graph, scheduler, options), { spans, end_us, linkBusy_us } = all;
    assert.deepEqual(timeline(graph, make(), options), all);

    const computes = graph.nodes.filter((node) => node.kind === "compute");
    const allToAlls = graph.nodes.filter((node) => node.kind === "allToAll");
    const pieces = computes.map((node) => node.name === "experts" ? chunksOf(node) : 1);
    assert.equal(lane(spans, "compute").length, pieces.reduce((a, b) => a + b, 0));
    const chunked = allToAlls.flatMap((node) => {
      return Array.from({ length: chunksOf(node) }, () => node.bytes / chunksOf(node));
    });
    assert.equal(lane(spans, "allToAll").length, chunked.length);
    assert.equal(lane(spans, "gradients").length, microOps.length);
    // Byte conservation: what the spans say is what the nodes ask for, and the link was busy for just as long as that takes.
    const costs = [
      ...chunked.map((bytes) => options.costs.allToAll(bytes)),
      ...microOps.map((op) => options.costs.reduction(op.bytes, groupOf(graph, op))),
    ];
    near(
      spans.reduce((sum, { bytes }) => sum + bytes, 0),
      costs.reduce((sum, { bytes }) => sum + bytes, 0),
    );
    near(linkBusy_us, costs.reduce((sum, { link_us }) => sum + link_us, 0));
    assert.ok(linkBusy_us <= end_us + 1e-6);

    for (const { asked_us, start_us, end_us: ended_us, alone_us } of spans) {
      assert.ok(asked_us <= start_us && start_us <= ended_us && ended_us <= end_us);
      assert.ok(ended_us - start_us >= alone_us - 1e-6, "faster than the link");
    }
    for (const name of ["compute", "allToAll", "gradients"] as const) {
      const row = lane(spans, name);
      row.slice(1).forEach((span, i) => assert.ok(span.start_us >= row[i].end_us));
    }
    // The program is one thread: computation and all-to-alls follow one another, but for chunks.
    const program = spans.filter((span) =>
      span.lane !== "gradients" && !/ \d+\/\d+$/.test(span.name)
    );
    program.slice(1).forEach((span, i) => assert.ok(span.start_us >= program[i].end_us));
  }));
});

Deno.test("timeline: with the link for itself an all-to-all takes its time alone; exclusive schedules give it that", () => {
  fc.assert(fc.property(randomGraph, randomOptions, fc.nat(20_000), (graph, options, bytes) => {
    const scheduler = createScheduler("outside", { bucketBytes: bytes + 1 });
    for (const span of lane(timeline(graph, scheduler, options).spans, "allToAll")) {
      near(span.end_us - span.start_us, span.alone_us);
    }
  }));
});

Deno.test("timeline: lina launches no micro-op beside an all-to-all or before one that is imminent", () => {
  fc.assert(fc.property(randomGraph, randomOptions, fc.nat(20_000), (graph, options, bytes) => {
    const scheduler = createScheduler("lina", { microOpBytes: bytes + 16 });
    const { spans } = timeline(graph, scheduler, options);
    const program = spans.filter((span) => span.lane !== "gradients");
    const closed = program.flatMap((span, i): [number, number][] => {
      if (span.lane === "allToAll") return [[span.start_us, span.end_us]];
      return span.name.endsWith("backward combine") ? [[span.start_us, program[i + 1].end_us]] : [];
    });
    const lastEnd = Math.max(...program.map(({ end_us }) => end_us));
    for (const { asked_us } of lane(spans, "gradients")) {
      if (asked_us >= lastEnd) continue;
      assert.ok(!closed.some(([from, to]) => from < asked_us && asked_us < to));
    }
  }));
});

Deno.test("timeline: without latency a faster link is never slower for fifo", () => {
  // With latency it may be: a gap of the link can come to lie where it hurts.
  const link = fc.record({
    rate: fc.integer({ min: 1, max: 200 }),
    gain: fc.double({ min: 1, max: 3, noNaN: true }),
  });
  fc.assert(
    fc.property(randomGraph, randomOptions, link, fc.nat(20_000), (graph, options, link, bytes) => {
      const end = (bytes_per_us: number) => {
        const costs = stepCosts({ alpha_us: 0, bytes_per_us }, { ranks: 4 });
        return timeline(graph, new Fifo({ bucketBytes: bytes + 1 }), { ...options, costs }).end_us;
      };
      assert.ok(end(link.rate * link.gain) <= end(link.rate) * (1 + 1e-9));
    }),
    { numRuns: 300 },
  );
});

Deno.test("timeline: names are for readers, impossible times are errors", () => {
  const graph = buildStepGraph({
    layers: [{ feedForward: [gradient("a", 40), gradient("b", 8)], attention: [] }],
    head: [],
    embedding: [],
  });
  const names = (scheduler: CollectiveScheduler) =>
    timeline(graph, scheduler, { compute_us: () => 1, costs: PLAIN }).spans.map((s) => s.name);
  assert.ok(names(new Fifo()).includes("a and 1 more"));
  assert.ok(names(new Fifo()).includes("layer 0 backward feedForward"));
  assert.ok(names(new Fifo()).includes("forward embedding"));
  const parts = names(createScheduler("lina", { microOpBytes: 32 }));
  for (const name of ["a 0..32", "a 32..40", "b"]) assert.ok(parts.includes(name), name);
  assert.throws(
    () => timeline(graph, new Fifo(), { compute_us: () => NaN, costs: PLAIN }),
    /duration of forward embedding must be at least 0 and finite: current value is NaN/,
  );
  const costs = { ...PLAIN, reduction: () => ({ latency_us: -1, link_us: 0, bytes: 0 }) };
  assert.throws(
    () => timeline(graph, new Fifo(), { compute_us: () => 1, costs }),
    /latency of a collective must be at least 0 and finite: current value is -1/,
  );
});
