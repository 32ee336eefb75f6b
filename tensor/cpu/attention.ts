// Causal attention on the CPU, tile by tile: matrix products by `gemm.ts`, the online softmax between them compiled. A tile of
// scores is all that exists of the N × N matrix, so memory does not grow with the sequence.

import type { AttentionShape } from "../device.ts";
import type { Tensor } from "../tensor.ts";
import { matrixProduct } from "./gemm.ts";
import { allocate } from "./memory.ts";
import { realKernels } from "./wasm.ts";

/** Queries and keys of a tile, by measurement. Two tiles of f32 (forward and backward) fit in the L2 cache beside their operands. */
const QUERIES = 64, KEYS = 512;

/** Offsets of one tile of scores, one of their gradients, and three numbers per query; 8 bytes each suffice for any dtype. */
let scratch: { scores: number; gradients: number; max: number; sum: number } | undefined;

function tiles(): { scores: number; gradients: number; max: number; sum: number } {
  return scratch ??= {
    scores: allocate(QUERIES * KEYS * 8),
    gradients: allocate(QUERIES * KEYS * 8),
    max: allocate(QUERIES * 8),
    sum: allocate(QUERIES * 8),
  };
}

/** `Kernels.attention` on the CPU. */
export function attention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  out: Tensor,
  lse: Tensor,
  shape: AttentionShape,
): void {
  const product = matrixProduct(q.dtype), kernels = realKernels(q.dtype);
  const bytes = q.dtype === "f32" ? 4 : 8;
  const { scores, max, sum } = tiles();
  const { offsets, heads: H, kvHeads: G, headDim: C } = shape;
  const ldq = H * C, ldk = G * C, scale = 1 / Math.sqrt(C);
  for (let s = 0; s + 1 < offsets.length; s++) {
    const start = offsets[s], length = offsets[s + 1] - start;
    for (let h = 0; h < H; h++) {
      const g = Math.floor(h * G / H);
      for (let i = 0; i < length; i += QUERIES) {
        const rows = Math.min(QUERIES, length - i);
        const query = ((start + i) * ldq + h * C) * bytes;
        const o = out.address + query;
        for (let j = 0; j < i + rows; j += KEYS) {
          const columns = Math.min(KEYS, i + rows - j);
          const key = ((start + j) * ldk + g * C) * bytes;
          // deno-fmt-ignore
          product(false, true, rows, columns, C, scale, q.address + query, ldq, k.address + key, ldk, 0, scores, columns);
          kernels.attention_tile(scores, rows, columns, i, j, max, sum, o, ldq, C);
          // deno-fmt-ignore
          product(false, false, rows, C, columns, 1, scores, columns, v.address + key, ldk, j === 0 ? 0 : 1, o, ldq);
        }
        const l = lse.address + ((start + i) * H + h) * bytes;
        kernels.attention_finish(o, ldq, rows, C, max, sum, l, H);
      }
    }
  }
}

/** `Kernels.attentionBackward` on the CPU. */
export function attentionBackward(
  dOut: Tensor,
  q: Tensor,
  k: Tensor,
  v: Tensor,
  out: Tensor,
  lse: Tensor,
  shape: AttentionShape,
  dQ: Tensor,
  dK: Tensor,
  dV: Tensor,
): void {
  const product = matrixProduct(q.dtype), kernels = realKernels(q.dtype);
  const bytes = q.dtype === "f32" ? 4 : 8;
  const { scores, gradients, max: delta } = tiles();
  const { offsets, heads: H, kvHeads: G, headDim: C } = shape;
  const ldq = H * C, ldk = G * C, scale = 1 / Math.sqrt(C);
  kernels.fill(dK.address, 0, dK.size);
  kernels.fill(dV.address, 0, dV.size);
  for (let s = 0; s + 1 < offsets.length; s++) {
    const start = offsets[s], length = offsets[s + 1] - start;
    for (let h = 0; h < H; h++) {
      const g = Math.floor(h * G / H);
      for (let i = 0; i < length; i += QUERIES) {
        const rows = Math.min(QUERIES, length - i);
        const query = ((start + i) * ldq + h * C) * bytes;
        const d = dOut.address + query, l = lse.address + ((start + i) * H + h) * bytes;
        kernels.attention_delta(d, out.address + query, ldq, rows, C, delta);
        for (let j = 0; j < i + rows; j += KEYS) {
          const columns = Math.min(KEYS, i + rows - j);
          const key = ((start + j) * ldk + g * C) * bytes;
          // deno-fmt-ignore
          {
            product(false, true, rows, columns, C, scale, q.address + query, ldq, k.address + key, ldk, 0, scores, columns);
            product(false, true, rows, columns, C, 1, d, ldq, v.address + key, ldk, 0, gradients, columns);
            kernels.attention_tile_backward(scores, gradients, rows, columns, i, j, l, H, delta, scale);
            product(true, false, columns, C, rows, 1, scores, columns, d, ldq, 1, dV.address + key, ldk);
            product(false, false, rows, C, columns, 1, gradients, columns, k.address + key, ldk, j === 0 ? 0 : 1,
              dQ.address + query, ldq);
            product(true, false, columns, C, rows, 1, gradients, columns, q.address + query, ldq, 1, dK.address + key, ldk);
          }
        }
      }
    }
  }
}
