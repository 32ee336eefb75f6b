import assert from "node:assert/strict";
import { buildStepGraph, type GradientOutline } from "../../moe/graph.ts";
import type { Mark } from "../../moe/gradients.ts";
import { computing } from "./measures.ts";
import { agreeProfile, readProfile } from "./profile.ts";
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
