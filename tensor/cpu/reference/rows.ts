// Plain TypeScript of the kernels that work row by row: gathering, combining, normalising, rotating, softmax, loss.

import type { Tensor } from "../../tensor.ts";
import { floatView, hostView, indexView } from "../view.ts";
import { add } from "./elementwise.ts";

/** Length of a row of a matrix. */
function width(x: Tensor): number {
  return x.shape.slice(1).reduce((product, n) => product * n, 1);
}

/** Reference of `Kernels.gatherRows`. */
export function gatherRows(x: Tensor, rows: Tensor, out: Tensor): void {
  const D = width(out), from = hostView(x) as Float32Array, to = hostView(out) as Float32Array;
  indexView(rows).forEach((row, i) => {
    if (row >= 0) to.set(from.subarray(row * D, (row + 1) * D), i * D);
    else if (out.dtype === "i64") (to as unknown as BigInt64Array).fill(0n, i * D, (i + 1) * D);
    else to.fill(0, i * D, (i + 1) * D);
  });
}

/** Reference of `Kernels.scatterAddRows`. */
export function scatterAddRows(x: Tensor, rows: Tensor, out: Tensor): void {
  const D = width(x), from = floatView(x), to = floatView(out);
  indexView(rows).forEach((row, i) => {
    if (row >= 0) { for (let d = 0; d < D; d++) to[row * D + d] += from[i * D + d]; }
  });
}

/** Reference of `Kernels.combineRows`. */
export function combineRows(
  y: Tensor,
  slots: Tensor,
  weights: Tensor | null,
  out: Tensor,
  residual?: Tensor,
): void {
  const [N, K] = slots.shape, D = width(out);
  const Y = floatView(y), S = indexView(slots), O = floatView(out);
  const W = weights && floatView(weights), base = residual && floatView(residual);
  for (let n = 0; n < N; n++) {
    for (let d = 0; d < D; d++) {
      let sum = 0;
      for (let k = 0; k < K; k++) {
        const slot = S[n * K + k];
        if (slot >= 0) sum += (W ? W[n * K + k] : 1) * Y[slot * D + d];
      }
      O[n * D + d] = (base ? base[n * D + d] : 0) + sum;
    }
  }
}

/** Reference of `Kernels.combineRowsBackward`. */
export function combineRowsBackward(
  dOut: Tensor,
  y: Tensor,
  slots: Tensor,
  weights: Tensor,
  dY: Tensor,
  dWeights: Tensor,
): void {
  const [N, K] = slots.shape, D = width(dOut);
  const DO = floatView(dOut), Y = floatView(y), S = indexView(slots), W = floatView(weights);
  const DY = floatView(dY).fill(0), DW = floatView(dWeights);
  for (let n = 0; n < N; n++) {
    for (let k = 0; k < K; k++) {
      const slot = S[n * K + k], weight = W[n * K + k];
      let dot = 0;
      for (let d = 0; slot >= 0 && d < D; d++) {
        DY[slot * D + d] = weight * DO[n * D + d];
        dot += DO[n * D + d] * Y[slot * D + d];
      }
      DW[n * K + k] = dot;
    }
  }
}

/** Reference of `Kernels.rmsNorm`. */
export function rmsNorm(x: Tensor, gain: Tensor, out: Tensor, invRms: Tensor, eps: number): void {
  const D = gain.size, N = invRms.size;
  const X = floatView(x), G = floatView(gain), O = floatView(out), I = floatView(invRms);
  for (let n = 0; n < N; n++) {
    let sum = 0;
    for (let d = 0; d < D; d++) sum += X[n * D + d] ** 2;
    const inverse = 1 / Math.sqrt(sum / D + eps);
    for (let d = 0; d < D; d++) O[n * D + d] = X[n * D + d] * inverse * G[d];
    I[n] = inverse;
  }
}

/** Reference of `Kernels.addRmsNorm`. */
export function addRmsNorm(
  x: Tensor,
  y: Tensor,
  gain: Tensor,
  sum: Tensor,
  out: Tensor,
  invRms: Tensor,
  eps: number,
): void {
  add(x, y, sum);
  rmsNorm(sum, gain, out, invRms, eps);
}

/** Reference of `Kernels.rmsNormBackward`. */
export function rmsNormBackward(
  dOut: Tensor,
  x: Tensor,
  gain: Tensor,
  invRms: Tensor,
  dX: Tensor,
  dGain: Tensor,
  residual?: Tensor,
): void {
  const D = gain.size, N = invRms.size;
  const DO = floatView(dOut), X = floatView(x), G = floatView(gain), I = floatView(invRms);
  const DX = floatView(dX), DG = floatView(dGain), base = residual && floatView(residual);
  for (let n = 0; n < N; n++) {
    let dot = 0; // Σ_d dOut gain x
    for (let d = 0; d < D; d++) dot += DO[n * D + d] * G[d] * X[n * D + d];
    const inverse = I[n], pull = dot * inverse ** 3 / D;
    for (let d = 0; d < D; d++) {
      const g = DO[n * D + d], value = X[n * D + d];
      DG[d] += g * value * inverse;
      DX[n * D + d] = (base ? base[n * D + d] : 0) + (g * G[d] * inverse - value * pull);
    }
  }
}

/** Reference of `Kernels.rope`. */
export function rope(
  x: Tensor,
  positions: Tensor,
  options: { readonly headDim: number; readonly theta: number; readonly inverse?: boolean },
): void {
  const { headDim: C, theta, inverse = false } = options;
  const X = floatView(x), P = indexView(positions), D = width(x), half = C / 2;
  for (let n = 0; n < P.length; n++) {
    for (let i = 0; i < half; i++) {
      const angle = P[n] * theta ** (-2 * i / C);
      const cos = Math.cos(angle), sin = inverse ? -Math.sin(angle) : Math.sin(angle);
      for (let head = n * D; head < (n + 1) * D; head += C) {
        const a = X[head + i], b = X[head + i + half];
        X[head + i] = a * cos - b * sin;
        X[head + i + half] = b * cos + a * sin;
      }
    }
  }
}

/** Calls back for every row and each of q, k and v with the tensor, its first element there, that in the joined row, and the count. */
function forEachPart(
  joined: Tensor,
  parts: readonly Tensor[],
  visit: (part: Tensor, from: number, at: number, count: number) => void,
): void {
  for (let n = 0; n < joined.shape[0]; n++) {
    let at = n * joined.shape[1];
    for (const part of parts) {
      const count = part.shape[1];
      visit(part, n * count, at, count);
      at += count;
    }
  }
}

/** Reference of `Kernels.splitQkv`. */
export function splitQkv(
  qkv: Tensor,
  positions: Tensor,
  options: { readonly headDim: number; readonly theta: number },
  q: Tensor,
  k: Tensor,
  v: Tensor,
): void {
  const joined = floatView(qkv);
  forEachPart(qkv, [q, k, v], (part, from, at, count) => {
    (floatView(part) as Float32Array).set(joined.subarray(at, at + count), from);
  });
  rope(q, positions, options);
  rope(k, positions, options);
}

/** Reference of `Kernels.joinQkv`. */
export function joinQkv(
  dQ: Tensor,
  dK: Tensor,
  dV: Tensor,
  positions: Tensor,
  options: { readonly headDim: number; readonly theta: number },
  dQkv: Tensor,
): void {
  const { headDim: C, theta } = options, half = C / 2;
  const joined = floatView(dQkv), P = indexView(positions);
  forEachPart(dQkv, [dQ, dK, dV], (part, from, at, count) => {
    const row = floatView(part).subarray(from, from + count);
    const position = part === dV ? 0 : P[from / count];
    for (let i = 0; i < count; i++) {
      const pair = i % C, first = pair < half;
      const angle = position * theta ** (-2 * (pair % half) / C);
      const other = first ? row[i + half] : -row[i - half];
      joined[at + i] = row[i] * Math.cos(angle) + other * Math.sin(angle);
    }
  });
}

/** Reference of `Kernels.softmax`. */
export function softmax(x: Tensor, out: Tensor): void {
  const D = x.shape.at(-1)!, X = floatView(x), O = floatView(out);
  for (let row = 0; row < X.length; row += D) {
    let max = -Infinity, sum = 0;
    for (let d = row; d < row + D; d++) max = Math.max(max, X[d]);
    for (let d = row; d < row + D; d++) sum += Math.exp(X[d] - max);
    for (let d = row; d < row + D; d++) O[d] = Math.exp(X[d] - max) / sum;
  }
}

/** Reference of `Kernels.softmaxBackward`. */
export function softmaxBackward(dY: Tensor, y: Tensor, dX: Tensor): void {
  const D = y.shape.at(-1)!, DY = floatView(dY), Y = floatView(y), DX = floatView(dX);
  for (let row = 0; row < Y.length; row += D) {
    let dot = 0;
    for (let d = row; d < row + D; d++) dot += DY[d] * Y[d];
    for (let d = row; d < row + D; d++) DX[d] = Y[d] * (DY[d] - dot);
  }
}

/** Reference of `Kernels.crossEntropy`. */
export function crossEntropy(logits: Tensor, targets: Tensor, losses: Tensor, scale: number): void {
  const [N, V] = logits.shape;
  const X = floatView(logits), T = indexView(targets), L = floatView(losses);
  for (let n = 0; n < N; n++) {
    const row = X.subarray(n * V, (n + 1) * V), target = T[n];
    if (target < 0) {
      L[n] = 0;
      row.fill(0);
      continue;
    }
    let max = -Infinity, sum = 0;
    for (const logit of row) max = Math.max(max, logit);
    for (const logit of row) sum += Math.exp(logit - max);
    L[n] = max + Math.log(sum) - row[target];
    for (let v = 0; v < V; v++) {
      row[v] = scale * (Math.exp(row[v] - max) / sum - (v === target ? 1 : 0));
    }
  }
}
