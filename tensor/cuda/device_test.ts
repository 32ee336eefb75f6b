// The device itself: copies, streams, events, launches, memory. Kernels are tested beside their rooms.

import assert from "node:assert/strict";
import fc from "fast-check";
import { emulated, testDevice } from "../../tests/emulator/device.ts";
import { now } from "../../trace/mod.ts";
import { cpuDevice } from "../cpu/device.ts";
import type { RoutingKernels } from "../routing_kernels.ts";
import { DTYPES, newArray, type TypedArray } from "../dtype.ts";
import { empty, fromArray } from "../tensor.ts";
import { OutOfMemoryError } from "../memory_error.ts";
import type { ModuleSource } from "./context.ts";
import { cudaDevice, findCuda } from "./device.ts";
import { CompileError } from "../../ffi/nvrtc.ts";

/** Kernels that show what a launch hands over, and one that takes its time. */
const probe: ModuleSource = {
  name: "probe",
  source: `
struct Pair { int first; int rest[3]; };
extern "C" __global__ void parameters(double* out, int i, i64 l, float f, double d, Pair pair, int last) {
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    out[0] = i; out[1] = (double)l; out[2] = f; out[3] = d;
    out[4] = pair.first; out[5] = pair.rest[2]; out[6] = last; out[7] = gridDim.x * 1000 + gridDim.y * 100 + gridDim.z * 10;
    out[8] = blockDim.x;
  }
}
extern "C" __global__ void shared(float* out, int n) {
  extern __shared__ float scratch[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) scratch[i] = i;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = scratch[n - 1 - i];
}
extern "C" __global__ void increment(float* x, int n, int rounds) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) for (int round = 0; round < rounds; round++) x[i] = x[i] + 1;
}
`,
  kernels: {
    parameters: ["ptr", "i32", "i64", "f32", "f64", { bytes: 16 }, "i32"],
    shared: ["ptr", "i32"],
    increment: ["ptr", "i32", "i32"],
    absent: ["ptr"],
  },
};

const device = await testDevice([probe]);
const ignore = device === null;

function test(name: string, run: (cuda: NonNullable<typeof device>) => void | Promise<void>): void {
  Deno.test({ name, ignore, fn: () => run(device!) });
}

function random(dtype: (typeof DTYPES)[number], length: number): TypedArray {
  const array = newArray(dtype, length);
  const bytes = new Uint8Array(array.buffer);
  for (let i = 0; i < bytes.length; i++) bytes[i] = (i * 2654435761 >>> 11) & 63;
  return array;
}

test("findCuda() and properties", (cuda) => {
  const found = findCuda();
  assert.ok(found.ok && found.devices >= 1 && found.runtime >= 12_000);
  const { properties } = cuda.context;
  assert.equal(cuda.name, properties.name);
  assert.ok(properties.capability >= 80 && properties.multiprocessors > 0);
  // So that the emulator's launches overlap in all tests, which ends kernels that do not wait for the one before.
  if (emulated && !Deno.env.has("LINA_EMULATOR_CAPABILITY")) {
    assert.ok(properties.capability > 90);
  }
  assert.ok(properties.sharedMemory_bytes >= 96 * 1024 && properties.memory_bytes > 2 ** 28);
});

test("every kernel of the contract is there", (cuda) => {
  for (const name of Object.keys(cpuDevice().kernels)) {
    assert.ok(Object.hasOwn(cuda.kernels, name), name);
  }
  const routing: Record<keyof RoutingKernels, true> = {
    gate: true,
    gateWeightGrad: true,
    combineRowsGate: true,
    route: true,
    routeBackward: true,
    placeRows: true,
    spreadRows: true,
    majorOrders: true,
    countSlices: true,
  };
  for (const name of Object.keys(routing)) assert.ok(Object.hasOwn(cuda.routing, name), name);
});

test("every dtype goes to the device and back, at odd sizes and inside a tensor", async (cuda) => {
  for (const dtype of DTYPES) {
    for (const size of [0, 1, 3, 17, 1025]) {
      const array = random(dtype, size);
      using x = empty(cuda, [size], dtype);
      cuda.write(array, x);
      assert.deepEqual(await x.toArray(), array);
      if (size > 2) {
        cuda.write(array.subarray(0, size - 2) as TypedArray, x.rows(1, size - 1));
        const expected = array.slice() as Uint8Array;
        expected.set(array.subarray(0, size - 2) as Uint8Array, 1);
        assert.deepEqual(await x.toArray(), expected);
        assert.deepEqual(await x.rows(1, 3).toArray(), expected.slice(1, 3));
      }
    }
  }
});

test("write() stages its source: the array may change at once", async (cuda) => {
  using x = empty(cuda, [4096]);
  const array = new Float32Array(4096);
  for (let round = 0; round < 5; round++) {
    array.fill(round);
    cuda.write(array, x);
    array.fill(-1);
    assert.ok((await x.toArray() as Float32Array).every((value) => value === round));
  }
});

test("write() refuses another size or type", (cuda) => {
  using x = empty(cuda, [4]);
  assert.throws(() => cuda.write(new Float32Array(3), x), /must have 4 elements/);
  assert.throws(() => cuda.write(new Float64Array(4), x), /must be a Float32Array/);
});

test("uploads far larger than the ring, downloads far larger than the staging area", async (cuda) => {
  const size = (emulated ? 45 : 150) * 2 ** 18 + 3; // in f32
  const array = new Float32Array(size);
  for (let i = 0; i < size; i += 1000) array[i] = i;
  array[size - 1] = 7;
  using x = fromArray(cuda, array);
  const used = cuda.memory().used_bytes;
  const first = cuda.read(x), second = cuda.read(x.rows(1000, 2000));
  cuda.write(new Float32Array(size), x); // comes after both
  assert.deepEqual(await second, array.slice(1000, 2000));
  const copy = await first as Float32Array;
  assert.equal(copy.length, size);
  assert.ok(copy.every((value, i) => value === array[i]));
  assert.equal((await cuda.read(x.rows(size - 1, size)))[0], 0);
  assert.equal(cuda.memory().used_bytes, used, "the snapshot is freed");
});

test("many small reads at once, their tensors freed before they arrive", async (cuda) => {
  const reads = Array.from({ length: 50 }, (_, i) => {
    using x = fromArray(cuda, new Float32Array(100 + i).fill(i));
    return cuda.read(x);
  });
  (await Promise.all(reads)).forEach((array, i) => {
    assert.deepEqual(array, new Float32Array(100 + i).fill(i));
  });
});

test("a launch hands over every type of parameter", async (cuda) => {
  const kernel = cuda.context.kernel(probe, "parameters");
  assert.equal(cuda.context.kernel(probe, "parameters"), kernel);
  using out = empty(cuda, [9], "f64");
  const cases = [
    { i: -5, l: 2 ** 40 + 3, f: 1.5, d: Math.PI, first: 11, rest: -3, last: 2 ** 31 - 1 },
    { i: -(2 ** 31), l: -(2 ** 40) - 3, f: -0.25, d: -1e300, first: 0, rest: 1, last: -1 },
    { i: 0, l: -1, f: Infinity, d: 0, first: 5, rest: 6, last: 7 },
  ];
  for (const { i, l, f, d, first, rest, last } of cases) {
    const pair = new Uint8Array(new Int32Array([first, 0, 0, rest]).buffer);
    kernel.launch(3, 2, 1, 64, 0, out.address, i, l, f, d, pair, last);
    assert.deepEqual([...await out.toArray()], [i, l, f, d, first, rest, last, 3210, 64]);
  }
});

test("a launch refuses wrong arguments and says which", (cuda) => {
  const kernel = cuda.context.kernel(probe, "increment");
  assert.throws(() => kernel.launch(1, 1, 1, 32, 0, 0), /probe\.increment .* 3 arguments/);
  assert.throws(
    () => kernel.launch(1, 1, 1, 32, 0, NaN, 1, 1),
    /argument 0 must be a value for ptr/,
  );
  assert.throws(() => kernel.launch(1, 1, 1, 32, 0, 0, 1.5, 1), /argument 1 .* 1\.5/);
  assert.throws(() => kernel.launch(1, 1, 1, 32, 0, 0, 2 ** 33, 1), /argument 1/);
  assert.throws(() => kernel.launch(1, 1, 1, 32, 0, 0, 1, new Uint8Array(4)), /argument 2/);
  const parameters = cuda.context.kernel(probe, "parameters");
  assert.throws(
    () => parameters.launch(1, 1, 1, 32, 0, 0, 0, 0, 0, 0, new Uint8Array(12), 0),
    /argument 5 must be 16 bytes: current value is 12 bytes/,
  );
  assert.throws(() => cuda.context.kernel(probe, "other"), /probe .* "other"/);
  assert.throws(() => cuda.context.kernel(probe, "absent"), /probe\.absent/);
  assert.throws(
    () => cuda.context.kernel({ name: "stranger", source: "", kernels: {} }, "x"),
    /stranger/,
  );
});

test("an impossible launch names kernel, grid and block; no blocks are no work", async (cuda) => {
  const kernel = cuda.context.kernel(probe, "increment");
  using x = fromArray(cuda, new Float32Array([1, 2]));
  assert.throws(
    () => kernel.launch(5, 1, 1, 4096, 0, x.address, 2, 1),
    /cuLaunchKernel .*probe\.increment, grid 5 x 1 x 1, block 4096/,
  );
  kernel.launch(0, 1, 1, 64, 0, x.address, 2, 1);
  kernel.launch(1, 1, 1, 64, 0, x.address, 2, 1);
  assert.deepEqual(await x.toArray(), new Float32Array([2, 3]));
});

test("dynamic shared memory: little, then more than 48 KiB, then too much", async (cuda) => {
  const kernel = cuda.context.kernel(probe, "shared");
  const most = cuda.context.properties.sharedMemory_bytes;
  for (const n of [8, 20_000, 16, most / 4]) {
    using out = empty(cuda, [n]);
    kernel.launch(1, 1, 1, 128, 4 * n, out.address, n);
    assert.deepEqual(await out.toArray(), Float32Array.from({ length: n }, (_, i) => n - 1 - i));
  }
  assert.throws(() => kernel.launch(1, 1, 1, 128, most + 4, 0, 1), /probe\.shared/);
});

test("kernels and copies of one stream keep their order", async (cuda) => {
  const kernel = cuda.context.kernel(probe, "increment");
  using x = empty(cuda, [300]);
  cuda.context.clear(x.address, x.bytes);
  const reads: Promise<TypedArray>[] = [];
  for (let round = 0; round < 20; round++) {
    kernel.launch(3, 1, 1, 128, 0, x.address, 300, 1);
    reads.push(cuda.read(x.rows(299, 300)));
  }
  assert.deepEqual((await Promise.all(reads)).map((array) => array[0]), reads.map((_, i) => i + 1));
});

test("streams wait for each other's events; events pass once", async (cuda) => {
  const other = cuda.createStream("copy", { priority: -1 });
  assert.equal(other.name, "copy");
  const kernel = cuda.context.kernel(probe, "increment");
  using x = empty(cuda, [1000]);
  cuda.context.clear(x.address, x.bytes);
  kernel.launch(8, 1, 1, 128, 0, x.address, 1000, emulated ? 10 : 100_000);
  const event = cuda.stream.record();
  other.wait(event);
  await other.synchronize();
  assert.equal(event.done(), true, "the other stream's end comes after the event");
  other.wait(event); // has passed: nothing to wait for
  other.wait(cpuDevice().stream.record());
  assert.throws(() => other.wait({ done: () => false, time: () => 0 }), /CUDA event/);
  other.destroy();
});

test("timed events lie on the host's clock, in order", async (cuda) => {
  cuda.anchor();
  const before = now();
  const first = cuda.stream.recordTimed(), second = cuda.stream.recordTimed();
  const plain = cuda.stream.record();
  await cuda.stream.synchronize();
  const after = now();
  assert.ok(first.done() && second.done() && plain.done());
  const slack = 200; // µs; the clocks are tied to a few, but a busy host is late
  assert.ok(
    before - slack <= first.time() && first.time() <= second.time() + 1,
    `${first.time() - before}`,
  );
  assert.ok(second.time() <= after + slack, `${second.time() - after}`);
  assert.ok(plain.time() >= before && plain.time() <= now());
});

test("thousands of events that nobody asks about", async (cuda) => {
  for (let i = 0; i < 5000; i++) cuda.stream.record();
  const event = cuda.stream.record();
  await cuda.stream.synchronize();
  assert.ok(event.done());
});

test("hostWaits counts reads and synchronisations, nothing else", async (cuda) => {
  using x = fromArray(cuda, new Float32Array(10));
  using y = empty(cuda, [10]);
  const before = cuda.hostWaits;
  for (let i = 0; i < 100; i++) cuda.write(new Float32Array(10), x);
  cuda.context.kernel(probe, "increment").launch(1, 1, 1, 64, 0, x.address, 10, 1);
  cuda.stream.record().done();
  cuda.context.clear(y.address, y.bytes);
  assert.equal(cuda.hostWaits, before);
  await x.toArray();
  await cuda.stream.synchronize();
  assert.equal(cuda.hostWaits, before + 2);
});

test("memory: aligned, counted, and an error when there is not enough", (cuda) => {
  const before = cuda.memory();
  const addresses = [1, 255, 256, 257, 4096].map((bytes) => cuda.allocate(bytes));
  for (const address of addresses) assert.equal(address % 256, 0);
  assert.ok(cuda.memory().used_bytes >= before.used_bytes + 4865);
  assert.ok(cuda.memory().reserved_bytes >= cuda.memory().used_bytes);
  for (const address of addresses) cuda.free(address);
  assert.equal(cuda.memory().used_bytes, before.used_bytes);
  const all = cuda.context.properties.memory_bytes;
  assert.throws(() => cuda.allocate(all + 2 ** 30), OutOfMemoryError);
  assert.equal(cuda.memory().used_bytes, before.used_bytes);
  cuda.resetPeak();
  assert.equal(cuda.memory().peak_bytes, before.used_bytes);
});

test("pinned memory is seen through its buffer", (cuda) => {
  using pinned = cuda.pinned(4096);
  assert.equal(pinned.buffer.byteLength, 4096);
  new Uint8Array(pinned.buffer).fill(7);
  assert.ok(pinned.address > 0);
});

test("a tensor map has 128 bytes; wrong strides are refused", (cuda) => {
  using x = empty(cuda, [256, 64], "bf16");
  const options = {
    dtype: "bf16",
    address: x.address,
    sizes: [64, 256],
    strides_bytes: [128],
    box: [64, 64],
    swizzle: "128B",
  } as const;
  if (emulated) assert.throws(() => cuda.context.tensorMap(options), /is not emulated/);
  else if (cuda.context.properties.capability >= 90) {
    assert.equal(cuda.context.tensorMap(options).length, 128);
  }
  assert.throws(() => cuda.context.tensorMap({ ...options, strides_bytes: [] }), RangeError);
});

test("a module that does not compile shows the compiler's log", async () => {
  const broken: ModuleSource = {
    name: "broken",
    source: `extern "C" __global__ void f(float* x) { x[0] = no_such_name; }`,
    kernels: { f: ["ptr"] },
  };
  await assert.rejects(
    () => cudaDevice({ modules: [broken] }),
    (error) => error instanceof CompileError && /broken\.cu[^]*no_such_name/.test(error.message),
  );
  const other = { ...broken, name: "another" };
  await assert.rejects(
    () => cudaDevice({ modules: [broken, other] }),
    (error) => error instanceof CompileError && /broken\.cu[^]*another\.cu/.test(error.message),
  );
});

test("a module for exactly this GPU that does not compile is done without, not unsaid", async (cuda) => {
  const exact: ModuleSource = {
    name: "exact",
    source: `extern "C" __global__ void f(float* x) { x[0] = no_such_name; }`,
    kernels: { f: ["ptr"] },
    from: cuda.context.properties.capability,
    exact: true,
  };
  const said: string[] = [], { warn } = console;
  console.warn = (text: string) => void said.push(text);
  try {
    const { context, problems } = await cudaDevice({ modules: [exact] });
    assert.equal(context.has(exact), false);
    assert.throws(() => context.kernel(exact, "f"), /exact/);
    assert.equal(problems.length, 1);
    assert.match(said.join("\n"), /slower kernels .* exact\.cu[^]*no_such_name/);
  } finally {
    console.warn = warn;
  }
});

test("more blocks than a grid can have are refused", (cuda) => {
  const kernel = cuda.context.kernel(probe, "increment");
  for (const blocks of [2 ** 31, 2 ** 32 + 1, -1, NaN]) {
    assert.throws(
      () => kernel.launch(blocks, 1, 1, 32, 0, 0, 0, 0),
      /probe\.increment as its blocks/,
    );
  }
});

test("a device is made once; one that is not there is refused", async () => {
  assert.equal(await cudaDevice(), await cudaDevice({ device: 0 }));
  await assert.rejects(() => cudaDevice({ device: 99 }), /current value is 99/);
  await assert.rejects(() => cudaDevice({ device: -1 }), /current value is -1/);
});

test("writes and reads of any shape keep every byte", async (cuda) => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.uint8Array({ minLength: 0, maxLength: 3000 }), { maxLength: 8 }),
      async (arrays) => {
        const tensors = arrays.map((array) => fromArray(cuda, array));
        const reads = tensors.map((tensor) => cuda.read(tensor));
        for (const tensor of tensors) tensor[Symbol.dispose]();
        (await Promise.all(reads)).forEach((array, i) => assert.deepEqual(array, arrays[i]));
      },
    ),
    { numRuns: emulated ? 30 : 100 },
  );
});
