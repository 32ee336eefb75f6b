// Arithmetic of a training step, for the share of a GPU's peak that is reached (MFU).

import { countParameters, type ModelConfig } from "../../moe/config.ts";

/** TFLOP/s of dense bf16 matrix products that NVIDIA gives for its GPUs, by a part of their names. */
const PEAKS: readonly (readonly [name: RegExp, tflops: number])[] = [
  [/H100 PCIe/, 756],
  [/H100|H200|H800|GH200/, 989],
  [/B200|GB200/, 2250],
  [/A100|A800/, 312],
  [/L40S/, 362],
];

/**
 * Floating-point operations of a forward and a backward pass: six for each token and each weight that it meets in a matrix product, and those of
 * causal attention, whose backward pass takes 2.5 times the forward pass. What is computed twice to save memory counts once.
 *
 * @param config Sizes of the model.
 * @param sequences Number of sequences.
 * @param length Tokens of each.
 * @returns The operations.
 */
export function stepFlops(config: ModelConfig, sequences: number, length: number): number {
  const { vocab, width, heads, headDim, layers, tied } = config;
  // The embedding is looked up, not multiplied; a tied one is multiplied as the head.
  const met = countParameters(config).active - (tied ? 0 : vocab * width);
  const attention = 3.5 * 4 * sequences * heads * length ** 2 * headDim / 2 * layers;
  return 6 * met * sequences * length + attention;
}

/**
 * The peak of a device.
 *
 * @param name Its name.
 * @returns TFLOP/s in bf16; undefined if it is not known.
 */
export function peakTflops(name: string): number | undefined {
  return PEAKS.find(([pattern]) => pattern.test(name))?.[1];
}
