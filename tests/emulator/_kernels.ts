// Compiles and launches single kernels for the emulator's own tests, by the calls of ffi/, on the emulator or a GPU. Not how the project
// launches kernels: that is tensor/cuda/device.ts.

import { addressOf, cString, keepUntilHere } from "../../ffi/address.ts";
import { checkCuda, cuda, type CudaFunctionHandle, type CudaModuleHandle } from "../../ffi/cuda.ts";
import { checkCudart, CUDART, cudart, type CudaStreamHandle } from "../../ffi/cudart.ts";
import { nvrtc } from "../../ffi/nvrtc.ts";

/** Elements of a device array, or the bytes of one parameter. */
export type Elements =
  | Float32Array<ArrayBuffer>
  | Float64Array<ArrayBuffer>
  | Int32Array<ArrayBuffer>
  | Uint32Array<ArrayBuffer>
  | Uint16Array<ArrayBuffer>
  | Uint8Array<ArrayBuffer>
  | BigUint64Array<ArrayBuffer>
  | BigInt64Array<ArrayBuffer>;

/** A kernel's parameter: a number is an i32, elements are its bytes, an array of device memory its address. */
export type Value = number | Elements | DeviceArray<Elements>;

/** Rounds to bfloat16, ties to even; returns the bits. */
export function bf16Bits(x: number): number {
  const bits = new Uint32Array(Float32Array.of(x).buffer)[0];
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
}

/** The value of a bfloat16. */
export function fromBf16(bits: number): number {
  return new Float32Array(Uint32Array.of(bits << 16).buffer)[0];
}

/** Numbers in [-1, 1) that repeat from run to run. */
export function numbers(length: number, seed: number): Float32Array<ArrayBuffer> {
  let state = seed * 2 + 1;
  return Float32Array.from({ length }, () => {
    state = Math.imul(state, 1664525) + 1013904223 | 0;
    return (state >> 8) / 2 ** 23;
  });
}

/** An array in device memory. */
export class DeviceArray<T extends Elements> {
  readonly #host: T;
  /** Its address. */
  readonly address: bigint;

  /** @param host Contents to begin with; {@linkcode read} brings them back up to date. */
  constructor(host: T) {
    this.#host = host;
    const out = new BigUint64Array(new ArrayBuffer(8));
    const { calls } = cudart();
    checkCudart(calls.cudaMalloc(addressOf(out.buffer), BigInt(host.byteLength)), "cudaMalloc");
    this.address = out[0];
    this.#copy(1);
  }

  /** The contents. */
  read(): T {
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
    keepUntilHere(this.#host);
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
  const out32 = new Int32Array(new ArrayBuffer(4));
  const attribute = (which: number) => {
    const code = cudart().calls.cudaDeviceGetAttribute(addressOf(out32.buffer), which, 0);
    checkCudart(code, "cudaDeviceGetAttribute");
    return out32[0];
  };
  const level = attribute(CUDART.attributeMajor) * 10 + attribute(CUDART.attributeMinor);
  checkCudart(cudart().calls.cudaSetDevice(0), "cudaSetDevice");
  const image = await nvrtc().compile(common + source, "test.cu", [
    `--gpu-architecture=sm_${level}`,
    "--std=c++17",
    "-default-device",
  ]);
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
      const slots = values.map((value): Elements => {
        if (value instanceof DeviceArray) return BigUint64Array.of(value.address);
        return typeof value === "number" ? Int32Array.of(value) : value;
      });
      const table = BigUint64Array.from(slots, ({ buffer }) => addressOf(buffer));
      const stream = 0n as CudaStreamHandle;
      const at = addressOf(table.buffer);
      // deno-fmt-ignore
      const code = calls.cuLaunchKernel(kernel, grid, 1, 1, block, 1, 1, shared_bytes, stream, at, 0n);
      keepUntilHere(slots, table, title);
      checkCuda(code, "cuLaunchKernel");
      for (;;) {
        const state = cudart().calls.cudaStreamQuery(stream);
        if (state === CUDART.errorNotReady) continue;
        checkCudart(state, "cudaStreamQuery");
        break;
      }
    },
  };
}
