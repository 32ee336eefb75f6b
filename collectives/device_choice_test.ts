import assert from "node:assert/strict";
import fc from "fast-check";
import { chooseDevice, decide, type DeviceRecord, gpuOf, noteOf } from "./device_choice.ts";
import { LocalStore } from "./rendezvous/local_store.ts";
import { readEnvironment } from "./rendezvous/environment.ts";

const has = (gpu: string): DeviceRecord => ({ gpu, reason: "" });
const none = (reason: string): DeviceRecord => ({ gpu: null, reason });

Deno.test("decide() takes GPUs if every rank has one of its own", () => {
  assert.deepEqual(decide([has("a")], false), {
    kind: "cuda",
    reason: "there is a GPU",
    sharing: [],
  });
  const own = decide([has("a"), has("b")], false);
  assert.deepEqual([own.kind, own.reason], ["cuda", "every rank has a GPU of its own"]);
});

Deno.test("one line tells why a GPU that a rank has is not used, and nothing where there is none", () => {
  const auto = { device: "auto", backend: "auto" } as const;
  const few = decide([has("a"), has("a")], false);
  const line =
    /^lina: the CPU is used, as 1 GPU is not enough for 2 ranks .*--share-gpu allows it\)$/;
  assert.match(noteOf(few, auto, () => false)!, line);
  // Another rank's machine may have the GPU.
  assert.match(
    noteOf(decide([none("no driver"), has("a")], false), auto, () => false)!,
    /no driver/,
  );
  const nobody = decide([none("no\n  driver"), none("no driver")], false);
  assert.equal(noteOf(nobody, auto, () => false), null);
  assert.equal(noteOf(nobody, auto, () => true), "lina: the CPU is used, as rank 0: no driver");
  assert.equal(noteOf(few, { ...auto, device: "cpu" }, () => true), null);
  assert.match(noteOf(decide([has("a"), has("a")], true), auto, () => true)!, /share a GPU/);
});

Deno.test("decide() says which rank lacks a GPU and why, or who would share one", () => {
  const lacking = decide([has("a"), none("no driver")], true);
  assert.deepEqual([lacking.kind, lacking.reason], ["cpu", "rank 1: no driver"]);
  assert.equal(decide([none("no driver")], true).reason, "no driver");
  const few = decide([has("a"), has("b"), has("b")], false);
  assert.equal(few.kind, "cpu");
  assert.match(few.reason, /^2 GPUs are not enough for 3 ranks \(rank 2 .* rank 1; --share-gpu/);
  assert.match(decide([has("a"), has("a")], false).reason, /^1 GPU is not enough for 2 ranks/);
  const shared = decide([has("a"), has("b"), has("b")], true);
  assert.deepEqual([shared.kind, shared.sharing], ["cuda", [2]]);
});

Deno.test("gpuOf() gives ranks different GPUs whenever there are enough", () => {
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 16 }), fc.integer({ min: 0, max: 16 }), (ranks, gpus) => {
      const given = Array.from(
        { length: ranks },
        (_, r) => gpuOf(undefined, gpus, ranks, r, false),
      );
      if (gpus >= ranks) assert.equal(new Set(given).size, ranks);
      else assert(given.every((gpu) => gpu === null));
      const shared = Array.from(
        { length: ranks },
        (_, r) => gpuOf(undefined, gpus, ranks, r, true),
      );
      assert(shared.every((gpu) => gpus === 0 ? gpu === null : Number(gpu) < gpus));
    }),
  );
  assert.equal(gpuOf("GPU-a, GPU-b", 8, 2, 1, false), "GPU-b");
  assert.equal(gpuOf("", 8, 1, 0, true), null);
});

Deno.test("chooseDevice() looks for a GPU only where one may be used", async () => {
  const context = { store: new LocalStore() };
  const place = readEnvironment({});
  const auto = { device: "auto", backend: "auto" } as const;
  const never = () => assert.fail("looked for a GPU");
  const cpu = await chooseDevice(place, { ...auto, device: "cpu" }, context, never);
  assert.deepEqual([cpu.kind, cpu.reason], ["cpu", "it was asked for"]);
  const shm = await chooseDevice(place, { ...auto, backend: "shm" }, context, never);
  assert.equal(shm.kind, "cpu");
  const counted = readEnvironment({ LINA_GPUS: "0" });
  assert.match((await chooseDevice(counted, auto, context, never)).reason, /no NVIDIA GPU/);
  const found = await chooseDevice(place, auto, context, () => Promise.resolve(has("a")));
  assert.equal(found.kind, "cuda");
});

Deno.test("chooseDevice() tells the ranks of each other, and all decide alike", async () => {
  const store = new LocalStore();
  const rank = (r: number, more = {}) =>
    readEnvironment({
      RANK: `${r}`,
      WORLD_SIZE: "2",
      LOCAL_WORLD_SIZE: "2",
      MASTER_ADDR: "h",
      ...more,
    });
  const auto = { device: "auto", backend: "auto" } as const;
  const decisions = await Promise.all([0, 1].map((r) =>
    chooseDevice(
      rank(r),
      auto,
      { store },
      () => Promise.resolve(r === 0 ? has("a") : none("too old")),
    )
  ));
  assert.deepEqual(decisions[0], decisions[1]);
  assert.equal(decisions[0].reason, "rank 1: too old");
});

Deno.test("chooseDevice() throws when a GPU that was asked for cannot be used, or wishes contradict", async () => {
  const context = { store: new LocalStore() };
  const place = readEnvironment({});
  const find = () => Promise.resolve(none("no NVIDIA driver is installed"));
  const wish = (device: "auto" | "cpu" | "cuda", backend: "auto" | "shm" | "nccl") =>
    chooseDevice(place, { device, backend }, context, find);
  await assert.rejects(wish("cuda", "auto"), /Cannot use device cuda.*no NVIDIA driver/);
  await assert.rejects(wish("auto", "nccl"), /Cannot use backend nccl.*no NVIDIA driver/);
  await assert.rejects(wish("cpu", "nccl"), /must be a GPU: current value is cpu/);
  const two = readEnvironment({ RANK: "0", WORLD_SIZE: "2", MASTER_ADDR: "h" });
  const shm = { device: "cuda", backend: "shm" } as const;
  await assert.rejects(chooseDevice(two, shm, context, find), /must travel by nccl/);
});
