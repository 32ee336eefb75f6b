// Text to numbers and back. The built-in tokenizer is the bytes of the text; others come from the application through the
// interface (`examples/lib/hf_tokenizer.ts` brings those of a `tokenizer.json`).

/** Turns text into token ids and back. */
export interface Tokenizer {
  /** Name for logs and for a checkpoint's config: a model is only as good as the tokenizer it was trained with. */
  readonly name: string;
  /** Number of ids: all are in 0 .. vocabularySize − 1. */
  readonly vocabularySize: number;
  /** Id that ends a text, if there is one. */
  readonly endOfText?: number;
  /** The ids of a text. */
  encode(text: string): Int32Array;
  /** The text of ids; what is no whole character becomes U+FFFD. */
  decode(ids: ArrayLike<number>): string;
}

const encoder = new TextEncoder();
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });

/**
 * The bytes of the text in UTF-8, each an id of its own: any text, any language, nothing to download.
 *
 * @example
 * ```ts
 * import { byteTokenizer } from "./tokenizer.ts";
 * import assert from "node:assert/strict";
 *
 * assert.deepEqual([...byteTokenizer.encode("né")], [0x6e, 0xc3, 0xa9]);
 * assert.equal(byteTokenizer.decode([0x6e, 0xc3, 0xa9]), "né");
 * ```
 */
export const byteTokenizer: Tokenizer = {
  name: "bytes",
  vocabularySize: 256,
  encode: (text: string): Int32Array => Int32Array.from(encoder.encode(text)),
  decode: (ids: ArrayLike<number>): string => decoder.decode(Uint8Array.from(ids)),
};

/** Turns ids that come one at a time into pieces of text that end at whole characters. */
export class StreamDecoder {
  readonly #tokenizer: Tokenizer;
  #pending: number[] = [];
  #shown = "";
  #settled = 0; // pending ids whose text has been given out

  /**
   * Begins a text.
   *
   * @param tokenizer Whose ids come.
   */
  constructor(tokenizer: Tokenizer) {
    this.#tokenizer = tokenizer;
  }

  /**
   * Takes the next id.
   *
   * @param id The id.
   * @returns The text that is certain now and was not before; empty in the midst of a character.
   */
  push(id: number): string {
    this.#pending.push(id);
    const text = this.#tokenizer.decode(this.#pending);
    // A character whose rest is still to come decodes to U+FFFD; after 8 ids nothing more will come of it.
    if (text.endsWith("\ufffd") && this.#pending.length - this.#settled < 8) return "";
    const piece = text.slice(this.#shown.length);
    this.#shown = text;
    this.#settled = this.#pending.length;
    // Some tokenizers write the first token of a text without its space, so a few ids of context stay.
    if (this.#pending.length > 64) {
      this.#pending = this.#pending.slice(-16);
      this.#shown = this.#tokenizer.decode(this.#pending);
      this.#settled = this.#pending.length;
    }
    return piece;
  }

  /**
   * Ends the text.
   *
   * @returns What was held back.
   */
  flush(): string {
    const text = this.#tokenizer.decode(this.#pending).slice(this.#shown.length);
    this.#pending = [];
    this.#shown = "";
    this.#settled = 0;
    return text;
  }
}
