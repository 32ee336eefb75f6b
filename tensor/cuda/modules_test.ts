// Every `.cu` module compiles with NVRTC for every GPU that it declares, and has the kernels that it declares. Needs NVRTC, no GPU.

import assert from "node:assert/strict";
import { nvrtc } from "../../ffi/nvrtc.ts";
import { LibraryNotFoundError } from "../../ffi/search.ts";
import { CUDA_MODULES } from "./kernels.ts";
import { compileModule, isFor } from "./compile.ts";

/** Ampere and Hopper; what runs on the former runs on those between. */
const TARGETS = [80, 90] as const;

function compilerIsThere(): boolean {
  try {
    nvrtc();
    return true;
  } catch (error) {
    if (!(error instanceof LibraryNotFoundError) || Deno.env.get("LINA_CI")) throw error;
    console.warn("skipped: Cannot compile kernels as NVRTC must be installed (LINA_NVRTC)");
    return false;
  }
}

const ignore = !compilerIsThere();

Deno.test({
  name: "every module compiles for every target that it declares",
  ignore,
  async fn() {
    const jobs = CUDA_MODULES.flatMap((module) =>
      TARGETS.filter((target) => isFor(module, target, nvrtc().version)).map((target) => ({
        module,
        target,
      }))
    );
    assert.ok(CUDA_MODULES.every((module) => jobs.some((job) => job.module === module)));
    const next = jobs.values();
    const work = async () => {
      for (const { module, target } of next) {
        const { code, compiled } = await compileModule(module, target, null);
        assert.ok(compiled);
        const text = new TextDecoder("latin1").decode(code);
        for (const name of Object.keys(module.kernels)) {
          assert.ok(
            text.includes(`.text.${name}\0`),
            `${module.name}.cu for sm_${target} has no kernel ${name}`,
          );
        }
      }
    };
    await Promise.all(Array.from({ length: navigator.hardwareConcurrency }, work));
  },
});

Deno.test({
  name: "for a GPU that the compiler does not know yet, modules compile to PTX",
  ignore,
  async fn() {
    const { architectures } = nvrtc();
    assert.ok(architectures.includes(80) && architectures.includes(90));
    const { code } = await compileModule(CUDA_MODULES[0], 999, null);
    const text = new TextDecoder().decode(code);
    assert.match(text, new RegExp(`\\.target sm_${architectures.at(-1)}\\b`));
    assert.ok(text.endsWith("\0"), "as the driver takes it");
  },
});

Deno.test("modules have names of their own", () => {
  const names = CUDA_MODULES.map((module) => module.name);
  assert.equal(new Set(names).size, names.length);
});

Deno.test("all kernels overlap the launch of the next one: they wait for the one before", () => {
  for (const { name, source, overlaps } of CUDA_MODULES) {
    assert.ok(overlaps, name);
    const kernels = source.split("__global__").slice(1);
    for (const kernel of kernels) {
      const body = kernel.slice(kernel.indexOf("{") + 1).replaceAll("\\\n", "");
      const before = body.slice(0, body.indexOf("after_previous();")).trim();
      assert.equal(before, "", `${name}: ${kernel.slice(0, 200)}`);
    }
  }
});
