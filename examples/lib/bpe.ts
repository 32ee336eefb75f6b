// Byte-level byte-pair encoding as GPT-2 has it: learns merges from a text, and encodes with them. Written as a `tokenizer.json` that
// Hugging Face's libraries read, too; reads only such files, without any package. Not here: normalisers, special tokens, other kinds of models.

import type { Tokenizer } from "../../moe/tokenizer.ts";

/** GPT-2's words: letters, numbers or other signs with the space before them, endings after an apostrophe, and spaces. */
const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

/** Ids are below this, so that two of them make one number. */
const MOST_IDS = 65536;

/** Words whose ids are remembered. */
const REMEMBERED = 500_000;

const encoder = new TextEncoder();

/** A `tokenizer.json` of byte-level BPE, as far as it is used here. */
export interface BpeDescription {
  /** @ignore */
  readonly version: string;
  /** None. */
  readonly added_tokens: readonly unknown[];
  /** None. */
  readonly normalizer: null;
  /** GPT-2's. */
  readonly pre_tokenizer: {
    readonly type: "ByteLevel";
    readonly add_prefix_space: boolean;
    readonly use_regex?: boolean;
  };
  /** The words and how they came about. */
  readonly model: {
    readonly type: "BPE";
    readonly vocab: Readonly<Record<string, number>>;
    readonly merges: readonly (string | readonly [string, string])[];
  };
}

/** The letters that stand for bytes in the file, as GPT-2 defined them: no spaces or control characters. */
function byteLetters(): string[] {
  const shown = (b: number) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let extra = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(shown(b) ? b : extra++));
}

/** A word of the text while merges are learned. */
interface Word {
  ids: number[];
  readonly count: number;
}

/**
 * Learns merges: again and again the most frequent pair of neighbours within words becomes one id, the lowest ids where counts are equal.
 *
 * @param text The text.
 * @param vocabularySize Ids to end with, 256 for the bytes among them; fewer if no pair comes twice any more.
 * @returns The tokenizer as a `tokenizer.json`.
 * @throws {RangeError} If the size is not in 256 .. 65536.
 */
export function learnBpe(text: string, vocabularySize: number): BpeDescription {
  if (!(Number.isInteger(vocabularySize) && vocabularySize >= 256 && vocabularySize <= MOST_IDS)) {
    throw new RangeError(
      `Cannot learn a tokenizer as its size must be in 256 .. ${MOST_IDS}: current value is ${vocabularySize}`,
    );
  }
  const pairs = new Pairs(wordsOf(text));
  const merges: [number, number][] = [];
  while (256 + merges.length < vocabularySize) {
    const pair = pairs.mostFrequent();
    if (pair === null) break;
    pairs.merge(pair, 256 + merges.length);
    merges.push(pair);
  }
  const letters = byteLetters();
  for (const [a, b] of merges) letters.push(letters[a] + letters[b]);
  const byteLevel = {
    type: "ByteLevel",
    add_prefix_space: false,
    trim_offsets: true,
    use_regex: true,
  };
  return {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: [],
    normalizer: null,
    pre_tokenizer: byteLevel,
    post_processor: null,
    decoder: byteLevel,
    model: {
      type: "BPE",
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: "",
      end_of_word_suffix: "",
      fuse_unk: false,
      vocab: Object.fromEntries(letters.map((word, id) => [word, id])),
      merges: merges.map(([a, b]) => `${letters[a]} ${letters[b]}`),
    },
  } as BpeDescription;
}

function wordsOf(text: string): Word[] {
  const counts = new Map<string, number>();
  for (const [word] of text.matchAll(WORDS)) counts.set(word, (counts.get(word) ?? 0) + 1);
  return Array.from(counts, ([word, count]) => ({ ids: [...encoder.encode(word)], count }));
}

/** Pairs of neighbouring ids, how often they come and in which words. */
class Pairs {
  readonly #words: readonly Word[];
  readonly #counts = new Map<number, number>();
  /** Numbers of the words that a pair came in; some twice, and some that have lost it. */
  readonly #places = new Map<number, number[]>();
  /** A heap of pairs by the count that they had when they came in. */
  readonly #heap: { readonly pair: number; readonly count: number }[] = [];

  constructor(words: readonly Word[]) {
    this.#words = words;
    for (const [i, { ids, count }] of words.entries()) {
      for (let at = 1; at < ids.length; at++) this.#add(ids[at - 1], ids[at], count, i);
    }
    for (const [pair, count] of this.#counts) this.#push(pair, count);
  }

  mostFrequent(): [number, number] | null {
    for (let top = this.#pop(); top; top = this.#pop()) {
      const count = this.#counts.get(top.pair) ?? 0;
      if (count < 2) continue;
      // Counts only sink while a pair lies in the heap.
      if (count === top.count) return [Math.floor(top.pair / MOST_IDS), top.pair % MOST_IDS];
      this.#push(top.pair, count);
    }
    return null;
  }

  merge([a, b]: [number, number], merged: number): void {
    const places = this.#places.get(a * MOST_IDS + b)!;
    const grown = new Set<number>();
    for (const i of places) {
      const word = this.#words[i], { ids, count } = word;
      const out: number[] = [];
      let found = false;
      for (let at = 0; at < ids.length; at++) {
        if (ids[at] === a && ids[at + 1] === b) {
          out.push(merged);
          found = true;
          at++;
        } else out.push(ids[at]);
      }
      if (!found) continue;
      for (let at = 1; at < ids.length; at++) this.#add(ids[at - 1], ids[at], -count, -1);
      for (let at = 1; at < out.length; at++) {
        const isNew = out[at] === merged || out[at - 1] === merged;
        this.#add(out[at - 1], out[at], count, isNew ? i : -1);
        if (isNew) grown.add(out[at - 1] * MOST_IDS + out[at]);
      }
      word.ids = out;
    }
    this.#places.delete(a * MOST_IDS + b);
    for (const pair of grown) this.#push(pair, this.#counts.get(pair)!);
  }

  #add(a: number, b: number, count: number, place: number): void {
    const pair = a * MOST_IDS + b;
    this.#counts.set(pair, (this.#counts.get(pair) ?? 0) + count);
    if (place < 0) return;
    const places = this.#places.get(pair);
    if (!places) this.#places.set(pair, [place]);
    else if (places.at(-1) !== place) places.push(place);
  }

  /** Whether heap entry x comes before y. */
  #before(x: { pair: number; count: number }, y: { pair: number; count: number }): boolean {
    return x.count > y.count || (x.count === y.count && x.pair < y.pair);
  }

  #push(pair: number, count: number): void {
    const heap = this.#heap, entry = { pair, count };
    let at = heap.push(entry) - 1;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (!this.#before(entry, heap[parent])) break;
      heap[at] = heap[parent];
      at = parent;
    }
    heap[at] = entry;
  }

  #pop(): { readonly pair: number; readonly count: number } | undefined {
    const heap = this.#heap, top = heap[0], entry = heap.pop();
    if (entry === undefined || heap.length === 0) return top;
    let at = 0;
    for (let child = 1; child < heap.length; child = 2 * at + 1) {
      if (child + 1 < heap.length && this.#before(heap[child + 1], heap[child])) child++;
      if (!this.#before(heap[child], entry)) break;
      heap[at] = heap[child];
      at = child;
    }
    heap[at] = entry;
    return top;
  }
}

/**
 * Whether a `tokenizer.json` is one that {@linkcode bpeTokenizer} reads.
 *
 * @param description The file's contents.
 * @returns True for plain byte-level BPE without special tokens.
 */
export function isPlainBpe(description: unknown): description is BpeDescription {
  const { added_tokens, normalizer, pre_tokenizer, model } = description as BpeDescription;
  return Array.isArray(added_tokens) && added_tokens.length === 0 && !normalizer &&
    pre_tokenizer?.type === "ByteLevel" && pre_tokenizer.add_prefix_space === false &&
    pre_tokenizer.use_regex !== false && model?.type === "BPE" && Array.isArray(model.merges) &&
    byteLetters().every((letter) => Number.isInteger(model.vocab?.[letter]));
}

/**
 * The tokenizer of a description.
 *
 * @param description From {@linkcode learnBpe}, or of a file for which {@linkcode isPlainBpe} holds.
 * @param name Its name in checkpoints.
 * @returns The tokenizer.
 * @throws {Error} If a merge names a word that is not in the vocabulary.
 */
export function bpeTokenizer({ model }: BpeDescription, name: string): Tokenizer {
  const { vocab, merges } = model, letters = byteLetters();
  const idOf = (word: string) => {
    const id = Object.hasOwn(vocab, word) ? vocab[word] : undefined;
    if (id !== undefined && Number.isInteger(id) && id >= 0 && id < MOST_IDS) return id;
    throw new Error(
      `Cannot load the tokenizer ${name} as ${
        JSON.stringify(word)
      } must be in its vocabulary, below ${MOST_IDS}: current value is ${id}`,
    );
  };
  const byteOf = new Map(letters.map((letter, byte) => [letter, byte]));
  const bytes: number[][] = [];
  for (const word of Object.keys(vocab)) {
    bytes[idOf(word)] = Array.from(word, (letter) => byteOf.get(letter) ?? 63);
  }
  const idOfByte = letters.map(idOf);
  const steps = new Map<number, { readonly rank: number; readonly merged: number }>();
  for (const [rank, merge] of merges.entries()) {
    const [a, b] = typeof merge === "string" ? merge.split(" ") : merge;
    steps.set(idOf(a) * MOST_IDS + idOf(b), { rank, merged: idOf(a + b) });
  }
  const known = new Map<string, readonly number[]>();
  const encodeWord = (word: string): readonly number[] => {
    const found = known.get(word);
    if (found) return found;
    const ids = Array.from(encoder.encode(word), (byte) => idOfByte[byte]);
    for (;;) {
      let best: { readonly rank: number; readonly merged: number } | undefined, place = 0;
      for (let i = 1; i < ids.length; i++) {
        const step = steps.get(ids[i - 1] * MOST_IDS + ids[i]);
        if (step && (!best || step.rank < best.rank)) {
          best = step;
          place = i;
        }
      }
      if (!best) break;
      ids.splice(place - 1, 2, best.merged);
    }
    if (known.size < REMEMBERED) known.set(word, ids);
    return ids;
  };
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return {
    name,
    vocabularySize: bytes.length,
    encode(text: string): Int32Array {
      const out: number[] = [];
      for (const [word] of text.matchAll(WORDS)) for (const id of encodeWord(word)) out.push(id);
      return Int32Array.from(out);
    },
    decode: (ids: ArrayLike<number>): string =>
      decoder.decode(Uint8Array.from(Array.from(ids).flatMap((id) => bytes[id] ?? [63]))),
  };
}
