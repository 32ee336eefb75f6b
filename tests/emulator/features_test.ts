// What kernels may rely on, as the emulator has it: barriers, warp operations, tensor core fragments, asynchronous copies, conversions,
// atomic operations, parameters. The same tests pass on a real GPU, which shows that the emulation is true.

import assert from "node:assert/strict";
import fc from "fast-check";
import { bf16Bits, compile, DeviceArray, type Elements, numbers } from "./_kernels.ts";
import { loadCuda } from "./device.ts";

const ok = await loadCuda();

function test(name: string, fn: () => void | Promise<void>): void {
  Deno.test({ name: `cuda emulator: ${name}`, ignore: !ok, fn });
}

const f32 = (length: number) => new DeviceArray(new Float32Array(length));
const i32 = (length: number) => new DeviceArray(new Int32Array(length));

test("kernels come from macros and take parameters of every type", async () => {
  const kernels = await compile(`
    struct Three { int a; float b; bf16 c; };
    template <typename T>
    DEVICE void put(double* out, T x, i64 y, float z, double w, Three t, unsigned u) {
      out[0] = to_f32(x); out[1] = (double)y; out[2] = z; out[3] = w; out[4] = t.a; out[5] = t.b; out[6] = to_f32(t.c); out[7] = u;
    }
    #define PUT(T) extern "C" __global__ void put_##T(double* out, T x, i64 y, float z, double w, Three t, unsigned u) { put(out, x, y, z, w, t, u); }
    PUT(float) PUT(bf16)`);
  const three = new Uint8Array(new ArrayBuffer(12));
  new DataView(three.buffer).setInt32(0, -5, true);
  new DataView(three.buffer).setFloat32(4, 0.25, true);
  new DataView(three.buffer).setUint16(8, bf16Bits(3), true);
  for (
    const [name, x] of [["put_float", Float32Array.of(1.5)], [
      "put_bf16",
      Uint16Array.of(bf16Bits(1.5)),
    ]] as const
  ) {
    const out = new DeviceArray(new Float64Array(8));
    // deno-fmt-ignore
    kernels.run(name, 1, 1, 0, out, x, BigInt64Array.of(-(2n ** 40n)), Float32Array.of(0.5), Float64Array.of(1e300), three, Uint32Array.of(0xffffffff));
    assert.deepEqual([...out.read()], [1.5, -(2 ** 40), 0.5, 1e300, -5, 0.25, 3, 0xffffffff]);
  }
});

test("blocks and threads in three dimensions have their indices", async () => {
  const kernels = await compile(`
    extern "C" __global__ void where(int* out, int n) {
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) out[i] = blockIdx.x * 10000 + threadIdx.x;
    }`);
  for (const [grid, block, n] of [[1, 1, 1], [3, 33, 99], [7, 1024, 7000]]) {
    const out = i32(n);
    kernels.run("where", grid, block, 0, out, n);
    const expected = Array.from({ length: n }, (_, i) => Math.floor(i / block) * 10000 + i % block);
    assert.deepEqual([...out.read()], expected);
  }
});

test("barriers: shared memory is seen by all, predicates are joined", async () => {
  const kernels = await compile(`
    extern "C" __global__ void reverse(float* x, int rounds) {
      extern __shared__ __align__(1024) float dynamic[];
      __shared__ float fixed[1024];
      int t = threadIdx.x, n = blockDim.x;
      float v = x[blockIdx.x * n + t];
      for (int r = 0; r < rounds; r++) {
        fixed[t] = v;
        __syncthreads();
        dynamic[n - 1 - t] = fixed[(t + 1) % n];
        __syncthreads();
        v = dynamic[t];
      }
      x[blockIdx.x * n + t] = v;
    }
    extern "C" __global__ void predicates(int* out, int below) {
      int p = (int)threadIdx.x < below;
      int count = __syncthreads_count(p), all = __syncthreads_and(p), any = __syncthreads_or(p);
      out[threadIdx.x] = count * 4 + (all != 0) * 2 + (any != 0);
    }
    extern "C" __global__ void sums(float* out, const float* x) {
      __shared__ float scratch[32];
      float sum = block_sum(x[threadIdx.x], scratch), most = block_max(x[threadIdx.x], scratch);
      out[2 * threadIdx.x] = sum;
      out[2 * threadIdx.x + 1] = most;
    }`);
  for (const n of [1, 31, 33, 256, 1024]) {
    let expected = Array.from({ length: n }, (_, i) => i);
    const x = new DeviceArray(Float32Array.from([...expected, ...expected, ...expected]));
    kernels.run("reverse", 3, n, 4 * n, x, 3);
    for (let r = 0; r < 3; r++) {
      const last = expected;
      expected = last.map((_, i) => last[(n - 1 - i + 1) % n]);
    }
    assert.deepEqual([...x.read()], [...expected, ...expected, ...expected]);
  }
  for (const below of [0, 1, 69, 70]) {
    const out = i32(70);
    kernels.run("predicates", 1, 70, 0, out, below);
    const expected = below * 4 + (below === 70 ? 2 : 0) + (below > 0 ? 1 : 0);
    assert.deepEqual([...out.read()], new Array(70).fill(expected));
  }
  const x = Float32Array.from({ length: 256 }, (_, i) => (i * 37) % 256);
  const out = f32(512);
  kernels.run("sums", 1, 256, 0, out, new DeviceArray(x));
  assert.deepEqual([...out.read()], Array.from({ length: 512 }, (_, i) => i % 2 ? 255 : 32640));
});

test("shuffles of every kind, width and type", async () => {
  const kernels = await compile(`
    template <typename T>
    DEVICE void shuffles(T* out, const T* x, int by, int width) {
      T v = x[threadIdx.x];
      out[threadIdx.x] = __shfl_sync(0xffffffffu, v, by, width);
      out[64 + threadIdx.x] = __shfl_up_sync(0xffffffffu, v, by, width);
      out[128 + threadIdx.x] = __shfl_down_sync(0xffffffffu, v, by, width);
      out[192 + threadIdx.x] = __shfl_xor_sync(0xffffffffu, v, by, width);
    }
    #define SHUFFLES(T, name) extern "C" __global__ void name(T* out, const T* x, int by, int width) { shuffles(out, x, by, width); }
    SHUFFLES(float, of_float) SHUFFLES(int, of_int) SHUFFLES(u64, of_u64) SHUFFLES(double, of_double)`);
  const squares = Array.from({ length: 64 }, (_, i) => i * i + 1);
  const large = squares.map((value) => BigInt(value) << 33n);
  const types: Record<string, [input: Elements, output: Elements]> = {
    of_float: [Float32Array.from(squares), new Float32Array(256)],
    of_int: [Int32Array.from(squares), new Int32Array(256)],
    of_u64: [BigUint64Array.from(large), new BigUint64Array(256)],
    of_double: [Float64Array.from(squares), new Float64Array(256)],
  };
  const arrays = Object.entries(types).map(([name, [input, output]]) =>
    [name, input, new DeviceArray(input), new DeviceArray(output)] as const
  );
  const sources = [
    (_: number, by: number, begin: number, width: number) => begin + by % width,
    (lane: number, by: number, begin: number) => lane - by < begin ? lane : lane - by,
    (lane: number, by: number, begin: number, width: number) =>
      lane + by < begin + width ? lane + by : lane,
    (lane: number, by: number, begin: number, width: number) =>
      (lane ^ by) < begin + width ? lane ^ by : lane,
  ];
  const any = fc.tuple(
    fc.constantFrom(...arrays),
    fc.integer({ min: 0, max: 31 }),
    fc.constantFrom(1, 2, 4, 8, 16, 32),
  );
  fc.assert(
    fc.property(any, ([[name, x, input, output], by, width]) => {
      kernels.run(name, 1, 64, 0, output, input, by, width);
      const expected = sources.flatMap((source) =>
        Array.from({ length: 64 }, (_, i) => {
          const lane = i % 32;
          return x[i - lane + source(lane, by, lane - lane % width, width)];
        })
      );
      assert.deepEqual([...output.read()], expected);
    }),
    { numRuns: 60 },
  );
});

test("votes, reductions and matches, also in halves of a warp that go apart", async () => {
  const kernels = await compile(`
    extern "C" __global__ void votes(int* out, const int* x, unsigned split) {
      int lane = threadIdx.x % 32, v = x[threadIdx.x];
      unsigned mask = split >> lane & 1 ? split : ~split;
      int* to = out + 10 * threadIdx.x;
      if (split >> lane & 1) { // the two parts of the warp meet at different places of the program
        to[0] = __ballot_sync(mask, v & 1);
        to[1] = __any_sync(mask, v > 90);
      } else {
        to[0] = __ballot_sync(mask, v & 1);
        to[1] = __any_sync(mask, v > 90);
      }
      __syncwarp();
      to[2] = __all_sync(mask, v > 0);
      to[3] = __reduce_add_sync(mask, v);
      to[4] = __reduce_min_sync(mask, v);
      to[5] = __reduce_max_sync(mask, v);
      to[6] = __reduce_and_sync(mask, (unsigned)v);
      to[7] = __reduce_or_sync(mask, (unsigned)v);
      to[8] = __reduce_xor_sync(mask, (unsigned)v);
      to[9] = __match_any_sync(mask, v % 3);
    }`);
  const value = fc.integer({ min: -5, max: 100 });
  const part = fc.integer({ min: 1, max: 0x7fffffff });
  fc.assert(
    fc.property(fc.array(value, { minLength: 64, maxLength: 64 }), part, (x, split) => {
      const out = i32(640), input = new DeviceArray(Int32Array.from(x));
      kernels.run("votes", 1, 64, 0, out, input, Uint32Array.of(split));
      const expected = x.flatMap((own, i) => {
        const base = i - i % 32;
        const member = (lane: number) => (split >> lane & 1) === (split >> i % 32 & 1);
        const lanes = Array.from({ length: 32 }, (_, lane) => lane).filter(member);
        const group = lanes.map((lane) => x[base + lane]);
        const bits = (pass: (v: number) => boolean) =>
          lanes.reduce((sum, lane) => pass(x[base + lane]) ? sum | 1 << lane : sum, 0);
        return [
          bits((v) => (v & 1) === 1),
          Number(group.some((v) => v > 90)),
          Number(group.every((v) => v > 0)),
          group.reduce((a, b) => a + b),
          Math.min(...group),
          Math.max(...group),
          group.reduce((a, b) => a & b),
          group.reduce((a, b) => a | b),
          group.reduce((a, b) => a ^ b),
          bits((v) => v % 3 === own % 3),
        ];
      });
      assert.deepEqual([...out.read()], expected);
      out.free();
      input.free();
    }),
    { numRuns: 30 },
  );
});

const FRAGMENTS = `
  extern "C" __global__ void matrices(unsigned* out, const u16* x, int transposed) {
    __shared__ alignas(16) u16 tile[32 * 24];
    for (int i = threadIdx.x; i < 32 * 24; i += 32) tile[i] = x[i];
    __syncthreads();
    u32 r[4];
    if (transposed) load_matrices_transposed(r, tile + threadIdx.x * 24 + 8);
    else load_matrices(r, tile + threadIdx.x * 24 + 8);
    for (int j = 0; j < 4; j++) out[threadIdx.x * 4 + j] = r[j];
  }
  // c [16, 8] += a [16, 16] b [16, 8]; the fragments come by load_matrices as in real kernels, and c by its layout.
  extern "C" __global__ void product(float* c, const u16* a, const u16* b) {
    __shared__ alignas(16) u16 sa[16 * 16], sb[16 * 16];
    int t = threadIdx.x;
    for (int i = t; i < 256; i += 32) { sa[i] = a[i]; sb[i] = i % 16 < 8 ? b[i / 16 * 8 + i % 16] : 0; }
    __syncthreads();
    u32 ra[4], rb[4];
    load_matrices(ra, sa + (t % 16) * 16 + t / 16 * 8);
    load_matrices_transposed(rb, sb + (t % 16) * 16 + t / 16 * 8);
    float rc[4];
    for (int i = 0; i < 4; i++) rc[i] = c[(t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2];
    mma_bf16(rc, ra, rb);
    for (int i = 0; i < 4; i++) c[(t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = rc[i];
  }`;

test("load_matrices: every element of every lane, straight and transposed", async () => {
  const kernels = await compile(FRAGMENTS);
  const x = Uint16Array.from({ length: 32 * 24 }, (_, i) => i);
  for (const transposed of [0, 1]) {
    const out = new DeviceArray(new Uint32Array(128));
    kernels.run("matrices", 1, 32, 0, out, new DeviceArray(x), transposed);
    const element = (matrix: number, row: number, column: number) =>
      x[(8 * matrix + row) * 24 + 8 + column];
    const expected = Array.from({ length: 128 }, (_, i) => {
      const matrix = i % 4, lane = i >> 2, major = lane >> 2, minor = 2 * (lane % 4);
      const [low, high] = [minor, minor + 1].map((k) =>
        transposed ? element(matrix, k, major) : element(matrix, major, k)
      );
      return low + high * 65536;
    });
    assert.deepEqual([...out.read()], expected);
  }
});

test("mma_bf16: every position of its three fragments", async () => {
  const kernels = await compile(FRAGMENTS);
  const run = (a: number[], b: number[], c: number[]) => {
    const arrays = [
      new DeviceArray(Float32Array.from(c)),
      new DeviceArray(Uint16Array.from(a, bf16Bits)),
      new DeviceArray(Uint16Array.from(b, bf16Bits)),
    ] as const;
    kernels.run("product", 1, 32, 0, ...arrays);
    const result = [...arrays[0].read()];
    for (const array of arrays) array.free();
    return result;
  };
  // Small integers: sums are exact, so any error of a layout shows and nothing else does.
  const small = (length: number, seed: number) =>
    [...numbers(length, seed)].map((x) => Math.round(x * 8));
  const product = (a: number[], b: number[], c: number[]) =>
    c.map((start, i) => {
      const row = i >> 3, column = i % 8;
      return Array.from({ length: 16 }, (_, k) => a[row * 16 + k] * b[k * 8 + column])
        .reduce((x, y) => x + y, start);
    });
  const b = small(128, 1), c = small(128, 2);
  for (let at = 0; at < 256; at++) {
    const a = new Array<number>(256).fill(0);
    a[at] = 1;
    assert.deepEqual(run(a, b, c), product(a, b, c));
  }
  const a = small(256, 3);
  assert.deepEqual(run(a, b, c), product(a, b, c));
});

test("copy_async: groups land in order, zeros where not valid", async () => {
  const kernels = await compile(`
    extern "C" __global__ void copies(float* out, const float* x) {
      __shared__ alignas(16) float tile[3][128];
      int t = threadIdx.x;
      for (int s = 0; s < 3; s++) {
        copy_async_16(&tile[s][4 * t], x + s * 128 + 4 * t, t % 5 != s);
        copy_async_commit();
      }
      copy_async_wait<2>();
      __syncthreads();
      for (int i = 0; i < 4; i++) out[t + 32 * i] = tile[0][t + 32 * i];
      copy_async_wait<1>();
      __syncthreads();
      for (int i = 0; i < 4; i++) out[128 + t + 32 * i] = tile[1][t + 32 * i];
      copy_async_wait<0>();
      __syncthreads();
      for (int i = 0; i < 4; i++) out[256 + t + 32 * i] = tile[2][t + 32 * i];
    }`);
  const x = numbers(384, 5), out = f32(384);
  kernels.run("copies", 1, 32, 0, out, new DeviceArray(x));
  const expected = x.map((value, i) => (i % 128 >> 2) % 5 === Math.floor(i / 128) ? 0 : value);
  assert.deepEqual(out.read(), expected);
});

test("bf16 is rounded to nearest even; a NaN stays one", async () => {
  const kernels = await compile(`
    extern "C" __global__ void rounds(unsigned* out, const float* x, int n) {
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) {
        out[2 * i] = to_bf16(x[i]).bits;
        out[2 * i + 1] = pack_bf16(x[i], x[n - 1 - i]);
      }
    }
    extern "C" __global__ void widens(float* out) { bf16 x; x.bits = blockIdx.x * 256 + threadIdx.x; out[x.bits] = to_f32(x); }`);
  const bits: number[] = [];
  for (let high = 0; high < 0x10000; high += 61) {
    for (const low of [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff]) bits.push(high * 65536 + low);
  }
  const x = new Float32Array(Uint32Array.from(bits).buffer), n = x.length;
  const input = new DeviceArray(x), out = new DeviceArray(new Uint32Array(2 * n));
  kernels.run("rounds", Math.ceil(n / 256), 256, 0, out, input, n);
  const rounded = bits.map((each) =>
    (each & 0x7fffffff) > 0x7f800000
      ? 0x7fff
      : ((each + 0x7fff + (each >>> 16 & 1)) >>> 16) & 0xffff
  );
  const expected = rounded.flatMap((each, i) => [each, each + rounded[n - 1 - i] * 65536]);
  assert.deepEqual([...out.read()], expected);
  const wide = f32(65536);
  kernels.run("widens", 256, 256, 0, wide);
  const back = new Uint32Array(wide.read().buffer);
  assert(back.every((each, i) => each === i * 65536));
});

test("atomic operations", async () => {
  const kernels = await compile(`
    extern "C" __global__ void atomics(int* i, unsigned* u, u64* w, float* f, double* d) {
      int t = blockIdx.x * blockDim.x + threadIdx.x;
      atomicAdd(i, t); atomicMax(i + 1, t); atomicMin(i + 2, -t); atomicSub(i + 3, 1); atomicExch(i + 4, 7);
      atomicOr(u, 1u << t % 32); atomicAnd(u + 1, ~(1u << t % 7)); atomicXor(u + 2, t); atomicInc(u + 3, 9);
      for (unsigned old = u[4], seen; (seen = atomicCAS(u + 4, old, old + 2)) != old;) old = seen;
      atomicAdd(w, 1ull << 33); atomicMax(w + 1, (u64)t << 40); atomicAdd(f, 0.5f); atomicAdd(d, 0.25);
    }`);
  const i = i32(5), u = new DeviceArray(Uint32Array.of(0, 0xffffffff, 0, 0, 0));
  const w = new DeviceArray(new BigUint64Array(2));
  const f = f32(1), d = new DeviceArray(new Float64Array(1));
  kernels.run("atomics", 4, 64, 0, i, u, w, f, d);
  assert.deepEqual([...i.read()], [255 * 128, 255, -255, -256, 7]);
  assert.deepEqual([...u.read()], [0xffffffff, 0xffffff80, 0, 6, 512]);
  assert.deepEqual([...w.read()], [256n << 33n, 255n << 40n]);
  assert.deepEqual([f.read()[0], d.read()[0]], [128, 64]);
});

test("mathematical functions and integer intrinsics", async () => {
  const names = [
    ["exp2_fast(x)", (x: number) => 2 ** x],
    ["__expf(x)", Math.exp],
    ["__logf(fabsf(x) + 0.1f)", (x: number) => Math.log(Math.abs(x) + 0.1)],
    ["rsqrtf(x * x + 1)", (x: number) => 1 / Math.sqrt(x * x + 1)],
    ["tanhf(x)", Math.tanh],
    ["expm1f(x)", Math.expm1],
    ["log1pf(fabsf(x))", (x: number) => Math.log1p(Math.abs(x))],
    ["__fdividef(x, 3.0f)", (x: number) => x / 3],
    ["__saturatef(x)", (x: number) => Math.min(1, Math.max(0, x))],
    ["fminf(x, max(0.25f, -x))", (x: number) => Math.min(x, Math.max(0.25, -x))],
    ["(float)__float2int_rn(x * 4)", (x: number) => Math.round(x * 4)],
    [
      "(float)__clz(__float2int_rd(fabsf(x) * 1000))",
      (x: number) => Math.clz32(Math.floor(Math.abs(x) * 1000)),
    ],
    ["(float)__popc(__float_as_uint(x) >> 8)", (x: number) => {
      const bits = new Uint32Array(Float32Array.of(x).buffer)[0] >>> 8;
      return bits.toString(2).replaceAll("0", "").length;
    }],
    ["(float)(__byte_perm(0x03020100u, 0x07060504u, 0x5410u) >> 24)", () => 5],
  ] as const;
  const lines = names.map(([code], i) => `out[${i} * 200 + t] = ${code};`).join("\n");
  const kernels = await compile(
    `extern "C" __global__ void all(float* out, const float* in) { int t = threadIdx.x; float x = in[t]; ${lines} }`,
  );
  const x = numbers(200, 9).map((value) => value * 5), out = f32(200 * names.length);
  kernels.run("all", 1, 200, 0, out, new DeviceArray(x));
  const result = out.read();
  names.forEach(([code, fn], i) => {
    x.forEach((value, t) => {
      const expected = fn(value), got = result[i * 200 + t];
      const bound = 1e-6 + 2e-5 * Math.abs(expected);
      assert(Math.abs(got - expected) <= bound, `${code} of ${value} is ${expected}: ${got}`);
    });
  });
});
