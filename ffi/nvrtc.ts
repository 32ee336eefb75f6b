// NVRTC: compiles CUDA C++ to machine code of one architecture, or to PTX, at run time, off the main thread. Caching lies with the caller.

import { addressOf, cString, keepUntilHere, readCString } from "./address.ts";
import { CudaError, openCudaLibrary } from "./cuda_library.ts";

const SYMBOLS = {
  // nvrtcResult nvrtcVersion(int *major, int *minor);
  nvrtcVersion: { parameters: ["u64", "u64"], result: "i32" },
  // nvrtcResult nvrtcCreateProgram(nvrtcProgram *prog, const char *src, const char *name, int numHeaders,
  //   const char * const *headers, const char * const *includeNames);
  nvrtcCreateProgram: { parameters: ["u64", "u64", "u64", "i32", "u64", "u64"], result: "i32" },
  // nvrtcResult nvrtcCompileProgram(nvrtcProgram prog, int numOptions, const char * const *options);
  nvrtcCompileProgram: { parameters: ["u64", "i32", "u64"], result: "i32", nonblocking: true },
  // nvrtcResult nvrtcGetCUBINSize(nvrtcProgram prog, size_t *cubinSizeRet);
  nvrtcGetCUBINSize: { parameters: ["u64", "u64"], result: "i32" },
  // nvrtcResult nvrtcGetCUBIN(nvrtcProgram prog, char *cubin);
  nvrtcGetCUBIN: { parameters: ["u64", "u64"], result: "i32" },
  // nvrtcResult nvrtcGetPTXSize(nvrtcProgram prog, size_t *ptxSizeRet);
  nvrtcGetPTXSize: { parameters: ["u64", "u64"], result: "i32", optional: true },
  // nvrtcResult nvrtcGetPTX(nvrtcProgram prog, char *ptx);
  nvrtcGetPTX: { parameters: ["u64", "u64"], result: "i32", optional: true },
  // nvrtcResult nvrtcGetNumSupportedArchs(int *numArchs);
  nvrtcGetNumSupportedArchs: { parameters: ["u64"], result: "i32", optional: true },
  // nvrtcResult nvrtcGetSupportedArchs(int *supportedArchs);
  nvrtcGetSupportedArchs: { parameters: ["u64"], result: "i32", optional: true },
  // nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram prog, size_t *logSizeRet);
  nvrtcGetProgramLogSize: { parameters: ["u64", "u64"], result: "i32" },
  // nvrtcResult nvrtcGetProgramLog(nvrtcProgram prog, char *log);
  nvrtcGetProgramLog: { parameters: ["u64", "u64"], result: "i32" },
  // nvrtcResult nvrtcDestroyProgram(nvrtcProgram *prog);
  nvrtcDestroyProgram: { parameters: ["u64"], result: "i32" },
  // const char *nvrtcGetErrorString(nvrtcResult result);
  nvrtcGetErrorString: { parameters: ["i32"], result: "pointer" },
} as const satisfies Deno.ForeignLibraryInterface;

/** NVRTC_ERROR_COMPILATION: the source is wrong; every other code is about the call. */
const COMPILATION = 6;

/** A source does not compile. */
export class CompileError extends Error {
  /** @ignore */
  override readonly name = "CompileError";
}

/** The compiler that was opened. */
export interface Nvrtc {
  /** The path or name by which it was opened. */
  readonly path: string;
  /** Its version: `13.0`. */
  readonly version: string;
  /** Architectures that it compiles for, ascending: 90 for sm_90. Empty if it does not tell. */
  readonly architectures: readonly number[];
  /**
   * Compiles a source on another thread.
   *
   * @param source CUDA C++.
   * @param name Its name in messages: `norms.cu`.
   * @param options Compiler options, one per element.
   * @returns What `cuModuleLoadData` takes: machine code, or for a virtual architecture (`compute_90`) PTX and a zero.
   * @throws {CompileError} If the source does not compile; the message holds the compiler's log.
   * @throws {CudaError} If the compiler cannot work, as for an architecture that it does not know.
   */
  compile(
    source: string,
    name: string,
    options: readonly string[],
  ): Promise<Uint8Array<ArrayBuffer>>;
}

let loaded: Nvrtc | undefined;

/**
 * The compiler of this process, loaded at the first call. `LINA_NVRTC` may hold its absolute path.
 *
 * @returns The compiler.
 * @throws {LibraryNotFoundError} If none can be loaded; the message lists the places tried.
 */
export function nvrtc(): Nvrtc {
  if (loaded) return loaded;
  const { symbols, path } = openCudaLibrary("NVRTC", "libnvrtc.so", "LINA_NVRTC", SYMBOLS);
  loadBuiltins(path);
  const check = (code: number, call: string, detail = "") => {
    if (code === 0) return;
    const words = readCString(symbols.nvrtcGetErrorString(code));
    throw new CudaError(call, code, words, detail || "no message");
  };

  const version = new Int32Array(new ArrayBuffer(8));
  const at = addressOf(version.buffer);
  check(symbols.nvrtcVersion(at, at + 4n), "nvrtcVersion");

  const size = new BigUint64Array(new ArrayBuffer(8)), sizeAt = addressOf(size.buffer);

  /** Machine code; null if the program was compiled for a virtual architecture. */
  function cubin(program: bigint): Uint8Array<ArrayBuffer> | null {
    check(symbols.nvrtcGetCUBINSize(program, sizeAt), "nvrtcGetCUBINSize");
    if (size[0] === 0n) return null;
    const code = new Uint8Array(Number(size[0]));
    check(symbols.nvrtcGetCUBIN(program, addressOf(code.buffer)), "nvrtcGetCUBIN");
    return code;
  }

  function ptx(program: bigint): Uint8Array<ArrayBuffer> {
    check(symbols.nvrtcGetPTXSize!(program, sizeAt), "nvrtcGetPTXSize");
    const code = new Uint8Array(Number(size[0]));
    check(symbols.nvrtcGetPTX!(program, addressOf(code.buffer)), "nvrtcGetPTX");
    return code;
  }

  function architectures(): number[] {
    const { nvrtcGetNumSupportedArchs: count, nvrtcGetSupportedArchs: list } = symbols;
    if (!count || !list || !symbols.nvrtcGetPTX || !symbols.nvrtcGetPTXSize) return [];
    check(count(at), "nvrtcGetNumSupportedArchs");
    const known = new Int32Array(new ArrayBuffer(4 * version[0]));
    if (known.length > 0) check(list(addressOf(known.buffer)), "nvrtcGetSupportedArchs");
    return [...known].sort((a, b) => a - b);
  }

  function log(program: bigint): string {
    check(symbols.nvrtcGetProgramLogSize(program, sizeAt), "nvrtcGetProgramLogSize");
    const bytes = new Uint8Array(Number(size[0]));
    if (bytes.length === 0) return "";
    check(symbols.nvrtcGetProgramLog(program, addressOf(bytes.buffer)), "nvrtcGetProgramLog");
    return new TextDecoder().decode(bytes).replace(/[\s\0]+$/, "");
  }

  async function compile(
    source: string,
    name: string,
    options: readonly string[],
  ): Promise<Uint8Array<ArrayBuffer>> {
    // All that C reads stays referenced until the end of this function.
    const text = cString(source), title = cString(name);
    const strings = options.map(cString);
    const table = BigUint64Array.from(strings, (string) => addressOf(string.buffer));
    const program = new BigUint64Array(new ArrayBuffer(8));
    check(
      symbols.nvrtcCreateProgram(
        addressOf(program.buffer),
        addressOf(text.buffer),
        addressOf(title.buffer),
        0,
        0n,
        0n,
      ),
      "nvrtcCreateProgram",
    );
    try {
      const code = await symbols.nvrtcCompileProgram(
        program[0],
        options.length,
        addressOf(table.buffer),
      );
      if (code === COMPILATION) {
        throw new CompileError(
          `Cannot compile ${name} with ${options.join(" ")}:\n${log(program[0])}`,
        );
      }
      check(code, "nvrtcCompileProgram", `${name} with ${options.join(" ")}: ${log(program[0])}`);
      return cubin(program[0]) ?? ptx(program[0]);
    } finally {
      keepUntilHere(text, title, strings, table);
      symbols.nvrtcDestroyProgram(addressOf(program.buffer));
    }
  }

  const name = `${version[0]}.${version[1]}`;
  return loaded = { path, version: name, architectures: architectures(), compile };
}

/**
 * The compiler opens `libnvrtc-builtins` by its bare name, which the loader does not find beside it in Python's wheels; once
 * it is open, the name leads to it.
 */
function loadBuiltins(path: string): void {
  const folder = /^(\/.*)\/[^/]*$/.exec(path)?.[1];
  if (folder === undefined) return;
  try {
    for (const { name } of Deno.readDirSync(folder)) {
      if (name.startsWith("libnvrtc-builtins.so.")) Deno.dlopen(`${folder}/${name}`, {});
    }
  } catch {
    // Then the compiler finds it, or says that it does not.
  }
}
