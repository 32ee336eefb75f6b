// Compilation and its cache, and what a process without CUDA is told.

import assert from "node:assert/strict";
import { nvrtc } from "../../ffi/nvrtc.ts";
import { buildEmulator } from "../../tests/emulator/build.ts";
import { emulated, loadCuda } from "../../tests/emulator/device.ts";
import type { ModuleSource } from "./context.ts";
import {
  architectureFor,
  compileModule,
  compileModules,
  compileOptions,
  isFor,
} from "./compile.ts";

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
  assert.deepEqual(fits(of(90, true), "12.10"), [90]);
  assert.deepEqual(fits(of(90, true), "12.3"), [], "the compiler is too old");
  assert.equal(compileOptions(of(90, true), 90)[0], "--gpu-architecture=sm_90a");
  assert.equal(compileOptions(module, 86)[0], "--gpu-architecture=sm_86");
});

Deno.test("a GPU that is newer than the compiler gets PTX of the newest architecture that it knows", () => {
  const of = (capability: number, known: number[]) =>
    compileOptions(module, capability, known)[0].replace("--gpu-architecture=", "");
  assert.equal(of(103, [80, 90, 100, 103]), "sm_103");
  assert.equal(of(103, [80, 90, 100]), "compute_100");
  assert.equal(of(103, [80, 90, 120]), "compute_90");
  assert.equal(of(80, [90]), "sm_80", "what the compiler has given up: its error says so");
  assert.equal(of(103, []), "sm_103");
  assert.equal(architectureFor(90, [80, 90]), 90);
  assert.equal(architectureFor(103, [80, 90, 120]), 90);
  assert.equal(architectureFor(90, [75, 80, 86]), 86, "a compiler before Hopper");
  assert.equal(architectureFor(90, []), 90);
});

Deno.test({
  name: "compiled modules tell the architecture that they were compiled for",
  ignore: !there,
  async fn() {
    const { architectures } = nvrtc();
    const [{ architecture, code, error }] = await compileModules([module], 999);
    assert.ok(code, String(error));
    assert.equal(architecture, architectures.at(-1) ?? 999);
    const broken = { ...module, name: "broken", source: "?" };
    const [other] = await compileModules([broken], 80);
    assert.equal(other.architecture, 80);
    assert.ok(other.error && !other.code);
  },
});

Deno.test({
  name:
    "rank 0 says on standard error that it compiles, if it takes long, and where it keeps the code",
  ignore: !there,
  async fn() {
    const slow = { ...module, source: `${module.source} // ${"slow"}`, name: "slow" };
    const warned: string[] = [], { warn } = console, rank = Deno.env.get("RANK");
    const cache = Deno.env.get("LINA_CACHE"), folder = await Deno.makeTempDir();
    const { setTimeout } = globalThis;
    console.warn = (text: string) => void warned.push(text);
    // A second is over at once.
    globalThis.setTimeout = ((run: () => void) => setTimeout(run, 0)) as typeof setTimeout;
    try {
      Deno.env.set("LINA_CACHE", folder);
      Deno.env.set("RANK", "1");
      await compileModules([slow], 80);
      assert.deepEqual(warned, []);
      Deno.env.set("RANK", "0");
      await compileModules([{ ...slow, source: `${slow.source} again` }], 80);
      assert.deepEqual(warned, [`lina: compiling GPU kernels for sm_80, once: kept in ${folder}`]);
      await Deno.chmod(folder, 0o777);
      await compileModules([slow], 80);
      assert.match(warned[1], /sm_80, each time, as .* must belong to this user/);
    } finally {
      console.warn = warn;
      globalThis.setTimeout = setTimeout;
      if (rank === undefined) Deno.env.delete("RANK");
      else Deno.env.set("RANK", rank);
      if (cache === undefined) Deno.env.delete("LINA_CACHE");
      else Deno.env.set("LINA_CACHE", cache);
      await Deno.remove(folder, { recursive: true });
    }
  },
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

Deno.test({
  name: "a compiler or cuBLAS that is missing is found before a device is wanted",
  ignore: !there || !emulated,
  async fn() {
    const library = (await buildEmulator())!;
    const all = {
      LINA_CUDART: library,
      LINA_CUDA: library,
      LINA_NVRTC: library,
      LINA_CUBLAS: library,
    };
    const missing = [["LINA_CUDA", /CUDA driver/], ["LINA_NVRTC", /NVRTC/], [
      "LINA_CUBLAS",
      /cuBLAS/,
    ]] as const;
    for (const [name, words] of missing) {
      const { ok, reason, thrown } = await finding({ ...all, [name]: "/no/such/library.so" });
      assert.equal(ok, false, name);
      assert.match(reason, words);
      assert.ok(reason.includes("/no/such/library.so") && thrown.includes(reason));
    }
  },
});
