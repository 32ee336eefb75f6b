// Finds and opens a C library: an environment variable that names it, else known places, else bare names that the system's
// loader looks up. Not a package manager: nothing is installed or downloaded. A library is opened once and never closed.

/** Where {@linkcode openFirst} looks. */
export interface SearchOptions {
  /** Environment variable that may hold the absolute path; when it is set, nothing else is tried. */
  readonly env: string;
}

/** A library that has been opened. */
export interface OpenedLibrary<S extends Deno.ForeignLibraryInterface> {
  /** The bound symbols. */
  readonly symbols: Deno.StaticForeignLibraryInterface<S>;
  /** The path or name that worked. */
  readonly path: string;
}

/** No candidate of a library could be opened. */
export class LibraryNotFoundError extends Error {
  /** @ignore */
  override readonly name = "LibraryNotFoundError";
}

/**
 * Opens the first candidate that the system can load and that has the symbols.
 *
 * @param name Name of the library for the error: `Open MPI or MPICH`.
 * @param candidates Absolute paths and bare names (`libmpi.so.40`), best first.
 * @param symbols The symbol table.
 * @param options The environment variable that overrides the candidates.
 * @returns The symbols and the path that worked.
 * @throws {LibraryNotFoundError} If none opens; the message lists every path tried and why it failed.
 */
export function openFirst<const S extends Deno.ForeignLibraryInterface>(
  name: string,
  candidates: readonly string[],
  symbols: S,
  options: SearchOptions,
): OpenedLibrary<S> {
  const override = Deno.env.get(options.env);
  if (override !== undefined && !isAbsolute(override)) {
    throw new LibraryNotFoundError(
      `Cannot open ${name} as ${options.env} must be an absolute path: current value is "${override}"`,
    );
  }
  const paths = override === undefined ? candidates : [override];
  const reasons: string[] = [];
  const causes: unknown[] = [];
  for (const path of paths) {
    try {
      return { symbols: Deno.dlopen(path, symbols).symbols, path };
    } catch (cause) {
      if (cause instanceof Deno.errors.NotCapable) throw cause;
      reasons.push(`  ${path}: ${reasonOf(cause)}`);
      causes.push(cause);
    }
  }
  throw new LibraryNotFoundError(
    `Cannot open ${name} as one of these must load (set ${options.env} to the absolute path of another):\n${
      reasons.join("\n")
    }`,
    { cause: causes },
  );
}

function isAbsolute(path: string): boolean {
  return path.startsWith("/") || /^[A-Za-z]:[\\/]/.test(path);
}

/** The loader's own words, without Deno's prefix. */
function reasonOf(cause: unknown): string {
  const text = cause instanceof Error ? cause.message : String(cause);
  return text.replace(/^Could not open library: /, "").split("\n", 1)[0];
}
