// Tensor maps: what the bulk tensor copy engine of Hopper is told of a matrix in memory.

import { addressOf } from "../../ffi/address.ts";
import { CUDA, cuda, cudaError } from "../../ffi/cuda.ts";
import type { CudaContext } from "./context.ts";

const SWIZZLES = ["none", "32B", "64B", "128B"] as const;

/** Bytes of a map, and the alignment that the driver wants it to have. */
const MAP_BYTES = 128, ALIGNMENT = 64;
const MOST_DIMENSIONS = 5;

/** What a call reads and writes; made at the first. */
interface Cells {
  readonly map: Uint8Array<ArrayBuffer>;
  /** Sizes and strides in bytes; boxes and steps. */
  readonly wide: BigUint64Array<ArrayBuffer>;
  readonly narrow: Uint32Array<ArrayBuffer>;
  readonly mapAddress: bigint;
  readonly wideAddress: bigint;
  readonly narrowAddress: bigint;
}
let cells: Cells | undefined;

function makeCells(): Cells {
  const memory = new ArrayBuffer(MAP_BYTES + ALIGNMENT), start = addressOf(memory);
  const mapAddress = (start + BigInt(ALIGNMENT - 1)) & -BigInt(ALIGNMENT);
  const wide = new BigUint64Array(2 * MOST_DIMENSIONS), narrow = new Uint32Array(wide.length);
  return {
    map: new Uint8Array(memory, Number(mapAddress - start), MAP_BYTES),
    wide,
    narrow,
    mapAddress,
    wideAddress: addressOf(wide.buffer),
    narrowAddress: addressOf(narrow.buffer),
  };
}

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
  if (
    rank < 1 || rank > MOST_DIMENSIONS || strides_bytes.length !== rank - 1 || box.length !== rank
  ) {
    throw new RangeError(
      `Cannot encode a tensor map as sizes, strides and box must have R, R - 1 and R entries, R in 1..5: current value is ${rank}, ${strides_bytes.length}, ${box.length}`,
    );
  }
  const { map, wide, narrow, mapAddress, wideAddress, narrowAddress } = cells ??= makeCells();
  for (let i = 0; i < rank; i++) {
    wide[i] = BigInt(sizes[i]);
    wide[MOST_DIMENSIONS + i] = i < rank - 1 ? BigInt(strides_bytes[i]) : 0n;
    narrow[i] = box[i];
    narrow[MOST_DIMENSIONS + i] = 1;
  }
  const code = cuda().calls.cuTensorMapEncodeTiled(
    mapAddress,
    dtype === "bf16" ? CUDA.tensorMapBf16 : CUDA.tensorMapF32,
    rank,
    BigInt(address),
    wideAddress,
    wideAddress + BigInt(8 * MOST_DIMENSIONS),
    narrowAddress,
    narrowAddress + BigInt(4 * MOST_DIMENSIONS),
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
  return map.slice();
}
