import assert from "node:assert/strict";
import { rangesOf } from "./ranges.ts";

Deno.test("rangesOf() joins three and more neighbours", () => {
  assert.equal(rangesOf([]), "");
  assert.equal(rangesOf([4]), "4");
  assert.equal(rangesOf([0, 1]), "0, 1");
  assert.equal(rangesOf([0, 3, 4, 5, 9]), "0, 3 to 5, 9");
});
