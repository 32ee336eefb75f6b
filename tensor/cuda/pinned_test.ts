// Uploads while the stream stands still, and downloads while the device is full; device_test.ts has the usual ones.

import assert from "node:assert/strict";
import { testDevice } from "../../tests/emulator/device.ts";
import { empty, fromArray } from "../tensor.ts";
import { Arena } from "./arena.ts";
import { PinnedMemory, Staging } from "./pinned.ts";
import { type CudaStream, EventPool } from "./streams.ts";

const device = await testDevice();

function test(name: string, run: (cuda: NonNullable<typeof device>) => void | Promise<void>): void {
  Deno.test({ name, ignore: !device, fn: () => run(device!) });
}

test("an upload behind a stream that stands still does not wait for it", async (cuda) => {
  const size = 64 * 2 ** 18 + 5; // in f32: eight segments
  const array = Float32Array.from({ length: size }, (_, i) => i % 1000);
  using x = empty(cuda, [size]);
  const began = performance.now();
  let stalled = true;
  const done = () => {
    if (stalled && performance.now() - began > 5000) throw new Error("it waits for the stream");
    return !stalled;
  };
  const stream: CudaStream = Object.create(cuda.stream, {
    record: { value: () => ({ done, time: () => 0 }) },
  });
  const pool = new EventPool(), staging = new Staging(stream, pool);
  staging.upload(array.subarray(0, 100), x.address);
  assert.equal(pool.hostWaits, 0);
  staging.upload(array, x.address);
  assert.ok(pool.hostWaits > 0);
  assert.deepEqual(await x.toArray(), array);
  stalled = false;
  const before = pool.hostWaits;
  for (let round = 0; round < 3; round++) {
    array.fill(round);
    staging.upload(array, x.address);
    assert.deepEqual(await x.toArray(), array);
  }
  assert.equal(pool.hostWaits, before);
});

test("a download for which the device has no room for a snapshot", async (cuda) => {
  const size = 70 * 2 ** 18 + 3; // in f32: more than one part
  const array = Float32Array.from({ length: size }, (_, i) => i % 1001);
  using x = fromArray(cuda, array);
  const full = new Arena({
    contiguous: true,
    granularity_bytes: 2 ** 21,
    grow: () => null,
    free_bytes: () => 0,
  });
  const target = new Float32Array(size);
  const arrives = new Staging(cuda.stream, new EventPool()).download(x.address, target, full);
  cuda.kernels.fill(x, -1); // comes after it
  await arrives;
  assert.deepEqual(target, array);
});

test("page-locked memory of no size is refused", () => {
  for (const bytes of [0, -1, 1.5, NaN]) assert.throws(() => new PinnedMemory(bytes), RangeError);
});

test("host memory: copies keep the order of their streams, both ways", async (cuda) => {
  const copies = cuda.createStream("copy");
  const n = 1000;
  const host = cuda.hostMemory(8 * n), floats = new Float32Array(host.buffer);
  using x = fromArray(cuda, Float32Array.from({ length: n }, (_, i) => i));
  using y = empty(cuda, [n]);
  copies.wait(cuda.stream.record());
  host.store(x, 4 * n, copies);
  host.load(4 * n, y, copies);
  cuda.stream.wait(copies.record());
  cuda.kernels.scale(y, 2);
  copies.wait(cuda.stream.record());
  host.store(y, 0, copies);
  await copies.synchronize();
  assert.deepEqual([floats[0], floats[n - 1], floats[n], floats[2 * n - 1]], [
    0,
    2 * n - 2,
    0,
    n - 1,
  ]);
  assert.throws(() => host.load(4 * n + 1, y, copies), /must lie in the host's 8000: .* from 4001/);
  host[Symbol.dispose]();
});
