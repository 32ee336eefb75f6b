// The clock of a device that does not answer; device_test.ts has streams and events that do.

import assert from "node:assert/strict";
import { testDevice } from "../../tests/emulator/device.ts";
import { now } from "../../trace/mod.ts";
import { Events } from "../device.ts";
import { CudaStream, EventPool } from "./streams.ts";

const device = await testDevice();

/** A pool whose device is busy until it is told otherwise. */
class BusyPool extends EventPool {
  busy = true;
  readonly #made = performance.now();

  override passed(handle: Parameters<EventPool["passed"]>[0]): boolean {
    if (performance.now() - this.#made > 3000) throw new Error("it waits for the device");
    return !this.busy && super.passed(handle);
  }
}

Deno.test({
  name:
    "tying the clocks does not wait for a busy device; times are the host's until they are tied",
  ignore: !device,
  async fn() {
    const pool = new BusyPool(), stream = new CudaStream("timed", pool);
    const event = stream.recordTimed();
    const start = performance.now();
    pool.anchor();
    assert.ok(performance.now() - start < 1000);
    assert.ok(Number.isNaN(event.time()));
    await device!.stream.synchronize();
    pool.busy = false;
    while (!event.done());
    assert.ok(Math.abs(event.time() - now()) < 1e6);
    const before = now();
    pool.anchor();
    const timed = stream.recordTimed();
    while (!timed.done());
    assert.ok(timed.time() > before - 200 && timed.time() < now() + 200);
    stream.destroy();
  },
});

Deno.test({
  name: "a thread waits for an event while the host goes on; the event is not used again before",
  ignore: !device,
  async fn() {
    const pool = new EventPool(), stream = new CudaStream("marked", pool);
    const mark = stream.mark();
    const first = mark.passing(), second = mark.passing();
    // Asking passes it, but its handle is still in use.
    while (!mark.done());
    const created = pool.created;
    const other = stream.mark();
    assert.equal(pool.created, created + 1, "the handle that a thread waits for was used again");
    await Promise.all([first, second]);
    assert.equal(pool.eventWaits, 1);
    await other.passing();
    await stream.mark().passing(); // a handle from the pool
    assert.equal(pool.created, created + 1);
    assert.ok(mark.done() && other.done());
    await mark.passing(); // at once
    assert.ok(Math.abs(mark.time() - now()) < 60e6);
    stream.destroy();
  },
});

Deno.test({
  name: "a stream that waits for several points is behind all of them",
  ignore: !device,
  async fn() {
    const pool = new EventPool();
    const streams = ["a", "b", "c"].map((name) => new CudaStream(name, pool));
    const [a, b, c] = streams;
    const all = new Events([a.record(), b.record()]);
    c.wait(all);
    await c.synchronize();
    assert.ok(all.done());
    assert.ok(all.time() <= now());
    for (const stream of streams) stream.destroy();
  },
});
