// The matrix product by cuBLAS on the compute stream. cuBLAS is column-major: a row-major product is that of the swapped,
// transposed operands. Sums are in f32 throughout; f32 inputs are not rounded to TF32. The grouped product is in grouped.ts.

import { addressOf } from "../../ffi/address.ts";
import {
  checkCublas,
  createCublas,
  CUBLAS,
  cublas,
  type CublasCalls,
  type CublasHandle,
} from "../../ffi/cublas.ts";
import type { CudaStreamHandle } from "../../ffi/cudart.ts";
import type { GemmOptions, Kernels } from "../device.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext } from "./context.ts";

/** Bytes of the handle's workspace; NVIDIA's advice for Hopper. */
const WORKSPACE = 32 * 2 ** 20;

/** Element types that the product takes. */
export type GemmDType = "f32" | "bf16";

/** The product on addresses: `out = alpha · op(a) op(b) + beta · out`, row-major, op(a) [M, K], op(b) [K, N]. */
export class Gemm {
  readonly #calls: CublasCalls;
  readonly #handle: CublasHandle;
  readonly #factors = new Float32Array(new ArrayBuffer(8));
  readonly #alpha: bigint;
  readonly #beta: bigint;

  /** @param context The GPU; the workspace comes from its memory and stays taken. */
  constructor(context: CudaContext) {
    this.#calls = cublas().calls;
    this.#handle = createCublas(
      context.stream as CudaStreamHandle,
      BigInt(context.allocate(WORKSPACE)),
      WORKSPACE,
    );
    this.#alpha = addressOf(this.#factors.buffer);
    this.#beta = this.#alpha + 4n;
  }

  /**
   * Enqueues a product. Leading dimensions are the stored rows' strides in elements.
   *
   * @param transposeA Whether `a` is stored [K, M].
   * @param transposeB Whether `b` is stored [N, K].
   * @param m Rows of `out`.
   * @param n Columns of `out`.
   * @param k Length of the sums; with 0, `out = beta · out`.
   * @param alpha Factor of the product.
   * @param a Address of a.
   * @param lda Stride of a's rows.
   * @param b Address of b.
   * @param ldb Stride of b's rows.
   * @param beta Factor of the old contents; 0 never reads them.
   * @param out Address of the result.
   * @param ldo Stride of its rows.
   * @param dtype Type of a and b.
   * @param outDtype Type of the result: that of a and b, or f32.
   * @throws {CudaError} If cuBLAS refuses.
   */
  product(
    transposeA: boolean,
    transposeB: boolean,
    m: number,
    n: number,
    k: number,
    alpha: number,
    a: number,
    lda: number,
    b: number,
    ldb: number,
    beta: number,
    out: number,
    ldo: number,
    dtype: GemmDType,
    outDtype: GemmDType,
  ): void {
    this.#factors[0] = alpha;
    this.#factors[1] = beta;
    const type = dtype === "bf16" ? CUBLAS.typeBf16 : CUBLAS.typeF32;
    const code = this.#calls.cublasGemmEx(
      this.#handle,
      transposeB ? CUBLAS.transpose : CUBLAS.noTranspose,
      transposeA ? CUBLAS.transpose : CUBLAS.noTranspose,
      n,
      m,
      k,
      this.#alpha,
      BigInt(b),
      type,
      ldb,
      BigInt(a),
      type,
      lda,
      this.#beta,
      BigInt(out),
      outDtype === "bf16" ? CUBLAS.typeBf16 : CUBLAS.typeF32,
      ldo,
      CUBLAS.computeF32,
      CUBLAS.algorithmDefault,
    );
    if (code !== 0) {
      checkCublas(
        code,
        "cublasGemmEx",
        `[${m}, ${k}] x [${k}, ${n}], ${dtype} to ${outDtype}, transposes ${transposeA} ${transposeB}`,
      );
    }
  }
}

const products = new WeakMap<CudaContext, Gemm>();

/**
 * The products of a GPU's compute stream; one cuBLAS handle serves all rooms.
 *
 * @param context The GPU.
 * @returns Its products, the same for every call.
 */
export function gemmOf(context: CudaContext): Gemm {
  let gemm = products.get(context);
  if (gemm === undefined) products.set(context, gemm = new Gemm(context));
  return gemm;
}

/** The dtype of an operand. */
function gemmDType(x: Tensor, name: string): GemmDType {
  if (x.dtype === "f32" || x.dtype === "bf16") return x.dtype;
  throw new TypeError(
    `Cannot multiply on the GPU as ${name} must be f32 or bf16: current value is ${x.dtype}`,
  );
}

/**
 * {@linkcode Kernels.gemm}.
 *
 * @param context The GPU.
 * @returns The kernel.
 */
export function gemmKernels(context: CudaContext): Pick<Kernels, "gemm"> {
  const blas = gemmOf(context);
  return {
    gemm(a: Tensor, b: Tensor, out: Tensor, options: GemmOptions = {}): void {
      const { transposeA = false, transposeB = false, alpha = 1, beta = 0 } = options;
      const [m, n] = out.shape, k = a.shape[transposeA ? 0 : 1];
      if (m === 0 || n === 0) return;
      const largest = Math.max(m, n, k);
      if (largest >= 2 ** 31) {
        throw new RangeError(
          `Cannot multiply as every dimension must be < 2^31: current value is ${largest}`,
        );
      }
      const dtype = gemmDType(a, "a"), outDtype = gemmDType(out, "out");
      if (b.dtype !== dtype || (dtype === "f32" && outDtype === "bf16")) {
        throw new TypeError(
          `Cannot multiply on the GPU as dtypes must be equal, or bf16 to f32: current value is ${dtype}, ${b.dtype} to ${outDtype}`,
        );
      }
      if (k === 0 && beta === 0) return context.clear(out.address, out.bytes);
      // deno-fmt-ignore
      blas.product(transposeA, transposeB, m, n, k, alpha, a.address, Math.max(1, transposeA ? m : k),
        b.address, Math.max(1, transposeB ? k : n), beta, out.address, n, dtype, outDtype);
    },
  };
}
