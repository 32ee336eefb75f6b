// Checksums of files, from the system's own modules. They are loaded at the first use: importing node:crypto or node:zlib at the
// top would double the time that every rank takes to start, whether or not it ever saves anything.

import type { Hash } from "node:crypto";

/**
 * A SHA-256 that bytes are added to.
 *
 * @returns The hash; `update(bytes)`, then `digest("hex")`.
 */
export function sha256(): Hash {
  // deno-lint-ignore no-process-global -- importing node:process costs what this is meant to save
  return process.getBuiltinModule("node:crypto").createHash("sha256");
}

/**
 * The CRC-32 of bytes.
 *
 * @param bytes The bytes.
 * @returns A number in 0..2³² − 1.
 */
export function crc32(bytes: Uint8Array): number {
  // deno-lint-ignore no-process-global -- as above
  return process.getBuiltinModule("node:zlib").crc32(bytes);
}

/** Lets the event loop run once. */
export function nextTurn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}
