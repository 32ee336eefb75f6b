// Compiles the `.cu` modules for the GPU at hand, or takes their code from the cache on disk. launch.ts loads and launches it.

import { nvrtc } from "../../ffi/nvrtc.ts";
import { cacheFolder, cacheKey, cacheProblem, readCached, writeCached } from "./cache.ts";
import common from "./common.cuh" with { type: "text" };
import type { ModuleSource } from "./context.ts";

/** The oldest NVRTC that knows the instructions of modules for one exact architecture; older ones do without these modules. */
const EXACT_VERSION = [12, 4] as const;

/**
 * Whether a module is for a GPU.
 *
 * @param module The module.
 * @param capability The GPU's compute capability times ten.
 * @param version Version of NVRTC: `12.4`.
 * @returns True if it can be compiled for it.
 */
export function isFor(module: ModuleSource, capability: number, version: string): boolean {
  const from = module.from ?? 80;
  if (!module.exact) return capability >= from;
  const [major, minor] = version.split(".").map(Number), [oldMajor, oldMinor] = EXACT_VERSION;
  return capability === from && (major > oldMajor || major === oldMajor && minor >= oldMinor);
}

/**
 * The architecture that code is compiled for: the GPU's own, or, if it is newer than the compiler, the newest that this knows before it.
 *
 * @param capability The GPU's compute capability times ten.
 * @param known Architectures that the compiler knows, ascending; empty if that is not known.
 * @returns What `__CUDA_ARCH__` is in kernels, divided by ten: 90.
 */
export function architectureFor(capability: number, known: readonly number[]): number {
  return known.filter((each) => each <= capability).at(-1) ?? capability;
}

/**
 * The compiler options of a module. For a GPU that is newer than the compiler they ask for PTX of the newest architecture that it knows,
 * which the driver compiles for that GPU.
 *
 * @param module The module.
 * @param capability The GPU's compute capability times ten.
 * @param known Architectures that the compiler knows, ascending; empty if that is not known. @default {[]}
 * @returns Options of NVRTC.
 */
export function compileOptions(
  module: ModuleSource,
  capability: number,
  known: readonly number[] = [],
): string[] {
  const architecture = architectureFor(capability, known);
  const target = architecture === capability
    ? `sm_${capability}${module.exact ? "a" : ""}`
    : `compute_${architecture}`;
  return [
    `--gpu-architecture=${target}`,
    "--std=c++17",
    "-default-device",
  ];
}

/**
 * Compiles a module, or takes its code from the cache on disk.
 *
 * @param module The module.
 * @param capability The GPU's compute capability times ten.
 * @param folder The cache, or null for none. @default {cacheFolder()}
 * @returns Machine code or PTX, and whether it had to be compiled.
 * @throws {CompileError} If the source does not compile; the message holds the compiler's log.
 */
export async function compileModule(
  module: ModuleSource,
  capability: number,
  folder: string | null = cacheFolder(),
): Promise<{ readonly code: Uint8Array<ArrayBuffer>; readonly compiled: boolean }> {
  const compiler = nvrtc();
  const options = compileOptions(module, capability, compiler.architectures);
  const source = `#line 1 "common.cuh"\n${common}\n#line 1 "${module.name}.cu"\n${module.source}`;
  const key = await cacheKey([source, ...options, compiler.version]);
  const cached = folder === null ? null : await readCached(folder, key);
  if (cached !== null) return { code: cached, compiled: false };
  const code = await compiler.compile(source, `${module.name}.cu`, options);
  if (folder !== null) await writeCached(folder, key, code);
  return { code, compiled: true };
}

/** What became of a module: its machine code, or why it has none. */
export interface CompiledModule {
  /** The module. */
  readonly module: ModuleSource;
  /** What it was compiled for, by {@linkcode architectureFor}: from 90 on, `after_previous()` in its kernels waits. */
  readonly architecture: number;
  /** Machine code; the driver may read it as late as a kernel's first use. */
  readonly code?: Uint8Array<ArrayBuffer>;
  /** What the compiler said against it. */
  readonly error?: unknown;
}

/** From when on compiling is told, in ms. */
const TOLD_MS = 1000;
/** Variables that hold this process's rank, by launcher: only rank 0 tells. */
const RANKS = ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"] as const;

function isFirstRank(): boolean {
  const name = RANKS.find((each) => Deno.env.has(each));
  return name === undefined || Deno.env.get(name) === "0";
}

/** Says on standard error, once it takes long, that kernels are compiled; until it is disposed of. */
function tellOfCompiling(capability: number): Disposable {
  const timer = setTimeout(async () => {
    const folder = cacheFolder(), problem = await cacheProblem(folder);
    const kept = problem === null ? `once: kept in ${folder}` : `each time, as ${problem}`;
    console.warn(`lina: compiling GPU kernels for sm_${capability}, ${kept}`);
  }, TOLD_MS);
  return { [Symbol.dispose]: () => clearTimeout(timer) };
}

/**
 * Compiles the modules that are for a GPU side by side, off the main thread, or takes them from the cache. On rank 0 it says so on
 * standard error if it takes longer than a second.
 *
 * @param modules The modules.
 * @param capability The GPU's compute capability times ten.
 * @returns Those that are for it; a module that does not compile has its error.
 */
export async function compileModules(
  modules: readonly ModuleSource[],
  capability: number,
): Promise<CompiledModule[]> {
  const { version, architectures } = nvrtc();
  const architecture = architectureFor(capability, architectures);
  const wanted = modules.filter((module) => isFor(module, capability, version));
  using _ = isFirstRank() ? tellOfCompiling(capability) : null;
  return await Promise.all(wanted.map(async (module): Promise<CompiledModule> => {
    try {
      const { code } = await compileModule(module, capability);
      return { module, architecture, code };
    } catch (error) {
      return { module, architecture, error };
    }
  }));
}
