// The committed kernels.wasm is what kernels/build.sh makes of the C sources: rebuilt and compared byte by byte.

import { assertBuilt, assertNoData } from "../../tests/_wasm_build.ts";

const wasm = new URL("./kernels.wasm", import.meta.url);

Deno.test("kernels.wasm is the build of its sources", async () => {
  await assertBuilt(wasm, new URL("./kernels/build.sh", import.meta.url));
});

Deno.test("kernels.wasm keeps to the stack's room: it has no data of its own", async () => {
  await assertNoData(wasm, ["memory memory", "function log"]);
});
