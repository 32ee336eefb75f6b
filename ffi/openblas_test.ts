// The search for BLAS and its switches, each in a process of its own, because a process opens one library once.

import assert from "node:assert/strict";

const SCRIPT = `
  import { openBlas } from ${JSON.stringify(new URL("./openblas.ts", import.meta.url).href)};
  import { machineAddress, linearBuffer } from ${
  JSON.stringify(new URL("../tensor/cpu/memory.ts", import.meta.url).href)
};
  const blas = openBlas();
  if (!blas) { console.log("none"); Deno.exit(0); }
  const x = new Float64Array(linearBuffer(), 65536, 12);
  x.set([1, 2, 3, 4, 5, 6, 7, 8]); // [[1, 2], [3, 4]] times [[5, 6], [7, 8]], transposed
  const at = (i) => machineAddress(65536 + 8 * i);
  blas.dgemm(false, true, 2, 2, 2, 1, at(0), 2, at(4), 2, 0, at(8), 2);
  console.log([...x.subarray(8)].join());
`;

async function run(env: Record<string, string>): Promise<{ out: string; error: string }> {
  const { stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["eval", SCRIPT],
    env: { LINA_BLAS: "on", ...env },
  }).output();
  return {
    out: new TextDecoder().decode(stdout).trim(),
    error: new TextDecoder().decode(stderr),
  };
}

Deno.test("BLAS multiplies on machine addresses where it is installed", async () => {
  const { out, error } = await run({});
  if (out === "none") {
    const message = "OpenBLAS is not installed";
    if (Deno.env.get("LINA_CI")) throw new Error(message);
    console.warn(`skipped: ${message}`);
  } else assert.equal(out, "17,23,39,53", error);
});

Deno.test("LINA_BLAS=off finds none, another word is refused", async () => {
  assert.equal((await run({ LINA_BLAS: "off" })).out, "none");
  assert.match((await run({ LINA_BLAS: "maybe" })).error, /must be "on" or "off".* "maybe"/);
});

Deno.test("LINA_OPENBLAS_LIB that cannot be opened is an error, not a silent detour", async () => {
  const { error } = await run({ LINA_OPENBLAS_LIB: "/nonexistent/libopenblas.so" });
  assert.match(error, /Cannot open OpenBLAS[\s\S]*\/nonexistent\/libopenblas\.so/);
  assert.match((await run({ LINA_OPENBLAS_LIB: "x.so" })).error, /must be an absolute path/);
});
