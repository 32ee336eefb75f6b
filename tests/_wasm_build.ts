// Whether a committed WebAssembly file is what its build script makes of the C sources, and keeps to the memory it may use.

import assert from "node:assert/strict";

/** The compiler that made the committed files; another release may choose other instructions. */
const COMPILER = /clang version 19\.1\.7/;
const DATA = 11;

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

/**
 * Builds a file again and compares it byte by byte; skipped without the compiler, unless LINA_CI is set.
 *
 * @param wasm The committed file.
 * @param script The script that builds it, given the place of the result.
 */
export async function assertBuilt(wasm: URL, script: URL): Promise<void> {
  const version = await compiler();
  if (!COMPILER.test(version)) {
    const found = version.split("\n", 1)[0] || "none";
    const message =
      `Cannot rebuild ${wasm.pathname} as clang-19 and wasm-ld-19 must be ${COMPILER.source}: current value is ${found}`;
    if (Deno.env.get("LINA_CI")) throw new Error(message);
    console.warn(`skipped: ${message}`);
    return;
  }
  const out = await Deno.makeTempFile({ suffix: ".wasm" });
  try {
    const args = [script.pathname, out];
    const { success, stderr } = await new Deno.Command("sh", { args }).output();
    assert(success, new TextDecoder().decode(stderr));
    const same = (await Deno.readFile(out)).toBase64() === (await Deno.readFile(wasm)).toBase64();
    assert(same, `${wasm.pathname} must be built anew: sh ${script.pathname}`);
  } finally {
    await Deno.remove(out);
  }
}

/**
 * Checks what a file imports, and that it has no static data, for which there is no room in the memory.
 *
 * @param wasm The committed file.
 * @param imports What it may import: "memory memory".
 */
export async function assertNoData(wasm: URL, imports: readonly string[]): Promise<void> {
  const bytes = await Deno.readFile(wasm);
  const module = await WebAssembly.compile(bytes);
  const found = WebAssembly.Module.imports(module).map(({ name, kind }) => `${kind} ${name}`);
  assert.deepEqual(found, imports);
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
}
