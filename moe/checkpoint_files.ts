// Folders and files of checkpoints on the disk: durable writes, and replacing and removing folders so that a crash in between
// never leaves half a checkpoint under a checkpoint's name. Knows nothing of what is in the files.

import { sha256 } from "./hash.ts";
import type { OutputFile, WrittenFile } from "./safetensors.ts";

/** Folders with this prefix are being written or removed; a later save clears those that a crash left. */
export const TEMPORARY_PREFIX = ".checkpoint-";

/**
 * Writes a file and waits until the disk has it.
 *
 * @param path Where.
 * @param create Makes the file.
 * @param write Writes to it.
 * @returns What `write` returned.
 */
export async function writeSynced<T>(
  path: string,
  create: (path: string) => OutputFile,
  write: (file: OutputFile) => T | Promise<T>,
): Promise<T> {
  const file = create(path);
  try {
    const result = await write(file);
    file.sync();
    return result;
  } finally {
    file.close();
  }
}

/**
 * Writes a text file and waits until the disk has it.
 *
 * @param path Where.
 * @param text What.
 * @param create Makes the file.
 * @returns Size and hash.
 */
export function writeText(
  path: string,
  text: string,
  create: (path: string) => OutputFile,
): WrittenFile {
  const bytes = new TextEncoder().encode(text);
  const file = create(path);
  try {
    file.write(bytes);
    file.sync();
  } finally {
    file.close();
  }
  return { bytes: bytes.length, sha256: sha256().update(bytes).digest("hex") };
}

/**
 * Waits until the disk has the names in a folder.
 *
 * @param path The folder.
 */
export function syncFolder(path: string): void {
  if (Deno.build.os === "windows") return; // folders cannot be opened there
  using folder = Deno.openSync(path, { read: true });
  folder.syncSync();
}

/**
 * Gives a folder its final name. What has the name already stays a complete checkpoint, under another name, until the new one is in place.
 *
 * @param from The folder.
 * @param to Its final name.
 */
export function replaceFolder(from: string, to: string): void {
  const replaced = `${to}-replaced`;
  if (exists(to)) {
    removeFolder(replaced);
    Deno.renameSync(to, replaced);
  }
  Deno.renameSync(from, to);
  removeFolder(replaced);
}

/**
 * Removes what crashes have left behind.
 *
 * @param directory Where checkpoints lie.
 */
export function removeLeftovers(directory: string): void {
  const names = [...Deno.readDirSync(directory)].map((entry) => entry.name);
  for (const name of names) {
    if (name.startsWith(TEMPORARY_PREFIX)) {
      Deno.removeSync(`${directory}/${name}`, { recursive: true });
    }
  }
}

/**
 * Removes all but the newest of some checkpoints.
 *
 * @param older The checkpoints, the newest first.
 * @param keep How many stay.
 */
export function prune(
  older: readonly { readonly path: string }[],
  keep: number,
): void {
  for (const { path } of older.slice(keep)) removeFolder(path);
}

/**
 * Removes a folder if that is possible, without a word if it is not.
 *
 * @param path The folder.
 */
export function removeQuietly(path: string): void {
  try {
    Deno.removeSync(path, { recursive: true });
  } catch {
    // The error that led here says more.
  }
}

/** Takes the name away first: half a folder must never look like a damaged checkpoint. */
function removeFolder(path: string): void {
  if (!exists(path)) return;
  const slash = path.lastIndexOf("/");
  const doomed = `${path.slice(0, slash)}/${TEMPORARY_PREFIX}removing-${path.slice(slash + 1)}`;
  Deno.renameSync(path, doomed);
  Deno.removeSync(doomed, { recursive: true });
}

function exists(path: string): boolean {
  try {
    Deno.lstatSync(path);
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}
