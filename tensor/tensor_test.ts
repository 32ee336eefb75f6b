// Tensors and the CPU's memory: views share, `using` frees, blocks never overlap, and what is freed is used again.

import assert from "node:assert/strict";
import fc from "fast-check";
import { CAPACITY_BYTES } from "./cpu/memory.ts";
import { cpuDevice, hostView } from "./cpu/device.ts";
import { bytesOf, dtypeOf, DTYPES, newArray } from "./dtype.ts";
import { empty, fromArray, hostLike, type Tensor, TensorScope, zeros } from "./tensor.ts";

const device = cpuDevice();

Deno.test("every dtype survives the way to the device and back", async () => {
  for (const dtype of DTYPES) {
    const host = newArray(dtype, 5);
    for (let i = 0; i < 5; i++) host[i] = dtype === "i64" ? BigInt(i) : i;
    assert.equal(dtypeOf(host), dtype);
    using x = fromArray(device, host);
    assert.equal(x.bytes, 5 * bytesOf(dtype));
    assert.deepEqual(await x.toArray(), host);
    assert.deepEqual(hostLike(x), newArray(dtype, 5));
  }
});

Deno.test("reshape and rows share memory and the owner's life", () => {
  const x = fromArray(device, Float32Array.of(1, 2, 3, 4, 5, 6), [3, 2]);
  const row = x.rows(1, 2), flat = x.reshape(6);
  assert.deepEqual(hostView(row), Float32Array.of(3, 4));
  hostView(row)[0] = 9;
  assert.equal(hostView(flat)[2], 9);
  row[Symbol.dispose](); // a view frees nothing
  assert(!x.disposed);
  x[Symbol.dispose]();
  assert(flat.disposed);
  x[Symbol.dispose](); // disposing twice is allowed
  assert.throws(() => hostView(flat), /must be alive/);
});

Deno.test("refused: wrong reshapes, rows, shapes, arrays", () => {
  using x = zeros(device, [3, 2]);
  assert.throws(() => x.reshape(4), /size must stay 6/);
  for (const [start, end] of [[-1, 1], [0, 4], [2, 1], [0.5, 1]]) {
    assert.throws(() => x.rows(start, end), /range must lie in 0\.\.3/);
  }
  assert.throws(() => empty(device, [2, -1]), /whole number >= 0/);
  assert.throws(() => empty(device, [1.5]), /whole number >= 0/);
  assert.throws(() => fromArray(device, new Float32Array(5), [2, 3]), /hold 6 elements/);
  assert.throws(() => device.write(new Float32Array(5), x), /must have 6 elements/);
  assert.throws(() => device.write(new Float64Array(6), x), /must be a Float32Array for f32/);
  assert.throws(() => device.free(12345), /must be a block's: current value is 12345/);
});

Deno.test("refused: more memory than there is, beyond 2^31 elements too", () => {
  assert.throws(() => empty(device, [CAPACITY_BYTES]), /rank's tensors must fit in/);
  assert.throws(() => empty(device, [2 ** 40, 2 ** 20]), /Cannot (allocate|make)/);
});

Deno.test("live blocks never overlap, are aligned, and are counted", () => {
  const commands = fc.array(
    fc.oneof(
      fc.record({ allocate: fc.integer({ min: 0, max: 300_000 }) }),
      fc.record({ free: fc.nat() }),
    ),
    { maxLength: 120 },
  );
  fc.assert(
    fc.property(commands, (list) => {
      const before = device.memory().used_bytes;
      const live: { address: number; bytes: number }[] = [];
      let asked = 0;
      for (const command of list) {
        if ("allocate" in command) {
          const bytes = command.allocate, address = device.allocate(bytes);
          assert.equal(address % 64, 0);
          for (const other of live) {
            const apart = address + bytes <= other.address ||
              other.address + other.bytes <= address;
            assert(apart && address !== other.address);
          }
          live.push({ address, bytes });
          asked += bytes;
        } else if (live.length > 0) {
          const [block] = live.splice(command.free % live.length, 1);
          device.free(block.address);
          asked -= block.bytes;
        }
        const used = device.memory().used_bytes - before;
        assert(used >= asked && used <= asked * 1.125 + 64 * (live.length + 1));
      }
      for (const { address } of live) device.free(address);
      assert.equal(device.memory().used_bytes, before);
    }),
    { numRuns: 60 },
  );
});

Deno.test("a loop that frees what it makes takes no more from the system; the peak is remembered", () => {
  const round = () => {
    using x = zeros(device, [1000, 100]), y = zeros(device, [500, 100], "f64");
    assert.notEqual(x.address, y.address);
  };
  round();
  const { used_bytes, reserved_bytes } = device.memory();
  device.resetPeak();
  for (let i = 0; i < 100; i++) round();
  assert.equal(device.memory().used_bytes, used_bytes);
  assert.equal(device.memory().reserved_bytes, reserved_bytes);
  assert(device.memory().peak_bytes >= used_bytes + 800_000);
});

Deno.test("a block cannot be freed twice", () => {
  const address = device.allocate(1 << 20);
  device.free(address);
  assert.throws(() => device.free(address), /must be a block's/);
});

Deno.test("the CPU's stream and events have passed already", async () => {
  const event = device.stream.record();
  device.stream.wait(event);
  await device.stream.synchronize();
  assert(event.done());
  assert(event.time() > 0);
});

Deno.test("a tensor with no elements works", async () => {
  const none: Tensor = zeros(device, [0, 7]);
  assert.equal((await none.toArray()).length, 0);
  assert.equal(none.rows(0, 0).size, 0);
  none[Symbol.dispose]();
});

Deno.test("a scope frees what was made in it unless it keeps it, also in scopes around it", () => {
  const before = device.memory().used_bytes;
  const make = (fails: boolean): Tensor[] => {
    using scope = new TensorScope();
    const kept = [zeros(device, [10]), zeros(device, [20]).reshape(5, 4)];
    using _temporary = zeros(device, [30]);
    if (fails) throw new Error("half-way");
    return scope.keep(kept);
  };
  assert.throws(() => make(true), /half-way/);
  assert.equal(device.memory().used_bytes, before);
  const around = (fails: boolean) => {
    using scope = new TensorScope();
    const made = make(false);
    assert.throws(() => make(true), /half-way/);
    assert(!made[0].disposed);
    return fails ? made : scope.keep(made);
  };
  assert(around(true).every(({ disposed }) => disposed));
  assert.equal(device.memory().used_bytes, before);
  const made = around(false);
  assert(made.every(({ disposed }) => !disposed));
  assert(device.memory().used_bytes > before);
  const own = empty(device, [3]);
  assert(!own.disposed, "no scope is open any more");
  own[Symbol.dispose]();
});

Deno.test("host memory: beside that of the tensors; what is free and what is used make a whole", () => {
  const before = device.memory();
  using x = fromArray(device, Float32Array.of(1, 2, 3)), y = zeros(device, [2]);
  const after = device.memory();
  assert.equal(before.free_bytes - after.free_bytes, after.used_bytes - before.used_bytes);
  using host = device.hostMemory(20);
  const stream = device.createStream("copy");
  host.store(x, 4, stream);
  host.load(8, y, stream);
  assert.deepEqual([...new Float32Array(host.buffer)], [0, 1, 2, 3, 0]);
  assert.deepEqual([...hostView(y)], [2, 3]);
});
