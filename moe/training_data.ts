// Puts the batches of a text into the form that a trainer takes: each rank its share of the same global batch.

import { Batches, type TokenData } from "./data.ts";
import type { Batch } from "./transformer.ts";

/** Where a trainer gets its rows. */
export interface TrainingData {
  /** Tokens of one step, over all ranks and passes. */
  readonly tokensPerStep: number;
  /** Tokens of the longest sequence. */
  readonly sequence: number;
  /** Sequences of a global batch. */
  readonly batch: number;
  /** Order of the sequences. */
  readonly seed: number;
  /**
   * This rank's part of a pass; it may be asked for before its time, also that of a step that will not be made.
   * @param pass Number of the forward and backward pass, from 0; a step has as many passes as it accumulates.
   */
  training(pass: number): Batch;
  /**
   * This rank's part of the validation batches; every rank gets as many.
   * @param limit At most so many global batches. @default {all}
   */
  validation(limit?: number): Iterable<Batch>;
}

/** How a text is cut into passes. */
export interface TrainingDataOptions {
  /** Tokens of one sequence. */
  readonly sequence: number;
  /** Sequences of a global batch. */
  readonly batch: number;
  /** Passes that a batch is cut into. @default {1} */
  readonly accumulate?: number;
  /** Order of the sequences. */
  readonly seed: number;
  /** This rank and the number of ranks. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
}

/**
 * The passes of a text.
 *
 * @param text Its tokens.
 * @param options Sizes, order, rank.
 * @returns The data.
 * @throws {RangeError} If a rank would have no sequence in some pass, or the text is too short.
 */
export function trainingData(text: TokenData, options: TrainingDataOptions): TrainingData {
  const { sequence, batch, seed, rank, size, accumulate = 1 } = options;
  if (!(batch >= size * accumulate)) {
    throw new RangeError(
      `Cannot train as the batch must hold a sequence for each of ${size} ranks in each of ${accumulate} passes: current value is ${batch}`,
    );
  }
  const train = new Batches(text.train, { sequence, batch, seed });
  return {
    tokensPerStep: batch * sequence,
    sequence,
    batch,
    seed,
    training(pass) {
      const part = pass % accumulate, step = Math.floor(pass / accumulate);
      return rowsOf(train.get(step, { rank, size, part, parts: accumulate }), sequence);
    },
    *validation(limit = Infinity) {
      const held = new Batches(text.validation, { sequence, batch, seed: null });
      // The last batch may be cut short: it would begin the text again.
      const whole = Math.max(1, Math.floor(held.windows / batch));
      for (let i = 0; i < Math.min(limit, whole); i++) {
        yield rowsOf(held.get(i, { rank, size }), sequence);
      }
    },
  };
}

function rowsOf(
  share: { readonly sequences: number; readonly inputs: Int32Array; readonly targets: Int32Array },
  sequence: number,
): Batch {
  const offsets = Int32Array.from({ length: share.sequences + 1 }, (_, s) => s * sequence);
  return { tokens: share.inputs, targets: share.targets, offsets };
}
