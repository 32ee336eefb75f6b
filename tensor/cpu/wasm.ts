// The compiled kernels (kernels/*.c) bound to the linear memory. Arguments are byte offsets and counts of elements, as in
// the C prototypes; nothing is checked here.

import type { DType } from "../dtype.ts";
// @ts-types="./kernels_wasm.d.ts"
import module from "./kernels_wasm.js";
import { linearMemory } from "./memory.ts";

type Kernel = (...args: number[]) => void;
/** Returns the place of a row number beyond its limit, or −1. */
type CheckedKernel = (...args: number[]) => number;

/** The kernels of one floating type; parameters are those of the C functions of the same names. */
export interface RealKernels {
  readonly fill: (x: number, value: number, n: number) => void;
  readonly add: (x: number, y: number, out: number, n: number) => void;
  readonly axpy: (alpha: number, x: number, y: number, n: number) => void;
  readonly scale: (x: number, alpha: number, n: number) => void;
  readonly sum: (x: number, out: number, n: number) => void;
  readonly sum_squares: (x: number, out: number, n: number) => void;
  readonly relu: (x: number, out: number, n: number) => void;
  readonly relu_backward: (dOut: number, x: number, dX: number, n: number) => void;
  readonly gelu: (x: number, out: number, n: number) => void;
  readonly gelu_backward: (dOut: number, x: number, dX: number, n: number) => void;
  readonly swiglu: (x: number, out: number, rows: number, F: number) => void;
  readonly swiglu_backward: (dOut: number, x: number, dX: number, rows: number, F: number) => void;
  readonly adamw: Kernel;
  readonly scatter_add_rows: CheckedKernel;
  readonly combine_rows: CheckedKernel;
  readonly combine_rows_backward: CheckedKernel;
  readonly rms_norm: Kernel;
  readonly rms_norm_backward: Kernel;
  readonly rope: Kernel;
  readonly split_qkv: Kernel;
  readonly join_qkv: Kernel;
  readonly softmax: (x: number, out: number, N: number, V: number) => void;
  readonly softmax_backward: (dY: number, y: number, dX: number, N: number, V: number) => void;
  readonly cross_entropy: CheckedKernel;
  readonly attention_tile: Kernel;
  readonly attention_finish: Kernel;
  readonly attention_delta: Kernel;
  readonly attention_tile_backward: Kernel;
  readonly gemm_scratch: () => number;
  readonly gemm: Kernel;
}

/** All compiled kernels. */
export interface WasmKernels {
  /** Those that compute in f32. */
  readonly f32: RealKernels;
  /** Those that compute in f64. */
  readonly f64: RealKernels;
  readonly gather_rows: CheckedKernel;
  readonly f32_to_f64: (x: number, out: number, n: number) => void;
  readonly f64_to_f32: (x: number, out: number, n: number) => void;
  readonly bf16_to_f32: (x: number, out: number, n: number) => void;
  readonly f32_to_bf16: (x: number, out: number, n: number) => void;
}

let bound: WasmKernels | undefined;

/** The compiled kernels, bound to the linear memory at the first call. @returns Them. */
export function wasmKernels(): WasmKernels {
  return bound ?? bind();
}

function bind(): WasmKernels {
  const { exports } = new WebAssembly.Instance(module, {
    env: { memory: linearMemory(), log: Math.log },
  });
  const all: Record<string, unknown> = { f32: {}, f64: {} };
  for (const [name, kernel] of Object.entries(exports)) {
    const typed = /^(?<name>\w+)_(?<dtype>f32|f64)$/.exec(name)?.groups;
    if (typed && !name.includes("_to_")) {
      (all[typed.dtype] as Record<string, unknown>)[typed.name] = kernel;
    } else all[name] = kernel;
  }
  return bound = all as unknown as WasmKernels;
}

/**
 * The kernels of a floating type.
 *
 * @param dtype The element type.
 * @returns Its kernels.
 * @throws {TypeError} If the CPU does not compute in it.
 */
export function realKernels(dtype: DType): RealKernels {
  const kernels = bound ?? bind();
  if (dtype === "f32") return kernels.f32;
  if (dtype === "f64") return kernels.f64;
  throw new TypeError(
    `Cannot compute on the CPU as the dtype must be f32 or f64: current value is ${dtype}`,
  );
}
