import assert from "node:assert/strict";
import fc from "fast-check";
import type { TypedArray } from "../tensor/dtype.ts";
import { modelConfig } from "./config.ts";
import { CheckpointError } from "./manifest.ts";
import { mixtralConfig } from "./mixtral_config.ts";
import { createFile, type TensorSource, writeSafetensors } from "./safetensors.ts";
import { convertFloats, loadWeights, type NamedTensor } from "./weights.ts";

const root = Deno.makeTempDirSync({ prefix: "lina-weights-" });
Deno.test.afterAll(() => Deno.removeSync(root, { recursive: true }));
let folders = 0;

function fresh(): string {
  const path = `${root}/${folders++}`;
  Deno.mkdirSync(path);
  return path;
}

async function write(path: string, tensors: readonly TensorSource[]): Promise<void> {
  const file = createFile(path);
  await writeSafetensors(file, tensors);
  file.close();
}

function tensor(name: string, array: TypedArray, dtype: NamedTensor["dtype"] = "f32"): NamedTensor {
  const shape = [array.length];
  return {
    name,
    dtype,
    shape,
    read: () => array,
    write: (from) => (array as Float32Array).set(from as Float32Array),
  };
}

Deno.test("convertFloats() rounds to nearest even, as the hardware does", () => {
  const number = fc.oneof(
    fc.float(),
    fc.constantFrom(0, -0, NaN, Infinity, -Infinity, 1, 65504, 65520, 3.4e38, 1e-45, 1.00390625),
  );
  fc.assert(fc.property(fc.array(number, { maxLength: 20 }), (list) => {
    const numbers = Float32Array.from(list);
    assert.equal(convertFloats(numbers, "f32"), numbers);
    assert.deepEqual(convertFloats(numbers, "f64"), Float64Array.from(numbers));
    assert.deepEqual(convertFloats(numbers, "f16"), Float16Array.from(numbers));
    const bf16 = convertFloats(numbers, "bf16") as Uint16Array;
    const back = convertFloats(bf16, "f32") as Float32Array;
    numbers.forEach((x, i) => {
      if (Number.isNaN(x)) return assert.ok(Number.isNaN(back[i]));
      const step = Math.max(2 ** -133, 2 ** (Math.floor(Math.log2(Math.abs(x) || 1)) - 7));
      assert.ok(back[i] === x || !Number.isFinite(back[i]) || Math.abs(back[i] - x) <= step / 2);
    });
    // What fits is exact, and stays what it is.
    assert.deepEqual(
      convertFloats(back, "bf16"),
      bf16.map((b, i) => Number.isNaN(back[i]) ? b | 0x40 : b),
    );
  }));
  assert.deepEqual(
    convertFloats(Float32Array.of(1.00390625, 1.01171875), "bf16"),
    Uint16Array.of(0x3f80, 0x3f82), // ties go to the even neighbour
  );
  assert.throws(() => convertFloats(Int32Array.of(1), "f32"), /both types must be floating/);
});

Deno.test("loadWeights() reads a single file, and converts", async () => {
  const folder = fresh();
  const stored = Float16Array.of(0.5, -2, 3);
  await write(`${folder}/model.safetensors`, [tensor("a", stored, "f16")]);
  const wanted = tensor("a", new Float32Array(3));
  await loadWeights(folder, [wanted]);
  assert.deepEqual(wanted.read(), Float32Array.of(0.5, -2, 3));
});

Deno.test("loadWeights() opens only the files that the index names for what is wanted", async () => {
  const folder = fresh();
  await write(`${folder}/one.safetensors`, [tensor("a", Float32Array.of(1))]);
  await write(`${folder}/two.safetensors`, [tensor("b", Float32Array.of(2))]);
  const index = { a: "one.safetensors", b: "two.safetensors", c: "absent.safetensors" };
  const setIndex = (weight_map: unknown) =>
    Deno.writeTextFileSync(
      `${folder}/model.safetensors.index.json`,
      JSON.stringify({ weight_map }),
    );
  setIndex(index);
  const [a, b] = ["a", "b"].map((name) => tensor(name, new Float32Array(1)));
  await loadWeights(folder, [a, b]);
  assert.deepEqual([a.read(), b.read()], [Float32Array.of(1), Float32Array.of(2)]);

  const load = (name: string) => loadWeights(folder, [tensor(name, new Float32Array(1))]);
  await assert.rejects(() => load("c"), CheckpointError);
  await assert.rejects(() => load("d"), /index must name the tensor d/);
  await assert.rejects(() => load("toString"), /index must name the tensor toString/);
  for (const outside of ["../0/model.safetensors", "/etc/passwd", "..", "", 7, null, "a/b"]) {
    setIndex({ a: outside });
    await assert.rejects(() => load("a"), /index must name files in it/);
  }
  setIndex({ a: "two.safetensors" });
  await assert.rejects(() => load("a"), /must have the tensor a/);
  setIndex(null);
  await assert.rejects(() => load("a"), /index must name/);
  Deno.writeTextFileSync(`${folder}/model.safetensors.index.json`, "{");
  await assert.rejects(() => load("a"), /must be JSON/);
});

Deno.test("nothing is written when one tensor does not fit", async () => {
  const folder = fresh();
  await write(`${folder}/model.safetensors`, [
    tensor("a", Float32Array.of(1)),
    tensor("n", Int32Array.of(7), "i32"),
  ]);
  const a = tensor("a", new Float32Array(1));
  const cases: [NamedTensor, RegExp][] = [
    [tensor("b", new Float32Array(1)), /must have the tensor b/],
    [tensor("n", new Float32Array(1)), /type must be f32: current value is i32/],
    [{ ...a, shape: [1, 1] }, /shape must be \[1,1\]: current value is \[1\]/],
  ];
  for (const [other, message] of cases) {
    await assert.rejects(() => loadWeights(folder, [a, other]), message);
    assert.deepEqual(a.read(), new Float32Array(1));
  }
  await assert.rejects(() => loadWeights(fresh(), [a]), /Cannot open .*model.safetensors/);
});

Deno.test("mixtralConfig() describes a Mixtral and nothing else", () => {
  const sizes = { vocab: 256, width: 64, layers: 2, heads: 4, kvHeads: 2, experts: 8 };
  const config = mixtralConfig(modelConfig(sizes), 128)!;
  assert.equal(config.model_type, "mixtral");
  assert.equal(config.num_local_experts, 8);
  assert.equal(config.num_experts_per_tok, 2);
  assert.equal(config.num_key_value_heads, 2);
  assert.equal(config.max_position_embeddings, 128);
  assert.equal(config.torch_dtype, "float32");
  for (
    const other of [
      { experts: 0 },
      { sharedExperts: 1 },
      { denseLayers: 1 },
      { activation: "relu" as const },
      { router: { kind: "switch" as const } },
      { router: { kind: "softmax" as const, topK: 2, renormalise: false } },
    ]
  ) {
    assert.equal(mixtralConfig(modelConfig({ ...sizes, ...other }), 128), null);
  }
});
