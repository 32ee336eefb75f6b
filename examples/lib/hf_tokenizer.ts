// The tokenizer of a public model: reads `tokenizer.json` (and, beside it, `tokenizer_config.json`) through
// `@huggingface/tokenizers`. An adapter and its error messages; the work is the package's.

import { basename, dirname, join } from "node:path";
import { Tokenizer as HuggingFaceTokenizer } from "npm:@huggingface/tokenizers@^0.2.0";
import type { Tokenizer } from "../../moe/tokenizer.ts";

const MODELS: readonly string[] = ["BPE", "WordPiece", "Unigram"];

/** Largest file that is taken for a tokenizer; those of public models have up to about 35 MB. */
const MAX_BYTES = 256 * 1024 * 1024;

/**
 * Loads a tokenizer.
 *
 * @param path A `tokenizer.json`, or the folder that holds one.
 * @returns The tokenizer. It adds no special tokens to a text, and writes those that it meets.
 * @throws {Error} If the file is absent, not JSON, not a tokenizer's, or does not give its own words back.
 */
export function loadTokenizer(path: string): Tokenizer {
  const file = isFolder(path) ? join(path, "tokenizer.json") : path;
  const description = readJson(file);
  const config = readJson(join(dirname(file), "tokenizer_config.json"), true);
  const model = (description as { model?: { type?: unknown; vocab?: unknown } }).model;
  if (model === null || typeof model !== "object" || model.vocab === undefined) {
    throw broken(file, "it must describe a model with a vocabulary", description);
  }
  // The package guesses at a kind that it does not know. Old files name none.
  if (model.type !== undefined && !MODELS.includes(model.type as string)) {
    throw broken(file, `its model must be one of ${MODELS}`, model.type);
  }
  let inner: HuggingFaceTokenizer, vocabularySize = 0, endOfText: number | undefined;
  try {
    inner = new HuggingFaceTokenizer(description, config);
    for (const [word, id] of inner.get_vocab(true)) {
      if (!Number.isInteger(id) || id < 0 || id >= 2 ** 24) {
        throw new RangeError(`the id of ${JSON.stringify(word)} is ${id}`);
      }
      vocabularySize = Math.max(vocabularySize, id + 1);
    }
    if (vocabularySize === 0) throw new RangeError("the vocabulary is empty");
    const end = (config as { eos_token?: string | { content?: string } }).eos_token;
    const word = typeof end === "string" ? end : end?.content;
    endOfText = word === undefined ? undefined : inner.token_to_id(word);
    // A tokenizer that cannot encode at all fails here and not in the midst of a run.
    checkIds(inner.encode("a", { add_special_tokens: false }).ids, vocabularySize);
  } catch (cause) {
    throw new Error(
      `Cannot load the tokenizer ${file} as it must be a tokenizer.json that @huggingface/tokenizers understands: ${
        (cause as Error).message
      }`,
      { cause },
    );
  }
  return {
    name: basename(dirname(file)) || file,
    vocabularySize,
    endOfText,
    encode(text: string): Int32Array {
      const { ids } = inner.encode(text, { add_special_tokens: false });
      return checkIds(ids, vocabularySize);
    },
    decode(ids: ArrayLike<number>): string {
      const options = { skip_special_tokens: false, clean_up_tokenization_spaces: false };
      return ids.length === 0 ? "" : inner.decode(Array.from(ids), options);
    },
  };
}

function checkIds(ids: readonly unknown[], vocabularySize: number): Int32Array {
  for (const id of ids) {
    if (!Number.isInteger(id) || (id as number) < 0 || (id as number) >= vocabularySize) {
      throw new RangeError(
        `Cannot encode the text as every id must be in 0 .. ${
          vocabularySize - 1
        }: current value is ${id}; the tokenizer may lack an unknown token`,
      );
    }
  }
  return Int32Array.from(ids as number[]);
}

function readJson(file: string, optional: boolean = false): object {
  let text: string;
  try {
    const { size } = Deno.statSync(file);
    if (size > MAX_BYTES) throw broken(file, `it must have at most ${MAX_BYTES} bytes`, size);
    text = Deno.readTextFileSync(file);
  } catch (cause) {
    if (cause instanceof Deno.errors.NotFound) {
      if (optional) return {};
      throw new Error(`Cannot load the tokenizer ${file} as the file must exist`, { cause });
    }
    throw cause;
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new Error(`Cannot load the tokenizer ${file} as it must be JSON: ${cause}`, { cause });
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw broken(file, "it must be a JSON object", value);
  }
  return value;
}

function isFolder(path: string): boolean {
  try {
    return Deno.statSync(path).isDirectory;
  } catch {
    return false; // the error comes with the file that is opened next
  }
}

function broken(file: string, must: string, current: unknown): Error {
  const text = JSON.stringify(current) ?? String(current);
  return new Error(
    `Cannot load the tokenizer ${file} as ${must}: current value is ${text.slice(0, 80)}`,
  );
}
