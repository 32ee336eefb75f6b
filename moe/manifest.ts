// The manifest of a checkpoint: what it is of, which files belong to it, their sizes and hashes. It is written last, so a
// folder with a manifest is complete; and it carries a checksum of itself. Reading trusts nothing in it. Not here: the
// tensors (`safetensors.ts`) and the order of events (`checkpoint.ts`).

import { nextTurn, sha256 } from "./hash.ts";

/** What JSON can hold. */
export type Json =
  | string
  | number
  | boolean
  | null
  | readonly Json[]
  | { readonly [key: string]: Json };

/** Version of the layout that this code writes; it reads this one and older ones. */
export const FORMAT_VERSION = 1;

/** Name of the manifest in a checkpoint's folder. */
export const MANIFEST_NAME = "manifest.json";

const MAX_MANIFEST_BYTES = 4 * 1024 * 1024;

/** A file of a checkpoint. */
export interface ManifestFile {
  /** Name in the checkpoint's folder. */
  readonly name: string;
  /** Size. */
  readonly bytes: number;
  /** SHA-256 in hexadecimal. */
  readonly sha256: string;
}

/** The description of a checkpoint. */
export interface Manifest {
  /** Version of the layout. */
  readonly format: number;
  /** Steps done. */
  readonly step: number;
  /** Of which model. */
  readonly config: { readonly [key: string]: Json };
  /** What the program needs to go on: data position, seeds, … */
  readonly state: { readonly [key: string]: Json };
  /** Every file but the manifest. */
  readonly files: readonly ManifestFile[];
}

/** Thrown for a checkpoint that is incomplete or damaged, or that a newer version of this code wrote. */
export class CheckpointError extends Error {
  /** Kind of error. */
  override readonly name: string = "CheckpointError";
  /** Whether the checkpoint is well but of a newer layout. */
  readonly newer: boolean;

  /**
   * Makes an error.
   *
   * @param message What is wrong.
   * @param options Cause, and whether the layout is newer.
   */
  constructor(message: string, options: { cause?: unknown; newer?: boolean } = {}) {
    super(message, { cause: options.cause });
    this.newer = options.newer ?? false;
  }
}

/**
 * The text of a manifest, with its checksum.
 *
 * @param manifest The manifest; must hold only what JSON can.
 * @returns Lines of JSON.
 */
export function formatManifest(manifest: Manifest): string {
  // The checksum covers the content as JSON without spaces, so that only spaces may change unnoticed.
  const content = JSON.parse(JSON.stringify(manifest));
  return JSON.stringify({ ...content, checksum: checksumOf(content) }, null, 2) + "\n";
}

/**
 * Reads and checks the manifest of a checkpoint's folder. The files it names are not looked at.
 *
 * @param folder The folder.
 * @returns The manifest.
 * @throws {CheckpointError} If it is absent, damaged or of a newer layout.
 */
export function readManifest(folder: string): Manifest {
  const path = `${folder}/${MANIFEST_NAME}`;
  let text: string;
  try {
    const { size } = Deno.statSync(path);
    if (size > MAX_MANIFEST_BYTES) {
      throw new RangeError(
        `it must be at most ${MAX_MANIFEST_BYTES} bytes: current value is ${size}`,
      );
    }
    text = new TextDecoder("utf-8", { fatal: true }).decode(Deno.readFileSync(path));
  } catch (cause) {
    throw new CheckpointError(`Cannot read ${path}: ${(cause as Error).message}`, { cause });
  }
  let value: Record<string, unknown>;
  try {
    value = JSON.parse(text);
    JSON.stringify(value); // throws if it is nested too deep for what follows
  } catch (cause) {
    throw new CheckpointError(`Cannot read ${path} as it must be JSON`, { cause });
  }
  const fail = (must: string, current: unknown): never => {
    throw new CheckpointError(
      `Cannot read ${path} as ${must}: current value is ${JSON.stringify(current)?.slice(0, 100)}`,
    );
  };
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    fail("it must be an object", value);
  }
  const { checksum, ...content } = value;
  const actual = checksumOf(content);
  if (checksum !== actual) fail(`its checksum must be ${actual}`, checksum);
  if (!isCount(content.format) || content.format < 1) {
    fail("its format must be a whole number >= 1", content.format);
  }
  if (content.format as number > FORMAT_VERSION) {
    throw new CheckpointError(
      `Cannot read ${path} as its format must be at most ${FORMAT_VERSION}, the newest this version knows: current value is ${content.format}`,
      { newer: true },
    );
  }
  if (!isCount(content.step)) fail("its step must be a whole number >= 0", content.step);
  for (const key of ["config", "state"] as const) {
    const part = content[key];
    if (part === null || typeof part !== "object" || Array.isArray(part)) {
      fail(`its ${key} must be an object`, part);
    }
  }
  if (!Array.isArray(content.files)) fail("its files must be a list", content.files);
  const seen = new Set<string>();
  for (const file of content.files as Partial<ManifestFile>[]) {
    if (!isPlainName(file?.name) || seen.has(file.name)) {
      fail("the name of each file must be one of its own, without a folder", file?.name);
    }
    seen.add(file.name!);
    if (!isCount(file.bytes)) fail(`the size of ${file.name} must be a whole number`, file.bytes);
    if (typeof file.sha256 !== "string" || !/^[0-9a-f]{64}$/.test(file.sha256)) {
      fail(`the hash of ${file.name} must be 64 hexadecimal digits`, file.sha256);
    }
  }
  return content as unknown as Manifest;
}

/**
 * Compares a file with what the manifest says of it.
 *
 * @param folder The checkpoint's folder.
 * @param file What it must be.
 * @returns Once the whole file has been read.
 * @throws {CheckpointError} If it is absent or differs.
 */
export async function verifyFile(folder: string, file: ManifestFile): Promise<void> {
  const path = `${folder}/${file.name}`;
  try {
    const { size } = Deno.statSync(path);
    if (size !== file.bytes) {
      throw new CheckpointError(
        `Cannot use ${path} as it must have ${file.bytes} bytes: current value is ${size}`,
      );
    }
    const sha256 = await hashFile(path);
    if (sha256 !== file.sha256) {
      throw new CheckpointError(
        `Cannot use ${path} as its SHA-256 must be ${file.sha256}: current value is ${sha256}`,
      );
    }
  } catch (cause) {
    if (cause instanceof CheckpointError) throw cause;
    throw new CheckpointError(`Cannot use ${path}: ${(cause as Error).message}`, { cause });
  }
}

/**
 * The first place at which two descriptions of a model differ.
 *
 * @param expected The one wanted.
 * @param actual The one found.
 * @param path Where in the description both are. @default {""}
 * @returns Path and both values, or null if they are equal.
 */
export function firstDifference(
  expected: Json | undefined,
  actual: Json | undefined,
  path: string = "",
): { path: string; expected: Json | undefined; actual: Json | undefined } | null {
  if (isObject(expected) && isObject(actual)) {
    for (const key of new Set([...Object.keys(expected), ...Object.keys(actual)])) {
      const inner = path ? `${path}.${key}` : key;
      const found = firstDifference(expected[key], actual[key], inner);
      if (found) return found;
    }
    return null;
  }
  return JSON.stringify(expected) === JSON.stringify(actual) ? null : { path, expected, actual };
}

/**
 * Whether a name taken from a file may be used as that of a file in the same folder.
 *
 * @param name The name.
 * @returns False for anything that leads elsewhere.
 */
export function isPlainName(name: unknown): name is string {
  return typeof name === "string" && /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}$/.test(name);
}

async function hashFile(path: string): Promise<string> {
  using file = Deno.openSync(path, { read: true });
  const hash = sha256();
  const buffer = new Uint8Array(4 * 1024 * 1024);
  for (;;) {
    const n = file.readSync(buffer);
    if (n === null) return hash.digest("hex");
    hash.update(buffer.subarray(0, n));
    if (n === buffer.length) await nextTurn();
  }
}

function checksumOf(content: unknown): string {
  return sha256().update(JSON.stringify(content)).digest("hex");
}

function isObject(value: Json | undefined): value is { readonly [key: string]: Json } {
  return value !== null && typeof value === "object" && !Array.isArray(value);
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}
