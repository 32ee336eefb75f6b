// Gives every allocation of the emulated device a mapping of its own, filled with NaNs, that ends at a closed page and is closed when it
// is freed: reads and writes behind the end and after the free fault in the kernel that does them, and writes into the last bytes before the
// page or before the start are found at the free. The arena still does its accounting. Only for the emulator, where memory costs nothing.

import { addressOf } from "../../ffi/address.ts";
import { checkCudart, cudart } from "../../ffi/cudart.ts";
import { Arena } from "../../tensor/cuda/arena.ts";
import type { CudaContext } from "../../tensor/cuda/context.ts";

/** Stream of each arena's device: memory is freed in its order. */
const streams = new WeakMap<Arena, bigint>();
let making = 0n;

/** Replaces the arena's addresses in this process. */
export function fenceAllocations(): void {
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
    checkCudart(calls.cudaMalloc(addressOf(cell.buffer), BigInt(bytes)), "cudaMalloc");
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
    const code = cudaFreeAsync(BigInt(address), streams.get(this) ?? 0n);
    checkCudart(code, "cudaFreeAsync");
  };
}

/** Tells which stream the memory of a new device is freed in. */
export function fenceDevice(context: CudaContext): void {
  making = context.stream;
  context.free(context.allocate(1));
  making = 0n;
}
