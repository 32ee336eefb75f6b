import assert from "node:assert/strict";
import fc from "fast-check";
import { Fifo } from "../../moe/fifo.ts";
import { buildStepGraph, type GradientOutline } from "../../moe/graph.ts";
import type { CollectiveScheduler, StepGraph } from "../../moe/hooks.ts";
import { checkSchedule } from "../../moe/schedule.ts";
import { randomGraph, randomOptions } from "../../tests/lib/random_steps.ts";
import { stepBounds } from "./bounds.ts";
import { type StepCosts, stepCosts, timeAlone } from "./links.ts";
import { Outside } from "./outside.ts";
import { Lina } from "./lina.ts";
import { Priority } from "./priority.ts";
import { Planned, type PlannedOptions } from "./planned.ts";
import { boundaryKey, QuietStep } from "./filling.ts";
import { timeline, type TimelineOptions } from "./timeline.ts";

/** A planner that knows what the timeline does. */
function informed(graph: StepGraph, options: TimelineOptions, more: PlannedOptions = {}): Planned {
  const compute_us = new Map<number, number>();
  for (const node of graph.nodes) {
    if (node.kind === "compute") compute_us.set(node.id, options.compute_us(node));
  }
  return new Planned({ profile: { compute_us }, costs: options.costs, margin: 0, ...more });
}

const chunks = fc.constantFrom(1, 2, 3, [1, 2, 4]);

Deno.test("planned: reduces everything once, and is alike wherever it is planned", () => {
  fc.assert(
    fc.property(randomGraph, randomOptions, chunks, fc.double({ min: 0, max: 0.9, noNaN: true }), (
      graph,
      options,
      chunks,
      margin,
    ) => {
      const planned = informed(graph, options, { chunks, margin });
      const schedule = planned.plan(graph);
      checkSchedule(graph, schedule);
      const course = planned.course(graph)!;
      const again = informed(graph, options, { chunks, margin });
      assert.deepEqual(timeline(graph, again, options), course);
      assert.equal(planned.predict(graph), course.end_us);
      assert.deepEqual(again.plan(graph), schedule);
    }),
    { numRuns: 200 },
  );
});

Deno.test("planned: what fills the gaps delays no all-to-all", () => {
  const fills = fc.record({
    margin: fc.double({ min: 0, max: 0.9, noNaN: true }),
    least: fc.constantFrom(0, 0.5, 4),
  });
  fc.assert(
    fc.property(randomGraph, randomOptions, fills, fc.integer({ min: 1, max: 3 }), (
      graph,
      options,
      fill,
      count,
    ) => {
      const layers = graph.nodes.flatMap((node) => node.kind === "allToAll" ? [node.layer] : []);
      const chunks = new Map(layers.map((layer) => [layer, count]));
      const { microOps, launched } = new QuietStep(graph, { ...options, chunks }).fill(fill);
      const schedule = { microOps, chunks, exclusive: true };
      checkSchedule(graph, schedule);
      const filled = timeline(graph, {
        name: "filled",
        plan: () => schedule,
        launch: (boundary, { next, ready }) =>
          Math.min(ready, (launched.get(boundaryKey(boundary)) ?? 0) - next),
      }, options);
      const quiet = timeline(graph, {
        name: "quiet",
        plan: (graph) => ({ ...new Outside().plan(graph), chunks }),
        launch: ({ kind }, { ready }) => kind === "stepEnds" ? ready : 0,
      }, options);
      const program = (spans: typeof quiet.spans) =>
        spans.filter(({ lane }) => lane !== "gradients").toSorted((a, b) =>
          a.start_us - b.start_us || (a.name < b.name ? -1 : 1)
        );
      const want = program(quiet.spans);
      program(filled.spans).forEach(({ start_us, name }, i) => {
        const off = Math.abs(start_us - want[i].start_us);
        assert.ok(off <= 1e-6 * (1 + quiet.end_us), `${name}: ${start_us}`);
      });
    }),
    { numRuns: 200 },
  );
});

Deno.test("planned: never later than outside, fifo, priority and lina, nor before its bound", () => {
  fc.assert(
    fc.property(randomGraph, randomOptions, fc.constantFrom(1, 2), (graph, options, chunks) => {
      const planned = informed(graph, options, { chunks }), schedule = planned.plan(graph);
      const end_us = planned.predict(graph)!;
      const rate = options.costs.allToAll(1e6);
      const microOpBytes = Math.max(64, Math.round(2400 * rate.bytes / rate.link_us) || 64);
      const others: CollectiveScheduler[] = [
        new Outside(),
        new Fifo(),
        new Priority(),
        new Lina({ microOpBytes }),
      ];
      for (const other of others) {
        const cut: CollectiveScheduler = {
          name: other.name,
          pace: other.pace,
          plan: (graph: StepGraph) => ({ ...other.plan(graph), chunks: schedule.chunks }),
          launch: (boundary, state) => other.launch(boundary, state),
        };
        const late_us = timeline(graph, cut, { ...options, endsTold: "at once" }).end_us;
        assert.ok(end_us <= late_us * (1 + 1e-6), `${end_us} after ${other.name}'s ${late_us}`);
      }
      assert.ok(stepBounds(graph, schedule, options).bound_us <= end_us * (1 + 1e-9));
    }),
    { numRuns: 300 },
  );
});

Deno.test("planned: a plan of 24 layers takes little time", () => {
  const graph = buildStepGraph({
    layers: Array.from({ length: 24 }, (_, layer) => ({
      moe: { allToAllBytes: 3e6, experts: [] },
      feedForward: [gradient(`gate ${layer}`, 8192)],
      attention: ["norm2", "out", "qkv", "norm1"].map((name, i) =>
        gradient(`${name} ${layer}`, i % 3 === 0 ? 1024 : i * 1024 * 1024)
      ),
    })),
    head: [gradient("head", 32e6)],
    embedding: [gradient("embedding", 32e6)],
  });
  const options = { compute_us: () => 1500, costs: COSTS };
  informed(graph, options).plan(graph); // compiled
  const times = Array.from({ length: 5 }, () => {
    const start = performance.now();
    informed(graph, options).plan(graph);
    return performance.now() - start;
  });
  assert.ok(Math.min(...times) < 50, `${times}`);
});

function gradient(name: string, elements: number): GradientOutline {
  return { name, elements, elementBytes: 4, group: "world" };
}

/** Two MoE layers; a layer's backward pass has 1000 µs of computation between all-to-alls and 2000 µs after them. */
const GRAPH: StepGraph = buildStepGraph({
  layers: [0, 1].map((layer) => ({
    moe: { allToAllBytes: 1_000_000, experts: [] },
    feedForward: [gradient(`gate ${layer}`, 100)],
    attention: [gradient(`attention ${layer}`, 500_000), gradient(`norm ${layer}`, 100)],
  })),
  head: [gradient("head", 1_000_000)],
  embedding: [gradient("embedding", 250_000)],
});
const COSTS: StepCosts = stepCosts({ alpha_us: 20, bytes_per_us: 1000 }, { ranks: 4 });
const OPTIONS: TimelineOptions = {
  compute_us: ({ phase, layer, name }) =>
    phase === "forward" || layer < 0
      ? 500
      : name === "experts"
      ? 1000
      : name === "combine"
      ? 0
      : 1000,
  costs: COSTS,
};

Deno.test("planned: parts are cut to the time between all-to-alls, and small gradients share a reduction", () => {
  const planned = informed(GRAPH, OPTIONS), { microOps } = planned.plan(GRAPH);
  const { spans, end_us } = planned.course(GRAPH)!;
  const names = spans.filter(({ lane }) => lane === "gradients").map(({ name }) => name);
  assert.ok(names.some((name) => /^head \d+\.\.\d+$/.test(name)), `head in parts: ${names}`);
  assert.ok(names.some((name) => name.endsWith("and 3 more")), `small ones together: ${names}`);
  // Between the combine's end and the dispatch's start lie 1000 µs: 880 for bytes behind a latency of 120.
  const between = microOps.filter((microOp) =>
    Math.abs(timeAlone(COSTS.reduction(microOp.bytes)) - 1000) < 1
  );
  assert.ok(between.length >= 2, `${microOps.map(({ bytes }) => bytes)}`);
  const fifo = timeline(GRAPH, new Fifo(), OPTIONS).end_us;
  const outside = timeline(GRAPH, new Outside(), OPTIONS).end_us;
  assert.ok(end_us < fifo && end_us < outside, `${end_us}, fifo ${fifo}, outside ${outside}`);
});

Deno.test("planned: the number of slices is the best by prediction", () => {
  const of = (chunks: number | number[]) => {
    const planned = informed(GRAPH, OPTIONS, { chunks });
    return { end_us: planned.predict(GRAPH)!, chunks: planned.plan(GRAPH).chunks, planned };
  };
  const each = [1, 2, 4, 16].map((chunks) => of(chunks).end_us);
  const best = of([1, 2, 4, 16]);
  assert.equal(best.end_us, Math.min(...each));
  assert.ok(best.end_us < each[0] && best.chunks.get(0)! > 1);
  assert.equal(best.planned.name, "planned+pipeline");
  assert.equal(of(1).planned.name, "planned");
});

Deno.test("planned: without a profile of the step, or costs, it is outside", () => {
  const profile = { compute_us: new Map([[0, 1]]) };
  for (const options of [{}, { costs: COSTS }, { profile, costs: COSTS }]) {
    const planned = new Planned(options), outside = new Outside();
    assert.deepEqual(planned.plan(GRAPH), { ...outside.plan(GRAPH), chunks: new Map() });
    assert.equal(planned.predict(GRAPH), null);
    assert.deepEqual(timeline(GRAPH, planned, OPTIONS), timeline(GRAPH, outside, OPTIONS));
  }
  const cut = new Planned({ chunks: 3 }).plan(GRAPH);
  assert.deepEqual([...cut.chunks], [[0, 3], [1, 3]]);
});

Deno.test("planned: what is not ready when it was to go, goes at a later boundary", () => {
  const planned = informed(GRAPH, OPTIONS), schedule = planned.plan(GRAPH);
  const state = { schedule, running: 0, allToAlls: 0, imminent: false, insideMoe: true };
  const ends = GRAPH.nodes.filter((node) => node.kind === "allToAll" && node.phase === "backward");
  const at = (i: number, next: number, ready: number) =>
    planned.launch({ kind: "allToAllEnds", node: ends[i].id, chunk: 0 }, { ...state, next, ready });
  const due = at(3, 0, 99);
  assert.ok(due > 2);
  assert.equal(at(3, 0, 1), 1);
  assert.equal(at(3, due - 1, 99), 1);
  assert.equal(at(3, due + 1, 5), 0);
});

Deno.test("planned: options are checked", () => {
  for (const margin of [-0.1, 1, NaN]) {
    assert.throws(() => new Planned({ margin }), /"margin" must be at least 0 and below 1/);
  }
  for (const chunks of [0, 1.5, [], [2, 0]]) {
    assert.throws(() => new Planned({ chunks }), /"chunks" must be whole numbers >= 1/);
  }
});
