import assert from "node:assert/strict";
import fc from "fast-check";
import { Fifo } from "../../moe/fifo.ts";
import { buildStepGraph, type GradientOutline } from "../../moe/graph.ts";
import type { StepGraph } from "../../moe/hooks.ts";
import { checkSchedule } from "../../moe/schedule.ts";
import { randomGraph, randomOptions } from "../../tests/lib/random_steps.ts";
import { stepBounds } from "./bounds.ts";
import { type StepCosts, stepCosts, timeAlone } from "./links.ts";
import { Outside } from "./outside.ts";
import { Planned, type PlannedOptions } from "./planned.ts";
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

Deno.test("planned: reduces everything once, delays no all-to-all, and is alike wherever it is planned", () => {
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
      assert.equal(schedule.exclusive, true);
      const course = planned.predict(graph)!;
      assert.deepEqual(
        timeline(graph, informed(graph, options, { chunks, margin }), options),
        course,
      );
      assert.deepEqual(informed(graph, options, { chunks, margin }).plan(graph), schedule);
      // With nothing but all-to-alls on the link they take just as long.
      const program = (spans: typeof course.spans) =>
        spans.filter(({ lane }) => lane !== "gradients").map((
          { name, start_us },
        ) => [name, start_us]);
      const quiet = timeline(graph, {
        name: "quiet",
        plan: (graph) => ({ ...new Outside().plan(graph), chunks: schedule.chunks }),
        launch: ({ kind }, { ready }) => kind === "stepEnds" ? ready : 0,
      }, options);
      const want = program(quiet.spans);
      program(course.spans).forEach(([name, start_us], i) => {
        assert.equal(name, want[i][0]);
        const off = Math.abs(Number(start_us) - Number(want[i][1]));
        assert.ok(
          off <= 1e-6 * (1 + quiet.end_us),
          `${name}: ${start_us} instead of ${want[i][1]}`,
        );
      });
    }),
    { numRuns: 200 },
  );
});

Deno.test("planned: no later than outside, nor than the bound by more than latencies", () => {
  fc.assert(
    fc.property(randomGraph, randomOptions, (graph, options) => {
      const planned = informed(graph, options), schedule = planned.plan(graph);
      const { end_us } = planned.predict(graph)!;
      const outside = timeline(graph, new Outside({ bucketBytes: 1 }), options).end_us;
      const latency_us = Math.max(
        ...(["world", "replicas"] as const).map((group) =>
          options.costs.reduction(0, group).latency_us
        ),
      );
      // A reduction that waits for others to share its latency may come one latency later than one of its own.
      assert.ok(end_us <= outside + 8 * latency_us + 1e-6 * end_us, `${end_us} after ${outside}`);
      assert.ok(stepBounds(graph, schedule, options).bound_us <= end_us * (1 + 1e-9));
    }),
    { numRuns: 300 },
  );
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
  const { spans, end_us } = planned.predict(GRAPH)!;
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
    return { end_us: planned.predict(GRAPH)!.end_us, chunks: planned.plan(GRAPH).chunks, planned };
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
