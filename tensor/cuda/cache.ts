// Compiled kernels on disk, so that only the first process of a kind compiles. A file's name is the hash of all that the machine
// code depends on; its content ends in a hash of itself. A file that cannot be read, written or trusted is as good as none. Machine code is
// a program: folder and file must be this user's or root's, and nobody else may write to them, as ssh asks of its files.

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

/** Bits of a mode that let the group or others write. */
const WRITABLE_BY_OTHERS = 0o022;

/** Whether nobody but this user and root can have written what lies there; systems without owners do not tell. */
function isTrusted({ uid, mode }: Deno.FileInfo): boolean {
  if (uid === null || mode === null) return true;
  return (uid === 0 || uid === Deno.uid()) && (mode & WRITABLE_BY_OTHERS) === 0;
}

/**
 * Why compiled code is not kept in a folder.
 *
 * @param folder The folder, or null if there is no place for one.
 * @returns Half a sentence for a person; null if it can be kept, as when the folder has yet to be made.
 */
export async function cacheProblem(folder: string | null): Promise<string | null> {
  if (folder === null) return "neither LINA_CACHE nor HOME is set";
  try {
    if (isTrusted(await Deno.stat(folder))) return null;
    return `${folder} must belong to this user, and nobody else may write to it (chmod go-w)`;
  } catch (error) {
    return error instanceof Deno.errors.NotFound ? null : `${folder} cannot be read`;
  }
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
 * @returns The code, or null if there is none, it is broken, or another user could have written it.
 */
export async function readCached(
  folder: string,
  key: string,
): Promise<Uint8Array<ArrayBuffer> | null> {
  try {
    if (!isTrusted(await Deno.stat(folder))) return null;
    const bytes = await readTrusted(`${folder}/${key}`);
    if (bytes === null || bytes.length <= HASH_BYTES) return null;
    const code = bytes.slice(0, -HASH_BYTES), hash = bytes.subarray(-HASH_BYTES);
    const expected = await sha256(code);
    return expected.every((byte, i) => byte === hash[i]) ? code : null;
  } catch {
    return null;
  }
}

/** All of a file that is trusted, asked of the open file: another may take its name meanwhile. */
async function readTrusted(path: string): Promise<Uint8Array<ArrayBuffer> | null> {
  using file = await Deno.open(path);
  const info = await file.stat();
  if (!info.isFile || !isTrusted(info)) return null;
  const bytes = new Uint8Array(info.size);
  for (let at = 0; at < bytes.length;) {
    const count = await file.read(bytes.subarray(at));
    if (count === null) return null;
    at += count;
  }
  return bytes;
}

/**
 * Keeps compiled code: written under another name and renamed, so that a reader sees all of it or none.
 *
 * @param folder The folder; made, for this user alone, if it is not there.
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
    await Deno.mkdir(folder, { recursive: true, mode: 0o700 });
    if (!isTrusted(await Deno.stat(folder))) return false;
    const bytes = new Uint8Array(code.length + HASH_BYTES);
    bytes.set(code);
    bytes.set(await sha256(code), code.length);
    await Deno.writeFile(temporary, bytes, { createNew: true, mode: 0o600 });
    await Deno.rename(temporary, `${folder}/${key}`);
    return true;
  } catch {
    await Deno.remove(temporary).catch(() => {});
    return false;
  }
}
