// Text as training data: tokens of a file, split in training and validation, and batches of them. A batch depends on the seed and
// the step only, never on the number of ranks or on what was asked before, so a run resumes at any step and every
// rank takes its share of the same global batch. Not a loader for data that does not fit in memory.

import { byteTokenizer, type Tokenizer } from "./tokenizer.ts";

/** Token ids, in the narrowest array that holds the vocabulary. */
export type Tokens = Uint8Array | Uint16Array | Int32Array;

/** A text as tokens. */
export interface TokenData {
  /** What models learn from: the beginning of the text. */
  readonly train: Tokens;
  /** What they are measured on: its end. */
  readonly validation: Tokens;
  /** Number of ids. */
  readonly vocabularySize: number;
  /** Bytes of text per token, to compare losses of different tokenizers. */
  readonly bytesPerToken: number;
}

/** Options of {@linkcode loadText}. */
export interface TextOptions {
  /** Tokens of one sequence; both parts must hold one at least. */
  readonly sequence: number;
  /** Makes tokens of the text. @default {byteTokenizer} */
  readonly tokenizer?: Tokenizer;
  /** Part of the text for validation, taken from its end; 0 for none. @default {0.1} */
  readonly validationShare?: number;
}

/** Characters that are given to a tokenizer at once; the text is cut at ends of lines. */
const PIECE_CHARACTERS = 65536;

/**
 * Reads a text file.
 *
 * @param path The file; UTF-8, or any bytes for the byte tokenizer.
 * @param options Sequence length, tokenizer and split.
 * @returns Its tokens.
 * @throws {Error} If the file cannot be read, is empty, is not UTF-8 or is shorter than one sequence.
 */
export async function loadText(path: string, options: TextOptions): Promise<TokenData> {
  const { sequence } = options;
  const tokenizer = options.tokenizer ?? byteTokenizer;
  const share = options.validationShare ?? 0.1;
  requireWhole("sequence", sequence, 1);
  if (!(share >= 0 && share < 1)) {
    throw new RangeError(
      `Cannot split a text as the validation share must be in 0 .. 1: current value is ${share}`,
    );
  }
  let bytes: Uint8Array;
  try {
    bytes = await Deno.readFile(path);
  } catch (cause) {
    const why = cause instanceof Deno.errors.NotFound
      ? "the file must exist"
      : cause instanceof Deno.errors.IsADirectory
      ? "it must be a file, and it is a folder"
      : (cause as Error).message;
    throw new Error(`Cannot read the text ${path}: ${why}`, { cause });
  }
  if (bytes.length === 0) {
    throw new Error(`Cannot train on ${path} as it must hold text: current value is 0 bytes`);
  }
  const tokens = tokenizer === byteTokenizer ? bytes : encodeText(path, bytes, tokenizer);
  const end = tokens.length - Math.floor(tokens.length * share);
  const train = tokens.subarray(0, end), validation = tokens.subarray(end);
  for (const [part, held] of [["training", train], ["validation", validation]] as const) {
    if (part === "validation" && share === 0) continue;
    // One more than a sequence: every token needs a next one as its target.
    if (held.length < sequence + 1) {
      throw new Error(
        `Cannot train on ${path} as its ${part} part must have at least ${
          sequence + 1
        } tokens for sequences of ${sequence}: current value is ${held.length}`,
      );
    }
  }
  const bytesPerToken = bytes.length / tokens.length;
  return { train, validation, vocabularySize: tokenizer.vocabularySize, bytesPerToken };
}

function encodeText(path: string, bytes: Uint8Array, tokenizer: Tokenizer): Tokens {
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new Error(`Cannot train on ${path} as it must be UTF-8`, { cause });
  }
  const pieces: Int32Array[] = [];
  for (let at = 0; at < text.length;) {
    const line = text.indexOf("\n", at + PIECE_CHARACTERS);
    const end = line < 0 ? text.length : line + 1;
    pieces.push(tokenizer.encode(text.slice(at, end)));
    at = end;
  }
  const size = pieces.reduce((sum, piece) => sum + piece.length, 0);
  const V = tokenizer.vocabularySize;
  const tokens = new (V <= 256 ? Uint8Array : V <= 65536 ? Uint16Array : Int32Array)(size);
  let at = 0;
  for (const piece of pieces) {
    const strange = piece.find((id) => !(id >= 0 && id < V));
    if (strange !== undefined) {
      throw new Error(
        `Cannot train on ${path} as the tokenizer's ids must be in 0 .. ${
          V - 1
        }: current value is ${strange}`,
      );
    }
    tokens.set(piece, at);
    at += piece.length;
  }
  return tokens;
}

/** Sequences of a batch with the token that follows each of theirs. */
export interface Batch {
  /** Number of sequences B; 0 for a rank without a share. */
  readonly sequences: number;
  /** Ids [B · T], sequence after sequence. */
  readonly inputs: Int32Array;
  /** The id after each of them [B · T]. */
  readonly targets: Int32Array;
}

/** Which part of a global batch is wanted. */
export interface Share {
  /** This rank. @default {0} */
  readonly rank?: number;
  /** Number of ranks. @default {1} */
  readonly size?: number;
  /** Which part of the batch, when gradients are accumulated: one that all ranks share. @default {0} */
  readonly part?: number;
  /** Number of such parts. @default {1} */
  readonly parts?: number;
}

/** Options of {@linkcode Batches}. */
export interface BatchOptions {
  /** Tokens T of one sequence. */
  readonly sequence: number;
  /** Sequences of a global batch. */
  readonly batch: number;
  /** Order of the sequences; null takes them in the order of the text, for validation. */
  readonly seed: number | null;
}

/**
 * The batches of a text. An epoch goes through every window of T tokens once, in an order that the seed and the epoch give; each
 * epoch begins its windows at another place.
 */
export class Batches {
  /** Windows of an epoch. */
  readonly windows: number;
  /** Sequences of a global batch. */
  readonly batch: number;
  /** Tokens of one sequence. */
  readonly sequence: number;
  readonly #tokens: Tokens;
  readonly #seed: number | null;

  /**
   * Describes the batches; nothing is copied.
   *
   * @param tokens The text.
   * @param options Sizes and seed.
   * @throws {RangeError} If the text is shorter than one sequence and its last target, or a size is not a whole number ≥ 1.
   */
  constructor(tokens: Tokens, options: BatchOptions) {
    const { sequence, batch, seed } = options;
    requireWhole("sequence", sequence, 1);
    requireWhole("batch", batch, 1);
    if (seed !== null) requireWhole("seed", seed, 0);
    if (tokens.length < sequence + 1) {
      throw new RangeError(
        `Cannot make batches as the text must have at least ${
          sequence + 1
        } tokens: current value is ${tokens.length}`,
      );
    }
    this.#tokens = tokens;
    this.#seed = seed;
    this.sequence = sequence;
    this.batch = batch;
    // One window less than fit leaves room for a shift of up to a whole window.
    const fit = Math.floor((tokens.length - 1) / sequence);
    this.windows = seed === null ? fit : Math.max(1, Math.floor(tokens.length / sequence) - 1);
  }

  /** Global batches that go through the text once; the last may begin the text again. */
  get batchesPerEpoch(): number {
    return Math.ceil(this.windows / this.batch);
  }

  /**
   * A rank's share of the global batch of a step: its sequences `rank · B / size` to `(rank + 1) · B / size`, rounded down; of B cut
   * into parts alike, if there are any.
   * Shares do not overlap and together are the batch.
   *
   * @param step The step, from 0.
   * @param share Rank and number of ranks. @default {the whole batch}
   * @returns The share.
   */
  get(step: number, share: Share = {}): Batch {
    const { rank = 0, size = 1, part = 0, parts = 1 } = share;
    requireWhole("step", step, 0);
    requireWhole("size", size, 1);
    requireWhole("rank", rank, 0, size - 1);
    requireWhole("parts", parts, 1);
    requireWhole("part", part, 0, parts - 1);
    // Parts first, then ranks: what a pass has in it does not depend on how many ranks there are.
    const first = Math.floor(part * this.batch / parts);
    const held = Math.floor((part + 1) * this.batch / parts) - first;
    const from = first + Math.floor(rank * held / size);
    const to = first + Math.floor((rank + 1) * held / size);
    const T = this.sequence;
    const inputs = new Int32Array((to - from) * T), targets = new Int32Array((to - from) * T);
    for (let b = from; b < to; b++) {
      const start = this.#start(step * this.batch + b);
      inputs.set(this.#tokens.subarray(start, start + T), (b - from) * T);
      targets.set(this.#tokens.subarray(start + 1, start + 1 + T), (b - from) * T);
    }
    return { sequences: to - from, inputs, targets };
  }

  /** First token of the n-th sequence of the run. */
  #start(n: number): number {
    const epoch = Math.floor(n / this.windows);
    const window = n % this.windows;
    if (this.#seed === null) return window * this.sequence;
    const room = this.#tokens.length - this.windows * this.sequence; // ≥ 1: the last target
    const shift = hash(this.#seed, epoch, 0x5bd1e995) % Math.min(room, this.sequence);
    return shift + permute(window, this.windows, this.#seed, epoch) * this.sequence;
  }
}

/**
 * The place of `index` in a permutation of 0 .. n − 1 that the seed and the epoch give, without a table: four Feistel rounds on the next
 * even power of two, repeated until the result is below n.
 *
 * @param index What is permuted.
 * @param n Number of places, at most 2³².
 * @param seed Seed of the run.
 * @param epoch Number of the epoch.
 * @returns The place.
 */
export function permute(index: number, n: number, seed: number, epoch: number): number {
  let bits = 1;
  while (4 ** bits < n) bits++;
  const half = 2 ** bits;
  let x = index;
  do {
    let left = Math.floor(x / half), right = x % half;
    for (let round = 0; round < 4; round++) {
      [left, right] = [right, (left ^ hash(seed, epoch, right * 4 + round)) & (half - 1)];
      left >>>= 0;
      right >>>= 0;
    }
    x = left * half + right;
  } while (x >= n);
  return x;
}

/**
 * The loss of the best simple model, to compare with: p(next | last) from pair counts of the training text, smoothed towards
 * the frequency of the next token alone. `p(b | a) = (c(a, b) + β · p(b)) / (c(a) + β)` with `p(b) = (c(b) + 1) / (N + V)`, where β is
 * the one of 2⁻⁴ .. 2¹² that predicts each training pair best when that pair itself is left out.
 *
 * @param train Tokens that are counted.
 * @param validation Tokens that are predicted.
 * @param vocabularySize Number of ids V.
 * @returns Mean −ln p of a validation token after its predecessor, in nats per token.
 * @throws {RangeError} If either has fewer than two tokens.
 */
export function bigramLoss(train: Tokens, validation: Tokens, vocabularySize: number): number {
  if (train.length < 2 || validation.length < 2) {
    throw new RangeError(
      `Cannot count pairs as both texts must have at least 2 tokens: current value is ${
        Math.min(train.length, validation.length)
      }`,
    );
  }
  const V = vocabularySize, N = train.length;
  const single = new Float64Array(V), first = new Float64Array(V);
  const pairs = new Map<number, number>();
  for (let i = 0; i < N; i++) single[train[i]]++;
  for (let i = 0; i + 1 < N; i++) {
    const key = train[i] * V + train[i + 1];
    first[train[i]]++;
    pairs.set(key, (pairs.get(key) ?? 0) + 1);
  }
  let best = 1, bestLoss = Infinity;
  for (let beta = 1 / 16; beta <= 4096; beta *= 2) {
    let loss = 0;
    for (const [key, count] of pairs) {
      const a = Math.floor(key / V), b = key % V;
      // The pair that is predicted is taken out of its counts.
      const p = (count - 1 + beta * single[b] / (N + V)) / (first[a] - 1 + beta);
      loss -= count * Math.log(p);
    }
    if (loss < bestLoss) [best, bestLoss] = [beta, loss];
  }
  let loss = 0;
  for (let i = 0; i + 1 < validation.length; i++) {
    const a = validation[i], b = validation[i + 1];
    const p = (single[b] + 1) / (N + V);
    loss -= Math.log(((pairs.get(a * V + b) ?? 0) + best * p) / (first[a] + best));
  }
  return loss / (validation.length - 1);
}

/** A well-mixed 32-bit number of three whole numbers. */
function hash(a: number, b: number, c: number): number {
  let h = 0x9e3779b9;
  for (const n of [a, a / 2 ** 32, b, c]) {
    h = Math.imul(h ^ Math.floor(n), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    h ^= h >>> 16;
  }
  return h >>> 0;
}

function requireWhole(what: string, value: number, low: number, high?: number): void {
  if (Number.isSafeInteger(value) && value >= low && value <= (high ?? Infinity)) return;
  const range = high === undefined ? `>= ${low}` : `in ${low} .. ${high}`;
  throw new RangeError(
    `Cannot make batches as ${what} must be a whole number ${range}: current value is ${value}`,
  );
}
