import assert from "node:assert/strict";
import fc from "fast-check";
import { buildStepGraph } from "../../moe/graph.ts";
import type { CollectiveScheduler, StepGraph } from "../../moe/hooks.ts";
import { randomGraph, randomOptions, randomScheduler } from "../../tests/lib/random_steps.ts";
import { type BoundOptions, stepBounds } from "./bounds.ts";
import type { StepCosts } from "./links.ts";
import { createScheduler } from "./schedulers.ts";
import { timeline } from "./timeline.ts";

/** No bound is above another that must be larger, to rounding. */
function atMost(low: number, high: number, what: string): void {
  assert.ok(low <= high + 1e-9 * Math.max(1, high), `${what}: ${low} above ${high}`);
}

/** Latency of 10 µs and 1 µs per byte. */
const COSTS: StepCosts = {
  allToAll: (bytes) => ({ latency_us: 10, link_us: bytes, bytes }),
  reduction: (bytes) => ({ latency_us: 10, link_us: bytes, bytes }),
};

/** One MoE layer with a gradient of the head and one of attention; 1-byte elements. */
function layer(head: number, attention: number): StepGraph {
  const gradient = (name: string, elements: number) =>
    ({ name, elements, elementBytes: 1, group: "world" }) as const;
  return buildStepGraph({
    layers: [{
      moe: { allToAllBytes: 200, experts: [] },
      feedForward: [],
      attention: [gradient("attention", attention)],
    }],
    head: [gradient("head", head)],
    embedding: [],
  });
}

/** Gradients that are ready up to 299 µs early. */
const leadOf = ({ id }: { readonly id: number }) => id * 97 % 300;

/** Bounds of a layer under fifo with a bucket for each gradient; 10 nodes of 100 µs. */
function bounds(graph: StepGraph, options: Partial<BoundOptions> & { exclusive?: boolean } = {}) {
  const plan = createScheduler("fifo", { bucketBytes: 1 }).plan(graph);
  const { exclusive, ...rest } = options;
  return stepBounds(graph, { ...plan, exclusive }, {
    compute_us: () => 100,
    costs: COSTS,
    ...rest,
  });
}

Deno.test("bounds: the critical path is the program's or leads through the micro-ops", () => {
  // Forward: embedding, attention, gate, experts, combine, head; backward: head, combine, experts, gate, attention, embedding.
  const program = 12 * 100 + 4 * 210;
  const small = bounds(layer(16, 16));
  assert.deepEqual(small, {
    compute_us: 1200,
    link_us: 832,
    floor_us: 1200,
    criticalPath_us: program,
    bound_us: program,
  });
  // Attention's gradient is ready 100 µs before the program's end; the head's is under way by then.
  assert.equal(bounds(layer(16, 1000)).criticalPath_us, program - 100 + 1010);
  // The head's is ready after 7 nodes and 2 all-to-alls.
  assert.equal(bounds(layer(3000, 1000)).criticalPath_us, 700 + 420 + 3010 + 1010);
});

Deno.test("bounds: what the link has yet to carry", () => {
  // From the head's gradient on: both reductions and the two all-to-alls of the backward pass, the first of them 10 µs later.
  const { criticalPath_us, floor_us, bound_us } = bounds(layer(3000, 1000));
  assert.equal(bound_us, 700 + 420 + 10 + 3000 + 1000 + 2 * 200);
  assert.equal(floor_us, 4 * 200 + 4000);
  assert.ok(criticalPath_us < bound_us && floor_us < bound_us);
});

Deno.test("bounds: exclusive schedules have the rest of the all-to-alls on the path, outside the rest of the layer", () => {
  const graph = layer(3000, 1000);
  const free = 700 + 420 + 3010 + 1010;
  assert.equal(bounds(graph, { exclusive: true }).criticalPath_us, free + 2 * 210);
  const outside = bounds(graph, { exclusive: true, outside: true });
  assert.equal(outside.criticalPath_us, free + 2 * 210 + 2 * 100);
  // Without exclusion micro-ops that were launched before may run on.
  assert.equal(bounds(graph, { outside: true }).criticalPath_us, free);
});

Deno.test("bounds: floor ≤ bound, critical path ≤ bound, and no timeline is shorter", () => {
  let tight = 0, runs = 0;
  fc.assert(
    fc.property(
      randomGraph,
      randomScheduler,
      randomOptions,
      fc.boolean(),
      (graph, make, times, leads) => {
        const options = leads ? { ...times, lead_us: leadOf } : times;
        const scheduler = make();
        const outside = scheduler.name === "outside";
        const { floor_us, criticalPath_us, compute_us, link_us, bound_us } = stepBounds(
          graph,
          scheduler.plan(graph),
          { ...options, outside },
        );
        atMost(compute_us, criticalPath_us, "computation and path");
        atMost(Math.max(compute_us, link_us), floor_us, "parts and floor");
        atMost(floor_us, bound_us, "floor and bound");
        atMost(criticalPath_us, bound_us, "path and bound");
        const { end_us } = timeline(graph, scheduler, options);
        atMost(bound_us, end_us, `bound and timeline of ${scheduler.name}`);
        runs++;
        if (bound_us > end_us * (1 - 1e-9)) tight++;
      },
    ),
    { numRuns: 500 },
  );
  // A bound that is never reached would say little.
  assert.ok(tight > runs / 4, `${tight} of ${runs}`);
});

Deno.test("bounds: with nothing to reduce the bound is the step", () => {
  fc.assert(fc.property(randomGraph, randomOptions, (graph, options) => {
    const scheduler: CollectiveScheduler = {
      name: "none",
      plan: () => ({ microOps: [], chunks: new Map() }),
      launch: () => 0,
    };
    const nodes = graph.nodes.map((node) =>
      node.kind === "gradient" ? { ...node, elements: 0, bytes: 0 } : node
    );
    const { end_us } = timeline({ nodes }, scheduler, options);
    const { bound_us } = stepBounds({ nodes }, scheduler.plan({ nodes }), options);
    assert.ok(Math.abs(bound_us - end_us) <= 1e-9 * end_us);
  }));
});
