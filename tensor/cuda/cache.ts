// Compiled kernels on disk, so that only the first process of a kind compiles. A file's name is the hash of all that the machine
// code depends on; its content ends in a hash of itself. A file that cannot be read, written or trusted is as good as none.

/** Bytes of SHA-256. */
const HASH_BYTES = 32;

async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<Uint8Array<ArrayBuffer>> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
}

/**
 * The folder of compiled kernels: `LINA_CACHE`, else `lina` in `XDG_CACHE_HOME` or `~/.cache`.
 *
 * @returns Its path, or null if there is no such place.
 */
export function cacheFolder(): string | null {
  const own = Deno.env.get("LINA_CACHE");
  if (own) return own;
  const xdg = Deno.env.get("XDG_CACHE_HOME");
  if (xdg?.startsWith("/")) return `${xdg}/lina`;
  const home = Deno.env.get("HOME");
  return home ? `${home}/.cache/lina` : null;
}

/**
 * The name under which compiled code is kept.
 *
 * @param parts All that the code depends on: source, options, compiler.
 * @returns A file name.
 */
export async function cacheKey(parts: readonly string[]): Promise<string> {
  const hash = await sha256(new TextEncoder().encode(JSON.stringify(parts)));
  return `${hash.toHex()}.cubin`;
}

/**
 * Reads compiled code.
 *
 * @param folder The folder.
 * @param key Its name.
 * @returns The code, or null if there is none or it is broken.
 */
export async function readCached(
  folder: string,
  key: string,
): Promise<Uint8Array<ArrayBuffer> | null> {
  try {
    const bytes = await Deno.readFile(`${folder}/${key}`);
    if (bytes.length <= HASH_BYTES) return null;
    const code = bytes.slice(0, -HASH_BYTES), hash = bytes.subarray(-HASH_BYTES);
    const expected = await sha256(code);
    return expected.every((byte, i) => byte === hash[i]) ? code : null;
  } catch {
    return null;
  }
}

/**
 * Keeps compiled code: written under another name and renamed, so that a reader sees all of it or none.
 *
 * @param folder The folder; made if it is not there.
 * @param key Its name.
 * @param code The code.
 * @returns Whether it was kept.
 */
export async function writeCached(
  folder: string,
  key: string,
  code: Uint8Array<ArrayBuffer>,
): Promise<boolean> {
  const temporary = `${folder}/${key}.${crypto.randomUUID()}.tmp`;
  try {
    await Deno.mkdir(folder, { recursive: true });
    const bytes = new Uint8Array(code.length + HASH_BYTES);
    bytes.set(code);
    bytes.set(await sha256(code), code.length);
    await Deno.writeFile(temporary, bytes);
    await Deno.rename(temporary, `${folder}/${key}`);
    return true;
  } catch {
    await Deno.remove(temporary).catch(() => {});
    return false;
  }
}
