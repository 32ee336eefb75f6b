import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import fc from "fast-check";
import { bytesOf, type DType, DTYPES, newArray, type TypedArray } from "../tensor/dtype.ts";
import { sizeOf } from "../tensor/tensor.ts";
import {
  createFile,
  MAX_HEADER_BYTES,
  SafetensorsFile,
  type TensorSource,
  writeSafetensors,
} from "./safetensors.ts";

const folder = Deno.makeTempDirSync({ prefix: "lina-safetensors-" });
Deno.test.afterAll(() => Deno.removeSync(folder, { recursive: true }));
let files = 0;

function fresh(): string {
  return `${folder}/${files++}.safetensors`;
}

async function write(tensors: readonly TensorSource[]): Promise<string> {
  const path = fresh();
  const file = createFile(path);
  try {
    const { bytes } = await writeSafetensors(file, tensors);
    assert.equal(Deno.statSync(path).size, bytes);
  } finally {
    file.close();
  }
  return path;
}

function bytesUnder(array: TypedArray): Uint8Array {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}

function source(name: string, dtype: DType, shape: number[], seed: number): TensorSource {
  const array = newArray(dtype, sizeOf(shape));
  const bytes = bytesUnder(array);
  for (let i = 0; i < bytes.length; i++) bytes[i] = Math.imul(i + seed + 1, 0x9e3779b1) >>> 24;
  return { name, dtype, shape, read: () => array };
}

/** A file with any header and any number of bytes of data. */
function raw(header: string, data: number, length: bigint = BigInt(header.length)): string {
  const bytes = new Uint8Array(8 + header.length + data);
  new DataView(bytes.buffer).setBigUint64(0, length, true);
  bytes.set(new TextEncoder().encode(header), 8);
  const path = fresh();
  Deno.writeFileSync(path, bytes);
  return path;
}

const tensorArbitrary = fc.record({
  name: fc.oneof(fc.string({ unit: "binary", maxLength: 12 }), fc.constant("__proto__"))
    .filter((name) => name !== "__metadata__" && name.isWellFormed()),
  dtype: fc.constantFrom(...DTYPES),
  shape: fc.array(fc.integer({ min: 0, max: 5 }), { maxLength: 3 }),
  seed: fc.nat(1000),
});

Deno.test("what is written is read back, whole and in ranges", async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.uniqueArray(tensorArbitrary, { selector: (t) => t.name, maxLength: 8 }),
      fc.nat(16),
      fc.nat(16),
      async (specs, a, b) => {
        const sources = specs.map((s) => source(s.name, s.dtype, s.shape, s.seed));
        const path = await write(sources);
        using file = new SafetensorsFile(path);
        assert.deepEqual(file.metadata, { format: "pt" });
        assert.equal(file.tensors.size, sources.length);
        for (const { name, dtype, shape, read } of sources) {
          const info = file.tensors.get(name)!;
          assert.equal(info.dtype, dtype);
          assert.deepEqual(info.shape, shape);
          assert.equal(info.offset % bytesOf(dtype), 0, "aligned");
          const wanted = bytesUnder(await read());
          assert.deepEqual(bytesUnder(await file.read(name)), wanted);
          const [start, end] = [a, b].map((x) => Math.floor(x * info.size / 16)).sort((p, q) =>
            p - q
          );
          const width = bytesOf(dtype);
          assert.deepEqual(
            bytesUnder(await file.read(name, { start, end })),
            wanted.slice(start * width, end * width),
          );
        }
        Deno.removeSync(path);
      },
    ),
    { numRuns: 60 },
  );
});

Deno.test("tensors larger than one chunk are read and written whole", async () => {
  const big = source("big", "u8", [9 * 1024 * 1024], 3);
  const path = await write([source("small", "f32", [3], 1), big]);
  using file = new SafetensorsFile(path);
  assert.equal(
    Buffer.compare(await file.read("big") as Uint8Array, await big.read() as Uint8Array),
    0,
  );
});

Deno.test("files whose data is not aligned are read", async () => {
  const header = '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' +
    '"b":{"dtype":"F64","shape":[1],"data_offsets":[1,9]}} ';
  const path = raw(header, 9);
  const value = new Uint8Array(new Float64Array([Math.PI]).buffer);
  const bytes = Deno.readFileSync(path);
  bytes.set(value, bytes.length - 8);
  Deno.writeFileSync(path, bytes);
  using file = new SafetensorsFile(path);
  assert.equal((await file.read("b"))[0], Math.PI);
});

Deno.test("a hostile header is refused with its reason, without taking memory", () => {
  const one = (entry: string) => `{"a":${entry}}`;
  const cases: [string, RegExp][] = [
    [raw("{}", 0, 1n), /header's length must be 2 to/],
    [raw("{}", 0, 3n), /header's length must be 2 to 2 bytes: current value is 3/],
    [raw("{}", 0, 2n ** 63n), /header's length/],
    [raw("{}", 0, 2n ** 64n - 1n), /header's length/],
    [raw("[]", 0), /must begin with \{/],
    [raw("{,", 0), /must be JSON/],
    [raw('{"\\ud800', 0), /must be JSON/],
    [raw("{" + "[".repeat(1e6), 0), /nest at most 3 deep/],
    [raw("{}", 4), /tensors must fill the file's 4 bytes/],
    [raw(one("null"), 0), /dtype must be one of/],
    [raw(one('{"dtype":"F8_E4M3","shape":[],"data_offsets":[0,1]}'), 1), /dtype must be one of/],
    [raw(one('{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}'), 1), /shape must be/],
    [raw(one('{"dtype":"U8","shape":"x","data_offsets":[0,1]}'), 1), /shape must be/],
    [raw(one('{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}'), 1), /shape must be/],
    [raw(one('{"dtype":"U8","shape":[1e15,1e15],"data_offsets":[0,1]}'), 1), /must have/],
    [raw(one('{"dtype":"U8","shape":[1],"data_offsets":[0,2]}'), 1), /data_offsets must lie/],
    [raw(one('{"dtype":"U8","shape":[1],"data_offsets":[1,0]}'), 1), /data_offsets must lie/],
    [raw(one('{"dtype":"U8","shape":[1],"data_offsets":[0]}'), 1), /data_offsets must lie/],
    [raw(one('{"dtype":"F32","shape":[1],"data_offsets":[0,1]}'), 1), /must have 4 bytes/],
    [raw(one('{"dtype":"U8","shape":[1],"data_offsets":[1,2]}'), 2), /must begin at byte 0/],
    [
      raw(
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},' +
          '"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        3,
      ),
      /b must begin at byte 2/,
    ],
    [raw('{"__metadata__":{"a":1}}', 0), /hold strings only/],
  ];
  for (const [path, message] of cases) {
    assert.throws(() => new SafetensorsFile(path), message);
    assert.throws(() => new SafetensorsFile(path), /^Error: Cannot open /);
  }
  assert.throws(() => new SafetensorsFile(`${folder}/absent`), /Cannot open .*absent/);
});

Deno.test("a header beyond the limit is refused before it is read", () => {
  const path = fresh();
  const file = Deno.openSync(path, { write: true, createNew: true });
  const length = new Uint8Array(8);
  new DataView(length.buffer).setBigUint64(0, BigInt(MAX_HEADER_BYTES + 1), true);
  file.writeSync(length);
  file.truncateSync(2 ** 32); // sparse
  file.close();
  assert.throws(() => new SafetensorsFile(path), /header's length must be 2 to 16777216/);
});

Deno.test("random damage to a file is an error or other contents, never a crash", async () => {
  const path = await write([
    source("model.a", "f32", [4, 4], 1),
    source("model.b", "bf16", [7], 2),
    source("model.c", "u8", [], 3),
  ]);
  const good = Deno.readFileSync(path);
  const target = fresh();
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.record({ at: fc.nat(good.length - 1), to: fc.nat(255) }), { maxLength: 6 }),
      fc.integer({ min: -good.length, max: 64 }),
      async (edits, grow) => {
        const bytes = new Uint8Array(Math.max(0, good.length + Math.min(grow, 64)));
        bytes.set(good.subarray(0, bytes.length));
        for (const { at, to } of edits) if (at < bytes.length) bytes[at] = to;
        Deno.writeFileSync(target, bytes);
        try {
          using file = new SafetensorsFile(target);
          for (const name of file.tensors.keys()) await file.read(name);
        } catch (error) {
          assert.match((error as Error).message, /^Cannot open .* as /);
        }
      },
    ),
    { numRuns: 400 },
  );
});

Deno.test("a file that shrinks after it was opened is an error", async () => {
  const path = await write([source("a", "f32", [1000], 1)]);
  using file = new SafetensorsFile(path);
  Deno.truncateSync(path, 2000);
  await assert.rejects(() => file.read("a"), /must have \d+ bytes: current value is 2000/);
});

Deno.test("reading asks for a tensor and a range that exist", async () => {
  using file = new SafetensorsFile(await write([source("a", "f32", [10], 1)]));
  await assert.rejects(() => file.read("b"), /name must be one of the 1/);
  await assert.rejects(() => file.read("a", { start: 5, end: 11 }), /range must lie in 0\.\.10/);
  await assert.rejects(() => file.read("a", { start: -1, end: 1 }), /range/);
  await assert.rejects(() => file.read("a", { start: 0.5, end: 1 }), /range/);
});

Deno.test("writing refuses double names and elements that are not as announced", async () => {
  const file = createFile(fresh());
  const a = source("a", "f32", [2], 1);
  await assert.rejects(() => writeSafetensors(file, [a, a]), /every name must be unique/);
  const short = { ...a, shape: [3] };
  await assert.rejects(() => writeSafetensors(file, [short]), /must be f32 \[3\]: .* f32 \[2\]/);
  const other = { ...a, dtype: "i32" as const };
  await assert.rejects(() => writeSafetensors(file, [other]), /must be i32/);
  file.close();
});
