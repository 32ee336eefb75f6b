// Where the libraries of CUDA lie, and the exception that their status codes become. Knows the places of NVIDIA's packages, of
// Python's wheels and of conda; starts no program and installs nothing. cudart.ts, cuda.ts, nvrtc.ts, cublas.ts and nccl.ts open by it.

import { type OpenedLibrary, openFirst } from "./search.ts";

/** A handle of a CUDA library: an address or an opaque number. The property exists only for the type checker. */
export type CudaHandle<Name extends string> = bigint & { readonly __handle: Name };

/** A call of a CUDA library failed. */
export class CudaError extends Error {
  /** @ignore */
  override readonly name = "CudaError";
  /** The C function, as in the library's manual. */
  readonly call: string;
  /** The status that it returned. */
  readonly code: number;
  /** The code's name: `cudaErrorInvalidValue`. */
  readonly codeName: string;

  /**
   * @param call The C function.
   * @param code The status that it returned.
   * @param codeName The code's name.
   * @param text The library's message, and what the caller knows of the call.
   */
  constructor(call: string, code: number, codeName: string, text: string) {
    super(`${call} failed with ${codeName} (${code}): ${text}`);
    this.call = call;
    this.code = code;
    this.codeName = codeName;
  }
}

/** Major versions of CUDA that are supported, the preferred one first. */
const MAJORS: readonly number[] = [13, 12];

/** The major version that the first library settled; the others should match it. */
let preferredMajor: number | undefined;

/**
 * Makes one major version of CUDA the preferred one for the libraries opened from now on.
 *
 * @param major 12 or 13.
 */
export function preferCudaMajor(major: number): void {
  preferredMajor = major;
}

/** Names of a folder's entries that pass, sorted; none if it cannot be read. */
function entries(folder: string, pass: (name: string) => boolean): string[] {
  try {
    return [...Deno.readDirSync(folder)].map((entry) => entry.name).filter(pass).sort();
  } catch {
    return [];
  }
}

/** The library folders of NVIDIA's wheels in a Python installation: `lib/python3.X/site-packages/nvidia/X/lib`. */
function wheelFolders(prefix: string): string[] {
  const folders: string[] = [];
  const roots = entries(`${prefix}/lib`, (name) => /^python3/.test(name));
  for (const root of roots.map((name) => `${prefix}/lib/${name}`)) {
    for (const packages of ["site-packages", "dist-packages"]) {
      const nvidia = `${root}/${packages}/nvidia`;
      for (const name of entries(nvidia, () => true)) folders.push(`${nvidia}/${name}/lib`);
    }
  }
  return folders;
}

/** The prefix of the `python3` (or `python`) that the PATH finds; the program is not started. */
function pythonPrefixes(): string[] {
  const prefixes: string[] = [];
  for (const folder of (Deno.env.get("PATH") ?? "").split(":")) {
    for (const name of ["python3", "python"]) {
      if (!folder.startsWith("/") || entries(folder, (entry) => entry === name).length === 0) {
        continue;
      }
      // A virtual environment's own prefix, then the installation's that its link leads to.
      prefixes.push(folder.replace(/\/[^/]*\/?$/, ""));
      try {
        const real = Deno.realPathSync(`${folder}/${name}`);
        prefixes.push(real.replace(/\/[^/]*\/[^/]*$/, ""));
      } catch {
        // A dangling link has no installation behind it.
      }
      return prefixes;
    }
  }
  return prefixes;
}

/** Every folder that may hold CUDA's libraries, most specific first. */
function libraryFolders(): string[] {
  const env = (name: string) => Deno.env.get(name) || undefined;
  const folders: string[] = [];
  for (const root of [env("CUDA_HOME"), env("CUDA_PATH")]) {
    if (root) folders.push(`${root}/lib64`, `${root}/lib`);
  }
  for (const folder of (env("LD_LIBRARY_PATH") ?? "").split(":")) {
    if (folder.startsWith("/")) folders.push(folder);
  }
  for (const prefix of [env("VIRTUAL_ENV"), env("CONDA_PREFIX")]) {
    if (prefix) folders.push(...wheelFolders(prefix), `${prefix}/lib`);
  }
  for (const prefix of pythonPrefixes()) folders.push(...wheelFolders(prefix));
  if (env("HOME")) folders.push(...wheelFolders(`${env("HOME")}/.local`));
  folders.push(...wheelFolders("/usr"), ...wheelFolders("/usr/local"));
  const toolkits = entries("/usr/local", (name) => /^cuda(-\d+(\.\d+)?)?$/.test(name));
  for (const toolkit of toolkits.length > 0 ? toolkits : ["cuda"]) {
    folders.push(`/usr/local/${toolkit}/lib64`);
  }
  return [...new Set(folders)];
}

/**
 * Absolute paths and, last, bare names under which a library may be found.
 *
 * @param names File names, best first: `libnccl.so.2`.
 * @returns Candidates for {@linkcode openFirst}: each name in every known folder, then each name alone.
 */
export function cudaCandidates(names: readonly string[]): string[] {
  const folders = libraryFolders();
  const absolute = names.flatMap((name) => folders.map((folder) => `${folder}/${name}`));
  // Folders without such a file would only make the error longer than a screen; those that were looked at are named by it.
  const there = absolute.filter((path) => {
    try {
      return Deno.statSync(path).isFile;
    } catch {
      return false;
    }
  });
  return [...there, ...names];
}

/**
 * Opens a library of CUDA whose file name ends in the major version.
 *
 * @param name Its name for errors: `the CUDA runtime`.
 * @param stem File name up to the version: `libcudart.so`.
 * @param env Environment variable that overrides the search with an absolute path.
 * @param symbols The symbol table.
 * @param majors Versions to try, best first. @default the one of the library opened first, then the other
 * @returns The symbols and the path that worked.
 * @throws {LibraryNotFoundError} If none opens; the message lists every file tried and every folder looked into.
 */
export function openCudaLibrary<const S extends Deno.ForeignLibraryInterface>(
  name: string,
  stem: string,
  env: string,
  symbols: S,
  majors: readonly number[] = MAJORS,
): OpenedLibrary<S> {
  const first = preferredMajor;
  const order = first === undefined
    ? majors
    : [...majors].sort((a, b) => Number(b === first) - Number(a === first));
  return openCudaFile(name, order.map((major) => `${stem}.${major}`), env, symbols);
}

/**
 * Opens a library of CUDA by its file name.
 *
 * @param name Its name for errors: `NCCL`.
 * @param files File names, best first: `libnccl.so.2`.
 * @param env Environment variable that overrides the search with an absolute path.
 * @param symbols The symbol table.
 * @returns The symbols and the path that worked.
 * @throws {LibraryNotFoundError} If none opens; the message lists every file tried and every folder looked into.
 */
export function openCudaFile<const S extends Deno.ForeignLibraryInterface>(
  name: string,
  files: readonly string[],
  env: string,
  symbols: S,
): OpenedLibrary<S> {
  try {
    return openFirst(name, cudaCandidates(files), symbols, { env });
  } catch (error) {
    if (error instanceof Error && !Deno.env.has(env)) {
      error.message += `\nlooked into: ${libraryFolders().join(", ") || "no folder"}`;
    }
    throw error;
  }
}
