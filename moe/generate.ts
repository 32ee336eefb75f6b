// Text from a model: one token at a time, each from a pass over the whole context. Every rank takes part in every pass, because the
// experts are spread over the ranks; each may go on from a prompt of its own.

import type { Device } from "../tensor/device.ts";
import { random } from "./init.ts";
import type { Transformer } from "./transformer.ts";
import { sampleToken, type SamplingOptions } from "./sampling.ts";
import { plainStep } from "./step.ts";

/** How {@linkcode generate} goes on from a prompt. */
export interface GenerateOptions extends SamplingOptions {
  /** Tokens to add, alike on all ranks. */
  readonly tokens: number;
  /** Most tokens that the model looks back on. */
  readonly context: number;
  /** Seed of the choices. @default {0} */
  readonly seed?: number;
}

/**
 * Goes on from a prompt. All ranks call it together and take every token.
 *
 * @param model The model.
 * @param device Where it lives.
 * @param prompt This rank's first tokens, at least one.
 * @param options How many tokens, and how they are chosen.
 * @returns The tokens that follow, one by one.
 * @throws {RangeError} If the prompt is empty or has tokens that the model does not know.
 */
export async function* generate(
  model: Transformer,
  device: Device,
  prompt: ArrayLike<number>,
  options: GenerateOptions,
): AsyncGenerator<number, void, void> {
  const { tokens, context, seed = 0 } = options;
  const known = Array.from(prompt);
  const { vocab } = model.config;
  if (known.length === 0 || known.some((id) => !(Number.isInteger(id) && id >= 0 && id < vocab))) {
    throw new RangeError(
      `Cannot generate as the prompt must hold tokens in 0..${vocab - 1}: current value is ${
        known.length === 0 ? "empty" : known
      }`,
    );
  }
  const next = random(seed, "generate");
  const step = plainStep(device);
  for (let i = 0; i < tokens; i++) {
    const seen = Int32Array.from(known.slice(-context));
    using logits = await model.logits(seen, Int32Array.of(0, seen.length), step);
    const token = sampleToken(await logits.toArray() as Float32Array, next(), options);
    known.push(token);
    yield token;
  }
}
