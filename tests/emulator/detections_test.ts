// What the emulator finds that a GPU would leave to chance: missing barriers and waits, deadlocks, accesses out of bounds, misaligned
// ones, impossible launches. Only for the emulator: on a GPU most of these kernels end the context.

import assert from "node:assert/strict";
import { addressOf } from "../../ffi/address.ts";
import { CudaError } from "../../ffi/cuda_library.ts";
import { cudart, type CudaStreamHandle } from "../../ffi/cudart.ts";
import type { ModuleSource } from "../../tensor/cuda/context.ts";
import { compile, DeviceArray, type Kernels, type Value } from "./_kernels.ts";
import { emulated, loadCuda, testDevice } from "./device.ts";

const ok = await loadCuda() && emulated;

function test(name: string, fn: () => void | Promise<void>): void {
  Deno.test({ name: `cuda emulator: ${name}`, ignore: !ok, fn });
}

const f32 = (length: number) => new DeviceArray(new Float32Array(length));

/** Forgets the error of a kernel; the project itself never does, as nothing is to be trusted afterwards. */
function reset(): void {
  const symbols = { cudaDeviceReset: { parameters: [], result: "i32" } } as const;
  // deno-lint-ignore lina/dlopen-in-ffi
  Deno.dlopen(cudart().path, symbols).symbols.cudaDeviceReset();
}

/** Runs a kernel that must fail; checks the error's name and message. */
function assertFails(
  kernels: Kernels,
  launch: readonly [name: string, grid: number, block: number, shared: number, ...Value[]],
  codeName: string,
  message: RegExp,
): void {
  try {
    assert.throws(() => kernels.run(...launch), (error) => {
      assert(error instanceof CudaError);
      assert.match(error.message, message);
      assert.equal(error.codeName, codeName);
      return true;
    });
    // As on a GPU, nothing works any more.
    const cell = new BigUint64Array(new ArrayBuffer(8));
    assert.notEqual(cudart().calls.cudaMalloc(addressOf(cell.buffer), 4n), 0);
  } finally {
    reset();
  }
}

/** Runs `fn` with LINA_EMULATOR_SEED set. */
function withSeed(seed: number, fn: () => void): void {
  Deno.env.set("LINA_EMULATOR_SEED", String(seed));
  try {
    fn();
  } finally {
    Deno.env.delete("LINA_EMULATOR_SEED");
  }
}

const neighbours = (barriers: readonly [boolean, boolean]) => `
  extern "C" __global__ void rotate(float* x) {
    __shared__ float tile[256];
    int t = threadIdx.x, n = blockDim.x;
    float v = x[blockIdx.x * n + t];
    for (int r = 0; r < 3; r++) {
      tile[t] = v;
      ${barriers[0] ? "__syncthreads();" : ""}
      v = tile[(t + 1) % n];
      ${barriers[1] ? "__syncthreads();" : ""}
    }
    x[blockIdx.x * n + t] = v;
  }`;

async function rotates(barriers: readonly [boolean, boolean]): Promise<boolean> {
  const kernels = await compile(neighbours(barriers));
  const x = Float32Array.from({ length: 512 }, (_, i) => i);
  const array = new DeviceArray(x.slice());
  kernels.run("rotate", 2, 256, 0, array);
  const expected = x.map((_, i) => i - i % 256 + (i % 256 + 3) % 256);
  const result = array.read();
  return result.every((value, i) => value === expected[i]);
}

test("a missing barrier gives a wrong result, whichever it is", async () => {
  assert.equal(await rotates([true, true]), true);
  assert.equal(await rotates([false, true]), false);
  assert.equal(await rotates([true, false]), false);
});

test("a warp that runs ahead overwrites what the others have yet to read", async () => {
  // All warps would be in step if they took turns at their shuffles.
  const source = (barrier: string) =>
    `extern "C" __global__ void sums(float* x) {
    __shared__ float tile[128];
    int t = threadIdx.x;
    for (int r = 0; r < 2; r++) {
      tile[t] = t + r * 1000;
      __syncthreads();
      float v = __shfl_xor_sync(0xffffffffu, tile[(t + 32) % 128], 1);
      x[r * 128 + t] = __shfl_xor_sync(0xffffffffu, v, 1);
      ${barrier}
    }
  }`;
  for (const [barrier, good] of [["__syncthreads();", true], ["", false]] as const) {
    const x = f32(256);
    (await compile(source(barrier))).run("sums", 1, 128, 0, x);
    const right = x.read().every((value, i) => value === (i + 32) % 128 + (i >> 7) * 1000);
    assert.equal(right, good);
  }
});

test("a missing __syncwarp gives a wrong result", async () => {
  const source = (sync: string) =>
    `extern "C" __global__ void shift(float* x) {
    __shared__ float tile[32];
    tile[threadIdx.x] = x[threadIdx.x];
    ${sync}
    x[threadIdx.x] = tile[31 - threadIdx.x];
  }`;
  for (const [sync, good] of [["__syncwarp();", true], ["", false]] as const) {
    const x = new DeviceArray(Float32Array.from({ length: 32 }, (_, i) => i));
    (await compile(source(sync))).run("shift", 1, 32, 0, x);
    assert.equal(x.read().every((value, i) => value === 31 - i), good);
  }
});

test("a random order of threads finds what the usual orders do not", async () => {
  // Thread 0 writes a flag, which thread 128 needs: the barrier is missing, and in order it always comes first.
  const kernels = await compile(`extern "C" __global__ void flag(int* x) {
    __shared__ int flag;
    if (threadIdx.x == 0) flag = 1;
    __syncwarp();
    if (threadIdx.x == 128) x[0] = flag;
  }`);
  const x = new DeviceArray(new Int32Array(1));
  kernels.run("flag", 1, 256, 0, x);
  assert.equal(x.read()[0], 1);
  const seen = new Set<number>();
  for (let seed = 1; seed <= 30; seed++) {
    withSeed(seed, () => kernels.run("flag", 1, 256, 0, x));
    seen.add(x.read()[0]);
  }
  assert.deepEqual([...seen].sort(), [-1, 1]);
});

test("a copy that is not waited for, or overwrites what is still read, shows as NaN", async () => {
  const kernels = await compile(`
    extern "C" __global__ void early(float* out, const float* x) {
      __shared__ alignas(16) float tile[4];
      copy_async_16(tile, x, true);
      copy_async_commit();
      out[0] = tile[0];
      copy_async_wait<1>();
      out[1] = tile[0];
      copy_async_wait<0>();
      out[2] = tile[0];
    }
    extern "C" __global__ void uncommitted(float* out, const float* x) {
      __shared__ alignas(16) float tile[4];
      copy_async_16(tile, x, true);
      copy_async_wait<0>();
      out[0] = tile[0];
    }
    extern "C" __global__ void over(float* out, const float* x) {
      __shared__ alignas(16) float tile[4];
      for (int i = 0; i < 4; i++) tile[i] = 7;
      copy_async_16(tile, x, true);
      copy_async_commit();
      out[0] = tile[0];
      copy_async_wait<0>();
    }`);
  const x = new DeviceArray(Float32Array.of(1, 2, 3, 4)), out = f32(3);
  kernels.run("early", 1, 1, 0, out, x);
  assert.deepEqual([...out.read()], [NaN, NaN, 1]);
  kernels.run("uncommitted", 1, 1, 0, out, x);
  assert.deepEqual(out.read()[0], NaN);
  kernels.run("over", 1, 1, 0, out, x);
  assert.deepEqual(out.read()[0], NaN);
});

test("memory that was never written holds NaNs", async () => {
  const kernels = await compile(`extern "C" __global__ void look(float* out) {
    extern __shared__ __align__(1024) float dynamic[];
    __shared__ float fixed[4];
    out[2 * blockIdx.x] = dynamic[3];
    out[2 * blockIdx.x + 1] = fixed[3];
    dynamic[3] = fixed[3] = 1;
  }`);
  const out = f32(4);
  kernels.run("look", 2, 1, 16, out);
  assert.deepEqual([...out.read()], [NaN, NaN, NaN, NaN]);
});

test("a barrier that some threads never reach ends the kernel", async () => {
  const kernels = await compile(`
    extern "C" __global__ void leave(float* x) { if (threadIdx.x < 7) return; __syncthreads(); x[0] = 1; }
    extern "C" __global__ void mixed(float* x) { if (threadIdx.x < 32) __syncthreads(); else __syncwarp(0x3u); }
    extern "C" __global__ void part(float* x) { if (threadIdx.x % 2) x[0] = __shfl_sync(0xffffffffu, 1.0f, 0); else __syncthreads(); }
    extern "C" __global__ void self(float* x) { __syncwarp(0xfffffffeu); }
    extern "C" __global__ void kinds(float* x) { if (threadIdx.x % 2) __syncwarp(); else x[0] = __shfl_xor_sync(0xffffffffu, 1.0f, 1); }
    extern "C" __global__ void product(float* c, unsigned* a) { if (threadIdx.x < 31) mma_bf16(c, a, a); }`);
  const x = f32(64);
  assertFails(
    kernels,
    ["leave", 1, 64, 0, x],
    "cudaErrorLaunchFailure",
    /kernel leave, block \(0, 0, 0\), .*57 threads wait for ever, 7 have exited; 0-6 exited; 7-63 at __syncthreads/,
  );
  assertFails(
    kernels,
    ["mixed", 1, 64, 0, x],
    "cudaErrorLaunchFailure",
    /__syncwarp with mask 0x00000003, in which lane \d+ itself is missing/,
  );
  assertFails(
    kernels,
    ["part", 1, 32, 0, x],
    "cudaErrorLaunchFailure",
    /0-0 at __syncthreads; 1-1 at __shfl_sync with mask 0xffffffff/,
  );
  assertFails(kernels, ["self", 1, 32, 0, x], "cudaErrorLaunchFailure", /lane 0 itself is missing/);
  assertFails(
    kernels,
    ["kinds", 1, 32, 0, x],
    "cudaErrorLaunchFailure",
    /lanes of one warp meet at different operations/,
  );
  assertFails(
    kernels,
    ["product", 1, 32, 0, x, x],
    "cudaErrorLaunchFailure",
    /mma_bf16 needs all 32 lanes: only 0x7fffffff/,
  );
});

test("faults end the kernel with the place", async () => {
  const kernels = await compile(`
    extern "C" __global__ void behind(float* x, int i) { if (threadIdx.x == 5 && blockIdx.x == 1) x[i] = 1; }
    extern "C" __global__ void null(float* x) { *(volatile float*)nullptr = 1; }
    extern "C" __global__ void odd(float* x) { *(Pack<float, 4>*)(x + 4) = *(const Pack<float, 4>*)(x + 1); }
    extern "C" __global__ void fixed(float* x, int i) { __shared__ float tile[32]; tile[i] = 1; __syncthreads(); x[0] = tile[0]; }
    extern "C" __global__ void dynamic(float* x, int i) { extern __shared__ float tile[]; tile[i] = 1; __syncthreads(); x[0] = tile[0]; }
    extern "C" __global__ void divide(int* x, int by) { x[0] = 7 / by; }
    extern "C" __global__ void traps(float* x) { if (threadIdx.x == 3) __trap(); }
    extern "C" __global__ void copies(float* x) { __shared__ alignas(16) float tile[8]; copy_async_16(tile + 1, x, true); }
    extern "C" __global__ void elsewhere(float* x) { copy_async_16(x, x + 4, true); }`);
  const x = f32(64);
  const fails = (
    name: string,
    values: readonly Value[],
    code: string,
    message: RegExp,
    shared = 0,
  ) => assertFails(kernels, [name, 2, 32, shared, x, ...values], code, message);
  const place = /kernel behind, block \(1, 0, 0\), thread \(5, 0, 0\): illegal address/;
  fails("behind", [64], "cudaErrorIllegalAddress", place);
  fails("null", [], "cudaErrorIllegalAddress", /null pointer/);
  fails("odd", [], "cudaErrorMisalignedAddress", /kernel odd.*misaligned/);
  fails("fixed", [32], "cudaErrorIllegalAddress", /kernel fixed.*out of the bounds of an array/);
  fails("dynamic", [100], "cudaErrorIllegalAddress", /byte 400 of .* the launch gave 400/, 400);
  fails("dynamic", [4096], "cudaErrorIllegalAddress", /byte 16384 of .* the launch gave 400/, 400);
  fails("divide", [0], "cudaErrorLaunchFailure", /division by zero/);
  fails("traps", [], "cudaErrorLaunchFailure", /thread \(3, 0, 0\): __trap/);
  fails("copies", [], "cudaErrorMisalignedAddress", /not aligned to 16 bytes/);
  fails("elsewhere", [], "cudaErrorIllegalAddress", /not shared memory of this block/);
});

test("a kernel that waits for another thread by spinning is ended", async () => {
  const kernels = await compile(
    `extern "C" __global__ void spins(volatile int* x) { if (threadIdx.x == 0) { while (x[0] == 0); } else x[0] = 1; }`,
  );
  Deno.env.set("LINA_EMULATOR_LIMIT_S", "0");
  try {
    assertFails(
      kernels,
      ["spins", 1, 2, 0, new DeviceArray(new Int32Array(1))],
      "cudaErrorLaunchTimeout",
      /kernel spins, block \(0, 0, 0\), thread \(0, 0, 0\): the kernel ran for more than 0 s/,
    );
  } finally {
    Deno.env.delete("LINA_EMULATOR_LIMIT_S");
  }
});

test("impossible launches are refused, and nothing is broken by them", async () => {
  const kernels = await compile(`extern "C" __global__ void one(float* x) { x[0] = 1; }`);
  const x = f32(1);
  const refuses = (grid: number, block: number, shared: number, message: RegExp) =>
    assert.throws(() => kernels.run("one", grid, block, shared, x), message);
  refuses(1, 1025, 0, /cudaErrorInvalidValue.*one: a block has 1 to 1024 threads.*1025/);
  refuses(1, 0, 0, /a block has 1 to 1024 threads/);
  refuses(0, 1, 0, /a grid is 1 to/);
  refuses(1, 1, 228 * 1024, /dynamic shared memory of 233472 bytes/);
  assert.throws(() => kernels.run("two", 1, 1, 0, x), /no extern "C" __global__ void two/);
  kernels.run("one", 1, 1, 227 * 1024, x);
  assert.equal(x.read()[0], 1);
});

test("a source that does not compile says where", async () => {
  await assert.rejects(compile(`\n\nextern "C" __global__ void f() { nonsense(); }`), /nonsense/);
  const refused = `extern "C" __global__ void f() { extern __shared__ alignas(16) float tile[]; }`;
  await assert.rejects(compile(refused), /NVRTC refuses alignas/);
});

test("memory has an end, and freed memory is gone", async () => {
  const cell = new BigUint64Array(new ArrayBuffer(8));
  assert.equal(cudart().calls.cudaMalloc(addressOf(cell.buffer), 1n << 50n), 2);
  const kernels = await compile(`extern "C" __global__ void touch(float* x) { x[0] = 1; }`);
  const x = f32(1 << 20);
  x.free();
  assertFails(kernels, ["touch", 1, 1, 0, x], "cudaErrorIllegalAddress", /kernel touch.*freed/);
});

test("allocations of the device are fenced", async () => {
  const source = `
    extern "C" __global__ void put(float* x, int i) { x[i] = 1; }
    extern "C" __global__ void get(float* x, float* out, int i) { out[0] = x[i]; }`;
  const module = {
    name: "fence",
    source,
    kernels: { put: ["ptr", "i32"], get: ["ptr", "ptr", "i32"] },
  } as const;
  const { context, stream } = (await testDevice([module]))!;
  const put = context.kernel(module, "put"), get = context.kernel(module, "get");
  const finds = async (message: RegExp) => {
    try {
      await assert.rejects(stream.synchronize(), message);
    } finally {
      reset();
    }
  };
  const make = () => context.allocate(4 * 100);
  const x = make(), out = context.allocate(4);
  put.launch(1, 1, 1, 1, 0, x, 99);
  context.free(x);
  put.launch(1, 1, 1, 1, 0, x, 0);
  await finds(/kernel put.*freed/);
  const y = make();
  put.launch(1, 1, 1, 1, 0, y, 100); // rounding up to 256 bytes left room
  context.free(y);
  await finds(/byte 400 of an allocation of 400 bytes was written/);
  const z = make();
  put.launch(1, 1, 1, 1, 0, z, -1);
  context.free(z);
  await finds(/4 bytes before an allocation of 400 bytes was written/);
  const w = make();
  get.launch(1, 1, 1, 1, 0, w, out, 128);
  await finds(/kernel get.*behind the end of an allocation/);
  context.free(w);
  context.free(out);
});

test("work of a stream comes as late as it may", async () => {
  const source =
    `extern "C" __global__ void copy(float* to, const float* from) { to[0] = from[0]; }`;
  const module = { name: "late", source, kernels: { copy: ["ptr", "ptr"] } } as const;
  const device = (await testDevice([module]))!;
  const { context, stream } = device;
  const copy = context.kernel(module, "copy");
  const { calls } = cudart();
  const x = context.allocate(4), y = context.allocate(4);
  // Pinned memory that changes before its copy was waited for.
  using pinned = device.pinned(8);
  const host = new Float32Array(pinned.buffer);
  host[0] = 1;
  calls.cudaMemcpyAsync(BigInt(x), BigInt(pinned.address), 4n, 1, stream.handle);
  host[0] = 2;
  copy.launch(1, 1, 1, 1, 0, y, x);
  calls.cudaMemcpyAsync(BigInt(pinned.address) + 4n, BigInt(y), 4n, 2, stream.handle);
  host[1] = 3;
  assert.equal(host[1], 3); // nothing has run so far
  await stream.synchronize();
  assert.deepEqual([...host], [2, 2]);
  // A second stream that waits for the first one sees its work, else it does not.
  const other = device.createStream("other");
  context.clear(y, 4);
  calls.cudaMemcpyAsync(BigInt(pinned.address), BigInt(y), 4n, 2, other.handle);
  await other.synchronize();
  assert.equal(host[0], 2);
  other.wait(stream.record());
  calls.cudaMemcpyAsync(BigInt(pinned.address), BigInt(y), 4n, 2, other.handle);
  await other.synchronize();
  assert.equal(host[0], 0);
  // Freed in the order of the compute stream: what the other stream has not been waited for finds it gone.
  calls.cudaMemcpyAsync(BigInt(pinned.address), BigInt(y), 4n, 2, other.handle);
  context.free(y);
  await stream.synchronize();
  try {
    await assert.rejects(
      other.synchronize(),
      /cudaMemcpyAsync of 4 bytes: the source is not allocated/,
    );
  } finally {
    reset();
  }
  context.free(x);
});

test("a kernel that overlaps the one before it, and does not wait for it", async () => {
  const { compileModule } = await import("../../tensor/cuda/compile.ts");
  const { Modules } = await import("../../tensor/cuda/launch.ts");
  // Of every number of a launch something shows in x: blocks in three dimensions, threads, shared memory.
  const write = (name: string, first: string) => `
    extern "C" __global__ void ${name}(float* x) {
      ${first}
      extern __shared__ __align__(16) float held[];
      int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
      held[threadIdx.x] = block * blockDim.x + threadIdx.x;
      x[block * blockDim.x + threadIdx.x] = held[threadIdx.x];
    }`;
  const module: ModuleSource = {
    name: "overlapping",
    source: write("waits", "after_previous();") + write("hurries", ""),
    kernels: { waits: ["ptr"], hurries: ["ptr"] },
    overlaps: true,
  };
  const { code } = await compileModule(module, 80);
  const stream = 0n as CudaStreamHandle, want = Float32Array.from({ length: 96 }, (_, i) => i);
  // Code for an older architecture, on whatever GPU, is never launched to overlap: there after_previous() is empty.
  for (const [name, architecture] of [["waits", 90], ["hurries", 89], ["hurries", 90]] as const) {
    const x = f32(want.length);
    const modules = new Modules([{ module, architecture, code }], stream);
    modules.kernel(module, name).launch(2, 3, 4, 4, 16, Number(x.address));
    if (name === "waits" || architecture < 90) {
      assert.deepEqual(x.read(), want);
    } else {
      assert.throws(() => x.read(), /LaunchFailed|719|LaunchFailure/);
      reset();
    }
  }
});
