import assert from "node:assert/strict";
import { BUCKET_BYTES, Fifo } from "../../moe/fifo.ts";
import { buildStepGraph, type GradientOutline } from "../../moe/graph.ts";
import type { Boundary, LaunchState } from "../../moe/hooks.ts";
import { Lina, MICRO_OP_BYTES } from "./lina.ts";
import { createScheduler, SCHEDULER_NAMES, type SchedulerName } from "./schedulers.ts";

const gradient = (name: string, elements: number): GradientOutline => {
  return { name, elements, elementBytes: 4, group: "world" };
};

const GRAPH = buildStepGraph({
  layers: [{
    moe: { allToAllBytes: 100, experts: [{ ...gradient("experts", 50), group: "replicas" }] },
    feedForward: [gradient("gate", 10)],
    attention: [gradient("qkv", 100)],
  }],
  head: [gradient("head", 2000)],
  embedding: [],
});

/** Bytes of the micro-ops that a scheduler plans. */
function planned(name: SchedulerName, options = {}): number[] {
  return createScheduler(name, options).plan(GRAPH).microOps.map(({ bytes }) => bytes);
}

Deno.test("schedulers: what each reduces at once", () => {
  assert.deepEqual(planned("fifo"), [200, 8440]); // replicas have buckets of their own
  assert.deepEqual(planned("fifo", { bucketBytes: 500 }), [8000, 200, 440]);
  assert.deepEqual(planned("outside", { bucketBytes: 500 }), [8000, 200, 440]);
  const whole = [8000, 200, 40, 400];
  assert.deepEqual(planned("priority", { bucketBytes: 500, microOpBytes: 500 }), whole);
  assert.deepEqual(planned("lina"), whole);
  assert.deepEqual(planned("lina", { microOpBytes: 4000 }), [4000, 4000, 200, 40, 400]);
  assert.deepEqual(planned("lina+pipeline", { microOpBytes: 4000 }), [4000, 4000, 200, 40, 400]);
  assert.deepEqual(
    createScheduler("fifo").plan(GRAPH),
    new Fifo({ bucketBytes: BUCKET_BYTES }).plan(GRAPH),
  );
});

Deno.test("schedulers: a micro-op is 2.4 ms of the link, 3 MB at 10 Gbit/s", () => {
  assert.equal(new Lina().microOpBytes, 3_000_000);
  assert.equal(MICRO_OP_BYTES, 3_000_000);
  assert.equal(new Lina({ linkBytesPerSecond: 1.25e9 }).microOpBytes, 3_000_000);
  assert.equal(new Lina({ linkBytesPerSecond: 12.5e9 }).microOpBytes, 30_000_000); // the paper's
  assert.equal(new Lina({ linkBytesPerSecond: 1e9, microOpBytes: 64 }).microOpBytes, 64);
});

Deno.test("schedulers: who decides by what is running, and who keeps all-to-alls apart", () => {
  const kinds = (["fifo", "outside", "priority", "lina", "lina+pipeline"] as const).map((name) => {
    const scheduler = createScheduler(name), { exclusive, chunks } = scheduler.plan(GRAPH);
    assert.equal(scheduler.name, name);
    assert.equal(chunks.size, name.endsWith("+pipeline") ? 1 : 0);
    return [scheduler.pace ?? "program", exclusive ?? false];
  });
  assert.deepEqual(kinds, [
    ["program", false],
    ["program", true],
    ["device", false],
    ["device", false],
    ["device", false],
  ]);
});

Deno.test("schedulers: how many of three go", () => {
  const boundary: Boundary = { kind: "gradientReady", gradient: 0 };
  const launches = (name: SchedulerName, change: Partial<LaunchState>, at: Boundary = boundary) => {
    const scheduler = createScheduler(name), schedule = scheduler.plan(GRAPH);
    const idle = { running: 0, allToAlls: 0, imminent: false, insideMoe: false };
    return scheduler.launch(at, { schedule, next: 0, ready: 3, ...idle, ...change });
  };
  const cases: [Partial<LaunchState>, number[]][] = [
    [{}, [3, 3, 1, 1]],
    [{ ready: 0 }, [0, 0, 0, 0]],
    [{ running: 1 }, [3, 3, 0, 0]],
    [{ allToAlls: 1 }, [3, 3, 0, 0]],
    [{ imminent: true, insideMoe: true }, [3, 0, 1, 0]],
    [{ insideMoe: true }, [3, 0, 1, 1]],
  ];
  const names = ["fifo", "outside", "priority", "lina"] as const;
  for (const [change, expected] of cases) {
    assert.deepEqual(names.map((name) => launches(name, change)), expected);
    assert.equal(launches("lina+pipeline", change), expected[3]);
  }
  const end = SCHEDULER_NAMES.map((name) => launches(name, { running: 1 }, { kind: "stepEnds" }));
  assert.deepEqual(end, SCHEDULER_NAMES.map(() => 3));
});

Deno.test("schedulers: unknown names and impossible sizes", () => {
  assert.throws(
    () => createScheduler("best" as SchedulerName),
    /the name must be one of fifo, outside, priority, lina, .*: current value is best/,
  );
  for (const bucketBytes of [0, -1, NaN]) {
    for (const name of ["fifo", "outside"] as const) {
      assert.throws(() => createScheduler(name, { bucketBytes }), /larger than 0 bytes/);
    }
  }
  for (const microOpBytes of [15, -1, NaN]) {
    assert.throws(() => createScheduler("lina", { microOpBytes }), /at least 16 bytes/);
  }
  for (const linkBytesPerSecond of [0, -1, NaN, Infinity]) {
    assert.throws(
      () => createScheduler("lina", { linkBytesPerSecond }),
      /"linkBytesPerSecond" must be a number above 0/,
    );
  }
  assert.throws(() => createScheduler("lina", { linkBytesPerSecond: 100 }), /at least 16 bytes/);
});

Deno.test("schedulers: +pipeline cuts every layer's all-to-alls alike", () => {
  const chunks = (
    options = {},
  ) => [...createScheduler("lina+pipeline", options).plan(GRAPH).chunks];
  assert.deepEqual(chunks(), [[0, 2]]);
  assert.deepEqual(chunks({ chunks: 5 }), [[0, 5]]);
  for (const wrong of [0, 1.5, NaN]) {
    assert.throws(
      () => createScheduler("lina+pipeline", { chunks: wrong }),
      /"chunks" must be a whole number >= 1: current value is/,
    );
  }
});
