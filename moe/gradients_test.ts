import assert from "node:assert/strict";
import { COMPLETED } from "../collectives/progress.ts";
import type { Communicator, Work } from "../collectives/types.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { Fifo } from "./fifo.ts";
import { GradientReducer } from "./gradients.ts";
import { buildStepGraph } from "./graph.ts";
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
