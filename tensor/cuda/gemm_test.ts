// The matrix product against the CPU's, at odd sizes, with every transpose, dtype, factor and offset.

import assert from "node:assert/strict";
import { smallSizes, testDevice } from "../../tests/emulator/device.ts";
import { cpuDevice } from "../cpu/device.ts";
import type { Device } from "../device.ts";
import { bytesOf, type DType } from "../dtype.ts";
import { empty, fromArray, Tensor } from "../tensor.ts";

const device = await testDevice();
const ignore = device === null;

/** Numbers that bf16 holds exactly, so that only sums round. */
function numbers(size: number, seed: number): Float32Array {
  return Float32Array.from({ length: size }, (_, i) => ((i * 37 + seed * 101) % 33 - 16) / 16);
}

/** A tensor of those numbers on a device, in a dtype, `offset` elements into its memory. */
function tensorOf(on: Device, values: Float32Array, shape: number[], dtype: DType, offset: number) {
  const whole = empty(on, [offset + values.length], dtype);
  const view = new Tensor(on, dtype, shape, {
    address: whole.address + offset * bytesOf(dtype),
    owner: whole,
  });
  on.write(
    dtype === "bf16"
      ? Uint16Array.from(new Uint32Array(values.buffer), (bits) => bits >>> 16)
      : values,
    view,
  );
  return { view, whole };
}

async function floats(x: Tensor): Promise<Float32Array> {
  const array = await x.toArray();
  if (x.dtype !== "bf16") return array as Float32Array;
  return new Float32Array(Uint32Array.from(array as Uint16Array, (bits) => bits << 16).buffer);
}

const SIZES = [[1, 1, 1], [3, 5, 7], [17, 1, 33], [1, 129, 17], [129, 65, 3], [64, 48, 200]];

for (const [dtype, outDtype] of [["f32", "f32"], ["bf16", "bf16"], ["bf16", "f32"]] as const) {
  Deno.test({
    name: `gemm ${dtype} to ${outDtype} agrees with the CPU`,
    ignore,
    async fn() {
      const cuda = device!, cpu = cpuDevice();
      for (const [m, n, k] of SIZES) {
        for (let variant = 0; variant < 4; variant++) {
          const transposeA = (variant & 1) > 0, transposeB = (variant & 2) > 0;
          const [alpha, beta] = [[1, 0], [0.5, 1], [-2, 0.25], [1, 1]][variant];
          const a = numbers(m * k, 1), b = numbers(k * n, 2), old = numbers(m * n, 3);
          const shapeA = transposeA ? [k, m] : [m, k], shapeB = transposeB ? [n, k] : [k, n];
          const run = async (on: Device, dtype: DType, outDtype: DType, offset: number) => {
            const [x, y, out] = [
              tensorOf(on, a, shapeA, dtype, offset),
              tensorOf(on, b, shapeB, dtype, offset),
              tensorOf(on, old, [m, n], outDtype, offset),
            ];
            on.kernels.gemm(x.view, y.view, out.view, { transposeA, transposeB, alpha, beta });
            const result = await floats(out.view);
            for (const { whole } of [x, y, out]) whole[Symbol.dispose]();
            return result;
          };
          const expected = await run(cpu, "f32", "f32", 0);
          for (const offset of [0, 1]) {
            const got = await run(cuda, dtype, outDtype, offset);
            // cuBLAS may round a product to bf16 before it adds the old contents.
            const relative = outDtype === "f32" ? 2 ** -20 : beta === 0 ? 2 ** -8 : 2 ** -7;
            got.forEach((value, i) => {
              const bound = relative * (Math.abs(expected[i]) + 0.01 * k);
              assert.ok(
                Math.abs(value - expected[i]) <= bound,
                `[${m}, ${n}, ${k}] variant ${variant} offset ${offset} at ${i}: ${value}, ${
                  expected[i]
                }`,
              );
            });
          }
        }
      }
    },
  });
}

Deno.test({
  name: "gemm without rows, columns or sums",
  ignore,
  async fn() {
    const cuda = device!;
    for (const [m, n, k] of [[0, 3, 4], [3, 0, 4], [0, 0, 0]]) {
      using a = empty(cuda, [m, k]), b = empty(cuda, [k, n]), out = empty(cuda, [m, n]);
      cuda.kernels.gemm(a, b, out);
    }
    using a = empty(cuda, [3, 0]), b = empty(cuda, [0, 2]);
    using out = fromArray(cuda, new Float32Array([1, 2, 3, 4, 5, 6]), [3, 2]);
    cuda.kernels.gemm(a, b, out, { beta: 1 });
    assert.deepEqual(await out.toArray(), new Float32Array([1, 2, 3, 4, 5, 6]));
    cuda.kernels.gemm(a, b, out, { beta: 0.5 });
    assert.deepEqual(await out.toArray(), new Float32Array([0.5, 1, 1.5, 2, 2.5, 3]));
    cuda.kernels.gemm(a, b, out);
    assert.deepEqual(await out.toArray(), new Float32Array(6));
  },
});

Deno.test({
  name: "gemm: beta 0 never reads what was there; other dtypes are refused",
  ignore,
  async fn() {
    const cuda = device!;
    using a = fromArray(cuda, new Float32Array([1, 2]), [1, 2]);
    using b = fromArray(cuda, new Float32Array([3, 4]), [2, 1]);
    using out = fromArray(cuda, new Float32Array([NaN]), [1, 1]);
    cuda.kernels.gemm(a, b, out);
    assert.deepEqual(await out.toArray(), new Float32Array([11]));
    using half = empty(cuda, [1, 1], "bf16"), double = empty(cuda, [1, 2], "f64");
    assert.throws(() => cuda.kernels.gemm(a, b, half), /f32, f32 to bf16/);
    assert.throws(() => cuda.kernels.gemm(double, b, out), /must be f32 or bf16/);
  },
});

Deno.test({
  name: "gemm takes no memory after the first call",
  ignore,
  async fn() {
    const cuda = device!, n = smallSizes ? 64 : 4096;
    using a = fromArray(cuda, numbers(n * n, 1), [n, n]), out = empty(cuda, [n, n]);
    cuda.kernels.gemm(a, a, out);
    const before = cuda.memory(), waits = cuda.hostWaits;
    for (let i = 0; i < 10; i++) cuda.kernels.gemm(a, a, out, { transposeB: i % 2 === 0 });
    assert.deepEqual(cuda.memory(), before);
    assert.equal(cuda.hostWaits, waits);
    await cuda.stream.synchronize();
  },
});
