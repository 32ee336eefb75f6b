// What a device offers to the rest of the house: memory, streams, and the kernels that a Mixture-of-Experts
// language model needs, forward and backward. The CPU and CUDA implement this one interface.
// Kernels here are unchecked: `tensor/ops.ts` checks shapes, dtypes and devices once, for every device.

import type { DType, TypedArray } from "./dtype.ts";
import type { RandomKey } from "./random.ts";
import type { RoutingKernels } from "./routing_kernels.ts";
import type { Tensor } from "./tensor.ts";

/**
 * An ordered queue of device work. Operations on one stream run in order, operations on two streams may overlap.
 * The CPU has one stream whose work is done when the call returns.
 */
export interface Stream {
  /** A name for traces: `compute`, `dispatch`, `gradients`, `copy`. */
  readonly name: string;
  /** Marks the present end of the stream's work. */
  record(): StreamEvent;
  /** Orders all later work of this stream after the event, without blocking the host. */
  wait(event: StreamEvent): void;
  /** Resolves when all work enqueued so far is done, without blocking the event loop. */
  synchronize(): Promise<void>;
  /** As `record`, with an event whose `time()` is the device's own. Absent where every event's is. */
  recordTimed?(): StreamEvent;
  /** As `record`, with an event that {@linkcode Device.passing} takes. Absent where there is no such thing. */
  mark?(): StreamEvent;
}

/**
 * Several points as one, for {@linkcode Stream.wait}: a stream that waits for it is behind all of them.
 */
export class Events implements StreamEvent {
  /** The points. */
  readonly all: readonly StreamEvent[];

  /** @param all The points. */
  constructor(all: readonly StreamEvent[]) {
    this.all = all;
  }

  /** Whether the device has passed all of them; never blocks. */
  done(): boolean {
    return this.all.every((event) => event.done());
  }

  /** Host-clock time in µs at which the device passed the last of them, once they are done. */
  time(): number {
    return this.all.reduce((last, event) => Math.max(last, event.time()), -Infinity);
  }
}

/** A point in a stream's work. */
export interface StreamEvent {
  /** Whether the device has passed the point; never blocks. */
  done(): boolean;
  /** Host-clock time in µs at which the device passed the point, once it is done; used by traces. */
  time(): number;
}

/** Bytes of device memory: what is in use, what the allocator holds, the highest use so far. */
export interface MemoryStats {
  /** Bytes of live allocations. */
  readonly used_bytes: number;
  /** Bytes taken from the system, live or cached. */
  readonly reserved_bytes: number;
  /** Highest `used_bytes` since the start or the last `resetPeak()`. */
  readonly peak_bytes: number;
  /** Bytes that can still be allocated, if in pieces: cached ones, and what the system has free, which other processes may take, too. */
  readonly free_bytes: number;
}

/** Host memory that a device copies to and from beside its other work: page-locked for a GPU, ordinary memory for the CPU. */
export interface HostMemory extends Disposable {
  /** The bytes; those that a copy is to change have not changed before its stream was synchronized. */
  readonly buffer: ArrayBuffer;
  /**
   * Enqueues a copy to a tensor of the device.
   * @param offset First byte on the host.
   * @param target Is filled whole.
   * @param stream The stream whose order the copy keeps.
   */
  load(offset: number, target: Tensor, stream: Stream): void;
  /**
   * Enqueues a copy of a tensor.
   * @param source The tensor.
   * @param offset First byte on the host.
   * @param stream The stream whose order the copy keeps.
   */
  store(source: Tensor, offset: number, stream: Stream): void;
}

/** A place where tensors live and kernels run. */
export interface Device {
  /** Which family of devices. */
  readonly kind: "cpu" | "cuda";
  /** The name that a person reads: processor or GPU model. */
  readonly name: string;
  /** The stream that kernels are enqueued on. */
  readonly stream: Stream;
  /** The kernels of this device. */
  readonly kernels: Kernels;
  /** Kernels that route tokens without the host's help; null on the CPU, where the host is the device. */
  readonly routing: RoutingKernels | null;
  /**
   * Memory of at least `bytes` bytes, aligned to 64 bytes (CPU) or 256 (CUDA), contents undefined.
   * @returns Byte offset in the CPU's linear memory, or the device address.
   * @throws {OutOfMemoryError} If there is not as much.
   */
  allocate(bytes: number): number;
  /**
   * Gives back what {@linkcode Device.allocate} returned, in the order of `stream`: kernels enqueued there may still use it. Work of another
   * stream, as a collective's, must come before: `stream.wait` or `work.wait(stream)` first.
   */
  free(address: number): void;
  /** Copies a host array into a tensor of the same size and dtype. */
  write(source: TypedArray, target: Tensor): void;
  /** A copy of a tensor's elements on the host, once all work enqueued before is done. */
  read(source: Tensor): Promise<TypedArray>;
  /** Memory statistics. */
  memory(): MemoryStats;
  /** Makes the present use the peak. */
  resetPeak(): void;
  /**
   * Resolves as soon as the device has passed a point; the processor is free meanwhile. Absent on the CPU, whose work is done when a call
   * returns.
   * @param event What {@linkcode Stream.mark} gave.
   * @throws {Error} If work before it failed.
   */
  passing?(event: StreamEvent): Promise<void>;
  /** Another stream; the CPU has but one, and gives that. */
  createStream(name: string): Stream;
  /**
   * Host memory for copies on a stream.
   * @param bytes How much, 1 at least.
   * @returns The memory; dispose of it once no copy is under way.
   */
  hostMemory(bytes: number): HostMemory;
}

/** Options of {@linkcode Kernels.gemm}. */
export interface GemmOptions {
  /** Takes `a` as stored [K, M] instead of [M, K]. @default {false} */
  readonly transposeA?: boolean;
  /** Takes `b` as stored [N, K] instead of [K, N]. @default {false} */
  readonly transposeB?: boolean;
  /** Factor of the product. @default {1} */
  readonly alpha?: number;
  /** Factor of the old contents of `out`; 0 never reads them. @default {0} */
  readonly beta?: number;
}

/** The activation between the two layers of an expert or of a dense feed-forward network. */
export type Activation = "swiglu" | "relu" | "gelu";

/** Sizes of an attention call over sequences that lie one after another. */
export interface AttentionShape {
  /** First row of each sequence and, last, the number of rows: length sequences + 1, host array. */
  readonly offsets: Int32Array;
  /** Query heads H. */
  readonly heads: number;
  /** Key and value heads G; divides H. */
  readonly kvHeads: number;
  /** Width C of one head. */
  readonly headDim: number;
}

/** Row groups of a batch that is sorted by group: group g has the rows `offsets[g]` to `offsets[g + 1]`; groups may be empty. */
export interface RowGroups {
  /** First row of each group and, last, the number of rows: i32 [G + 1] on the device. */
  readonly offsets: Tensor;
  /** The same on the host where it is known there, else null: no kernel waits for the device to learn it. */
  readonly host: Int32Array | null;
}

/** Options of {@linkcode Kernels.activationBackward} and {@linkcode Kernels.groupedGemmActivationBackward}. */
export interface ActivationBackwardOptions {
  /** As the activation had them, f32 [R] (f64 for f64). @default {ones} */
  readonly scales?: Tensor;
  /** Where the gradient of the scales goes, f32 [R] (f64 for f64); it is made only if this is given. */
  readonly dScales?: Tensor;
}

/** What one parameter brings to an AdamW update. All have the same number of elements. */
export interface AdamWUpdate {
  /** Weights that the model computes with; updated. */
  readonly parameter: Tensor;
  /** Gradient in the parameter's dtype, or f32; with `zeroGradient` it is 0 afterwards. */
  readonly gradient: Tensor;
  /** First moment, f32 (f64 for f64); updated. */
  readonly moment1: Tensor;
  /** Second moment, f32 (f64 for f64); updated. */
  readonly moment2: Tensor;
  /**
   * The low 16 bits of the f32 master weight of a bf16 parameter, as a signed difference (in an i16 tensor): master bits =
   * (parameter bits << 16) + residual. So a master weight costs two bytes. Null for f32 and f64 parameters, which are their own masters.
   */
  readonly residual: Tensor | null;
  /** Decoupled weight decay of this parameter. */
  readonly weightDecay: number;
}

/** Constants of one AdamW update. */
export interface AdamWOptions {
  /** Learning rate of this step. */
  readonly lr: number;
  /** Decay of the first moment. */
  readonly beta1: number;
  /** Decay of the second moment. */
  readonly beta2: number;
  /** Added to the root of the second moment. */
  readonly eps: number;
  /** Number of this step, from 1. */
  readonly step: number;
  /**
   * Factor applied to the gradient first (clipping, averaging): f32 [1] on the device, so that a norm need not come to the host. If it is
   * not finite, nothing is updated.
   */
  readonly gradScale: Tensor;
  /** Whether gradients are set to zero. */
  readonly zeroGradient: boolean;
}

/**
 * The kernels of a device. Shape letters: N rows (tokens), D model width, F hidden width, V vocabulary, H query heads,
 * G key/value heads, C head width, E experts, K choices per token, R routed rows. Matrices are row-major; a weight is
 * stored [out, in] as PyTorch's `Linear`. Outputs come last, are written whole unless said otherwise, and must not
 * overlap inputs unless said otherwise. Floating types of one call agree unless said otherwise.
 */
export interface Kernels {
  /** `x = value` */
  fill(x: Tensor, value: number): void;
  /** Normal numbers of mean 0 and this standard deviation, by index: see tensor/random.ts. bf16 and f16 are rounded from f32. */
  normal(out: Tensor, key: RandomKey, std: number): void;
  /** `out = x`, converting the dtype if they differ. */
  copy(x: Tensor, out: Tensor): void;
  /** `out = x + y`; `out` may be `x` or `y`. */
  add(x: Tensor, y: Tensor, out: Tensor): void;
  /** `y += alpha · x` */
  axpy(alpha: number, x: Tensor, y: Tensor): void;
  /** `x *= alpha` */
  scale(x: Tensor, alpha: number): void;
  /** `out = alpha · a b + beta · out` with a [M, K], b [K, N], out [M, N]; out in the dtype of a and b, or f32. */
  gemm(a: Tensor, b: Tensor, out: Tensor, options?: GemmOptions): void;
  /**
   * One GEMM per group over uneven row groups: the rows of group g meet weights[g].
   * `out_g = x_g w_gᵀ` (weight [out, in]); with `transposeWeight`, `out_g = x_g w_g` (the input's gradient).
   * Empty groups are allowed. The same array object of weights means the same weights: a device may keep what it derives from it.
   */
  groupedGemm(
    x: Tensor,
    weights: readonly Tensor[],
    groups: RowGroups,
    out: Tensor,
    options?: { readonly transposeWeight?: boolean; readonly beta?: number },
  ): void;
  /**
   * `grads[g] = dy_gᵀ x_g + beta · grads[g]` per group: the weights' gradients, in the dtype of dy or f32. With beta 0, the default being 1, those
   * of empty groups become 0.
   */
  groupedGemmWeightGrad(
    dy: Tensor,
    x: Tensor,
    groups: RowGroups,
    grads: readonly Tensor[],
    options?: { readonly beta?: number },
  ): void;
  /**
   * The experts' first product and activation: `up_g = x_g w_gᵀ`, `active[r] = scales[r] · activation(kind, up[r])`. x [R, D], weights [F, D]
   * ([2F, D] for swiglu), up [R, F] ([R, 2F]), active [R, F], scales as in {@linkcode Kernels.activation}. Rows of `active` outside the groups are
   * unspecified.
   */
  groupedGemmActivation(
    x: Tensor,
    weights: readonly Tensor[],
    groups: RowGroups,
    kind: Activation,
    up: Tensor,
    active: Tensor,
    scales?: Tensor,
  ): void;
  /**
   * The gradient before the activation from that behind the second product: with `d = dY_g w_g`, rounded to the dtype,
   * `dUp[r] = scales[r] · activationBackward(kind, d[r], up[r])` and `dScales[r] = d[r] · activation(kind, up[r])`. dY [R, D], weights [D, F], up
   * and dUp [R, F] ([R, 2F] for swiglu). Rows of dUp and dScales outside the groups are unspecified.
   */
  groupedGemmActivationBackward(
    dY: Tensor,
    weights: readonly Tensor[],
    groups: RowGroups,
    kind: Activation,
    up: Tensor,
    dUp: Tensor,
    options?: ActivationBackwardOptions,
  ): void;
  /** `out[i] = x[rows[i]]` for rows i32; a negative index writes zeros. x [*, D], out [rows, D]. */
  gatherRows(x: Tensor, rows: Tensor, out: Tensor): void;
  /** `out[rows[i]] += x[i]`; a negative index is skipped; out in the dtype of x, or f32. Deterministic: in a fixed order. */
  scatterAddRows(x: Tensor, rows: Tensor, out: Tensor): void;
  /**
   * `out[n] = residual[n] + Σ_k weights[n,k] · y[slots[n,k]]`; slots i32 [N, K], a negative slot adds nothing; y [R, D]. Without weights they are
   * 1, without residual it is 0. Weights are in the dtype of y, or f32; out may be the residual.
   */
  combineRows(
    y: Tensor,
    slots: Tensor,
    weights: Tensor | null,
    out: Tensor,
    residual?: Tensor,
  ): void;
  /**
   * Gradient of {@linkcode Kernels.combineRows}: `dY[slots[n,k]] = weights[n,k] · dOut[n]` and
   * `dWeights[n,k] = dOut[n] · y[slots[n,k]]`, in the dtype of the weights. Every row of y belongs to at most one (n, k), and to exactly one where
   * there are as many rows as slots; the gradient of a row that belongs to none is 0.
   */
  combineRowsBackward(
    dOut: Tensor,
    y: Tensor,
    slots: Tensor,
    weights: Tensor,
    dY: Tensor,
    dWeights: Tensor,
  ): void;
  /** `out = x / rms(x) · gain`, `rms(x) = √(mean(x²) + eps)`; saves invRms [N] in f32 (f64 for f64). */
  rmsNorm(x: Tensor, gain: Tensor, out: Tensor, invRms: Tensor, eps: number): void;
  /** `sum = x + y`, `out = rmsNorm(sum)`: one pass for a residual connection and the norm behind it. sum may be x or y. */
  addRmsNorm(
    x: Tensor,
    y: Tensor,
    gain: Tensor,
    sum: Tensor,
    out: Tensor,
    invRms: Tensor,
    eps: number,
  ): void;
  /**
   * Gradient of {@linkcode Kernels.rmsNorm}: writes dX, adds to dGain (in the dtype of the gain, or f32). With `residual`, dX = residual + the
   * gradient, as at a residual connection; dX may be the residual.
   */
  rmsNormBackward(
    dOut: Tensor,
    x: Tensor,
    gain: Tensor,
    invRms: Tensor,
    dX: Tensor,
    dGain: Tensor,
    residual?: Tensor,
  ): void;
  /**
   * Rotary positions in place: x [N, heads·C] with pairs (i, i + C/2) as Hugging Face's Llama has them, positions i32 [N].
   * `inverse` turns back, which is the gradient.
   */
  rope(
    x: Tensor,
    positions: Tensor,
    options: { readonly headDim: number; readonly theta: number; readonly inverse?: boolean },
  ): void;
  /**
   * The columns of a fused projection apart, queries and keys turned: qkv [N, (H + 2G)·C] → q [N, H·C], k and v [N, G·C], with rotary
   * positions as in {@linkcode Kernels.rope}.
   */
  splitQkv(
    qkv: Tensor,
    positions: Tensor,
    options: { readonly headDim: number; readonly theta: number },
    q: Tensor,
    k: Tensor,
    v: Tensor,
  ): void;
  /** Gradient of {@linkcode Kernels.splitQkv}: turns back and joins into dQkv. */
  joinQkv(
    dQ: Tensor,
    dK: Tensor,
    dV: Tensor,
    positions: Tensor,
    options: { readonly headDim: number; readonly theta: number },
    dQkv: Tensor,
  ): void;
  /**
   * Causal attention, scale 1/√C: q [N, H·C], k and v [N, G·C] → out [N, H·C]; saves the log-sum-exp lse [N, H]
   * (f32; f64 for f64). Memory is linear in the sequence.
   */
  attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    shape: AttentionShape,
  ): void;
  /** Gradient of {@linkcode Kernels.attention}. */
  attentionBackward(
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
  ): void;
  /**
   * `relu(x)`, tanh-approximated `gelu(x)`, or `silu(x[:, :F]) · x[:, F:]` for swiglu with x [N, 2F] → out [N, F]; row n times `scales[n]`, where
   * those are given: f32 [N] (f64 for f64).
   */
  activation(kind: Activation, x: Tensor, out: Tensor, scales?: Tensor): void;
  /**
   * Gradient of {@linkcode Kernels.activation}; dX has the shape of x. The scales' is that of the activation before it is rounded:
   * `dScales[n] = dOut[n] · activation(kind, x[n])`.
   */
  activationBackward(
    kind: Activation,
    dOut: Tensor,
    x: Tensor,
    dX: Tensor,
    options?: ActivationBackwardOptions,
  ): void;
  /** Row-wise softmax, `out` may be `x`. */
  softmax(x: Tensor, out: Tensor): void;
  /** `dX = y ⊙ (dY − (y · dY))` for y = softmax(x), row-wise; dX may be dY. */
  softmaxBackward(dY: Tensor, y: Tensor, dX: Tensor): void;
  /**
   * Softmax cross-entropy: losses [N] in f32 (f64 for f64), and logits [N, V] are replaced by
   * `scale · d loss / d logits`. A negative target (i32) is ignored: loss 0, gradient 0.
   */
  crossEntropy(logits: Tensor, targets: Tensor, losses: Tensor, scale: number): void;
  /** `out[0] += Σ x²` over all elements of all xs, which may differ in floating dtype; out f64 [1]. */
  sumSquares(xs: readonly Tensor[], out: Tensor): void;
  /** `out[0] += Σ x`, out f64 [1]. */
  sum(x: Tensor, out: Tensor): void;
  /** `out[0] = min(1, limit / √squares[0])`, or 1 with limit 0; NaN if the square sum is not finite. squares f64 [1], out f32 [1]. */
  clipScale(squares: Tensor, limit: number, out: Tensor): void;
  /** One AdamW step of many parameters in place with decoupled decay (Loshchilov and Hutter). */
  adamW(updates: readonly AdamWUpdate[], options: AdamWOptions): void;
}

/** Element types that kernels compute in. */
export const FLOAT_DTYPES: readonly DType[] = ["f32", "f64", "f16", "bf16"];
