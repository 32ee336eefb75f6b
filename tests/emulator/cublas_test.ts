// cuBLAS as the emulator has it. The same test passes on a real GPU.

import assert from "node:assert/strict";
import fc from "fast-check";
import { addressOf, keepUntilHere } from "../../ffi/address.ts";
import { checkCublas, CUBLAS, cublas, type CublasHandle } from "../../ffi/cublas.ts";
import { bf16Bits, DeviceArray, fromBf16, numbers } from "./_kernels.ts";
import { loadCuda } from "./device.ts";

const ok = await loadCuda();

Deno.test({
  name: "cuda emulator: cublasGemmEx: every pair of types, transposition and stride",
  ignore: !ok,
  fn() {
    const { calls } = cublas();
    const cell = new BigUint64Array(new ArrayBuffer(8));
    checkCublas(calls.cublasCreate_v2(addressOf(cell.buffer)), "cublasCreate_v2");
    const handle = cell[0] as CublasHandle;
    const cases = fc.record({
      m: fc.integer({ min: 1, max: 20 }),
      n: fc.integer({ min: 1, max: 20 }),
      k: fc.integer({ min: 0, max: 20 }),
      ta: fc.constantFrom(0, 1),
      tb: fc.constantFrom(0, 1),
      pad: fc.integer({ min: 0, max: 3 }),
      types: fc.constantFrom([14, 14], [14, 0], [0, 0], [1, 1]),
      alpha: fc.constantFrom(1, -0.5),
      beta: fc.constantFrom(0, 1, 0.25),
    });
    const make = (type: number, x: Float32Array) => {
      if (type === 14) return new DeviceArray(Uint16Array.from(x, bf16Bits));
      return new DeviceArray(type === 0 ? Float32Array.from(x) : Float64Array.from(x));
    };
    fc.assert(
      fc.property(cases, ({ m, n, k, ta, tb, pad, types: [type, typeC], alpha, beta }) => {
        const lda = (ta ? k : m) + pad, ldb = (tb ? n : k) + pad, ldc = m + pad;
        const a = numbers((ta ? m : k) * lda + 1, m), b = numbers((tb ? k : n) * ldb + 1, n);
        const c = numbers(n * ldc, k);
        if (beta === 0) c.fill(NaN); // is not read
        const arrays = [make(type, a), make(type, b), make(typeC, c)];
        const [da, db, dc] = arrays;
        const scalar = (x: number) => type === 1 ? Float64Array.of(x) : Float32Array.of(x);
        const factors = [scalar(alpha), scalar(beta)];
        const compute = type === 1 ? CUBLAS.computeF64 : CUBLAS.computeF32;
        // deno-fmt-ignore
        const code = calls.cublasGemmEx(handle, ta, tb, m, n, k, addressOf(factors[0].buffer), da.address, type, Math.max(1, lda),
        db.address, type, Math.max(1, ldb), addressOf(factors[1].buffer), dc.address, typeC, ldc, compute, -1);
        checkCublas(code, "cublasGemmEx");
        keepUntilHere(factors);
        const result = dc.read();
        const at = (x: Float32Array, i: number) => type === 14 ? fromBf16(bf16Bits(x[i])) : x[i];
        for (let j = 0; j < n; j++) {
          for (let i = 0; i < ldc; i++) {
            const got = typeC === 14
              ? fromBf16(Number(result[j * ldc + i]))
              : Number(result[j * ldc + i]);
            const old = typeC === 14 ? fromBf16(bf16Bits(c[j * ldc + i])) : c[j * ldc + i];
            if (i >= m) {
              assert.equal(got, old); // the padding stays
              continue;
            }
            let sum = 0;
            for (let l = 0; l < k; l++) {
              sum += at(a, ta ? i * lda + l : l * lda + i) * at(b, tb ? l * ldb + j : j * ldb + l);
            }
            const expected = alpha * sum + (beta === 0 ? 0 : beta * old);
            const tolerance = typeC === 14 ? 2 ** -8 : 1e-5;
            assert(Math.abs(got - expected) <= tolerance * Math.max(1, Math.abs(expected)));
          }
        }
        for (const array of arrays) array.free();
      }),
      { numRuns: 60 },
    );
  },
});
