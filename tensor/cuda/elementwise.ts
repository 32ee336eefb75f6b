// Launches of elementwise.cu: fill, copy, sums of two tensors, and activations. Every launch is one pass over memory; how it is cut into
// blocks is decided here.

import { bytesOf, type DType } from "../dtype.ts";
import type { Activation, Kernels } from "../device.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext, CudaKernel, ModuleSource, ParameterType } from "./context.ts";
import source from "./elementwise.cu" with { type: "text" };
import activations from "./activations.cuh" with { type: "text" };

type Elementwise = Pick<
  Kernels,
  "fill" | "copy" | "add" | "axpy" | "scale" | "activation" | "activationBackward"
>;

/** Threads of a block, and bytes of the largest elements that a block moves: a pack of 16 bytes per thread. */
const THREADS = 256, BLOCK_BYTES = THREADS * 16;

const KINDS: readonly Activation[] = ["relu", "gelu", "swiglu"];

/** The dtypes that are converted into each other. */
const CONVERTED: readonly DType[] = ["f32", "bf16", "f64", "i32"];

const conversions = CONVERTED.flatMap((from) =>
  CONVERTED.filter((to) => to !== from).map((to): [string, readonly ParameterType[]] => [
    `copy_${from}_${to}`,
    ["ptr", "ptr", "i64"],
  ])
);

/** The kernels of elementwise.cu. */
export const elementwiseModule: ModuleSource = {
  name: "elementwise",
  overlaps: true,
  source: `${activations}\n#line 1 "elementwise.cu"\n${source}`,
  kernels: Object.fromEntries([
    ["fill_pattern", ["ptr", "i64", "i32", "i32"]],
    ["copy_bytes", ["ptr", "ptr", "i64"]],
    ...conversions,
    ...["f32", "bf16"].flatMap((dtype): [string, readonly ParameterType[]][] => [
      [`add_${dtype}`, ["ptr", "ptr", "ptr", "i64"]],
      [`axpy_${dtype}`, ["f32", "ptr", "ptr", "i64"]],
      [`scale_${dtype}`, ["ptr", "f32", "i64"]],
      [`relu_${dtype}`, ["ptr", "ptr", "i64"]],
      [`gelu_${dtype}`, ["ptr", "ptr", "i64"]],
      [`relu_backward_${dtype}`, ["ptr", "ptr", "ptr", "i64"]],
      [`gelu_backward_${dtype}`, ["ptr", "ptr", "ptr", "i64"]],
      [`swiglu_backward_${dtype}`, ["ptr", "ptr", "ptr", "i64", "i64"]],
      ...KINDS.flatMap((kind): [string, readonly ParameterType[]][] => [
        [`${kind}_rows_${dtype}`, ["ptr", "ptr", "ptr", "i64", "i64"]],
        [`${kind}_backward_rows_${dtype}`, ["ptr", "ptr", "ptr", "ptr", "ptr", "i64", "i64"]],
      ]),
    ]),
  ]),
};

/** The kernels of one floating dtype. */
interface PerDType {
  readonly add: CudaKernel;
  readonly axpy: CudaKernel;
  readonly scale: CudaKernel;
  readonly forward: Readonly<Record<"relu" | "gelu", CudaKernel>>;
  readonly backward: Readonly<Record<Activation, CudaKernel>>;
  /** Row by row, with factors. */
  readonly forwardRows: Readonly<Record<Activation, CudaKernel>>;
  readonly backwardRows: Readonly<Record<Activation, CudaKernel>>;
}

/**
 * Blocks that cover a number of elements, one pass.
 *
 * @param elements How many; at least 1.
 * @param bytes Size of the largest element that a kernel reads or writes: its pack has 16 bytes.
 * @returns Blocks of THREADS threads.
 */
function blocks(elements: number, bytes: number): number {
  return Math.ceil(elements / (BLOCK_BYTES / bytes));
}

const PATTERN = new DataView(new ArrayBuffer(8));

/** Writes a value, as its dtype has it, into PATTERN again and again. */
function writePattern(dtype: DType, value: number): void {
  if (dtype === "f32") PATTERN.setFloat32(0, value, true);
  else if (dtype === "f64") PATTERN.setFloat64(0, value, true);
  else if (dtype === "f16") PATTERN.setFloat16(0, value, true);
  else if (dtype === "i64") PATTERN.setBigInt64(0, BigInt(value), true);
  else if (dtype === "i32") PATTERN.setInt32(0, value, true);
  else if (dtype === "i16") PATTERN.setInt16(0, value, true);
  else if (dtype === "u8") PATTERN.setUint8(0, value);
  else {
    PATTERN.setFloat32(0, value, true);
    const bits = PATTERN.getUint32(0, true);
    const rounded = Number.isNaN(value) ? 0x7fc0 : (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
    PATTERN.setUint16(0, rounded, true);
  }
  const bytes = bytesOf(dtype);
  for (let i = bytes; i < 8; i++) PATTERN.setUint8(i, PATTERN.getUint8(i - bytes));
}

/**
 * The element-wise kernels of a GPU.
 *
 * @param context The GPU.
 * @returns The kernels; f32 and bf16, `fill` and copies within a dtype take all, conversions f32, bf16, f64 and i32.
 */
export function elementwiseKernels(context: CudaContext): Elementwise {
  const kernel = (name: string): CudaKernel => context.kernel(elementwiseModule, name);
  const fillPattern = kernel("fill_pattern"), copyBytes = kernel("copy_bytes");
  const convert = new Map(conversions.map(([name]) => [name.slice("copy_".length), kernel(name)]));
  const perDType = (dtype: DType): PerDType => ({
    add: kernel(`add_${dtype}`),
    axpy: kernel(`axpy_${dtype}`),
    scale: kernel(`scale_${dtype}`),
    forward: { relu: kernel(`relu_${dtype}`), gelu: kernel(`gelu_${dtype}`) },
    backward: ofKinds((kind) => kernel(`${kind}_backward_${dtype}`)),
    forwardRows: ofKinds((kind) => kernel(`${kind}_rows_${dtype}`)),
    backwardRows: ofKinds((kind) => kernel(`${kind}_backward_rows_${dtype}`)),
  });
  const f32 = perDType("f32"), bf16 = perDType("bf16");

  function of(op: string, x: Tensor): PerDType {
    if (x.dtype === "bf16") return bf16;
    if (x.dtype === "f32") return f32;
    throw new TypeError(
      `Cannot ${op} as the dtype of x must be f32 or bf16: current value is ${x.dtype}`,
    );
  }

  /** Blocks for a tensor of floats. */
  function grid({ size, dtype }: Tensor): number {
    return blocks(size, dtype === "bf16" ? 2 : 4);
  }

  return {
    fill(x, value) {
      const bytes = x.bytes;
      if (bytes === 0) return;
      writePattern(x.dtype, value);
      const low = PATTERN.getInt32(0, true), high = PATTERN.getInt32(4, true);
      if (low === 0 && high === 0) context.clear(x.address, bytes);
      else fillPattern.launch(blocks(bytes, 1), 1, 1, THREADS, 0, x.address, bytes, low, high);
    },
    copy(x, out) {
      const { size } = x;
      if (size === 0) return;
      if (x.dtype === out.dtype) {
        copyBytes.launch(blocks(x.bytes, 1), 1, 1, THREADS, 0, x.address, out.address, x.bytes);
        return;
      }
      const conversion = convert.get(`${x.dtype}_${out.dtype}`);
      if (!conversion) {
        throw new TypeError(
          `Cannot copy as the dtypes of x and out must be equal or two of ${
            CONVERTED.join(", ")
          }: current value is ${x.dtype} and ${out.dtype}`,
        );
      }
      const bytes = Math.max(bytesOf(x.dtype), bytesOf(out.dtype));
      conversion.launch(blocks(size, bytes), 1, 1, THREADS, 0, x.address, out.address, size);
    },
    add(x, y, out) {
      const { add } = of("add", x);
      if (x.size === 0) return;
      add.launch(grid(x), 1, 1, THREADS, 0, x.address, y.address, out.address, x.size);
    },
    axpy(alpha, x, y) {
      const { axpy } = of("axpy", x);
      if (x.size === 0) return;
      axpy.launch(grid(x), 1, 1, THREADS, 0, alpha, x.address, y.address, x.size);
    },
    scale(x, alpha) {
      const { scale } = of("scale", x);
      if (x.size === 0) return;
      scale.launch(grid(x), 1, 1, THREADS, 0, x.address, alpha, x.size);
    },
    activation(kind, x, out, scales) {
      const { forward, forwardRows } = of("activate", x), { size } = out;
      if (size === 0) return;
      if (kind === "swiglu" || scales) {
        const width = out.shape.at(-1)!;
        // deno-fmt-ignore
        forwardRows[kind].launch(grid(out), 1, 1, THREADS, 0, x.address, out.address, scales ? scales.address : 0,
          size / width, width);
      } else forward[kind].launch(grid(out), 1, 1, THREADS, 0, x.address, out.address, size);
    },
    activationBackward(kind, dOut, x, dX, options) {
      const { backward, backwardRows } = of("take the activation's gradient", x), { size } = dOut;
      const scales = options?.scales, dScales = options?.dScales;
      if (size === 0) {
        if (dScales && dScales.size > 0) context.clear(dScales.address, dScales.bytes);
        return;
      }
      const d = dOut.address, at = x.address, to = dX.address, width = dOut.shape.at(-1)!;
      const rows = size / width;
      if (scales || dScales) {
        // deno-fmt-ignore
        backwardRows[kind].launch(Math.ceil(rows / (THREADS / 32)), 1, 1, THREADS, 0, d, at, to, scales ? scales.address : 0,
          dScales ? dScales.address : 0, rows, width);
      } else if (kind === "swiglu") {
        backward.swiglu.launch(grid(dOut), 1, 1, THREADS, 0, d, at, to, rows, width);
      } else backward[kind].launch(grid(dOut), 1, 1, THREADS, 0, d, at, to, size);
    },
  };
}

function ofKinds<T>(make: (kind: Activation) => T): Record<Activation, T> {
  return Object.fromEntries(KINDS.map((kind) => [kind, make(kind)])) as Record<Activation, T>;
}
