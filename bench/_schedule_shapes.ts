// The models of bench/schedule.ts: three shapes named after the paper's, fixed before the first measurement, and a tiny one for tests. Plain
// numbers and the arithmetic behind them; nothing runs here.
//
// What has to hold, or no comparison with the paper's figures means anything: with `fifo`, 33 to 45 % of a step are all-to-alls (the paper's
// Table 1 and Figure 4), with 4 ranks at 10 Gbit/s and with 8 at 5. The paper has one A100 per 100 Gbit/s; a rank here has a tenth of the
// link, so it needs a tenth of the arithmetic: of an H200 (132 multiprocessors, some 4 TFLOP/s of bf16 products each) a part of GPU_SHARE
// per cent, half as much with 8 ranks.
//
// Per layer and rank, with N tokens, K choices, width D, hidden width F, sequences of S, p ranks and a link of β bytes per second:
//
//   all-to-all, four times    t = 2 N K D (p − 1) / p / β           bf16 rows
//   gradients                 g = 2 · 16 D² (p − 1) / p / β         f32, attention's four matrices; a ring sends 2 (p − 1) / p of them
//   forward products          N (8 D² + 2 S D + 4 K D F) flop       projections, causal attention, experts; backward twice that
//
// `fifo` slows the backward all-to-alls by what it reduces beside them, which is most if g ≥ 2 t; `lina` can hide gradients under the backward
// pass if g is less than it computes there. So g is 3 to 5 times t, wide experts and long sequences are what a layer computes most, and
// vocabularies are bytes, tied, so that no large gradient comes last. Experts are two-layer ReLU networks, every feed-forward part is
// a mixture with one expert per rank, and gates choose two, as in the paper, but for `gpt2`, whose longer sequence takes their place.
//
// Packing k experts on a device leaves (p / k − 1) / (p / k) of the rows to be sent instead of (p − 1) / p, and makes k replicas of each expert
// whose gradients are 8 k D F bytes a layer and rank. With wide experts those cost more than the rows that stay: of the three, only `gpt2` has
// experts so narrow that k = 2 can pay.

import { modelConfig } from "../moe/config.ts";
import type { ModelConfig } from "../moe/config.ts";

/** A model and its batch. */
export interface Shape {
  /** Layers. */
  readonly layers: number;
  /** Width D. */
  readonly width: number;
  /** Query heads, and as many of keys and values. */
  readonly heads: number;
  /** Hidden width F of an expert. */
  readonly hidden: number;
  /** Tokens S of a sequence. */
  readonly sequence: number;
  /** Sequences of a rank. */
  readonly sequences: number;
  /** Experts K of a token. */
  readonly topK: number;
}

/** The shapes by name. */
export const SHAPES: Readonly<Record<string, Shape>> = {
  txl: {
    layers: 5,
    width: 1024,
    heads: 16,
    hidden: 8192,
    sequence: 1024,
    sequences: 2,
    topK: 2,
  },
  gpt2: {
    layers: 3,
    width: 1024,
    heads: 16,
    hidden: 1024,
    sequence: 8192,
    sequences: 1,
    topK: 1,
  },
  bert2gpt2: {
    layers: 3,
    width: 1280,
    heads: 20,
    hidden: 8192,
    sequence: 1024,
    sequences: 3,
    topK: 2,
  },
  tiny: {
    layers: 2,
    width: 64,
    heads: 4,
    hidden: 128,
    sequence: 64,
    sequences: 2,
    topK: 2,
  },
};

/** The shapes that are measured unless others are asked for. */
export const PAPER_SHAPES: readonly string[] = ["txl", "gpt2", "bert2gpt2"];

/** Tokens of the vocabulary: bytes. */
export const VOCABULARY = 256;

/**
 * A shape's model.
 *
 * @param shape The shape.
 * @param options Experts of a layer, and whether it lives on a GPU, where it is bf16.
 * @returns The configuration.
 */
export function shapeConfig(
  shape: Shape,
  options: { readonly experts: number; readonly cuda: boolean },
): ModelConfig {
  const { layers, width, heads, hidden, topK } = shape;
  return modelConfig({
    vocab: VOCABULARY,
    width,
    layers,
    heads,
    hidden,
    experts: options.experts,
    activation: "relu",
    tied: true,
    dtype: options.cuda ? "bf16" : "f32",
    router: { kind: "softmax", topK, auxLoss: 0.02 },
  });
}

/**
 * Bytes that a rank sends to others in one all-to-all when load is balanced.
 *
 * @param shape The shape.
 * @param options Ranks that share the experts, and bytes of a number.
 * @returns The bytes.
 */
export function allToAllBytes(
  shape: Shape,
  options: { readonly ranks: number; readonly elementBytes: number },
): number {
  const { sequence, sequences, topK, width } = shape, { ranks, elementBytes } = options;
  return sequence * sequences * topK * width * elementBytes * (ranks - 1) / ranks;
}

/**
 * A shape in words.
 *
 * @param shape The shape.
 * @returns One line.
 */
export function describeShape(shape: Shape): string {
  const { layers, width, heads, hidden, sequence, sequences, topK } = shape;
  return `${layers} layers, D ${width}, ${heads} heads, F ${hidden}, top-${topK}, ${sequences} x ${sequence} tokens a rank, V ${VOCABULARY} tied`;
}
