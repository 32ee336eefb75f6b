// An NVIDIA GPU as a device: finds it, opens the libraries at the first wish, and joins memory, streams, copies and kernels to
// the one interface that the CPU has, too. One GPU per process; the launcher makes one visible to each rank.

import { addressOf } from "../../ffi/address.ts";
import { cublas } from "../../ffi/cublas.ts";
import { cuda, cudaError } from "../../ffi/cuda.ts";
import { checkCudart, CUDART, cudart, cudartError } from "../../ffi/cudart.ts";
import { nvrtc } from "../../ffi/nvrtc.ts";
import { newArray, type TypedArray } from "../dtype.ts";
import type { Device, Kernels, MemoryStats, StreamEvent } from "../device.ts";
import type { RoutingKernels } from "../routing_kernels.ts";
import type { Tensor } from "../tensor.ts";
import { Arena } from "./arena.ts";
import { compileModules } from "./compile.ts";
import type { CudaContext, CudaKernel, CudaProperties, ModuleSource } from "./context.ts";
import { CUDA_MODULES, cudaKernels, cudaRoutingKernels } from "./kernels.ts";
import { Modules } from "./launch.ts";
import { memoryInfo, memorySource } from "./memory.ts";
import { PinnedMemory, Staging } from "./pinned.ts";
import { CudaEvent, CudaStream, EventPool } from "./streams.ts";
import { encodeTensorMap } from "./tensor_map.ts";

/** Oldest version of CUDA and lowest compute capability, times ten, that are supported. */
const OLDEST_CUDA = 12_000, LOWEST_CAPABILITY = 80;

/** What {@linkcode findCuda} found. */
export type CudaFinding =
  | {
    readonly ok: true;
    /** Number of GPUs that this process sees. */
    readonly devices: number;
    /** Versions of the runtime and of the driver's CUDA: 13000 for 13.0. */
    readonly runtime: number;
    /** @ignore */
    readonly driver: number;
  }
  | {
    readonly ok: false;
    /** Why there is no CUDA here, as half a sentence for a person. */
    readonly reason: string;
  };

let finding: CudaFinding | undefined;

/**
 * Whether this process can use a GPU, and why not. It never throws, opens the libraries (the runtime, the driver, the compiler, cuBLAS) only
 * once, and makes no context.
 *
 * @returns The number of GPUs, or the reason: library missing, driver missing, no device, too old.
 */
export function findCuda(): CudaFinding {
  return finding ??= find();
}

function find(): CudaFinding {
  const no = (reason: string): CudaFinding => ({ ok: false, reason });
  const out = new Int32Array(new ArrayBuffer(4)), at = addressOf(out.buffer);
  try {
    let { calls } = cudart();
    const read = (call: (out: bigint) => number): number => call(at) === 0 ? out[0] : 0;
    const driver = read(calls.cudaDriverGetVersion);
    if (driver === 0) return no("no NVIDIA driver is installed");
    // A runtime of a later major version than the driver's does not work with it.
    const runtimeOf = () => read(calls.cudaRuntimeGetVersion);
    if (Math.floor(runtimeOf() / 1000) > Math.floor(driver / 1000)) {
      if (driver >= OLDEST_CUDA) calls = cudart([Math.floor(driver / 1000)]).calls;
    }
    const runtime = runtimeOf();
    const text = (version: number) =>
      `${Math.floor(version / 1000)}.${Math.floor(version % 1000 / 10)}`;
    if (Math.min(driver, runtime) < OLDEST_CUDA) {
      return no(`CUDA ${text(Math.min(driver, runtime))} is too old, 12.0 is the oldest supported`);
    }
    const code = calls.cudaGetDeviceCount(at);
    const devices = out[0];
    if (code !== 0) {
      calls.cudaGetLastError();
      return no(cudartError(code, "cudaGetDeviceCount").message);
    }
    if (devices === 0) return no("there is no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it");
    let best = 0;
    for (let device = 0; device < devices; device++) best = Math.max(best, capability(device));
    if (best < LOWEST_CAPABILITY) {
      return no(
        `the GPU's compute capability is ${(best / 10).toFixed(1)}, 8.0 is the lowest supported`,
      );
    }
    // Without one of these the device could not be made.
    for (const open of [cuda, nvrtc, cublas]) open();
    return { ok: true, devices, runtime, driver };
  } catch (error) {
    return no(error instanceof Error ? error.message : String(error));
  }
}

function attribute(which: number, device: number): number {
  const out = new Int32Array(new ArrayBuffer(4));
  checkCudart(
    cudart().calls.cudaDeviceGetAttribute(addressOf(out.buffer), which, device),
    "cudaDeviceGetAttribute",
  );
  return out[0];
}

function capability(device: number): number {
  return attribute(CUDART.attributeMajor, device) * 10 + attribute(CUDART.attributeMinor, device);
}

function propertiesOf(device: number): CudaProperties {
  const { calls } = cuda();
  const name = new Uint8Array(new ArrayBuffer(256));
  const code = calls.cuDeviceGetName(addressOf(name.buffer), name.length, device);
  if (code !== 0) throw cudaError(code, "cuDeviceGetName");
  return {
    name: new TextDecoder().decode(name.subarray(0, name.indexOf(0))),
    capability: capability(device),
    multiprocessors: attribute(CUDART.attributeMultiprocessors, device),
    sharedMemory_bytes: attribute(CUDART.attributeSharedMemory, device),
    l2_bytes: attribute(CUDART.attributeL2Bytes, device),
    memory_bytes: memoryInfo().total_bytes,
  };
}

/** Options of {@linkcode cudaDevice}. */
export interface CudaDeviceOptions {
  /** Number of the GPU among those that this process sees. @default {0} */
  readonly device?: number;
  /** Further modules to compile beside the library's own. @default {[]} */
  readonly modules?: readonly ModuleSource[];
}

/** An NVIDIA GPU. */
export class CudaDevice implements Device {
  /** Which family of devices. */
  readonly kind = "cuda" as const;
  /** The GPU's name: `NVIDIA H200`. */
  readonly name: string;
  /** Number of the GPU among those that this process sees. */
  readonly index: number;
  /** The compute stream, on which all kernels run. */
  readonly stream: CudaStream;
  /** What kernel files work with. */
  readonly context: CudaContext;
  /** Why modules for exactly this architecture are not used, though they should be; empty as a rule. */
  readonly problems: readonly Error[];
  readonly #pool: EventPool;
  readonly #arena: Arena;
  readonly #staging: Staging;
  #kernels: Kernels | undefined;
  #routing: RoutingKernels | undefined;

  /** Use {@linkcode cudaDevice}. @ignore */
  constructor(index: number, arena: Arena, pool: EventPool, stream: CudaStream, modules: Modules) {
    this.index = index;
    this.stream = stream;
    this.problems = modules.problems;
    this.#pool = pool;
    this.#arena = arena;
    this.#staging = new Staging(stream, pool);
    const properties = propertiesOf(index);
    this.name = properties.name;
    const { calls } = cudart();
    this.context = {
      properties,
      stream: stream.handle,
      kernel: (module, name): CudaKernel => modules.kernel(module, name),
      has: (module) => modules.has(module),
      allocate: (bytes) => arena.allocate(bytes),
      free: (address) => arena.free(address),
      upload: (source, address) => this.#staging.upload(source, address),
      clear: (address, bytes) => {
        if (bytes === 0) return;
        const code = calls.cudaMemsetAsync(BigInt(address), 0, BigInt(bytes), stream.handle);
        if (code !== 0) throw cudartError(code, "cudaMemsetAsync", ` (${bytes} bytes)`);
      },
      tensorMap: encodeTensorMap,
    };
  }

  /** The kernels of this device. */
  get kernels(): Kernels {
    return this.#kernels ??= cudaKernels(this.context);
  }

  /** The kernels that route tokens without the host. */
  get routing(): RoutingKernels {
    return this.#routing ??= cudaRoutingKernels(this.context);
  }

  /** How often the host has waited for the device so far: every `read` and `synchronize`, and an upload that found its ring full. */
  get hostWaits(): number {
    return this.#pool.hostWaits;
  }

  /** How often another thread has waited for an event so far: see {@linkcode CudaDevice.passing}. */
  get eventWaits(): number {
    return this.#pool.eventWaits;
  }

  /** CUDA events of this device, in use or kept for the next use. */
  get events(): number {
    return this.#pool.created;
  }

  /**
   * Makes another stream.
   *
   * @param name A name for traces.
   * @param options `priority`: CUDA's number, 0 or less for more urgent work.
   * @returns The stream.
   */
  createStream(name: string, options: { readonly priority?: number } = {}): CudaStream {
    return new CudaStream(name, this.#pool, options.priority ?? 0);
  }

  /**
   * Page-locked host memory.
   *
   * @param bytes How much.
   * @returns The memory; dispose of it, or keep it for good.
   */
  pinned(bytes: number): PinnedMemory {
    return new PinnedMemory(bytes);
  }

  /** As {@linkcode Device.hostMemory}: page-locked memory, which takes about a millisecond for 4 MiB. */
  hostMemory(bytes: number): PinnedMemory {
    return new PinnedMemory(bytes);
  }

  /** As {@linkcode Device.passing}: takes a thread of Deno's, of which there are 32, until the device has passed the point. */
  passing(event: StreamEvent): Promise<void> {
    return event instanceof CudaEvent ? event.passing() : Promise.resolve();
  }

  /** Ties the device's clock to the host's anew, for the times of `recordTimed` events: call it once a step when these are wanted. */
  anchor(): void {
    this.#pool.anchor();
  }

  /** As {@linkcode Device.allocate}: device memory, in the order of the compute stream. @throws {OutOfMemoryError} */
  allocate(bytes: number): number {
    return this.#arena.allocate(bytes);
  }

  /** As {@linkcode Device.free}: in the order of the compute stream. */
  free(address: number): void {
    this.#arena.free(address);
  }

  /** As {@linkcode Device.write}: the array may change once it returns. */
  write(source: TypedArray, target: Tensor): void {
    if (source.length !== target.size) {
      throw new RangeError(
        `Cannot write as the array must have ${target.size} elements: current value is ${source.length}`,
      );
    }
    const wanted = newArray(target.dtype, 0).constructor;
    if (source.constructor !== wanted) {
      throw new TypeError(
        `Cannot write as the array must be a ${wanted.name} for ${target.dtype}: current value is ${source.constructor.name}`,
      );
    }
    this.#staging.upload(source, target.address);
  }

  /** As {@linkcode Device.read}: the host waits, without blocking the event loop. */
  async read(source: Tensor): Promise<TypedArray> {
    const target = newArray(source.dtype, source.size);
    await this.#staging.download(source.address, target, this.#arena);
    return target;
  }

  /** Memory statistics. */
  memory(): MemoryStats {
    const arena = this.#arena, { used_bytes, reserved_bytes, peak_bytes } = arena;
    return {
      used_bytes,
      reserved_bytes,
      peak_bytes,
      get free_bytes() {
        return arena.free_bytes; // asks the driver
      },
    };
  }

  /** Makes the present use the peak. */
  resetPeak(): void {
    this.#arena.resetPeak();
  }
}

const devices = new Map<number, Promise<CudaDevice>>();

/**
 * A GPU of this process: made current, its kernels compiled or taken from the cache on disk. Modules for exactly its architecture that
 * do not compile are done without, with a word on standard error; see `problems`.
 *
 * @param options Which GPU.
 * @returns The device, the same for every call.
 * @throws {Error} If CUDA cannot be used here; {@linkcode findCuda} tells beforehand.
 * @throws {CompileError} If a module does not compile, with the compiler's log.
 */
export function cudaDevice(options: CudaDeviceOptions = {}): Promise<CudaDevice> {
  const { device = 0, modules = [] } = options;
  if (modules.length > 0) return make(device, modules);
  let made = devices.get(device);
  if (made === undefined) devices.set(device, made = make(device, []));
  return made;
}

async function make(index: number, extra: readonly ModuleSource[]): Promise<CudaDevice> {
  const found = findCuda();
  if (!found.ok) throw new Error(`Cannot use a GPU as CUDA must work here: ${found.reason}`);
  if (!Number.isInteger(index) || index < 0 || index >= found.devices) {
    throw new RangeError(
      `Cannot use a GPU as its number must be < ${found.devices}: current value is ${index}`,
    );
  }
  const level = capability(index);
  if (level < LOWEST_CAPABILITY) {
    throw new RangeError(
      `Cannot use GPU ${index} as its compute capability must be 8.0 or more: current value is ${
        (level / 10).toFixed(1)
      }`,
    );
  }
  // The context takes a while: it is made on another thread, beside the compiler, then made current here.
  const [compiled] = await Promise.all([
    compileModules([...CUDA_MODULES, ...extra], level),
    cudart().calls.cudaSetDeviceElsewhere(index),
  ]);
  checkCudart(cudart().calls.cudaSetDevice(index), "cudaSetDevice");
  const code = cuda().calls.cuInit(0);
  if (code !== 0) throw cudaError(code, "cuInit");
  const pool = new EventPool();
  const stream = new CudaStream("compute", pool);
  const modules = new Modules(compiled, stream.handle);
  for (const { message } of modules.problems) {
    console.warn(`lina: slower kernels are used for some of this GPU's, which fail: ${message}`);
  }
  return new CudaDevice(index, new Arena(memorySource(index)), pool, stream, modules);
}
