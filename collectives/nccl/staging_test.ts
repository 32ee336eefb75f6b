import assert from "node:assert/strict";
import type { CudaDevice } from "../../tensor/cuda/device.ts";
import type { TypedArray } from "../../tensor/dtype.ts";
import { testDevice } from "../../tests/emulator/device.ts";
import type { Region } from "../transport.ts";
import { Staging } from "./staging.ts";

const device = await testDevice() as CudaDevice | null;
const MIB = 2 ** 20;

const region = (array: TypedArray): Region => ({
  dtype: "u8",
  length: array.length,
  array,
  address: -1,
});

/** The device, with what is asked of it. @param room Page-locked memory that there is. */
function watched(room: number): { device: CudaDevice; asked: number[]; held: Set<number> } {
  const asked: number[] = [], held = new Set<number>();
  const more = {
    stream: device!.stream,
    allocate: (bytes: number) => {
      const address = device!.allocate(bytes);
      held.add(address);
      return address;
    },
    free: (address: number) => {
      assert(held.delete(address));
      device!.free(address);
    },
    pinned: (bytes: number) => {
      if ((room -= bytes) < 0) throw new Error("no page-locked memory");
      asked.push(bytes);
      return device!.pinned(bytes);
    },
  };
  return { device: more as unknown as CudaDevice, asked, held };
}

Deno.test({
  name: "large arrays are staged in parts, and come back as they were",
  ignore: device === null,
  async fn() {
    const { device: here, asked, held } = watched(Infinity);
    const staging = new Staging(here, device!.stream);
    const from = new Uint8Array(70 * MIB + 5);
    for (let i = 0; i < from.length; i += 4097) from[i] = i % 251 + 1;
    const sum = from.slice();
    const staged = staging.stage(region(from), true);
    await device!.stream.synchronize();
    from.fill(0);
    staging.fetch(staged);
    await device!.stream.synchronize();
    staging.finish(staged, true);
    assert(from.every((x, i) => x === sum[i]));
    assert(asked.every((bytes) => bytes <= 32 * MIB), `${asked}`);
    assert.equal(asked.reduce((a, b) => a + b), 96 * MIB, "not the next power of two");
    staging.finish(staging.stage(region(new Uint8Array(90 * MIB)), false), false);
    assert.equal(asked.length, 3, "the slot is used again");
    staging.close();
    assert.equal(held.size, 0);
  },
});

Deno.test({
  name: "what cannot be staged leaves nothing behind",
  ignore: device === null,
  async fn() {
    const { device: here, held } = watched(40 * MIB);
    const staging = new Staging(here, device!.stream);
    staging.stage(region(new Uint8Array(5)), true); // never finished: its operation has failed
    assert.throws(() => staging.stage(region(new Uint8Array(64 * MIB)), true), /no page-locked/);
    assert.equal(held.size, 1);
    await device!.stream.synchronize();
    staging.close();
    assert.equal(held.size, 0);
  },
});
