// Gives every allocation of the emulated device a mapping of its own, filled with NaNs, that ends at a closed page and is closed when it
// is freed: reads and writes behind the end and after the free fault in the kernel that does them, and writes into the last bytes before the
// page or before the start are found at the free. The arena still does its accounting. On a GPU allocations are CUDA's own, slowly: not for
// use but under compute-sanitizer, which then knows where each one ends.

import { addressOf } from "../../ffi/address.ts";
import { checkCudart, cudart } from "../../ffi/cudart.ts";
import { Arena } from "../../tensor/cuda/arena.ts";
import type { CudaContext } from "../../tensor/cuda/context.ts";

/** Stream of each arena's device: memory is freed in its order. */
const streams = new WeakMap<Arena, bigint>();
let making = 0n;

/**
 * Replaces the arena's addresses in this process.
 *
 * @param where A GPU frees memory that was not allocated in a stream's order only once all work is done.
 */
export function fenceAllocations(where: "emulator" | "GPU"): void {
  const { calls, path } = cudart();
  const table = { cudaFreeAsync: { parameters: ["u64", "u64"], result: "i32" } } as const;
  // deno-lint-ignore lina/dlopen-in-ffi
  const { cudaFreeAsync } = Deno.dlopen(path, table).symbols;
  const { allocate, free } = Arena.prototype;
  const cell = new BigUint64Array(new ArrayBuffer(8));
  /** The arena's own address by the one that was given out. */
  const inner = new Map<number, number>();
  Arena.prototype.allocate = function (bytes: number): number {
    const own = allocate.call(this, bytes);
    const wanted = BigInt(where === "GPU" ? Math.max(1, bytes) : bytes);
    checkCudart(calls.cudaMalloc(addressOf(cell.buffer), wanted), "cudaMalloc");
    const address = Number(cell[0]);
    inner.set(address, own);
    if (making !== 0n) streams.set(this, making);
    return address;
  };
  Arena.prototype.free = function (address: number): void {
    const own = inner.get(address);
    if (own === undefined) return free.call(this, address); // it says what is wrong
    inner.delete(address);
    free.call(this, own);
    const code = where === "GPU"
      ? calls.cudaFree(BigInt(address))
      : cudaFreeAsync(BigInt(address), streams.get(this) ?? 0n);
    checkCudart(code, "cudaFree");
  };
}

/** Tells which stream the memory of a new device is freed in. */
export function fenceDevice(context: CudaContext): void {
  making = context.stream;
  context.free(context.allocate(1));
  making = 0n;
}
