// Tensor maps: what the bulk tensor copy engine of Hopper is told of a matrix in memory.

import { addressOf } from "../../ffi/address.ts";
import { CUDA, cuda, cudaError } from "../../ffi/cuda.ts";
import type { CudaContext } from "./context.ts";

const SWIZZLES = ["none", "32B", "64B", "128B"] as const;

/**
 * {@linkcode CudaContext.tensorMap}.
 *
 * @param options Element type, address, sizes, strides in bytes and box, innermost dimension first.
 * @returns The map's 128 bytes.
 * @throws {CudaError} If the driver refuses: alignment, sizes or box.
 */
export function encodeTensorMap(
  options: Parameters<CudaContext["tensorMap"]>[0],
): Uint8Array<ArrayBuffer> {
  const { dtype, address, sizes, strides_bytes, box, swizzle } = options;
  const rank = sizes.length;
  if (rank < 1 || rank > 5 || strides_bytes.length !== rank - 1 || box.length !== rank) {
    throw new RangeError(
      `Cannot encode a tensor map as sizes, strides and box must have R, R - 1 and R entries, R in 1..5: current value is ${rank}, ${strides_bytes.length}, ${box.length}`,
    );
  }
  // The driver wants the map aligned to 64 bytes.
  const memory = new ArrayBuffer(128 + 64), start = addressOf(memory);
  const offset = Number((64n - start % 64n) % 64n);
  const wide = BigUint64Array.from([...sizes, ...strides_bytes, 0], BigInt);
  const narrow = Uint32Array.from([...box, ...sizes.map(() => 1)]);
  const wideAt = addressOf(wide.buffer), narrowAt = addressOf(narrow.buffer);
  const code = cuda().calls.cuTensorMapEncodeTiled(
    start + BigInt(offset),
    dtype === "bf16" ? CUDA.tensorMapBf16 : CUDA.tensorMapF32,
    rank,
    BigInt(address),
    wideAt,
    wideAt + BigInt(8 * rank),
    narrowAt,
    narrowAt + BigInt(4 * rank),
    0, // no interleave
    SWIZZLES.indexOf(swizzle),
    CUDA.tensorMapL2Promotion256,
    0, // zeros beyond the edges
  );
  if (code !== 0) {
    throw cudaError(
      code,
      "cuTensorMapEncodeTiled",
      `: address ${address}, sizes [${sizes}], strides [${strides_bytes}], box [${box}], swizzle ${swizzle}`,
    );
  }
  // `wide` and `narrow` are used again, so that they live until here.
  return new Uint8Array(memory, offset, wide.length + narrow.length > 0 ? 128 : 0).slice();
}
