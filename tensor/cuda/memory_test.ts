// Growth of the mapped memory when the driver fails half way; device_test.ts has what works.

import assert from "node:assert/strict";
import { CUDA, cuda, type CudaCalls } from "../../ffi/cuda.ts";
import { testDevice } from "../../tests/emulator/device.ts";
import { memorySource } from "./memory.ts";

const device = await testDevice();

Deno.test({
  name: "memory that cannot be mapped or opened is none, and the next growth finds its place free",
  ignore: !device,
  fn() {
    const source = memorySource(device!.index),
      calls = cuda().calls as {
        -readonly [K in "cuMemMap" | "cuMemSetAccess" | "cuMemUnmap"]: CudaCalls[K];
      };
    if (!source.contiguous) return;
    const bytes = source.granularity_bytes;
    const first = source.grow(bytes)!;
    const { cuMemMap, cuMemSetAccess, cuMemUnmap } = calls;
    const unmapped: (readonly [bigint, bigint])[] = [];
    try {
      calls.cuMemUnmap = (address, size) => {
        unmapped.push([address, size]);
        return cuMemUnmap(address, size);
      };
      calls.cuMemMap = () => CUDA.errorOutOfMemory;
      assert.equal(source.grow(bytes), null);
      calls.cuMemMap = cuMemMap;
      assert.deepEqual(unmapped, []);
      calls.cuMemSetAccess = () => CUDA.errorOutOfMemory;
      assert.equal(source.grow(bytes), null);
      calls.cuMemSetAccess = () => 1;
      assert.throws(() => source.grow(bytes), /cuMemSetAccess failed/);
      const place = [BigInt(first + bytes), BigInt(bytes)] as const;
      assert.deepEqual(unmapped, [place, place]);
    } finally {
      Object.assign(calls, { cuMemMap, cuMemSetAccess, cuMemUnmap });
    }
    const next = source.grow(bytes)!;
    assert.equal(next, first + bytes);
    device!.context.clear(next, bytes);
  },
});
