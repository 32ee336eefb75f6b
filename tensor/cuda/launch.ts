// Loads compiled modules into the GPU and launches their kernels. A launch writes its arguments into a buffer that the kernel keeps and
// makes one call of the driver, which copies them: some microseconds, no garbage but the argument list. compile.ts makes the code.

import { addressOf, cString, keepUntilHere } from "../../ffi/address.ts";
import {
  checkCuda,
  CUDA,
  cuda,
  type CudaCalls,
  cudaError,
  type CudaFunctionHandle,
  type CudaModuleHandle,
} from "../../ffi/cuda.ts";
import type { CudaStreamHandle } from "../../ffi/cudart.ts";
import { CompileError } from "../../ffi/nvrtc.ts";
import type { CompiledModule } from "./compile.ts";
import type { CudaKernel, ModuleSource, ParameterType } from "./context.ts";

/**
 * From this architecture on a kernel may begin before the one before it has ended. What counts is what code was compiled for, not the GPU: in
 * code for older ones `after_previous()` (common.cuh) is empty, and would not wait.
 */
const LOWEST_OVERLAPPING = 90;

/** CU_TENSOR_MAP structs ask for an alignment of 64 bytes; other parameters have 8 at most. */
const STRUCT_ALIGNMENT = 64;

/** Most blocks of a grid in x. */
const MOST_BLOCKS = 2 ** 31 - 1;

/** Bytes of a CUlaunchConfig and of a CUlaunchAttribute. */
const CONFIG_BYTES = 56, ATTRIBUTE_BYTES = 72;

/** How an argument is written. */
const INTEGER_64 = 0, INTEGER_32 = 1, FLOAT_32 = 2, FLOAT_64 = 3, BYTES = 4;

const WRITE: Readonly<Record<string, number>> = {
  ptr: INTEGER_64,
  i64: INTEGER_64,
  i32: INTEGER_32,
  f32: FLOAT_32,
  f64: FLOAT_64,
};

/** A kernel that was compiled and loaded. */
export class LoadedKernel implements CudaKernel {
  readonly #name: string;
  readonly #calls: CudaCalls;
  readonly #handle: CudaFunctionHandle;
  readonly #stream: CudaStreamHandle;
  readonly #types: readonly ParameterType[];
  /** Per argument: how it is written, and at which byte. */
  readonly #write: Uint8Array;
  readonly #offsets: Int32Array;
  /** The arguments, one buffer under four types. */
  readonly #bytes: Uint8Array;
  readonly #u32: Uint32Array;
  readonly #i32: Int32Array;
  readonly #f32: Float32Array;
  readonly #f64: Float64Array;
  /** Addresses of the arguments, as the driver takes them. */
  readonly #table: BigUint64Array<ArrayBuffer>;
  readonly #tableAddress: bigint;
  /** Dynamic shared memory that the kernel may take so far. */
  #shared_bytes = 0;
  /** How it is launched if it overlaps the kernel before it: CUlaunchConfig, behind it one attribute. */
  readonly #config: Uint32Array<ArrayBuffer> | null = null;
  readonly #configAddress: bigint = 0n;

  /**
   * @param name Name for errors.
   * @param handle The function.
   * @param types Types of its parameters.
   * @param stream The stream that it is launched on.
   * @param overlaps Whether it may begin before the kernel before it has ended.
   */
  constructor(
    name: string,
    handle: CudaFunctionHandle,
    types: readonly ParameterType[],
    stream: CudaStreamHandle,
    overlaps = false,
  ) {
    this.#name = name;
    this.#calls = cuda().calls;
    this.#handle = handle;
    this.#stream = stream;
    this.#types = types;
    this.#write = new Uint8Array(types.length);
    this.#offsets = new Int32Array(types.length);
    let end = 0;
    types.forEach((type, i) => {
      const struct = typeof type === "object";
      if (struct) end = Math.ceil(end / STRUCT_ALIGNMENT) * STRUCT_ALIGNMENT;
      this.#write[i] = struct ? BYTES : WRITE[type];
      this.#offsets[i] = end;
      end += struct ? Math.ceil(type.bytes / 8) * 8 : 8;
    });
    const buffer = new ArrayBuffer(end);
    this.#bytes = new Uint8Array(buffer);
    this.#u32 = new Uint32Array(buffer);
    this.#i32 = new Int32Array(buffer);
    this.#f32 = new Float32Array(buffer);
    this.#f64 = new Float64Array(buffer);
    this.#table = BigUint64Array.from(
      types,
      (_, i) => addressOf(buffer) + BigInt(this.#offsets[i]),
    );
    this.#tableAddress = addressOf(this.#table.buffer);
    if (!overlaps) return;
    // struct CUlaunchConfig { unsigned grid[3], block[3], sharedMemBytes; CUstream hStream; CUlaunchAttribute *attrs; unsigned numAttrs; }
    // struct CUlaunchAttribute { int id; char pad[4]; union { int programmaticStreamSerializationAllowed; char pad[64]; } value; }
    this.#config = new Uint32Array((CONFIG_BYTES + ATTRIBUTE_BYTES) / 4);
    this.#configAddress = addressOf(this.#config.buffer);
    const addresses = new BigUint64Array(this.#config.buffer);
    this.#config.set([1, 1, 1, 1, 1, 1, 0]);
    addresses[4] = BigInt.asUintN(64, stream);
    addresses[5] = this.#configAddress + BigInt(CONFIG_BYTES);
    this.#config[12] = 1;
    this.#config[CONFIG_BYTES / 4] = CUDA.launchProgrammaticStreamSerialization;
    this.#config[CONFIG_BYTES / 4 + 2] = 1;
  }

  /** @inheritdoc */
  launch(
    x: number,
    y: number,
    z: number,
    threads: number,
    shared_bytes: number,
    ...values: readonly (number | Uint8Array)[]
  ): void {
    const count = this.#write.length;
    if (values.length !== count) {
      throw new TypeError(
        `Cannot launch ${this.#name} as it must get ${count} arguments: current value is ${values.length}`,
      );
    }
    for (let i = 0; i < count; i++) {
      const value = values[i], offset = this.#offsets[i];
      if (typeof value === "number") {
        switch (this.#write[i]) {
          case INTEGER_64: {
            if (!Number.isSafeInteger(value)) this.#refuse(i, value);
            const low = value >>> 0;
            this.#u32[offset >> 2] = low;
            this.#i32[(offset >> 2) + 1] = (value - low) / 0x1_0000_0000;
            continue;
          }
          case INTEGER_32:
            // Unsigned values of 32 bits have the same bits.
            if ((value | 0) !== value && value >>> 0 !== value) this.#refuse(i, value);
            this.#i32[offset >> 2] = value;
            continue;
          case FLOAT_32:
            this.#f32[offset >> 2] = value;
            continue;
          case FLOAT_64:
            this.#f64[offset >> 3] = value;
            continue;
        }
      } else if (this.#write[i] === BYTES) {
        if (value.length === (this.#types[i] as { readonly bytes: number }).bytes) {
          this.#bytes.set(value, offset);
          continue;
        }
      }
      this.#refuse(i, value);
    }
    if (x === 0 || y === 0 || z === 0) return; // no blocks, no work; CUDA calls it an error
    if (!(x > 0 && x <= MOST_BLOCKS)) { // more would come to the driver modulo 2^32
      throw new RangeError(
        `Cannot launch ${this.#name} as its blocks must be 0 to ${MOST_BLOCKS}: current value is ${x}`,
      );
    }
    if (shared_bytes > this.#shared_bytes) this.#allowShared(shared_bytes);
    const code = this.#call(x, y, z, threads, shared_bytes);
    if (code !== 0) {
      throw cudaError(
        code,
        this.#config === null ? "cuLaunchKernel" : "cuLaunchKernelEx",
        `: ${this.#name}, grid ${x} x ${y} x ${z}, block ${threads}, ${shared_bytes} bytes of shared memory`,
      );
    }
  }

  #call(x: number, y: number, z: number, threads: number, shared_bytes: number): number {
    const config = this.#config;
    if (config === null) {
      // deno-fmt-ignore
      return this.#calls.cuLaunchKernel(this.#handle, x, y, z, threads, 1, 1, shared_bytes, this.#stream, this.#tableAddress, 0n);
    }
    config[0] = x;
    config[1] = y;
    config[2] = z;
    config[3] = threads;
    config[6] = shared_bytes;
    return this.#calls.cuLaunchKernelEx(this.#configAddress, this.#handle, this.#tableAddress, 0n);
  }

  /** Beyond 48 KiB with its static part, a kernel must be allowed its shared memory; once is enough. */
  #allowShared(bytes: number): void {
    const code = this.#calls.cuFuncSetAttribute(
      this.#handle,
      CUDA.functionMaxDynamicSharedBytes,
      bytes,
    );
    if (code !== 0) {
      throw cudaError(
        code,
        "cuFuncSetAttribute",
        `: ${this.#name}, ${bytes} bytes of shared memory`,
      );
    }
    this.#shared_bytes = bytes;
  }

  #refuse(index: number, value: number | Uint8Array): never {
    const type = this.#types[index];
    const wanted = typeof type === "object" ? `${type.bytes} bytes` : `a value for ${type}`;
    const given = typeof value === "number" ? value : `${value.length} bytes`;
    throw new TypeError(
      `Cannot launch ${this.#name} as argument ${index} must be ${wanted}: current value is ${given}`,
    );
  }
}

interface LoadedModule {
  readonly handle: CudaModuleHandle;
  /** Whether its kernels are launched to overlap the one before. */
  readonly overlaps: boolean;
  /** Machine code; the driver may read it as late as a kernel's first use. */
  readonly code: Uint8Array<ArrayBuffer>;
  readonly kernels: Map<string, LoadedKernel>;
}

/** Gives machine code or PTX to the driver. */
function load({ name }: ModuleSource, bytes: Uint8Array<ArrayBuffer>): CudaModuleHandle {
  const cell = new BigUint64Array(new ArrayBuffer(8));
  const code = cuda().calls.cuModuleLoadData(addressOf(cell.buffer), addressOf(bytes.buffer));
  if (code !== 0) throw cudaError(code, "cuModuleLoadData", `: ${name}.cu`);
  return cell[0] as CudaModuleHandle;
}

/** The modules of a GPU. */
export class Modules {
  /** Why modules for exactly this architecture cannot be used; others take their place. */
  readonly problems: readonly Error[];
  readonly #stream: CudaStreamHandle;
  readonly #loaded = new Map<ModuleSource, LoadedModule>();

  /**
   * Loads machine code into the current GPU.
   *
   * @param compiled What {@linkcode compileModules} made.
   * @param stream The stream that kernels are launched on.
   * @throws {CompileError} If modules do not compile, but for those for exactly this architecture, which others can stand in for.
   * @throws {CudaError} If the GPU refuses the code of one.
   */
  constructor(compiled: readonly CompiledModule[], stream: CudaStreamHandle) {
    this.#stream = stream;
    const problems: Error[] = [], needed: Error[] = [];
    for (const { module, architecture, code, error } of compiled) {
      try {
        if (code === undefined) throw error;
        const handle = load(module, code);
        const overlaps = (module.overlaps ?? false) && architecture >= LOWEST_OVERLAPPING;
        this.#loaded.set(module, { handle, overlaps, code, kernels: new Map() });
      } catch (cause) {
        (module.exact ? problems : needed).push(cause as Error);
      }
    }
    if (needed.length === 1) throw needed[0];
    if (needed.length > 1) {
      const messages = needed.map(({ message }) => message).join("\n");
      throw new CompileError(`${needed.length} modules cannot be used:\n${messages}`, {
        cause: needed,
      });
    }
    this.problems = problems;
  }

  /**
   * Whether a module was loaded.
   *
   * @param module The module.
   * @returns True if its kernels can be launched.
   */
  has(module: ModuleSource): boolean {
    return this.#loaded.has(module);
  }

  /**
   * A kernel.
   *
   * @param module Its module.
   * @param name Its name.
   * @returns The kernel, the same for every call.
   * @throws {RangeError} If the module has no such kernel or was not loaded.
   */
  kernel(module: ModuleSource, name: string): LoadedKernel {
    const loaded = this.#loaded.get(module);
    if (loaded === undefined) {
      throw new RangeError(
        `Cannot take kernel ${name} as its module must be for this GPU and compiler: current value is ${module.name}`,
      );
    }
    const known = loaded.kernels.get(name);
    if (known !== undefined) return known;
    const types = module.kernels[name];
    if (types === undefined) {
      throw new RangeError(
        `Cannot take a kernel of ${module.name} as its name must be declared there: current value is "${name}"`,
      );
    }
    const cell = new BigUint64Array(new ArrayBuffer(8)), text = cString(name);
    checkCuda(
      cuda().calls.cuModuleGetFunction(
        addressOf(cell.buffer),
        loaded.handle,
        addressOf(text.buffer),
      ),
      `cuModuleGetFunction for ${module.name}.${name}`,
    );
    keepUntilHere(text);
    const handle = cell[0] as CudaFunctionHandle;
    const title = `${module.name}.${name}`;
    const kernel = new LoadedKernel(title, handle, types, this.#stream, loaded.overlaps);
    loaded.kernels.set(name, kernel);
    return kernel;
  }
}
