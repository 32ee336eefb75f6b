import assert from "node:assert/strict";
import { buildStepGraph, type GradientOutline } from "../../moe/graph.ts";
import type { Mark } from "../../moe/gradients.ts";
import { computing } from "./measures.ts";
import type { CollectiveScheduler, StepGraph } from "../../moe/hooks.ts";
import { stepCosts, timeAlone } from "./links.ts";
import {
  agreeProfile,
  decodeProfile,
  encodeProfile,
  profiledTimes,
  readProfile,
} from "./profile.ts";
import { createScheduler } from "./schedulers.ts";
import { timeline, type TimelineOptions } from "./timeline.ts";
import { createCommunicator } from "../../collectives/communicator.ts";
import { openSelf } from "../../collectives/self.ts";

const gradient = (name: string): GradientOutline => {
  return { name, elements: 10, elementBytes: 4, group: "world" };
};

const GRAPH = buildStepGraph({
  layers: [0, 1].map((layer) => ({
    moe: { allToAllBytes: 100, experts: [] },
    feedForward: [gradient(`gate${layer}`)],
    attention: [gradient(`qkv${layer}`)],
  })),
  head: [gradient("head")],
  embedding: [gradient("embedding")],
});

/** Marks of a step on a device that needs 10 µs for every piece of computation and 100 for an all-to-all, as the engine sets them. */
function marksOf(compute_us: (id: number) => number): Mark[] {
  const marks: Mark[] = [];
  let time_us = 1000;
  const mark = (boundary: Mark["boundary"]) => {
    const time = time_us;
    marks.push({ boundary, event: { done: () => true, time: () => time } });
  };
  mark({ kind: "passBegins" });
  let ending: number | null = null;
  for (const node of GRAPH.nodes) {
    if (node.kind === "gradient") {
      mark({ kind: "gradientReady", gradient: node.id });
      continue;
    }
    if (ending !== null) mark({ kind: "layerBackwardEnds", layer: ending });
    ending = null;
    if (node.kind === "allToAll") {
      mark({ kind: "allToAllStarts", node: node.id, chunk: 0 });
      time_us += 100;
      mark({ kind: "allToAllEnds", node: node.id, chunk: 0 });
      continue;
    }
    const { layer, phase, name } = node;
    if (phase === "backward" && name === "combine") mark({ kind: "combineBackwardStarts", layer });
    time_us += compute_us(node.id);
    if (phase === "backward" && name === "gate") ending = layer;
  }
  mark({ kind: "passEnds" });
  return marks;
}

Deno.test("profile: every piece between two marks has its time", () => {
  const { compute_us } = readProfile(GRAPH, marksOf((id) => 10 + id));
  let sum = 0, expected = 0;
  for (const node of GRAPH.nodes) {
    if (node.kind !== "compute") continue;
    sum += compute_us.get(node.id)!;
    expected += 10 + node.id;
    // Marks stand at both ends of these.
    const alone = node.name === "experts" || (node.phase === "backward" && node.layer >= 0);
    if (alone) assert.equal(compute_us.get(node.id), 10 + node.id, JSON.stringify(node));
  }
  assert.equal(sum, expected);
});

Deno.test("profile: ranks agree on medians of steps", async () => {
  const comm = createCommunicator(openSelf(), { rank: 0, size: 1, name: "world" });
  const profiles = [30, 10, 20].map((time) => readProfile(GRAPH, marksOf(() => time)));
  const { compute_us } = await agreeProfile(comm, profiles);
  const experts = GRAPH.nodes.find((node) => node.kind === "compute" && node.name === "experts")!;
  assert.equal(compute_us.get(experts.id), 20);
  await assert.rejects(agreeProfile(comm, []), /there must be one: current value is none/);
});

/** Marks of a step on the virtual clock, as an engine would set them, on a clock of its own. */
function marksFrom(graph: StepGraph, scheduler: CollectiveScheduler, options: TimelineOptions) {
  const { boundaries } = timeline(graph, scheduler, options);
  const at = (boundary: Mark["boundary"], at_us: number): Mark => {
    return { boundary, event: { done: () => true, time: () => 5000 + at_us } };
  };
  return [
    at({ kind: "passBegins" }, 0),
    ...boundaries.filter(({ boundary }) => boundary.kind !== "stepEnds")
      .map(({ boundary, at_us }) => at(boundary, at_us)),
    at({ kind: "passEnds" }, boundaries.at(-1)!.at_us),
  ];
}

Deno.test("profile: a simulated step gives its own times back, whatever reduced its gradients", () => {
  const costs = stepCosts({ alpha_us: 20, bytes_per_us: 0.1 }, { ranks: 4 });
  const options: TimelineOptions = {
    compute_us: ({ id }) => 100 + 7 * id,
    lead_us: ({ id }) => id % 3 * 10,
    costs,
  };
  for (const name of ["fifo", "outside", "lina"] as const) {
    const profile = readProfile(GRAPH, marksFrom(GRAPH, createScheduler(name), options));
    for (const node of GRAPH.nodes) {
      if (node.kind === "allToAll") {
        assert.ok(
          Math.abs(profile.allToAll_us!.get(node.id)! - timeAlone(costs.allToAll(100))) < 1e-6,
        );
      } else if (node.kind === "compute" && node.phase === "backward" && node.layer >= 0) {
        // Nothing marks the end of what follows the last gradient of the first layer.
        if (node.layer === 0 && node.name === "attention") continue;
        assert.ok(Math.abs(profile.compute_us.get(node.id)! - options.compute_us(node)) < 1e-6);
      } else if (node.kind === "gradient" && /gate|qkv1/.test(node.name)) {
        assert.ok(
          Math.abs(profile.lead_us!.get(node.id)! - options.lead_us!(node)) < 1e-6,
          node.name,
        );
      }
    }
    // And the model of what was read takes as long as the step did, under any scheduler.
    const known = profiledTimes(GRAPH, profile, costs)!;
    for (const other of ["fifo", "outside", "lina"] as const) {
      const end_us = timeline(GRAPH, createScheduler(other), known).end_us;
      const want_us = timeline(GRAPH, createScheduler(other), options).end_us;
      assert.ok(Math.abs(end_us / want_us - 1) < 0.01, `${name}, ${other}: ${end_us}, ${want_us}`);
    }
  }
});

Deno.test("profile: an all-to-all that takes longer than the balanced one does so in slices, too", () => {
  const costs = stepCosts({ alpha_us: 20, bytes_per_us: 1 }, { ranks: 2 });
  const profile = readProfile(GRAPH, marksOf(() => 10));
  const node = GRAPH.nodes.find((node) => node.kind === "allToAll")!;
  const known = profiledTimes(
    GRAPH,
    { ...profile, allToAll_us: new Map([[node.id, 170]]) },
    costs,
  )!;
  assert.equal(timeAlone(known.costs.allToAll(100, node)), 170);
  assert.equal(timeAlone(known.costs.allToAll(50, node)), 20 + 75);
  assert.equal(timeAlone(known.costs.allToAll(100)), 120);
  assert.equal(profiledTimes(GRAPH, { compute_us: new Map() }, costs), null);
});

Deno.test("profile: what is computed again belongs to the backward pass", () => {
  const marks = marksOf(() => 10), plain = readProfile(GRAPH, marks);
  const at = marks.findIndex(({ boundary }) =>
    boundary.kind === "combineBackwardStarts" && boundary.layer === 0
  );
  const before = marks[at].event.time();
  // Layer 0 runs again before its combine's backward: 3 us, an all-to-all of 50 us, and 4 us more.
  const forward = GRAPH.nodes.find((node) => node.kind === "allToAll")!.id;
  const late = (mark: Mark, by: number): Mark => {
    const time = mark.event.time() + by;
    return { ...mark, event: { done: () => true, time: () => time } };
  };
  const again = (kind: "allToAllStarts" | "allToAllEnds", time: number): Mark => {
    return {
      boundary: { kind, node: forward, chunk: 0 },
      event: { done: () => true, time: () => before + time },
    };
  };
  const repeated = readProfile(GRAPH, [
    ...marks.slice(0, at),
    again("allToAllStarts", 3),
    again("allToAllEnds", 53),
    ...marks.slice(at).map((mark) => late(mark, 57)),
  ]);
  const attention =
    GRAPH.nodes.find((node) =>
      node.kind === "compute" && node.phase === "backward" && node.layer === 1 &&
      node.name === "attention"
    )!.id;
  assert.equal(repeated.compute_us.get(attention), plain.compute_us.get(attention)! + 7);
  assert.deepEqual(repeated.allToAll_us, plain.allToAll_us);
  for (const [id, time] of plain.compute_us) {
    if (id !== attention) assert.equal(repeated.compute_us.get(id), time);
  }
});

Deno.test("profile: plain data and back", () => {
  const profile = { ...readProfile(GRAPH, marksOf((id) => id)), jitter: 0.03 };
  const data = JSON.parse(JSON.stringify(encodeProfile(profile)));
  assert.deepEqual(decodeProfile(GRAPH, data), profile);
  assert.throws(() => decodeProfile(GRAPH, null), /lacks node 0/);
  const [first, ...rest] = data.compute_us;
  assert.throws(() => decodeProfile(GRAPH, { ...data, compute_us: rest }), /lacks node 0/);
  for (const wrong of [[first[0], -1], [first[0], "1"], [9999, 1], "x"]) {
    assert.throws(
      () => decodeProfile(GRAPH, { ...data, compute_us: [wrong, ...rest] }),
      /must have times of compute nodes of the step: current value is /,
    );
  }
  assert.throws(
    () => decodeProfile(GRAPH, { ...data, jitter: NaN }),
    /"jitter" must be at least 0/,
  );
});

Deno.test("measures: the compute stream works but for its waits", () => {
  const marks = marksOf(() => 10);
  const intervals = computing(marks);
  const nodes = GRAPH.nodes.filter(({ kind }) => kind === "compute").length;
  const length = intervals.reduce((sum, { start_us, end_us }) => sum + end_us - start_us, 0);
  assert.equal(length, 10 * nodes);
  assert.equal(intervals.length, 9); // eight all-to-alls lie between them
  const late: Mark = { ...marks[3], event: { done: () => false, time: () => NaN } };
  assert.throws(() => computing([marks[0], late]), /which it has not/);
});
