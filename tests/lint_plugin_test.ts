import assert from "node:assert/strict";
import plugin, { importProblem } from "./lint_plugin.ts";

/** Messages that the plugin has for a file. */
function lint(path: string, code: string): string[] {
  const file = new URL(`../${path}`, import.meta.url).pathname;
  return Deno.lint.runPlugin(plugin, file, code).map((d) => `${d.id}: ${d.message}`);
}

Deno.test.each([
  ["tensor/tensor.ts", "./dtype.ts"],
  ["tensor/cpu/memory.ts", "../../ffi/libc.ts"],
  ["collectives/shm/mod.ts", "node:timers"],
  ["ffi/libc.ts", "../trace/mod.ts"],
  ["lina/training/scheduler.ts", "../../moe/hooks.ts"],
  ["mod.ts", "./lina/mod.ts"],
  ["examples/train.ts", "@huggingface/tokenizers"],
  ["serve/main.ts", "npm:hono@4"],
  ["moe/router_test.ts", "fast-check"],
  ["bench/launch.ts", "../mod.ts"],
])("%s may import %s", (path, specifier) => {
  assert.equal(importProblem(path, specifier), null);
});

Deno.test.each([
  ["ffi/libc.ts", "../tensor/dtype.ts"],
  ["tensor/tensor.ts", "../collectives/types.ts"],
  ["collectives/world.ts", "../moe/hooks.ts"],
  ["moe/layer.ts", "../lina/mod.ts"],
  ["trace/mod.ts", "../ffi/libc.ts"],
  ["lina/mod.ts", "../serve/main.ts"],
  ["lina/mod.ts", "../mod.ts"],
  ["moe/layer.ts", "npm:fast-check@4"],
  ["moe/layer.ts", "fast-check"],
  ["launch.ts", "https://example.org/x.ts"],
])("%s must not import %s", (path, specifier) => {
  assert.equal(typeof importProblem(path, specifier), "string");
});

Deno.test("the rules see every kind of import", () => {
  const code = `
    import { a } from "../moe/a.ts";
    import type { B } from "../moe/b.ts";
    export { c } from "../moe/c.ts";
    export * from "../moe/d.ts";
    const e = await import("../moe/e.ts");
    export const f = 1;
    const g = await import(a);
  `;
  assert.equal(lint("collectives/x.ts", code).length, 5);
  assert.deepEqual(lint("examples/x.ts", code), []);
});

Deno.test("the rules see dlopen outside ffi/, and paths that a URL does not have", () => {
  const open = 'Deno.dlopen("x", {}); Deno["dlopen"]("x", {}); Deno.open("x");';
  assert.equal(lint("collectives/x.ts", open).length, 2);
  assert.deepEqual(lint("ffi/x.ts", open), []);
  const meta = "import.meta.dirname; import.meta.filename; import.meta.url;";
  assert.equal(lint("moe/x.ts", meta).length, 2);
  assert.deepEqual(lint("tests/x.ts", meta), []);
});

Deno.test("what every rank loads at its start imports no node: module, which take longer than all of ours", async () => {
  const { stdout } = await new Deno.Command(Deno.execPath(), {
    args: ["info", "--json", new URL("../mod.ts", import.meta.url).href],
  }).output();
  const { modules } = JSON.parse(new TextDecoder().decode(stdout)) as {
    modules: { specifier: string; dependencies?: { specifier: string; code?: unknown }[] }[];
  };
  const importers = modules
    .filter((m) => !m.specifier.includes("/collectives/mpi/")) // loaded only by jobs over MPI, which takes longer anyway
    .filter((m) => m.dependencies?.some((d) => d.specifier.startsWith("node:") && d.code))
    .map((m) => m.specifier);
  assert.ok(modules.length > 50);
  assert.deepEqual(importers, []);
});

Deno.test("the rules see a scope of tensors where other code may run in between", () => {
  const good = `
    function f() { using s = new TensorScope(); return s.keep(1); }
    async function g() { await (() => { using s = new TensorScope(); })(); }
    class A { constructor() { using s = new TensorScope(); } }
  `;
  assert.deepEqual(lint("moe/x.ts", good), []);
  const bad = `
    async function f() { using s = new TensorScope(); }
    const g = async () => { using s = new TensorScope(); };
    class A { async h() { using s = new TensorScope(); } }
    function* i() { using s = new TensorScope(); }
  `;
  assert.equal(lint("moe/x.ts", bad).length, 4);
});
