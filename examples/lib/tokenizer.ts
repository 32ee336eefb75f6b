// The tokenizer of a `tokenizer.json`. Plain byte-level BPE is read here; for every other kind `hf_tokenizer.ts` and the package that it needs are
// loaded, and only then: the demo, the byte tokenizer and tokenizers of our own run without any package, also offline.

import { basename, dirname, join, resolve } from "node:path";
import type { Tokenizer } from "../../moe/tokenizer.ts";
import { bpeTokenizer, isPlainBpe } from "./bpe.ts";

/**
 * A tokenizer from a file.
 *
 * @param path A `tokenizer.json`, or the folder that holds one.
 * @returns The tokenizer.
 * @throws {Error} As `loadTokenizer` of hf_tokenizer.ts does.
 */
export async function tokenizerOf(path: string): Promise<Tokenizer> {
  const own = plainBpe(path);
  if (own) return own;
  // A computed address, so that Deno does not load the module with the program.
  const adapter = new URL("./hf_tokenizer.ts", import.meta.url).href;
  const { loadTokenizer }: typeof import("./hf_tokenizer.ts") = await import(adapter);
  return loadTokenizer(path);
}

/** Null if the file is of another kind, or cannot be read: then the package's adapter says why. */
function plainBpe(path: string): Tokenizer | null {
  try {
    const file = Deno.statSync(path).isDirectory ? join(path, "tokenizer.json") : path;
    const description = JSON.parse(Deno.readTextFileSync(file));
    if (!isPlainBpe(description)) return null;
    return bpeTokenizer(description, basename(dirname(resolve(file))));
  } catch {
    return null;
  }
}
