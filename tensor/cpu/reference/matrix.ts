// Plain TypeScript of the matrix products and of attention: three nested loops and the textbook formulas.

import type { AttentionShape, GemmOptions, RowGroups } from "../../device.ts";
import type { Tensor } from "../../tensor.ts";
import { floatView, indexView } from "../view.ts";

/** Reference of `Kernels.gemm`. */
export function gemm(a: Tensor, b: Tensor, out: Tensor, options: GemmOptions = {}): void {
  const { transposeA = false, transposeB = false, alpha = 1, beta = 0 } = options;
  const [M, N] = out.shape, K = transposeA ? a.shape[0] : a.shape[1];
  const A = floatView(a), B = floatView(b), C = floatView(out);
  const aRow = transposeA ? 1 : K, aColumn = transposeA ? M : 1;
  const bRow = transposeB ? 1 : N, bColumn = transposeB ? K : 1;
  for (let m = 0; m < M; m++) {
    for (let n = 0; n < N; n++) {
      let sum = 0;
      for (let k = 0; k < K; k++) sum += A[m * aRow + k * aColumn] * B[k * bRow + n * bColumn];
      C[m * N + n] = alpha * sum + (beta === 0 ? 0 : beta * C[m * N + n]);
    }
  }
}

/** Reference of `Kernels.groupedGemm`. */
export function groupedGemm(
  x: Tensor,
  weights: readonly Tensor[],
  groups: RowGroups,
  out: Tensor,
  options: { readonly transposeWeight?: boolean; readonly beta?: number } = {},
): void {
  const offsets = indexView(groups.offsets);
  weights.forEach((weight, g) => {
    const start = offsets[g], end = offsets[g + 1];
    gemm(x.rows(start, end), weight, out.rows(start, end), {
      transposeB: !options.transposeWeight,
      beta: options.beta,
    });
  });
}

/** Reference of `Kernels.groupedGemmWeightGrad`. */
export function groupedGemmWeightGrad(
  dy: Tensor,
  x: Tensor,
  groups: RowGroups,
  grads: readonly Tensor[],
  options: { readonly beta?: number } = {},
): void {
  const offsets = indexView(groups.offsets), { beta = 1 } = options;
  grads.forEach((grad, g) => {
    const start = offsets[g], end = offsets[g + 1];
    gemm(dy.rows(start, end), x.rows(start, end), grad, { transposeA: true, beta });
  });
}

/** Calls back for every (sequence, head) with the first row, the row after the last, the query head and its key head. */
function forEachHead(
  shape: AttentionShape,
  visit: (start: number, end: number, h: number, g: number) => void,
): void {
  const { offsets, heads, kvHeads } = shape;
  for (let s = 0; s + 1 < offsets.length; s++) {
    for (let h = 0; h < heads; h++) {
      visit(offsets[s], offsets[s + 1], h, Math.floor(h * kvHeads / heads));
    }
  }
}

/** Reference of `Kernels.attention`. */
export function attention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  out: Tensor,
  lse: Tensor,
  shape: AttentionShape,
): void {
  const { heads: H, kvHeads: G, headDim: C } = shape;
  const Q = floatView(q), K = floatView(k), V = floatView(v);
  const O = floatView(out), L = floatView(lse), scale = 1 / Math.sqrt(C);
  forEachHead(shape, (start, end, h, g) => {
    for (let i = start; i < end; i++) {
      const scores = [];
      for (let j = start; j <= i; j++) {
        let dot = 0;
        for (let c = 0; c < C; c++) dot += Q[(i * H + h) * C + c] * K[(j * G + g) * C + c];
        scores.push(dot * scale);
      }
      const max = scores.reduce((m, s) => Math.max(m, s), -Infinity);
      const sum = scores.reduce((total, s) => total + Math.exp(s - max), 0);
      L[i * H + h] = max + Math.log(sum);
      for (let c = 0; c < C; c++) {
        let o = 0;
        for (let j = start; j <= i; j++) {
          o += Math.exp(scores[j - start] - max) / sum * V[(j * G + g) * C + c];
        }
        O[(i * H + h) * C + c] = o;
      }
    }
  });
}

/** Reference of `Kernels.attentionBackward`. */
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
  const { heads: H, kvHeads: G, headDim: C } = shape;
  const Q = floatView(q), K = floatView(k), V = floatView(v), O = floatView(out);
  const L = floatView(lse), DO = floatView(dOut), scale = 1 / Math.sqrt(C);
  const DQ = floatView(dQ).fill(0), DK = floatView(dK).fill(0), DV = floatView(dV).fill(0);
  forEachHead(shape, (start, end, h, g) => {
    for (let i = start; i < end; i++) {
      const qi = (i * H + h) * C;
      let delta = 0; // Σ_j p_j dp_j = dOut · out
      for (let c = 0; c < C; c++) delta += DO[qi + c] * O[qi + c];
      for (let j = start; j <= i; j++) {
        const kj = (j * G + g) * C;
        let score = 0, dP = 0;
        for (let c = 0; c < C; c++) {
          score += Q[qi + c] * K[kj + c];
          dP += DO[qi + c] * V[kj + c];
        }
        const p = Math.exp(score * scale - L[i * H + h]);
        const dScore = p * (dP - delta) * scale;
        for (let c = 0; c < C; c++) {
          DV[kj + c] += p * DO[qi + c];
          DQ[qi + c] += dScore * K[kj + c];
          DK[kj + c] += dScore * Q[qi + c];
        }
      }
    }
  });
}
