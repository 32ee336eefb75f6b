// Builds the emulator's NCCL (nccl.cpp) into a library of its own, once per version of its source; as the newest NCCL, and as an older one
// without all-to-all. `LINA_NCCL_LIB` makes ffi/nccl.ts open it.

import { cacheProblem } from "../../tensor/cuda/cache.ts";

const SOURCE = new URL("nccl.cpp", import.meta.url);
const COMPILERS = [Deno.env.get("CXX"), "clang++-19", "clang++", "clang++-20", "clang++-18", "g++"];

/**
 * Builds the library, or finds that it is built.
 *
 * @param old Whether it lacks ncclAlltoAll, as versions before 2.28 do.
 * @returns Its path; null if this is not Linux, or there is no compiler.
 * @throws {Error} If the compiler fails; the message holds its output.
 */
export async function buildNccl(old: boolean): Promise<string | null> {
  if (Deno.build.os !== "linux") return null;
  const hash = await crypto.subtle.digest("SHA-256", await Deno.readFile(SOURCE));
  const folder = Deno.env.get("LINA_EMULATOR_CACHE") ??
    `${Deno.env.get("TMPDIR") ?? "/tmp"}/lina-emulator-${Deno.uid() ?? 0}`;
  await Deno.mkdir(folder, { recursive: true, mode: 0o700 });
  const problem = await cacheProblem(folder); // nobody else may have put a library there
  if (problem !== null) throw new Error(`Cannot build the emulator's NCCL as ${problem}`);
  const name = `${old ? "old-" : ""}nccl-${new Uint8Array(hash, 0, 12).toHex()}`;
  const library = `${folder}/${name}.so`;
  try {
    await Deno.stat(library);
    return library;
  } catch { /* it is to be built */ }
  const draft = `${library}.${Deno.pid}`;
  const flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra"];
  if (old) flags.push("-DLINA_OLD_NCCL");
  for (const compiler of COMPILERS) {
    if (!compiler) continue;
    try {
      const args = [...flags, SOURCE.pathname, "-o", draft];
      const { success, stderr } = await new Deno.Command(compiler, { args }).output();
      if (!success) {
        const text = new TextDecoder().decode(stderr);
        throw new Error(`Cannot build the emulator's NCCL with ${compiler}:\n${text}`);
      }
      await Deno.rename(draft, library);
      return library;
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
  }
  return null;
}

if (import.meta.main) console.log(await buildNccl(Deno.args.includes("--old")));
