// Whether the parameters that each module of tensor/cuda declares for its kernels are those of its .cu file: a wrong type or order is
// no error for CUDA, only garbage. Asks the emulator, which knows the C++ types.

import assert from "node:assert/strict";
import { addressOf, readCString } from "../../ffi/address.ts";
import { checkCuda, cuda } from "../../ffi/cuda.ts";
import { nvrtc } from "../../ffi/nvrtc.ts";
import type { ModuleSource, ParameterType } from "../../tensor/cuda/context.ts";
import { emulated, loadCuda } from "./device.ts";

const ok = await loadCuda() && emulated;

/** Kind and size, as the emulator writes them. */
function written(type: ParameterType): string {
  if (typeof type === "object") return `s${type.bytes}`;
  return { ptr: "p8", i32: "i4", i64: "i8", f32: "f4", f64: "f8" }[type];
}

/** Signatures of a module's kernels by name. */
async function signatures(module: ModuleSource): Promise<Map<string, string>> {
  const { compileModule } = await import("../../tensor/cuda/compile.ts");
  const { code } = await compileModule(module, 91); // what the emulator is, so the other tests' code
  const cell = new BigUint64Array(new ArrayBuffer(8));
  const { calls, path } = cuda();
  checkCuda(
    calls.cuModuleLoadData(addressOf(cell.buffer), addressOf(code.buffer)),
    "cuModuleLoadData",
  );
  const table = { linaSignatures: { parameters: ["u64"], result: "pointer" } } as const;
  // deno-lint-ignore lina/dlopen-in-ffi
  const text = readCString(Deno.dlopen(path, table).symbols.linaSignatures(cell[0]));
  const lines = text.trimEnd().split("\n").filter((line) => line !== "");
  return new Map(lines.map((line) => [line.split(" ", 1)[0], line]));
}

Deno.test({
  name: "kernels have the parameters that their modules declare",
  ignore: !ok,
  async fn() {
    nvrtc();
    const { CUDA_MODULES } = await import("../../tensor/cuda/kernels.ts");
    let kernels = 0;
    const wrong: string[] = [];
    for (const module of CUDA_MODULES.filter(({ exact }) => !exact)) {
      const found = await signatures(module);
      for (const [name, types] of Object.entries(module.kernels)) {
        const declared = [name, ...types.map(written)].join(" ");
        const real = found.get(name) ?? "no kernel";
        if (real !== declared) {
          wrong.push(`${module.name}.cu: ${declared} is declared, ${real} is there`);
        }
        kernels++;
      }
    }
    assert.deepEqual(wrong, []);
    assert(kernels > 0);
  },
});
