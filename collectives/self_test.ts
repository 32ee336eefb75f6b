// The world of one, through the communicator.

import assert from "node:assert/strict";
import { createCommunicator } from "./communicator.ts";
import { openSelf } from "./self.ts";

function world() {
  return createCommunicator(openSelf(), { rank: 0, size: 1, name: "world", timeout_ms: 200 });
}

Deno.test("a world of one copies what it would exchange", async () => {
  const comm = world();
  const x = Float32Array.of(1, 2, 3), out = new Float32Array(3);
  await comm.allReduce(x, { op: "avg", out });
  assert.deepEqual(out, x);
  await comm.allToAllV(x, [2], out.fill(0), [2]);
  assert.deepEqual([...out], [1, 2, 0]);
  await comm.gather(x, out);
  assert.deepEqual(out, x);
  assert.equal(await comm.split(null), null);
  assert.equal((await comm.split(7))!.name, "world/split2.7");
  assert.equal(comm.traffic.allReduce!.bytes, 0);
});

Deno.test("messages to oneself match by tag and in order", async () => {
  const comm = world();
  const first = new Int32Array(1), second = new Int32Array(1), other = new Int32Array(1);
  const early = comm.recv(first, 0, { tag: 1 });
  assert.equal(early.done, false);
  await comm.send(Int32Array.of(10), 0, { tag: 1 });
  await comm.send(Int32Array.of(30), 0, { tag: 2 });
  await comm.send(Int32Array.of(20), 0, { tag: 1 });
  await early;
  await comm.recv(second, 0, { tag: 1 });
  await comm.recv(other, 0, { tag: 2 });
  assert.deepEqual([first[0], second[0], other[0]], [10, 20, 30]);
});

Deno.test("a receive that nobody sends to ends in the watchdog, and the communicator is broken", async () => {
  const comm = world();
  const work = comm.recv(new Int32Array(1), 0);
  await assert.rejects(
    async () => await work,
    /Cannot complete recv 0 of world on rank 0 .* 200 ms.*not arrived: rank 0$/,
  );
  assert.throws(() => comm.barrier(), /broken by an earlier failure/);
});

Deno.test("abort throws and tells the job", () => {
  let told = "";
  const onAbort = (why: string) => void (told = why);
  const comm = createCommunicator(openSelf(), { rank: 0, size: 1, name: "world", onAbort });
  assert.throws(() => comm.abort("no data"), /has aborted the job: no data/);
  assert.equal(told, "no data");
});
