// Compilation and its cache, and what a process without CUDA is told.

import assert from "node:assert/strict";
import { buildEmulator } from "../../tests/emulator/build.ts";
import { emulated, loadCuda } from "../../tests/emulator/device.ts";
import type { ModuleSource } from "./context.ts";
import { compileModule, compileOptions, isFor } from "./launch.ts";

const there = await loadCuda();

const module: ModuleSource = {
  name: "cached",
  source: `extern "C" __global__ void f(float* x) { x[0] = 1; }`,
  kernels: { f: ["ptr"] },
};

Deno.test({
  name: "a module is compiled once; other sources and broken files are compiled again",
  ignore: !there,
  async fn() {
    const folder = await Deno.makeTempDir();
    try {
      const first = await compileModule(module, 80, folder);
      assert.ok(first.compiled);
      const second = await compileModule(module, 80, folder);
      assert.ok(!second.compiled);
      assert.deepEqual(second.code, first.code);
      const [file] = [...Deno.readDirSync(folder)];
      await Deno.writeFile(`${folder}/${file.name}`, first.code.subarray(0, 100));
      assert.ok((await compileModule(module, 80, folder)).compiled, "a broken file");
      assert.ok(!(await compileModule(module, 80, folder)).compiled, "repaired");
      assert.ok(
        (await compileModule({ ...module, source: module.source + "\n" }, 80, folder)).compiled,
      );
      assert.ok((await compileModule(module, 80, null)).compiled, "no cache");
      assert.ok((await compileModule(module, 80, `${folder}/${file.name}/below`)).compiled);
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  },
});

Deno.test("modules are for their capability and above, exact ones for theirs alone", () => {
  const of = (from?: number, exact?: boolean): ModuleSource => ({ ...module, from, exact });
  const fits = (m: ModuleSource, version = "13.0") =>
    [75, 80, 86, 90, 100, 120].filter((level) => isFor(m, level, version));
  assert.deepEqual(fits(module), [80, 86, 90, 100, 120]);
  assert.deepEqual(fits(of(90)), [90, 100, 120]);
  assert.deepEqual(fits(of(90, true)), [90]);
  assert.deepEqual(fits(of(90, true), "12.4"), [90]);
  assert.deepEqual(fits(of(90, true), "12.3"), [], "the compiler is too old");
  assert.equal(compileOptions(of(90, true), 90)[0], "--gpu-architecture=sm_90a");
  assert.equal(compileOptions(module, 86)[0], "--gpu-architecture=sm_86");
});

/** What another process, in which some library is another one, learns about CUDA. */
async function finding(
  env: Record<string, string>,
): Promise<{ ok: boolean; reason: string; thrown: string }> {
  const url = new URL("./device.ts", import.meta.url).href;
  const code = `const { cudaDevice, findCuda } = await import(${JSON.stringify(url)});
const found = findCuda();
const thrown = await cudaDevice().then(() => "", (error) => error.message);
console.log(JSON.stringify({ ...found, thrown }));`;
  const { stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["eval", code],
    env: { ...env, NO_COLOR: "1" },
  }).output();
  const text = new TextDecoder().decode(stdout);
  assert.ok(text, new TextDecoder().decode(stderr));
  return JSON.parse(text);
}

Deno.test("without the CUDA runtime or a driver, findCuda() says which; cudaDevice() says the same", async () => {
  const { ok, reason, thrown } = await finding({ LINA_CUDART: "/no/such/libcudart.so" });
  assert.equal(ok, false);
  assert.match(reason, /CUDA runtime[^]*\/no\/such\/libcudart\.so/);
  assert.ok(thrown.startsWith("Cannot use a GPU") && thrown.includes(reason));

  // Some library that is not the runtime: its symbols are missing.
  const wrong = await finding({
    LINA_CUDART: Deno.build.os === "darwin"
      ? "/usr/lib/libSystem.B.dylib"
      : "/lib/x86_64-linux-gnu/libc.so.6",
  });
  assert.equal(wrong.ok, false);
  assert.match(wrong.reason, /CUDA runtime/);
});

Deno.test({
  name: "a GPU that is too old is refused with its compute capability",
  ignore: !there || !emulated,
  async fn() {
    const library = (await buildEmulator())!;
    const { ok, reason, thrown } = await finding({
      LINA_CUDART: library,
      LINA_CUDA: library,
      LINA_EMULATOR_CAPABILITY: "75",
    });
    assert.equal(ok, false);
    assert.match(reason, /compute capability is 7\.5, 8\.0 is the lowest/);
    assert.ok(thrown.includes(reason));
  },
});
