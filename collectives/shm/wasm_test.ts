// The committed reduce.wasm is what build.sh makes of reduce.c: rebuilt and compared byte by byte.

import { assertBuilt, assertNoData } from "../../tests/_wasm_build.ts";

const wasm = new URL("./reduce.wasm", import.meta.url);

Deno.test("reduce.wasm is the build of its source", async () => {
  await assertBuilt(wasm, new URL("./build.sh", import.meta.url));
});

Deno.test("reduce.wasm has no data: that memory belongs to tensors", async () => {
  await assertNoData(wasm, ["memory memory"]);
});
