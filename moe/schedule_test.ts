import assert from "node:assert/strict";
import fc from "fast-check";
import { Fifo } from "./fifo.ts";
import {
  buildStepGraph,
  type GradientOutline,
  reducedGradients,
  type StepOutline,
} from "./graph.ts";
import type { Boundary, CollectiveScheduler, MicroOp, Schedule, StepGraph } from "./hooks.ts";
import { checkSchedule, ScheduleRun } from "./schedule.ts";

const gradient: fc.Arbitrary<Omit<GradientOutline, "name">> = fc.record({
  elements: fc.integer({ min: 1, max: 5000 }),
  elementBytes: fc.constantFrom(2, 4),
  group: fc.constantFrom("world", "replicas"),
});

const gradients = fc.array(gradient, { maxLength: 4 }).map((list) =>
  list.map((g, i): GradientOutline => ({ ...g, name: `g${i}` }))
);

const outline: fc.Arbitrary<StepOutline> = fc.record({
  layers: fc.array(
    fc.record({
      moe: fc.option(
        fc.record({ allToAllBytes: fc.integer({ min: 0, max: 1e6 }), experts: gradients }),
        { nil: undefined },
      ),
      feedForward: gradients,
      attention: gradients,
    }),
    { maxLength: 4 },
  ),
  head: gradients,
  embedding: gradients,
});

Deno.test("step graph: program order, dependencies before dependants", () => {
  fc.assert(fc.property(outline, (outline) => {
    const { nodes } = buildStepGraph(outline);
    nodes.forEach((node, i) => {
      assert.equal(node.id, i);
      for (const before of node.after) assert.ok(before < i);
    });
    const allToAlls = nodes.filter((node) => node.kind === "allToAll");
    assert.equal(allToAlls.length, 4 * outline.layers.filter((layer) => layer.moe).length);
  }));
});

Deno.test("fifo: every element once, in order of readiness, no bucket over its size or of two types", () => {
  fc.assert(fc.property(outline, fc.integer({ min: 1, max: 20_000 }), (outline, bucketBytes) => {
    const graph = buildStepGraph(outline);
    const schedule = new Fifo({ bucketBytes }).plan(graph);
    checkSchedule(graph, schedule);
    const nodes = reducedGradients(graph);
    const kinds = new Map(nodes.map((n) => [n.id, `${n.group} ${n.bytes / n.elements}`]));
    const buckets = schedule.microOps.map(({ parts }) => parts.map(({ gradient }) => gradient));
    const ascends = (ids: number[]) => assert.deepEqual(ids, ids.toSorted((a, b) => a - b));
    for (const kind of new Set(kinds.values())) {
      const ofType = buckets.filter((ids) => ids.some((id) => kinds.get(id) === kind));
      const ids = nodes.map(({ id }) => id).filter((id) => kinds.get(id) === kind);
      assert.deepEqual(ofType.flat(), ids);
      // No bucket is closed before the next gradient of its type would overfill it.
      ofType.slice(1).forEach(([next], i) => {
        const filled = schedule.microOps[buckets.indexOf(ofType[i])].bytes;
        assert.ok(filled + nodes.find(({ id }) => id === next)!.bytes > bucketBytes);
      });
    }
    ascends(buckets.map((ids) => ids.at(-1)!));
    for (const { parts, bytes } of schedule.microOps) {
      assert.ok(bytes <= bucketBytes || parts.length === 1);
    }
    assert.deepEqual(new Fifo({ bucketBytes }).plan(graph), schedule);
  }));
});

Deno.test("schedule run: micro-ops go once each, in order, only when ready, whatever the scheduler's mood", () => {
  fc.assert(fc.property(outline, fc.integer(), fc.boolean(), (outline, seed, reverse) => {
    const graph = buildStepGraph(outline);
    const plain = new Fifo({ bucketBytes: 4000 });
    let state = seed >>> 0;
    const moody: CollectiveScheduler = {
      name: "moody",
      plan: (graph) => plain.plan(graph),
      launch: (boundary, { ready }) => {
        state = Math.imul(state, 1664525) + 1013904223 >>> 0;
        return boundary.kind === "stepEnds" ? ready : Math.floor(state / 2 ** 32 * (ready + 1));
      },
    };
    const schedule = moody.plan(graph);
    const run = new ScheduleRun(moody, schedule);
    const launched: MicroOp[] = [], ready = new Set<number>();
    const on = (boundary: Boundary) => {
      for (const microOp of run.on(boundary)) {
        for (const part of microOp.parts) assert.ok(ready.has(part.gradient));
        launched.push(microOp);
      }
    };
    // Gradients may become ready in another order than the graph's.
    const order = reverse ? reducedGradients(graph).reverse() : reducedGradients(graph);
    for (const { id } of order) {
      ready.add(id);
      on({ kind: "gradientReady", gradient: id });
      if (launched.length > 0) on({ kind: "microOpEnds" });
    }
    assert.deepEqual(run.unready, []);
    on({ kind: "stepEnds" });
    assert.deepEqual(launched, schedule.microOps);
    assert.equal(run.left, 0);
  }));
});

Deno.test("schedule: gaps, overlaps, strangers and held back micro-ops are errors", () => {
  const graph: StepGraph = buildStepGraph({
    layers: [],
    head: [{ name: "w", elements: 10, elementBytes: 4, group: "world" }],
    embedding: [],
  });
  const id = reducedGradients(graph)[0].id;
  const plan = (...parts: [number, number, number][]): Schedule => ({
    microOps: parts.map(([gradient, start, end]) => ({
      parts: [{ gradient, start, end }],
      bytes: 4 * (end - start),
    })),
    chunks: new Map(),
  });
  checkSchedule(graph, plan([id, 6, 10], [id, 0, 6]));
  assert.throws(
    () => checkSchedule(graph, plan([id, 0, 4], [id, 5, 10])),
    /follow one another from 4/,
  );
  assert.throws(
    () => checkSchedule(graph, plan([id, 0, 6], [id, 5, 10])),
    /current value is 5\.\.10/,
  );
  assert.throws(() => checkSchedule(graph, plan([id, 0, 9])), /must cover 10/);
  assert.throws(
    () => checkSchedule(graph, plan([0, 0, 10])),
    /parts must be of gradients: current value is node 0/,
  );
  const whole = plan([id, 0, 10]);
  assert.throws(
    () => checkSchedule(graph, { ...whole, chunks: new Map([[0, 2]]) }),
    /must have all-to-alls: current value is layer 0/,
  );
  checkSchedule(graph, { ...whole, exclusive: true });
  const moe = buildStepGraph({
    layers: [{
      moe: {
        allToAllBytes: 1,
        experts: [{ name: "seat", elements: 4, elementBytes: 4, group: "replicas" }],
      },
      feedForward: [{ name: "w", elements: 10, elementBytes: 4, group: "world" }],
      attention: [],
    }],
    head: [],
    embedding: [],
  });
  const plain = new Fifo().plan(moe);
  const cut = (chunks: number) => ({ ...plain, chunks: new Map([[0, chunks]]) });
  for (const chunks of [1, 2, 7]) checkSchedule(moe, cut(chunks));
  for (const chunks of [0, 1.5, NaN, -1]) {
    assert.throws(() => checkSchedule(moe, cut(chunks)), /layer 0 in chunks as their number must/);
  }
  assert.equal(plain.microOps.length, 2); // no bucket of both
  const parts = plain.microOps.flatMap(({ parts }) => parts);
  assert.throws(
    () => checkSchedule(moe, { ...plain, microOps: [{ parts, bytes: 56 }] }),
    /micro-op 0 as its gradients must be reduced over the same ranks/,
  );
  assert.throws(
    () => checkSchedule(graph, { ...whole, exclusive: true }, "device"),
    /exclusive schedule as its pace must be program: current value is device/,
  );
  const halves = [[0, 5], [5, 10]].map(([start, end]) => ({ gradient: id, start, end }));
  const packed: Schedule = { microOps: [{ parts: halves, bytes: 40 }], chunks: new Map() };
  checkSchedule(graph, packed);
  assert.throws(() => checkSchedule(graph, packed, "device"), /must have one part: current value/);
  const run = (count: number) => {
    const scheduler = { name: "bad", plan: () => plan([id, 0, 10]), launch: () => count };
    return new ScheduleRun(scheduler, plan([id, 0, 10]));
  };
  assert.throws(() => run(1).on({ kind: "layerBackwardEnds", layer: 0 }), /must lie in 0\.\.0/);
  const stingy = run(0);
  stingy.on({ kind: "gradientReady", gradient: id });
  assert.throws(() => stingy.on({ kind: "stepEnds" }), /must lie in 1\.\.1/);
});

Deno.test("schedule run: an all-to-all is imminent until its last chunk has started", () => {
  const graph = buildStepGraph({
    layers: [{ moe: { allToAllBytes: 1, experts: [] }, feedForward: [], attention: [] }],
    head: [],
    embedding: [],
  });
  const seen: boolean[] = [];
  const scheduler: CollectiveScheduler = {
    name: "curious",
    plan: () => ({ microOps: [], chunks: new Map([[0, 3]]) }),
    launch: (_boundary, { imminent }) => {
      seen.push(imminent);
      return 0;
    },
  };
  const run = new ScheduleRun(scheduler, scheduler.plan(graph));
  run.on({ kind: "combineBackwardStarts", layer: 0 });
  for (const chunk of [0, 1, 2]) run.on({ kind: "allToAllStarts", node: 7, chunk });
  run.on({ kind: "combineBackwardStarts", layer: 0 });
  run.on({ kind: "layerBackwardEnds", layer: 0 }); // whatever a layer has left out
  assert.deepEqual(seen, [true, true, true, false, true, false]);
});

Deno.test("schedule run: only pace device hears of what is running", () => {
  const graph = buildStepGraph({
    layers: [],
    head: [{ name: "w", elements: 10, elementBytes: 4, group: "world" }],
    embedding: [],
  });
  const gradient = reducedGradients(graph)[0].id;
  const told = (pace?: CollectiveScheduler["pace"]) => {
    const seen: [string, number, number][] = [];
    const scheduler: CollectiveScheduler = {
      name: "curious",
      pace,
      plan: (graph) => new Fifo().plan(graph),
      launch: ({ kind }, { ready, running, allToAlls }) => {
        seen.push([kind, running, allToAlls]);
        return ready;
      },
    };
    const run = new ScheduleRun(scheduler, scheduler.plan(graph));
    run.on({ kind: "gradientReady", gradient });
    run.on({ kind: "allToAllStarts", node: 0, chunk: 0 });
    assert.deepEqual(run.on({ kind: "microOpEnds" }), []);
    run.on({ kind: "stepEnds" });
    return seen;
  };
  const program = [["gradientReady", 0, 0], ["allToAllStarts", 0, 0], ["stepEnds", 0, 0]];
  assert.deepEqual(told(), program);
  assert.deepEqual(told("program"), program);
  assert.deepEqual(told("device"), [
    ["gradientReady", 0, 0],
    ["allToAllStarts", 1, 1],
    ["microOpEnds", 0, 1],
    ["stepEnds", 0, 1],
  ]);
});
