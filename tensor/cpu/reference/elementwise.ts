// Plain TypeScript of the element-wise kernels, to be read and to test the compiled ones against. Not fast: every
// number goes through JavaScript's f64, so these results are also the more exact ones.

import type { DType, TypedArray } from "../../dtype.ts";
import type {
  Activation,
  ActivationBackwardOptions,
  AdamWOptions,
  AdamWUpdate,
} from "../../device.ts";
import { fillNormal, type RandomKey } from "../../random.ts";
import type { Tensor } from "../../tensor.ts";
import { floatView, hostView } from "../view.ts";

/** The bits of the bfloat16 nearest to x, ties to even. @param x A number. @returns 16 bits. */
export function toBf16(x: number): number {
  SCRATCH_F32[0] = x;
  const bits = SCRATCH_U32[0];
  if (Number.isNaN(x)) return (bits >>> 16) | 0x40;
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
}

/** The number that 16 bits of bfloat16 stand for. @param bits 16 bits. @returns The number. */
export function fromBf16(bits: number): number {
  SCRATCH_U32[0] = bits << 16;
  return SCRATCH_F32[0];
}

const SCRATCH_F32 = new Float32Array(1);
const SCRATCH_U32 = new Uint32Array(SCRATCH_F32.buffer);

/** Reference of `Kernels.fill`. */
export function fill(x: Tensor, value: number): void {
  const view = hostView(x);
  if (x.dtype === "i64") (view as BigInt64Array).fill(BigInt(value));
  else (view as Float32Array).fill(x.dtype === "bf16" ? toBf16(value) : value);
}

/** Reference of `Kernels.normal`. */
export function normal(out: Tensor, key: RandomKey, std: number): void {
  const view = hostView(out);
  if (out.dtype === "f32" || out.dtype === "f64") fillNormal(view as Float32Array, key, std);
  else {
    const exact = new Float32Array(out.size);
    fillNormal(exact, key, std);
    for (let i = 0; i < exact.length; i++) {
      view[i] = out.dtype === "bf16" ? toBf16(exact[i]) : exact[i];
    }
  }
}

function load(view: TypedArray, dtype: DType, i: number): number {
  return dtype === "bf16" ? fromBf16(view[i] as number) : Number(view[i]);
}

/** Reference of `Kernels.copy`. */
export function copy(x: Tensor, out: Tensor): void {
  const from = hostView(x), to = hostView(out);
  if (x.dtype === out.dtype) (to as Float32Array).set(from as Float32Array);
  else if (out.dtype === "i64") {
    for (let i = 0; i < x.size; i++) to[i] = BigInt(Math.trunc(load(from, x.dtype, i)));
  } else if (out.dtype === "bf16") {
    for (let i = 0; i < x.size; i++) to[i] = toBf16(load(from, x.dtype, i));
  } else {
    for (let i = 0; i < x.size; i++) to[i] = load(from, x.dtype, i);
  }
}

/** Reference of `Kernels.add`. */
export function add(x: Tensor, y: Tensor, out: Tensor): void {
  const a = floatView(x), b = floatView(y), c = floatView(out);
  for (let i = 0; i < c.length; i++) c[i] = a[i] + b[i];
}

/** Reference of `Kernels.axpy`. */
export function axpy(alpha: number, x: Tensor, y: Tensor): void {
  const a = floatView(x), b = floatView(y);
  for (let i = 0; i < b.length; i++) b[i] += alpha * a[i];
}

/** Reference of `Kernels.scale`. */
export function scale(x: Tensor, alpha: number): void {
  const a = floatView(x);
  for (let i = 0; i < a.length; i++) a[i] *= alpha;
}

/** Reference of `Kernels.sumSquares`. */
export function sumSquares(xs: readonly Tensor[], out: Tensor): void {
  for (const x of xs) {
    const a = floatView(x);
    let sum = 0;
    for (let i = 0; i < a.length; i++) sum += a[i] * a[i];
    floatView(out)[0] += sum;
  }
}

/** The factor that brings a norm down to a limit; 0 is no limit. @param squares Square of the norm. @param limit The limit. @returns At most 1; NaN for a norm that is not finite. */
export function clipFactor(squares: number, limit: number): number {
  if (!Number.isFinite(squares)) return NaN;
  const norm = Math.sqrt(squares);
  return limit > 0 && norm > limit ? limit / norm : 1;
}

/** Reference of `Kernels.clipScale`. */
export function clipScale(squares: Tensor, limit: number, out: Tensor): void {
  floatView(out)[0] = clipFactor(floatView(squares)[0], limit);
}

/** Reference of `Kernels.sum`. */
export function sum(x: Tensor, out: Tensor): void {
  const a = floatView(x);
  let total = 0;
  for (let i = 0; i < a.length; i++) total += a[i];
  floatView(out)[0] += total;
}

const GELU_SCALE = Math.sqrt(2 / Math.PI), GELU_CUBE = 0.044715;

function gelu(x: number): number {
  return 0.5 * x * (1 + Math.tanh(GELU_SCALE * (x + GELU_CUBE * x * x * x)));
}

function geluSlope(x: number): number {
  const t = Math.tanh(GELU_SCALE * (x + GELU_CUBE * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBE * x * x);
}

/** activation(kind, x[n])[f] for x of rows [F], or [gate, up]. */
function activated(kind: Activation, x: Float32Array | Float64Array, i: number, F: number): number {
  if (kind === "relu") return Math.max(x[i], 0);
  if (kind === "gelu") return gelu(x[i]);
  const at = i + Math.floor(i / F) * F, gate = x[at];
  return gate / (1 + Math.exp(-gate)) * x[at + F];
}

/** Reference of `Kernels.activation`. */
export function activation(kind: Activation, x: Tensor, out: Tensor, scales?: Tensor): void {
  const a = floatView(x), o = floatView(out), s = scales && floatView(scales);
  const F = out.shape.at(-1)!;
  for (let i = 0; i < o.length; i++) {
    o[i] = (s ? s[Math.floor(i / F)] : 1) * activated(kind, a, i, F);
  }
}

/** Reference of `Kernels.activationBackward`. */
export function activationBackward(
  kind: Activation,
  dOut: Tensor,
  x: Tensor,
  dX: Tensor,
  options: ActivationBackwardOptions = {},
): void {
  const dO = floatView(dOut), a = floatView(x), d = floatView(dX);
  const s = options.scales && floatView(options.scales);
  const dS = options.dScales && floatView(options.dScales).fill(0);
  const F = dOut.shape.at(-1)!, dots = new Float64Array(dS?.length ?? 0);
  for (let i = 0; i < dO.length; i++) {
    const n = Math.floor(i / F), g = (s ? s[n] : 1) * dO[i];
    if (kind === "swiglu") {
      const at = i + Math.floor(i / F) * F, gate = a[at], up = a[at + F];
      const sigmoid = 1 / (1 + Math.exp(-gate));
      d[at] = g * up * sigmoid * (1 + gate * (1 - sigmoid));
      d[at + F] = g * gate * sigmoid;
    } else if (kind === "relu") d[i] = a[i] > 0 ? g : 0;
    else d[i] = g * geluSlope(a[i]);
    if (dS) dots[n] += dO[i] * activated(kind, a, i, F);
  }
  dS?.set(dots as never);
}

/** Reference of `Kernels.adamW`. */
export function adamW(updates: readonly AdamWUpdate[], options: AdamWOptions): void {
  const { lr, beta1, beta2, eps, step, zeroGradient } = options;
  const gradScale = floatView(options.gradScale)[0];
  const correction1 = 1 - beta1 ** step, correction2 = 1 - beta2 ** step;
  for (const { parameter, gradient, moment1, moment2, weightDecay } of updates) {
    const p = floatView(parameter), g = floatView(gradient);
    const m = floatView(moment1), v = floatView(moment2);
    for (let i = 0; i < p.length && Number.isFinite(gradScale); i++) {
      const grad = g[i] * gradScale;
      const m1 = beta1 * m[i] + (1 - beta1) * grad;
      const m2 = beta2 * v[i] + (1 - beta2) * grad * grad;
      m[i] = m1;
      v[i] = m2;
      p[i] -= lr * (m1 / correction1 / (Math.sqrt(m2 / correction2) + eps) + weightDecay * p[i]);
    }
    if (zeroGradient) g.fill(0);
  }
}
