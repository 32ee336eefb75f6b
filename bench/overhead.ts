// Host time of what a step on the GPU is made of: launches, matrix products, events, memory, copies; and how long a device takes to
// make, with and without compiled kernels on disk. Times of the host, not of the GPU: each batch is short enough for the queue.
//
//   deno task bench:overhead [--json FILE]

import type { ModuleSource } from "../tensor/cuda/context.ts";
import { type CudaDevice, cudaDevice } from "../tensor/cuda/device.ts";
import { empty, fromArray } from "../tensor/tensor.ts";
import { needGpu } from "./_gpu.ts";

const probe: ModuleSource = {
  name: "overhead",
  source: `
extern "C" __global__ void three(float* x, i64 n, float value) { if (n < 0) x[0] = value; }
extern "C" __global__ void twelve(float* a, float* b, float* c, float* d, float* e, float* f, i64 n, i64 m, int i, int j,
                                  float x, float y) {
  if (n < 0) a[0] = b[0] + c[0] + d[0] + e[0] + f[0] + x + y + (float)m + i + j;
}`,
  kernels: {
    three: ["ptr", "i64", "f32"],
    // deno-fmt-ignore
    twelve: ["ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "i64", "i64", "i32", "i32", "f32", "f32"],
  },
};

interface Row {
  readonly what: string;
  readonly value: number;
  readonly unit: string;
}

const rows: Row[] = [];

function report(what: string, value: number, unit: string): void {
  rows.push({ what, value, unit });
  console.log(`${what.padEnd(52)} ${value.toFixed(value < 10 ? 2 : 1).padStart(9)} ${unit}`);
}

function median(values: number[]): number {
  return values.sort((a, b) => a - b)[values.length >> 1];
}

/** Median host time of one call in µs, over batches that the device has finished before the next begins. */
async function hostTime(device: CudaDevice, batch: number, call: () => void): Promise<number> {
  const times: number[] = [];
  for (let round = 0; round < 40; round++) {
    const start = performance.now();
    for (let i = 0; i < batch; i++) call();
    times.push((performance.now() - start) * 1000 / batch);
    await device.stream.synchronize();
  }
  return median(times.slice(10));
}

/** Median time of one awaited call in µs. */
async function awaitedTime(call: () => Promise<unknown>, rounds = 200): Promise<number> {
  const times: number[] = [];
  for (let round = 0; round < rounds; round++) {
    const start = performance.now();
    await call();
    times.push((performance.now() - start) * 1000);
  }
  return median(times.slice(rounds >> 2));
}

/** Seconds that another process takes to make the device, by its own clock. */
async function deviceTime(cache: string): Promise<number> {
  const code = `const { cudaDevice } = await import(${
    JSON.stringify(new URL("../tensor/cuda/device.ts", import.meta.url).href)
  });
const start = performance.now();
const device = await cudaDevice();
device.kernels; device.routing;
console.log((performance.now() - start) / 1000);`;
  const { success, stdout } = await new Deno.Command(Deno.execPath(), {
    args: ["eval", code],
    // NVRTC keeps a cache of its own, too.
    env: { LINA_CACHE: `${cache}/lina`, CUDA_CACHE_PATH: `${cache}/nvidia` },
    stderr: "inherit",
  }).output();
  if (!success) {
    throw new Error("Cannot time the making of a device as another process must make one");
  }
  return Number(new TextDecoder().decode(stdout));
}

async function overheads(device: CudaDevice): Promise<void> {
  const { context, stream } = device;
  const three = context.kernel(probe, "three"), twelve = context.kernel(probe, "twelve");
  using x = empty(device, [1024]);
  const at = x.address;
  report(
    "launch, 3 arguments",
    await hostTime(device, 300, () => three.launch(1, 1, 1, 32, 0, at, 1, 1)),
    "µs",
  );
  report(
    "launch, 12 arguments",
    await hostTime(
      device,
      300,
      () => twelve.launch(1, 1, 1, 32, 0, at, at, at, at, at, at, 1, 1, 1, 1, 1, 1),
    ),
    "µs",
  );
  for (const n of [64, 1024]) {
    using a = empty(device, [n, n], "bf16"), out = empty(device, [n, n], "bf16");
    report(
      `gemm ${n} x ${n} x ${n} bf16`,
      await hostTime(device, 200, () => device.kernels.gemm(a, a, out, { transposeB: true })),
      "µs",
    );
  }
  report(
    "event: record and done()",
    await hostTime(device, 300, () => void stream.record().done()),
    "µs",
  );
  report(
    "event: record, never asked about",
    await hostTime(device, 300, () => void stream.record()),
    "µs",
  );
  report(
    "event: recordTimed, never asked about",
    await hostTime(device, 300, () => void stream.recordTimed()),
    "µs",
  );
  const other = device.createStream("other");
  report(
    "event: record, another stream waits",
    await hostTime(device, 300, () => other.wait(stream.record())),
    "µs",
  );
  report(
    "allocate and free 1 MiB",
    await hostTime(device, 1000, () => device.free(device.allocate(2 ** 20))),
    "µs",
  );
  report("clear 4 KiB", await hostTime(device, 300, () => context.clear(at, 4096)), "µs");
  const small = new Int32Array(64), large = new Float32Array(2 ** 14);
  using big = empty(device, [2 ** 14]);
  report("upload 256 B", await hostTime(device, 300, () => context.upload(small, at)), "µs");
  report(
    "upload 64 KiB",
    await hostTime(device, 100, () => context.upload(large, big.address)),
    "µs",
  );
  report("synchronize, idle", await awaitedTime(() => stream.synchronize()), "µs");
  using one = empty(device, [1]);
  const cell = new Float32Array(1);
  report(
    "write and read 4 B",
    await awaitedTime(() => (device.write(cell, one), device.read(one))),
    "µs",
  );
  report("anchor()", await awaitedTime(() => Promise.resolve(device.anchor())), "µs");

  const before = Deno.memoryUsage().heapUsed;
  for (let i = 0; i < 1000; i++) {
    twelve.launch(1, 1, 1, 32, 0, at, at, at, at, at, at, 1, 1, 1, 1, 1, 1);
  }
  const after = Deno.memoryUsage().heapUsed;
  await stream.synchronize();
  report("garbage of a launch of 12 arguments (or a collection ran)", (after - before) / 1000, "B");
}

async function throughput(device: CudaDevice): Promise<void> {
  const array = new Float32Array(2 ** 26); // 256 MiB
  using x = fromArray(device, array);
  await device.stream.synchronize();
  report(
    "write 256 MiB",
    array.byteLength / 1000 /
      await awaitedTime(() => (device.write(array, x), device.stream.synchronize()), 8),
    "GB/s",
  );
  report(
    "read 256 MiB",
    array.byteLength / 1000 / await awaitedTime(() => device.read(x), 8),
    "GB/s",
  );
  const n = 8192;
  using a = empty(device, [n, n], "bf16"),
    b = empty(device, [n, n], "bf16"),
    out = empty(device, [n, n], "bf16");
  device.kernels.normal(a, [1, 2], 1);
  device.kernels.normal(b, [3, 4], 1);
  const start = () => {
    device.kernels.gemm(a, b, out, { transposeB: true });
    return device.stream.synchronize();
  };
  report(
    `gemm ${n} x ${n} x ${n} bf16`,
    2 * n ** 3 / 1e6 / await awaitedTime(start, 12),
    "TFLOP/s",
  );
  const before = device.memory().reserved_bytes;
  const began = performance.now();
  const block = device.allocate(16 * 2 ** 30);
  const grown = device.memory().reserved_bytes - before;
  report("growth of the arena, per GiB", (performance.now() - began) / (grown / 2 ** 30), "ms");
  device.free(block);
  const first = device.stream.recordTimed();
  await device.stream.synchronize();
  device.anchor();
  const then = first.time();
  const again = device.stream.recordTimed();
  device.anchor();
  await device.stream.synchronize();
  report("an event before its anchor, and after: apart", again.time() - then, "µs");
}

if (import.meta.main) {
  needGpu();
  const cache = await Deno.makeTempDir();
  report("a device, libraries perhaps not yet in memory", await deviceTime(cache), "s");
  await Deno.remove(cache, { recursive: true });
  report("a device, all kernels compiled", await deviceTime(cache), "s");
  report("a device, kernels from the cache", await deviceTime(cache), "s");
  await Deno.remove(cache, { recursive: true });
  const device = await cudaDevice({ modules: [probe] });
  console.log(device.name);
  await overheads(device);
  await throughput(device);
  const file = Deno.args[Deno.args.indexOf("--json") + 1];
  if (Deno.args.includes("--json") && file) {
    await Deno.writeTextFile(file, JSON.stringify({ device: device.name, rows }, null, 1) + "\n");
  }
}
