// Random training steps for properties of schedules: outlines with and without MoE layers, durations, links, and one scheduler of each kind.

import fc from "fast-check";
import { createScheduler, SCHEDULER_NAMES } from "../../lina/training/schedulers.ts";
import { type Link, stepCosts } from "../../lina/training/links.ts";
import type { TimelineOptions } from "../../lina/training/timeline.ts";
import { buildStepGraph, type GradientOutline } from "../../moe/graph.ts";
import type { CollectiveScheduler, StepGraph } from "../../moe/hooks.ts";

const gradients: fc.Arbitrary<GradientOutline[]> = fc.array(
  fc.record({
    elements: fc.integer({ min: 1, max: 5000 }),
    elementBytes: fc.constantFrom(2, 4),
    group: fc.constantFrom("world", "world", "replicas"),
  }),
  { maxLength: 4 },
).map((list) => list.map((g, i): GradientOutline => ({ ...g, name: `g${i}` })));

/** Graphs of up to four layers. */
export const randomGraph: fc.Arbitrary<StepGraph> = fc.record({
  layers: fc.array(
    fc.record({
      moe: fc.option(
        fc.record({ allToAllBytes: fc.integer({ min: 0, max: 30_000 }), experts: gradients }),
        { nil: undefined },
      ),
      feedForward: gradients,
      attention: gradients,
    }),
    { maxLength: 4 },
  ),
  head: gradients,
  embedding: gradients,
}).map(buildStepGraph);

/** Every policy at small sizes, and one of pace `program` that launches a random part of what is ready, exclusive or not. */
export const randomScheduler: fc.Arbitrary<() => CollectiveScheduler> = fc.record({
  name: fc.constantFrom(...SCHEDULER_NAMES, "moody"),
  bytes: fc.integer({ min: 16, max: 20_000 }),
  exclusive: fc.boolean(),
  seed: fc.integer(),
}).map(({ name, bytes, exclusive, seed }) => () => {
  if (name !== "moody") {
    const sizes = { bucketBytes: bytes, microOpBytes: Math.max(bytes, 500) };
    return createScheduler(name, sizes);
  }
  const fifo = createScheduler("fifo", { bucketBytes: bytes });
  let state = seed >>> 0;
  return {
    name,
    plan: (graph) => ({ ...fifo.plan(graph), exclusive }),
    launch: (boundary, { ready }) => {
      state = Math.imul(state, 1664525) + 1013904223 >>> 0;
      return boundary.kind === "stepEnds" ? ready : Math.floor(state / 2 ** 32 * (ready + 1));
    },
  };
});

/** Links with and without latency. */
export const randomLink: fc.Arbitrary<Link> = fc.record({
  alpha_us: fc.constantFrom(0, 1, 20),
  bytes_per_us: fc.constantFrom(1, 7, 100, 1250),
});

/** Durations of 0 to 999 µs, the same for the same node, and costs. */
export const randomOptions: fc.Arbitrary<TimelineOptions> = fc.record({
  link: randomLink,
  ranks: fc.integer({ min: 1, max: 8 }),
  scatter: fc.boolean(),
  seed: fc.nat(),
  endsTold: fc.constantFrom("boundary", "at once"),
}).map(({ link, ranks, scatter, seed, endsTold }) => ({
  compute_us: ({ id }) => (Math.imul(id + seed, 2654435761) >>> 0) % 1000,
  costs: stepCosts(link, { ranks, scatter }),
  endsTold,
}));
