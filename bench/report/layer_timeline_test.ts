import assert from "node:assert/strict";
import fc from "fast-check";
import type { Span, SpanArgs } from "../../trace/mod.ts";
import { difference, intersection, type Interval, length, union } from "./intervals.ts";
import { layerTimeline, stepSplit } from "./layer_timeline.ts";

const allToAll = (
  layer: number,
  phase: string,
  role: string,
  [start, end]: Interval,
  chunk = "",
): Span => ({
  track: "world",
  name: `layer ${layer} ${phase} ${role}${chunk}`,
  category: "allToAll",
  start,
  end,
  args: { layer, phase, role, bytes: 8000 },
});
const gradient = (name: string, [start, end]: Interval, args: SpanArgs = {}): Span => ({
  track: "gradients",
  name,
  category: "allReduce",
  start,
  end,
  args: { bytes: 4000, ...args },
});
const CHOICE = { layer: 1, policy: "lina", shape: "s", ranks: 4, mbit: 10_000 };

/** A step of two layers, from 1000 µs on. */
const SPANS: readonly Span[] = [
  allToAll(1, "forward", "dispatch", [1000, 1100]),
  allToAll(2, "backward", "dispatch", [1500, 1900]),
  allToAll(1, "backward", "combine", [2000, 2400], " 0/2"),
  allToAll(1, "backward", "combine", [2400, 2800], " 1/2"),
  allToAll(1, "backward", "dispatch", [3300, 3700]),
  allToAll(0, "backward", "combine", [4200, 4600]),
  gradient("model.layers.2.q.weight 0..9", [3000, 3200], { queued_us: 900 }),
  gradient("model.layers.1.q.weight 0..9", [4650, 4900], { queued_us: 300 }),
  gradient("model.layers.2.k.weight and 3 more", [4900, 5000], { last: "model.layers.0.q.weight" }),
  gradient("model.layers.0.q.weight", [5000, 6000]),
];
const COMPUTING: readonly Interval[] = [[1910, 1990], [2450, 3290], [3710, 4190], [4610, 5500]];

Deno.test("layerTimeline() cuts one layer's backward pass out, until its last gradient is reduced", () => {
  const own = layerTimeline({ spans: SPANS, computing: COMPUTING }, CHOICE)!;
  const shown = (lane: string) =>
    own.spans.filter((span) => span.lane === lane)
      .map((span) =>
        `${span.name} ${span.start_us}-${span.end_us}${span.own === false ? " beside" : ""}`
      );
  // It begins with the end of the computation before its all-to-all, and ends with the bucket that has a gradient of it.
  assert.equal(own.done_us, 3010);
  assert.deepEqual(shown("compute"), [
    "experts 460-1300",
    "gate, attention 1720-2200",
    "next layers 2620-3010 beside",
  ]);
  assert.deepEqual(shown("allToAll"), [
    "combine 0/2 10-410",
    "combine 1/2 410-810",
    "dispatch 1310-1710",
    "layer 0 backward combine 2210-2610 beside",
  ]);
  assert.deepEqual(shown("gradients"), [
    "model.layers.2.q.weight 0..9 1010-1210 beside",
    "model.layers.1.q.weight 0..9 2660-2910",
    "model.layers.2.k.weight and 3 more 2910-3010",
  ]);
  assert.equal(own.spans.find(({ name }) => name.includes("1.q"))!.queued_us, 300);
  assert.equal(layerTimeline({ spans: SPANS }, { ...CHOICE, layer: 7 }), null);
  // An all-to-all that waits for micro-ops: the layer begins where it was asked for.
  const startOf = (computing: Interval[]) =>
    layerTimeline({ spans: SPANS, computing }, CHOICE)!.spans[0].start_us;
  assert.equal(startOf([[1905, 1950]]), 50);
  assert.equal(startOf([[1800, 1850]]), 100, "not before the all-to-all before has ended");
  assert.equal(startOf([[1905, 2050]]), 0, "computation beside it");
});

Deno.test("a bucket is of every layer from its first gradient's to its last's", () => {
  const ofLayer = (name: string, last: string | undefined, layer: number) => {
    const spans = [
      allToAll(layer, "backward", "combine", [0, 10]),
      gradient(name, [20, 30], last === undefined ? {} : { last }),
    ];
    const own = layerTimeline({ spans }, { ...CHOICE, layer })!;
    return own.spans.some((span) => span.lane === "gradients" && span.own !== false);
  };
  const layer = (i: number) => `model.layers.${i}.input_layernorm.weight`;
  const embedding = "model.embed_tokens.weight";
  assert.ok(ofLayer("lm_head.weight and 23 more", embedding, 0));
  assert.ok(ofLayer("lm_head.weight and 3 more", layer(2), 2));
  assert.ok(!ofLayer("lm_head.weight and 3 more", layer(2), 1));
  assert.ok(!ofLayer("lm_head.weight and 1 more", "model.norm.weight", 2));
  assert.ok(ofLayer(`${layer(1)} and 1 more`, embedding, 0));
  assert.ok(!ofLayer(`${layer(1)} and 1 more`, embedding, 2));
  assert.ok(!ofLayer(embedding, undefined, 0));
  assert.ok(ofLayer(`${layer(0)} 0..9`, undefined, 0));
});

Deno.test("spans of a timeline are inside it, whatever was recorded", () => {
  const interval = fc.tuple(fc.nat(9000), fc.nat(2000)).map(([a, d]): Interval => [a, a + d]);
  const span = fc.oneof(
    fc.tuple(fc.nat(2), fc.constantFrom("forward", "backward"), interval).map(([l, p, at]) =>
      allToAll(l, p, "combine", at)
    ),
    fc.tuple(fc.nat(2), interval, fc.nat(3000)).map(([l, at, queued_us]) =>
      gradient(`model.layers.${l}.w`, at, { queued_us })
    ),
    interval.map(([start, end]): Span => ({
      track: "compute",
      name: "gemm",
      category: "gemm",
      start,
      end,
    })),
  );
  fc.assert(fc.property(fc.array(span, { maxLength: 40 }), (spans) => {
    const own = layerTimeline({ spans }, CHOICE);
    const has = spans.some(({ args }) => args?.layer === 1 && args.phase === "backward");
    assert.equal(own !== null, has);
    for (const { start_us, end_us } of own?.spans ?? []) {
      assert.ok(start_us >= 0 && end_us > start_us && end_us <= own!.done_us!);
    }
  }));
});

Deno.test("stepSplit(): computation, what hides nothing, overlap", () => {
  const spans = [
    allToAll(0, "forward", "dispatch", [0, 100]),
    gradient("w", [50, 400]),
    allToAll(0, "backward", "combine", [300, 350]),
  ];
  assert.deepEqual(stepSplit({ spans, computing: [[40, 60], [200, 310]] }, [0, 500]), {
    compute_ms: 0.13,
    exposed_a2a_ms: 0.12,
    exposed_allreduce_ms: 0.15,
    overlap: 0.325,
    pipelining: 0.2,
    utilisation: 0.26,
  });
  const idle = stepSplit({ spans: [] }, [0, 0]);
  assert.deepEqual(Object.values(idle), [0, 0, 0, 0, 0, 0]);
});

Deno.test("intervals: unions, intersections and differences are those of sets of points", () => {
  const list = fc.array(fc.tuple(fc.nat(40), fc.nat(12)).map(([a, d]): Interval => [a, a + d]));
  const has = (intervals: readonly Interval[], at: number) =>
    intervals.some(([start, end]) => start <= at && at < end);
  fc.assert(fc.property(list, list, (a, b) => {
    const A = union(a), B = union(b);
    const both = intersection(A, B), rest = difference(A, B);
    for (let at = 0.5; at < 60; at++) {
      assert.equal(has(A, at), has(a, at));
      assert.equal(has(both, at), has(a, at) && has(b, at));
      assert.equal(has(rest, at), has(a, at) && !has(b, at));
    }
    assert.equal(length(both) + length(rest), length(A));
    for (const own of [A, both, rest]) {
      own.forEach(([start, end], i) => {
        assert.ok(start < end && (i === 0 || own[i - 1][1] <= start));
      });
    }
  }));
});
