// What the rooms of the CUDA device share: the GPU's properties, the compute stream, memory, and compiled kernels. Interfaces only;
// device.ts makes them, and the kernel files (elementwise.ts, norms.ts, …) are written against them.

/** Type of a kernel's parameter: a device address, integers, floats, or a struct of that many bytes (a tensor map has 128). */
export type ParameterType = "ptr" | "i32" | "i64" | "f32" | "f64" | { readonly bytes: number };

/** One `.cu` file as a text import, and what may be launched from it. */
export interface ModuleSource {
  /** Name for errors and the cache: `elementwise`. */
  readonly name: string;
  /** CUDA C++; `common.cuh` comes before it. It includes no header, so that NVRTC needs none. */
  readonly source: string;
  /**
   * Kernels by their `extern "C"` name, with the types of their parameters in order.
   */
  readonly kernels: Readonly<Record<string, readonly ParameterType[]>>;
  /** Lowest compute capability that it is for, as 90 for Hopper; not compiled on older ones. @default {80} */
  readonly from?: number;
  /**
   * Whether it uses instructions of exactly that architecture (sm_90a: wgmma); then it is compiled for no other. Rooms do without it where
   * {@linkcode CudaContext.has} says so: on other GPUs, and where it does not compile. All other modules must. @default {false}
   */
  readonly exact?: boolean;
  /**
   * Whether every kernel begins with `after_previous()` (common.cuh), so that it may be launched before the one before it has ended. Small kernels
   * that follow each other then take a microsecond or two less each. @default {false}
   */
  readonly overlaps?: boolean;
}

/** A compiled kernel. */
export interface CudaKernel {
  /**
   * Enqueues the kernel on the compute stream.
   *
   * @param x Blocks in x.
   * @param y Blocks in y.
   * @param z Blocks in z.
   * @param threads Threads per block.
   * @param shared_bytes Dynamic shared memory per block; more than 48 KiB needs no further call.
   * @param values Values of the parameters: addresses and integers as numbers, a struct as a `Uint8Array` of its bytes.
   * @throws {CudaError} If the launch is impossible.
   */
  launch(
    x: number,
    y: number,
    z: number,
    threads: number,
    shared_bytes: number,
    ...values: readonly (number | Uint8Array)[]
  ): void;
}

/** What is known of the GPU. */
export interface CudaProperties {
  /** Its name: `NVIDIA H200`. */
  readonly name: string;
  /** Compute capability times ten: 90. */
  readonly capability: number;
  /** Number of multiprocessors that this process may use. */
  readonly multiprocessors: number;
  /** Most dynamic shared memory of a block, in bytes. */
  readonly sharedMemory_bytes: number;
  /** L2 cache in bytes. */
  readonly l2_bytes: number;
  /** Memory of the GPU in bytes. */
  readonly memory_bytes: number;
}

/** What kernel files work with. */
export interface CudaContext {
  /** The GPU. */
  readonly properties: CudaProperties;
  /** Handle of the compute stream (`cudaStream_t`). */
  readonly stream: bigint;
  /**
   * A kernel of a module; all modules were compiled when the device was made.
   *
   * @param module The module.
   * @param name The kernel's `extern "C"` name.
   * @returns The kernel; look it up once.
   * @throws {RangeError} If the module has no such kernel, or was not loaded for this GPU: ask {@linkcode CudaContext.has} first.
   */
  kernel(module: ModuleSource, name: string): CudaKernel;
  /** Whether a module was compiled and loaded for this GPU. */
  has(module: ModuleSource): boolean;
  /** Device memory, aligned to 256 bytes; in the order of the compute stream. @throws {OutOfMemoryError} */
  allocate(bytes: number): number;
  /** Gives it back in the order of the compute stream. */
  free(address: number): void;
  /** Enqueues a copy of host bytes to the device; the bytes may change once it returns (they are staged in pinned memory). */
  upload(source: ArrayBufferView, address: number): void;
  /** Enqueues `cudaMemsetAsync`. */
  clear(address: number, bytes: number): void;
  /**
   * Encodes a tensor map (`cuTensorMapEncodeTiled`) for the bulk tensor copy engine.
   *
   * @param options Element type, address, sizes and box, innermost dimension first; strides in bytes of all dimensions but the innermost.
   * @returns 128 bytes: a struct parameter of a kernel, or to be uploaded to a table.
   */
  tensorMap(options: {
    readonly dtype: "bf16" | "f32";
    readonly address: number;
    readonly sizes: readonly number[];
    readonly strides_bytes: readonly number[];
    readonly box: readonly number[];
    readonly swizzle: "none" | "32B" | "64B" | "128B";
  }): Uint8Array;
}
