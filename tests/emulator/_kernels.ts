// Compiles and launches single kernels on the emulator for its own tests, by the calls of ffi/. Not how the project launches kernels:
// that is tensor/cuda/device.ts.

import { addressOf, cString } from "../../ffi/address.ts";
import { checkCuda, cuda, type CudaFunctionHandle, type CudaModuleHandle } from "../../ffi/cuda.ts";
import { checkCudart, cudart, type CudaStreamHandle } from "../../ffi/cudart.ts";
import { nvrtc } from "../../ffi/nvrtc.ts";

/** A value of a kernel's parameter: a number is an i32, an f32 in a `Float32Array`, an array of device memory its address. */
export type Value = number | Float32Array<ArrayBuffer> | DeviceArray;

/** Keeps what C reads alive up to here. */
function kept(..._values: readonly unknown[]): void {}

type Host = Float32Array<ArrayBuffer> | Int32Array<ArrayBuffer> | Uint16Array<ArrayBuffer>;

/** An array in device memory. */
export class DeviceArray {
  readonly #host: Host;
  /** Its address. */
  readonly address: bigint;

  /** @param host Contents, or null elements to begin with. */
  constructor(host: Host) {
    this.#host = host;
    const out = new BigUint64Array(new ArrayBuffer(8));
    const { calls } = cudart();
    checkCudart(calls.cudaMalloc(addressOf(out.buffer), BigInt(host.byteLength)), "cudaMalloc");
    this.address = out[0];
    this.#copy(1);
  }

  /** The contents. */
  read(): Host {
    this.#copy(2);
    return this.#host;
  }

  #copy(kind: number): void {
    const { address } = this;
    const host = addressOf(this.#host.buffer);
    const [to, from] = kind === 1 ? [address, host] : [host, address];
    const bytes = BigInt(this.#host.byteLength);
    const stream = 0n as CudaStreamHandle;
    checkCudart(cudart().calls.cudaMemcpyAsync(to, from, bytes, kind, stream), "cudaMemcpyAsync");
    kept(this.#host);
  }

  /** Gives the memory back. */
  free(): void {
    checkCudart(cudart().calls.cudaFree(this.address), "cudaFree");
  }
}

/** A compiled source. */
export interface Kernels {
  /** Launches a kernel and waits. */
  run(name: string, grid: number, block: number, shared_bytes: number, ...values: Value[]): void;
}

/**
 * Compiles a source.
 *
 * @param source CUDA C++; common.cuh comes before it.
 * @returns Its kernels.
 */
export async function compile(source: string): Promise<Kernels> {
  const common = await Deno.readTextFile(
    new URL("../../tensor/cuda/common.cuh", import.meta.url),
  );
  const image = await nvrtc().compile(common + source, "test.cu", ["--gpu-architecture=sm_80"]);
  const { calls } = cuda();
  const out = new BigUint64Array(new ArrayBuffer(8));
  checkCuda(
    calls.cuModuleLoadData(addressOf(out.buffer), addressOf(image.buffer)),
    "cuModuleLoadData",
  );
  const module = out[0] as CudaModuleHandle;
  return {
    run(name, grid, block, shared_bytes, ...values) {
      const title = cString(name), handle = new BigUint64Array(new ArrayBuffer(8));
      const get = calls.cuModuleGetFunction(
        addressOf(handle.buffer),
        module,
        addressOf(title.buffer),
      );
      checkCuda(get, "cuModuleGetFunction");
      const kernel = handle[0] as CudaFunctionHandle;
      if (shared_bytes > 48 * 1024) {
        checkCuda(calls.cuFuncSetAttribute(kernel, 8, shared_bytes), "cuFuncSetAttribute");
      }
      const slots = values.map((value) => {
        if (value instanceof DeviceArray) return BigUint64Array.of(value.address);
        return typeof value === "number" ? Int32Array.of(value) : value;
      });
      const table = BigUint64Array.from(slots, (slot) => addressOf(slot.buffer as ArrayBuffer));
      const stream = 0n as CudaStreamHandle;
      const at = addressOf(table.buffer);
      // deno-fmt-ignore
      const code = calls.cuLaunchKernel(kernel, grid, 1, 1, block, 1, 1, shared_bytes, stream, at, 0n);
      kept(slots, table, title);
      checkCuda(code, "cuLaunchKernel");
      checkCudart(cudart().calls.cudaStreamQuery(stream), "cudaStreamQuery");
    },
  };
}
