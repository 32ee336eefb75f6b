import assert from "node:assert/strict";
import { COMPLETED } from "../collectives/progress.ts";
import type { AllReduceOptions, Communicator, Work } from "../collectives/types.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { type Device, Events, type StreamEvent } from "../tensor/device.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { recorder } from "../trace/mod.ts";
import { Fifo } from "./fifo.ts";
import { GradientReducer, type Mark } from "./gradients.ts";
import { buildStepGraph, seatGradientName } from "./graph.ts";
import type { CollectiveScheduler } from "./hooks.ts";
import { createParameter, freeParameter } from "./parameter.ts";

const device = cpuDevice();

for (const exclusive of [false, true]) {
  const what = exclusive ? "waits" : "does not wait";
  Deno.test(`gradients: an all-to-all ${what} for micro-ops launched before it`, async () => {
    const log: string[] = [];
    const slow: Work = {
      done: false,
      wait: async () => {
        await Promise.resolve();
        log.push("micro-op awaited");
      },
      then: (resolve, reject) => Promise.resolve().then(resolve, reject),
    };
    const comm = { allReduce: () => slow } as unknown as Communicator;
    const graph = buildStepGraph({
      head: [{ name: "w", elements: 3, elementBytes: 4, group: "world" }],
      layers: [{ moe: { allToAllBytes: 1, experts: [] }, feedForward: [], attention: [] }],
      embedding: [],
    });
    const weights = createParameter(device, "w", { shape: [3], dtype: "f32", init: { value: 1 } });
    const fifo = new Fifo();
    const scheduler: CollectiveScheduler = {
      name: "exclusive",
      plan: (graph) => ({ ...fifo.plan(graph), exclusive }),
      launch: (boundary, state) => fifo.launch(boundary, state),
    };
    const parameters = [weights];
    const step = new GradientReducer({ graph, scheduler, comm, device, parameters }).begin(0);
    step.gradientReady("w");
    const place = { layer: 0, phase: "backward", role: "combine", chunk: 0 } as const;
    const ended = await step.allToAll(place, () => {
      log.push("all-to-all");
      return COMPLETED;
    });
    await ended();
    await step.finish();
    assert.deepEqual(log, [
      ...(exclusive ? ["micro-op awaited"] : []),
      "all-to-all",
      "micro-op awaited",
    ]);
    freeParameter(weights);
  });
}

/** An event of its own. */
function eventOf(): StreamEvent {
  return { done: () => false, time: () => NaN };
}

/** Work that never ends, as far as the host sees, with an end on the device. */
function workOf(end: StreamEvent): Work {
  return { done: false, end, wait: () => {}, then: () => new Promise<never>(() => {}) };
}

Deno.test("gradients: in an exclusive schedule chunks in flight and micro-ops wait for each other on the device", async () => {
  const log: unknown[] = [], present = eventOf();
  const stream = { ...device.stream, record: () => present };
  const gpu: Device = { ...device, stream };
  const reduced = [eventOf(), eventOf()], exchanged = [eventOf(), eventOf()];
  const ends = reduced.values();
  const comm = {
    size: 2,
    allReduce: (_x: Tensor, { after }: AllReduceOptions) => {
      log.push("micro-op", ...after instanceof Events ? after.all : [after]);
      return workOf(ends.next().value!);
    },
  } as unknown as Communicator;
  const world = { elementBytes: 4, group: "world" } as const;
  const graph = buildStepGraph({
    head: [{ name: "w", elements: 3, ...world }, { name: "v", elements: 3, ...world }],
    layers: [{ moe: { allToAllBytes: 1, experts: [] }, feedForward: [], attention: [] }],
    embedding: [],
  });
  const parameters = ["w", "v"].map((name) =>
    createParameter(device, name, { shape: [3], dtype: "f32", init: { value: 1 } })
  );
  const fifo = new Fifo({ bucketBytes: 12 });
  const scheduler: CollectiveScheduler = {
    name: "exclusive",
    plan: (graph) => ({ ...fifo.plan(graph), exclusive: true, chunks: new Map([[0, 2]]) }),
    launch: (boundary, state) => fifo.launch(boundary, state),
  };
  const step = new GradientReducer({ graph, scheduler, comm, device: gpu, parameters }).begin(0);
  assert.equal(step.chunks(0), 2);
  assert.equal(step.chunks(1), 1);
  const start = (chunk: number) =>
    step.allToAll({ layer: 0, phase: "backward", role: "combine", chunk }, (after) => {
      log.push("all-to-all", ...after instanceof Events ? after.all : [after]);
      return workOf(exchanged[chunk]);
    });
  const first = await start(0); // nothing runs
  step.gradientReady("w"); // beside the first chunk
  const second = await start(1); // behind that micro-op
  await first();
  await second();
  step.gradientReady("v"); // behind nothing: the device's stream has waited for both
  await step.finish();
  assert.deepEqual(log, [
    ...["all-to-all", undefined],
    ...["micro-op", present, exchanged[0]],
    ...["all-to-all", present, reduced[0]],
    ...["micro-op", undefined],
  ]);
  parameters.forEach(freeParameter);
});

Deno.test("gradients: those of a seat are reduced among its replicas once all of its parameters are ready; marks and labels tell", async () => {
  const name = seatGradientName(0, 0);
  const graph = buildStepGraph({
    head: [{ name: "w", elements: 3, elementBytes: 4, group: "world" }],
    layers: [{
      moe: {
        allToAllBytes: 1,
        experts: [{ name, elements: 6, elementBytes: 4, group: "replicas" }],
      },
      feedForward: [],
      attention: [],
    }],
    embedding: [],
  });
  const log: [string, number, AllReduceOptions | undefined][] = [];
  const commOf = (who: string) =>
    ({
      size: 2,
      allReduce: (x: Tensor, options?: AllReduceOptions) => {
        log.push([who, x.size, options]);
        return COMPLETED;
      },
    }) as unknown as Communicator;
  const [weights, seat] = [3, 6].map((size, i) =>
    createParameter(device, i === 0 ? "w" : "expert", {
      shape: [size],
      dtype: "f32",
      init: { value: 1 },
    })
  );
  const options = {
    graph,
    scheduler: new Fifo(),
    comm: commOf("world"),
    device,
    parameters: [weights],
    seats: [{
      name,
      layer: 0,
      grad: seat.grad,
      comm: commOf("replicas"),
      parameters: ["w1", "w2"],
    }],
  };
  const reducer = new GradientReducer(options);
  const marks: Mark[] = [];
  recorder.capturing = true;
  try {
    const step = reducer.begin(0, { firstPass: true, marks });
    step.gradientReady("w");
    const place = { layer: 0, phase: "backward", role: "combine", chunk: 0 } as const;
    step.combineBackwardStarts(0);
    await (await step.allToAll(place, () => COMPLETED))();
    step.gradientReady("w2");
    step.gradientReady("an expert whose store reduces it");
    assert.deepEqual(log.map(([who]) => who), ["world"]);
    await assert.rejects(
      step.finish(),
      /every gradient must be ready: current value lacks .*seats\.0/,
    );
    step.gradientReady("w1");
    step.layerBackwardEnds(0);
    await step.finish();
  } finally {
    recorder.capturing = false;
  }
  assert.deepEqual(log.map(([who, size]) => [who, size]), [["world", 3], ["replicas", 6]]);
  const labels = log.map(([, , options]) => options!.label!);
  assert.deepEqual(labels.map(({ name, track }) => [name, track]), [
    ["w", "gradients"],
    [name, "gradients"],
  ]);
  const start_us = marks.at(-1)!.event.time() + 1000;
  labels.forEach(({ args }, i) => {
    const { priority, queued_us } = args!(start_us);
    assert.equal(priority, i);
    assert.ok((queued_us as number) >= 1000);
  });
  assert.deepEqual(marks.map(({ boundary }) => boundary.kind), [
    "passBegins",
    "gradientReady",
    "combineBackwardStarts",
    "allToAllStarts",
    "allToAllEnds",
    "gradientReady",
    "layerBackwardEnds",
    "passEnds",
  ]);
  const times = marks.map(({ event }) => event.time());
  assert.deepEqual(times, times.toSorted((a, b) => a - b));
  assert.throws(() => new GradientReducer({ ...options, seats: [] }), /Cannot reduce .*seats\.0/);
  [weights, seat].forEach(freeParameter);
});

Deno.test("gradients: where only the host can wait, micro-ops of an exclusive schedule are held back until all-to-alls have ended", async () => {
  const log: string[] = [];
  const slow = (what: string): Work => ({
    done: false,
    wait: async () => {
      await Promise.resolve();
      log.push(`${what} awaited`);
    },
    then: () => new Promise<never>(() => {}),
  });
  let launched = 0;
  const comm = {
    size: 2,
    allReduce: () => {
      log.push(`micro-op ${launched}`);
      return slow(`micro-op ${launched++}`);
    },
  } as unknown as Communicator;
  const names = ["a", "b", "c"];
  const graph = buildStepGraph({
    head: names.map((name) => ({ name, elements: 1, elementBytes: 4, group: "world" })),
    layers: [{ moe: { allToAllBytes: 1, experts: [] }, feedForward: [], attention: [] }],
    embedding: [],
  });
  const parameters = names.map((name) =>
    createParameter(device, name, { shape: [1], dtype: "f32", init: { value: 1 } })
  );
  const fifo = new Fifo({ bucketBytes: 4 });
  const scheduler: CollectiveScheduler = {
    name: "exclusive",
    plan: (graph) => ({ ...fifo.plan(graph), exclusive: true }),
    launch: (boundary, state) => fifo.launch(boundary, state),
  };
  const step = new GradientReducer({ graph, scheduler, comm, device, parameters }).begin(0);
  const start = (chunk: number) => {
    const place = { layer: 0, phase: "backward", role: "combine", chunk } as const;
    return step.allToAll(place, () => {
      log.push(`all-to-all ${chunk}`);
      return slow(`all-to-all ${chunk}`);
    });
  };
  const first = await start(0);
  step.gradientReady("a"); // behind the first chunk
  const second = await start(1); // behind that, and so is this behind the first
  await first();
  step.gradientReady("b"); // behind the second chunk
  step.gradientReady("c");
  await second();
  await step.finish();
  assert.deepEqual(log, [
    "all-to-all 0",
    "all-to-all 0 awaited",
    "micro-op 0",
    "micro-op 0 awaited",
    "all-to-all 1",
    "all-to-all 0 awaited",
    "all-to-all 1 awaited",
    "micro-op 1",
    "micro-op 2",
    "micro-op 0 awaited",
    "micro-op 1 awaited",
    "micro-op 2 awaited",
  ]);
  parameters.forEach(freeParameter);
});
