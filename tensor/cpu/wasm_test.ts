// The committed kernels.wasm is what kernels/build.sh makes of the C sources: rebuilt and compared byte by byte.

import assert from "node:assert/strict";

/** The compiler that made the committed file; another release may choose other instructions. */
const COMPILER = /clang version 19\.1\.7/;

async function compiler(): Promise<string> {
  try {
    const { stdout } = await new Deno.Command("clang-19", { args: ["--version"] }).output();
    await new Deno.Command("wasm-ld-19", { args: ["--version"] }).output();
    return new TextDecoder().decode(stdout);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return "";
    throw error;
  }
}

const version = await compiler();
const usable = COMPILER.test(version);

Deno.test("kernels.wasm is the build of its sources", async () => {
  if (!usable) {
    const found = version.split("\n", 1)[0] || "none";
    const message =
      `Cannot rebuild kernels.wasm as clang-19 and wasm-ld-19 must be ${COMPILER.source}: current value is ${found}`;
    if (Deno.env.get("LINA_CI")) throw new Error(message);
    console.warn(`skipped: ${message}`);
    return;
  }
  const out = await Deno.makeTempFile({ suffix: ".wasm" });
  try {
    const build = new URL("./kernels/build.sh", import.meta.url).pathname;
    const { success, stderr } = await new Deno.Command("sh", { args: [build, out] }).output();
    assert(success, new TextDecoder().decode(stderr));
    const committed = await Deno.readFile(new URL("./kernels.wasm", import.meta.url));
    assert.deepEqual(await Deno.readFile(out), committed, "run tensor/cpu/kernels/build.sh");
  } finally {
    await Deno.remove(out);
  }
});

Deno.test("kernels.wasm keeps to the stack's room: it has no data of its own", async () => {
  const bytes = await Deno.readFile(new URL("./kernels.wasm", import.meta.url));
  const module = await WebAssembly.compile(bytes);
  assert.deepEqual(
    WebAssembly.Module.imports(module).map(({ name, kind }) => `${kind} ${name}`),
    ["memory memory", "function log"],
  );
  const DATA = 11;
  let at = 8; // after magic and version: sections of an id, a LEB128 size and as many bytes
  while (at < bytes.length) {
    assert.notEqual(bytes[at++], DATA);
    let size = 0, shift = 0, byte;
    do {
      byte = bytes[at++];
      size |= (byte & 0x7f) << shift;
      shift += 7;
    } while (byte & 0x80);
    at += size;
  }
});
