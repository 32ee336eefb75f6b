import assert from "node:assert/strict";
import type { Device } from "../device.ts";
import { Tensor } from "../tensor.ts";
import type { CudaContext } from "./context.ts";
import { GroupTables, MAP_BYTES } from "./grouped_tables.ts";

const BOX = { columns: 64, rows: 64 }, OTHER = { columns: 64, rows: 128 };

/** Tables of a GPU whose tensor maps tell what they are of: address, rows, columns and rows of the box. */
function tablesOf() {
  const encoded: number[][] = [];
  const tensorMap: CudaContext["tensorMap"] = ({ address, sizes, box }) => {
    const says = [address, sizes[1], sizes[0], box[1]];
    encoded.push(says);
    const map = new Uint8Array(MAP_BYTES);
    new Float64Array(map.buffer).set(says);
    return map;
  };
  return { encoded, tables: new GroupTables({ tensorMap } as CudaContext) };
}

function matrix(address: number, rows: number, columns: number): Tensor {
  return new Tensor({} as Device, "bf16", [rows, columns], { address });
}

function says(map: Uint8Array): number[] {
  return [...new Float64Array(map.buffer, map.byteOffset, 4)];
}

Deno.test("tensor maps: shapes that share an address, and boxes, have their own, made once", () => {
  const { encoded, tables } = tablesOf();
  for (let step = 0; step < 3; step++) {
    for (let layer = 1; layer <= 24; layer++) {
      const address = layer * 65536;
      assert.deepEqual(says(tables.map(matrix(address, 16, 128), BOX)), [address, 16, 128, 64]);
      assert.deepEqual(says(tables.map(matrix(address, 16, 256), BOX)), [address, 16, 256, 64]);
      assert.deepEqual(says(tables.map(matrix(address, 16, 128), OTHER)), [address, 16, 128, 128]);
    }
  }
  assert.equal(encoded.length, 3 * 24);
});

Deno.test("tensor maps: those of one launch stay as they are, however many come and go", () => {
  const { tables } = tablesOf(), kept = matrix(512, 8, 64);
  for (let rows = 1; rows < 20_000; rows++) {
    const a = tables.map(kept, BOX), b = tables.map(matrix(1024, rows, 64), BOX);
    const c = tables.map(matrix(1536, rows, 64), BOX);
    assert.deepEqual(says(a), [512, 8, 64, 64]);
    assert.deepEqual(says(b), [1024, rows, 64, 64]);
    assert.deepEqual(says(c), [1536, rows, 64, 64]);
  }
});

Deno.test("tensor maps: what cannot be encoded is not found later", () => {
  let fails = true;
  const tensorMap = () => {
    if (fails) throw new RangeError("refused");
    return new Uint8Array(MAP_BYTES).fill(7);
  };
  const tables = new GroupTables({ tensorMap } as unknown as CudaContext);
  assert.throws(() => tables.map(matrix(512, 8, 64), BOX), RangeError);
  fails = false;
  assert.equal(tables.map(matrix(512, 8, 64), BOX)[0], 7);
});
