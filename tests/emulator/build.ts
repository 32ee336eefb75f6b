// Builds the CPU emulator of CUDA (the .cpp files here but nccl.cpp) into one shared library that stands for libcudart, libcuda,
// libnvrtc and libcublas, once per version of its sources: the folder's name is their hash. Started as a program it prints the path.

import { cacheProblem } from "../../tensor/cuda/cache.ts";

const SOURCES = [
  "engine.cpp",
  "warps.cpp",
  "faults.cpp",
  "device.cpp",
  "memory.cpp",
  "streams.cpp",
  "modules.cpp",
  "nvrtc.cpp",
  "cublas.cpp",
] as const;
const HEADERS = ["emulator.h", "engine.h", "switch.h", "kernel.h"] as const;
const COMPILERS = [Deno.env.get("CXX"), "clang++-19", "clang++", "clang++-20", "clang++-18"];
const FLAGS = [
  "-std=c++17",
  "-O3",
  "-march=native",
  "-fPIC",
  "-shared",
  "-fvisibility=hidden",
  "-fno-math-errno",
  "-Wall",
  "-Wextra",
];

/** The compiler's path name and version; null if none of them is a clang that runs. */
async function compiler(): Promise<{ name: string; version: string } | null> {
  for (const name of COMPILERS) {
    if (!name) continue;
    try {
      const { stdout, success } = await new Deno.Command(name, { args: ["--version"] }).output();
      const version = new TextDecoder().decode(stdout);
      if (success && /clang/.test(version)) return { name, version };
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
  }
  return null;
}

/** What `-march=native` depends on. */
async function processor(): Promise<string> {
  try {
    const lines = (await Deno.readTextFile("/proc/cpuinfo")).split("\n");
    return lines.find((line) => /^(flags|Features)\s*:/.test(line)) ?? "";
  } catch {
    return "";
  }
}

/** Where build products lie: `LINA_EMULATOR_CACHE`, else a folder of the user's own in the temporary folder. */
function cacheFolder(): string {
  const temporary = Deno.env.get("TMPDIR") ?? "/tmp";
  return Deno.env.get("LINA_EMULATOR_CACHE") ?? `${temporary}/lina-emulator-${Deno.uid() ?? 0}`;
}

/**
 * Builds the emulator, or finds that it is built.
 *
 * @returns The path of the shared library; null if the system is not Linux or has no clang.
 * @throws {Error} If the compiler fails, the message holding its output, or if others may write to the folder of build products.
 */
export async function buildEmulator(): Promise<string | null> {
  if (Deno.build.os !== "linux") return null;
  const clang = await compiler();
  if (!clang) return null;
  const texts = [clang.name, clang.version, await processor(), FLAGS.join(" ")];
  for (const file of [...SOURCES, ...HEADERS]) {
    texts.push(file, await Deno.readTextFile(new URL(file, import.meta.url)));
  }
  const bytes = new TextEncoder().encode(texts.join("\0"));
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const folder = `${cacheFolder()}/${hash.subarray(0, 12).toHex()}`;
  const library = `${folder}/libemulator.so`;
  await Deno.mkdir(folder, { recursive: true, mode: 0o700 });
  // The library is loaded into the tests: nobody else may have put it there.
  const problem = await cacheProblem(cacheFolder());
  if (problem !== null) throw new Error(`Cannot build the CUDA emulator as ${problem}`);
  using lock = await Deno.open(`${folder}/lock`, { create: true, write: true });
  await lock.lock(true); // another test process may be building it: then this one finds it built
  if (await exists(library)) return library;
  // The version of the emulated NVRTC, by which caches of compiled kernels tell one emulator from another.
  const build = new DataView(hash.buffer).getUint32(0) & 0x3fffffff;
  const temporary = `${library}.${Deno.pid}`;
  const args = [
    ...FLAGS,
    `-DLINA_CLANG="${clang.name}"`,
    `-DLINA_BUILD=${build}`,
    ...SOURCES.map((file) => new URL(file, import.meta.url).pathname),
    "-o",
    temporary,
    "-ldl",
    "-lpthread",
  ];
  const { success, stderr } = await new Deno.Command(clang.name, { args }).output();
  if (!success) {
    throw new Error(
      `Cannot build the CUDA emulator with ${clang.name}:\n${new TextDecoder().decode(stderr)}`,
    );
  }
  await Deno.copyFile(new URL("kernel.h", import.meta.url), `${folder}/kernel.h`);
  await Deno.rename(temporary, library);
  return library;
}

async function exists(path: string): Promise<boolean> {
  try {
    await Deno.stat(path);
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

if (import.meta.main) console.log(await buildEmulator());
