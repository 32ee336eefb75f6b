// Loads `hf_tokenizer.ts` and the package that it needs only for those who bring a tokenizer.json: the demo and the byte tokenizer run
// without any package, also offline.

import type { Tokenizer } from "../../moe/tokenizer.ts";

/**
 * The tokenizer of a public model.
 *
 * @param path A `tokenizer.json`, or the folder that holds one.
 * @returns The tokenizer.
 * @throws {Error} As `loadTokenizer` of hf_tokenizer.ts does.
 */
export async function tokenizerOf(path: string): Promise<Tokenizer> {
  // A computed address, so that Deno does not load the module with the program.
  const adapter = new URL("./hf_tokenizer.ts", import.meta.url).href;
  const { loadTokenizer }: typeof import("./hf_tokenizer.ts") = await import(adapter);
  return loadTokenizer(path);
}
