// Where the pool's memory comes from: the driver's virtual memory, so that the pool grows in place, or slabs. Nothing is given back to
// the system before the process ends.

import { addressOf } from "../../ffi/address.ts";
import { CUDA, cuda, cudaError, type CudaMemoryHandle } from "../../ffi/cuda.ts";
import { CudaError } from "../../ffi/cuda_library.ts";
import { checkCudart, CUDART, cudart, cudartError } from "../../ffi/cudart.ts";
import type { MemorySource } from "./arena.ts";

/**
 * The memory of the current GPU.
 *
 * @returns What is free and what there is in all, in bytes.
 */
export function memoryInfo(): { readonly free_bytes: number; readonly total_bytes: number } {
  const out = new BigUint64Array(new ArrayBuffer(16)), at = addressOf(out.buffer);
  checkCudart(cudart().calls.cudaMemGetInfo(at, at + 8n), "cudaMemGetInfo");
  return { free_bytes: Number(out[0]), total_bytes: Number(out[1]) };
}

/**
 * Memory of a GPU: one reserved range of addresses that it is mapped into, or, where the driver cannot do that, slabs.
 *
 * @param index Number of the GPU, which is current.
 * @returns Where an arena's memory comes from.
 */
export function memorySource(index: number): MemorySource {
  try {
    return new MappedMemory(index);
  } catch (error) {
    if (!(error instanceof CudaError)) throw error;
    return {
      contiguous: false,
      granularity_bytes: 2 ** 21,
      grow(bytes) {
        const { calls } = cudart();
        const cell = new BigUint64Array(new ArrayBuffer(8));
        const code = calls.cudaMalloc(addressOf(cell.buffer), BigInt(bytes));
        if (code === 0) return Number(cell[0]);
        calls.cudaGetLastError();
        if (code === CUDART.errorMemoryAllocation) return null;
        throw cudartError(code, "cudaMalloc", ` (${bytes} bytes)`);
      },
      free_bytes: () => memoryInfo().free_bytes,
    };
  }
}

/** GPU memory behind one range of addresses, twice as long as the memory: it grows in place, so blocks join across growths. */
class MappedMemory implements MemorySource {
  readonly contiguous = true;
  readonly granularity_bytes: number;
  readonly #properties: Int32Array<ArrayBuffer>;
  readonly #access: Int32Array<ArrayBuffer>;
  readonly #cell = new BigUint64Array(new ArrayBuffer(8));
  readonly #range_bytes: number;
  readonly #base: number;
  #mapped = 0;

  /** @param device Number of the GPU. */
  constructor(device: number) {
    const { calls } = cuda();
    // CUmemAllocationProp: type, handle types, location {type, id}, a pointer and 8 bytes of flags, all 0.
    // deno-fmt-ignore
    this.#properties = new Int32Array([CUDA.allocationPinned, 0, CUDA.locationDevice, device, 0, 0, 0, 0]);
    // CUmemAccessDesc: location {type, id}, flags.
    this.#access = new Int32Array([CUDA.locationDevice, device, CUDA.accessReadWrite]);
    const out = addressOf(this.#cell.buffer), properties = addressOf(this.#properties.buffer);
    let code = calls.cuMemGetAllocationGranularity(out, properties, CUDA.granularityRecommended);
    if (code !== 0) throw cudaError(code, "cuMemGetAllocationGranularity");
    const granularity = this.granularity_bytes = Math.max(2 ** 21, Number(this.#cell[0]));
    this.#range_bytes = Math.ceil(2 * memoryInfo().total_bytes / granularity) * granularity;
    code = calls.cuMemAddressReserve(
      out,
      BigInt(this.#range_bytes),
      BigInt(granularity),
      0n,
      0n,
    );
    if (code !== 0) throw cudaError(code, "cuMemAddressReserve", ` (${this.#range_bytes} bytes)`);
    this.#base = Number(this.#cell[0]);
  }

  /** @inheritdoc */
  grow(bytes: number): number | null {
    if (this.#mapped + bytes > this.#range_bytes) return null;
    const { calls } = cuda();
    const size = BigInt(bytes), address = BigInt(this.#base + this.#mapped);
    const properties = addressOf(this.#properties.buffer);
    let code = calls.cuMemCreate(addressOf(this.#cell.buffer), size, properties, 0n);
    if (code === CUDA.errorOutOfMemory) return null;
    if (code !== 0) throw cudaError(code, "cuMemCreate", ` (${bytes} bytes)`);
    const handle = this.#cell[0] as CudaMemoryHandle;
    code = calls.cuMemMap(address, size, 0n, handle, 0n);
    // The mapping keeps the memory; the handle is not needed any more.
    calls.cuMemRelease(handle);
    if (code === CUDA.errorOutOfMemory) return null; // page tables take memory, too
    if (code !== 0) throw cudaError(code, "cuMemMap", ` (${bytes} bytes)`);
    code = calls.cuMemSetAccess(address, size, addressOf(this.#access.buffer), 1n);
    if (code !== 0) calls.cuMemUnmap(address, size); // the next growth maps there again
    if (code === CUDA.errorOutOfMemory) return null;
    if (code !== 0) throw cudaError(code, "cuMemSetAccess", ` (${bytes} bytes)`);
    this.#mapped += bytes;
    return Number(address);
  }

  /** @inheritdoc */
  free_bytes(): number {
    return memoryInfo().free_bytes;
  }
}
