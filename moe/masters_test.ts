import assert from "node:assert/strict";
import fc from "fast-check";
import type { CheckpointTensor } from "./checkpoint.ts";
import { joinMasters, loadingMasters, splitMasters } from "./masters.ts";
import { convertFloats } from "./weights.ts";
import type { DType, TypedArray } from "../tensor/dtype.ts";

const bitsOf = (x: Float32Array) => new Uint32Array(x.buffer);

Deno.test("a master weight is split and joined to the bit, whatever it is", () => {
  fc.assert(fc.property(fc.array(fc.integer({ min: 0, max: 2 ** 32 - 1 })), (words) => {
    const masters = new Float32Array(Uint32Array.from(words).buffer);
    const { values, residuals } = splitMasters(masters);
    const numbers = convertFloats(values, "f32") as Float32Array;
    assert.deepEqual(joinMasters(numbers, residuals).map(zeroNaN), masters.map(zeroNaN));
    // To nearest: what is between it and its neighbours is larger.
    masters.forEach((master, i) => {
      if (Number.isNaN(master)) return assert(Number.isNaN(numbers[i]));
      const nearest = convertFloats(Float32Array.of(master), "bf16") as Uint16Array;
      const away = Math.abs(bitsOf(masters)[i] - (values[i] << 16 >>> 0));
      assert(values[i] === nearest[0] || away === 0x8000);
    });
  }));
});

const zeroNaN = (x: number) => Number.isNaN(x) ? 0 : x;

Deno.test("ties go away from zero, as on the device", () => {
  const ties = new Float32Array(Uint32Array.of(0x3f808000, 0xbf808000, 0x3f818000).buffer);
  const { values, residuals } = splitMasters(ties);
  assert.deepEqual([...values], [0x3f81, 0xbf81, 0x3f82]);
  assert.deepEqual([...residuals], [-0x8000, -0x8000, -0x8000]);
});

/** A tensor in memory. */
function tensor(name: string, dtype: DType, array: TypedArray): CheckpointTensor {
  return {
    name,
    owner: 0,
    dtype,
    shape: [array.length],
    read: () => array,
    write: (from) => (array as Float32Array).set(from as Float32Array),
  };
}

/** Loads what one run has saved into another, as readTensors does. */
async function load(from: readonly CheckpointTensor[], to: readonly CheckpointTensor[]) {
  for (const wanted of to) {
    const found = from.find(({ name }) => name === wanted.name);
    assert(found || wanted.optional, wanted.name);
    if (found) await wanted.write(convertFloats(await found.read(), wanted.dtype));
  }
}

Deno.test("f32, f64 and bf16 runs go on from each other; without residuals masters are the parameters", async () => {
  const exact = Float32Array.from({ length: 100 }, (_, i) => Math.fround(Math.sin(i) / 3));
  const f32 = () => {
    const w = new Float32Array(100), m = new Float32Array(100);
    return { w, weights: [tensor("w", "f32", w)], optimizer: [tensor("w.moment1", "f32", m)] };
  };
  const f64 = () => {
    const w = new Float64Array(100), m = new Float64Array(100);
    return { w, weights: [tensor("w", "f64", w)], optimizer: [tensor("w.moment1", "f64", m)] };
  };
  const bf16 = () => {
    const w = new Uint16Array(100).fill(7), r = new Int16Array(100).fill(9);
    const m = new Float32Array(100);
    const optimizer = [tensor("w.moment1", "f32", m), tensor("w.residual", "i16", r)];
    return { w, r, weights: [tensor("w", "bf16", w)], optimizer };
  };
  type Run = { weights: CheckpointTensor[]; optimizer: CheckpointTensor[] };
  const goOn = async (from: Run, to: Run) => {
    const { parameters, optimizer } = loadingMasters(to.weights, to.optimizer);
    await load(from.weights, parameters);
    await load(from.optimizer, optimizer);
  };
  const first = f32(), half = bf16(), again = bf16(), back = f32(), wide = f64();
  first.w.set(exact);
  await goOn(first, half);
  assert.deepEqual(
    joinMasters(convertFloats(half.w, "f32") as Float32Array, half.r),
    exact,
    "nothing of an f32 run is lost",
  );
  await goOn(half, again);
  assert.deepEqual([again.w, again.r], [half.w, half.r]);
  await goOn(half, back);
  assert.deepEqual(back.w, exact);
  await goOn(half, wide);
  assert.deepEqual(wide.w, Float64Array.from(exact));
  const without = { weights: half.weights, optimizer: half.optimizer.slice(0, 1) };
  await goOn(without, again);
  assert.deepEqual([again.w, again.r], [half.w, new Int16Array(100)]);
  await goOn(without, back);
  assert.deepEqual(back.w, convertFloats(half.w, "f32"));
});
