// The CUDA device of the tests: a real GPU where there is one, else the CPU emulator of CUDA, on which all of tensor/cuda and the unchanged
// .cu files run without a GPU (correctness, never speed). Not part of the library.
//
//   const device = await testDevice();
//   Deno.test({ name: "scale() doubles", ignore: !device, fn: … });
//
// What it finds beside wrong results, and a GPU would not always show:
// - Device and shared memory that was never written holds NaNs (0xFF bytes).
// - Asynchronous copies land only when they are waited for; NaNs are in their place until then.
// - Threads run one at a time until they wait, and one warp runs ahead of the others as far as it can, the first in even blocks, the last in
//   odd ones: a missing barrier shows.
// - Barriers and warp operations that can never complete, accesses behind the end of an allocation, after its free, or behind the dynamic
//   shared memory, misaligned 16-byte accesses, indices out of a local or static shared array, division by zero, kernels that run for
//   more than a minute: they end the kernel with an error that names kernel, block and thread, on standard error at once, and from every
//   later call, as on a GPU.
// - Launches overlap, as from Hopper on: a kernel of which a thread has not said after_previous() ends with an error.
// - Streams run as late as they may: when the host asks about them. So host memory that is changed too early, streams that do not wait for
//   each other, and memory that is freed under another stream's work show; so does host code that takes an answer for granted.
//
// Environment variables: LINA_EMULATOR=1 takes the emulator even if there is a GPU, =0 never takes it; LINA_EMULATOR_SEED=7 makes thread
// and block order random; LINA_EMULATOR_FENCE=0 leaves allocations side by side in the arena, where accesses beyond one are not noticed;
// LINA_EMULATOR_DEFER=0 runs streams at once; LINA_EMULATOR_STREAMS=asynchronous runs them beside the host and each other, with LINA_EMULATOR_PAUSE_US
// events pass later by random times of up to so much; LINA_EMULATOR_LIMIT_S=60 bounds a kernel's time; LINA_EMULATOR_CAPABILITY=91 (with 80
// launches do not overlap), LINA_EMULATOR_MULTIPROCESSORS=2, LINA_EMULATOR_MEMORY_MIB=8192 describe the device; LINA_EMULATOR_KEEP=1 keeps
// the sources of kernels in the folder that LINA_EMULATOR_CACHE names.
//
// On a GPU, for sanitize.ts: LINA_TEST_SMALL=1 makes tests choose the emulator's sizes; LINA_TEST_FENCE=1 makes every allocation one of
// CUDA's own, so that compute-sanitizer knows its bounds.
//
// In kernels: `extern __shared__ __align__(1024) u8 name[];` (any type and alignment up to 64 KiB) works on both sides. Inline assembly does
// not: give it a name in common.cuh, as mma_bf16 has, with its emulation in kernel.h.

import type { ModuleSource } from "../../tensor/cuda/context.ts";
import type { CudaDevice } from "../../tensor/cuda/device.ts";
import { buildEmulator } from "./build.ts";

/** Whether {@linkcode testDevice} gave the emulator. */
export let emulated = false;
/** Whether tests keep their sizes small, as on the emulator, or by wish. */
export let smallSizes = Deno.env.get("LINA_TEST_SMALL") === "1";

let fenced = false;
let loaded: Promise<boolean> | undefined;

/**
 * The CUDA device of the tests.
 *
 * @param modules Modules that kernels.ts does not list (yet): then a device of its own, whose `context` has their kernels.
 * @returns A GPU, else the emulator; null, with a message, if there is neither a GPU nor clang.
 * @throws {Error} If there is neither and `LINA_CI` is set.
 */
export async function testDevice(
  modules: readonly ModuleSource[] = [],
): Promise<CudaDevice | null> {
  if (!await (loaded ??= loadCuda())) return null;
  const { cudaDevice } = await import("../../tensor/cuda/device.ts");
  const device = await cudaDevice({ modules });
  if (device.problems.length > 0) throw new AggregateError(device.problems, "broken modules");
  if (fenced) {
    const { fenceDevice } = await import("./fence.ts");
    fenceDevice(device.context);
  }
  return device;
}

/**
 * Loads the CUDA libraries of this process, real or emulated, for tests of what lies below a device.
 *
 * @returns False, with a message, if there are none.
 * @throws {Error} If there are none and `LINA_CI` is set.
 */
export async function loadCuda(): Promise<boolean> {
  const wish = Deno.env.get("LINA_EMULATOR");
  if (wish !== "1" && await hasDriver()) {
    const { findCuda } = await import("../../tensor/cuda/device.ts");
    const found = findCuda();
    if (found.ok) {
      if (Deno.env.get("LINA_TEST_FENCE") === "1") await fence("GPU");
      return true;
    }
    if (wish !== "0") {
      throw new Error(`Cannot test on the GPU (LINA_EMULATOR=1 emulates one): ${found.reason}`);
    }
  }
  const library = wish === "0" ? null : await buildEmulator();
  if (library === null) {
    const message = wish === "0"
      ? "Cannot test on a GPU as there must be an NVIDIA GPU; deno task test has these tests on the emulator"
      : "Cannot test CUDA as there must be an NVIDIA GPU, or clang for its emulator";
    if (Deno.env.get("LINA_CI")) throw new Error(message);
    console.warn(`skipped: ${message}`);
    return false;
  }
  await loadEmulator(library);
  emulated = smallSizes = true;
  if (Deno.env.get("LINA_EMULATOR_FENCE") !== "0") await fence("emulator");
  return true;
}

async function fence(where: "emulator" | "GPU"): Promise<void> {
  const { fenceAllocations } = await import("./fence.ts");
  fenceAllocations(where);
  fenced = true;
}

/** Whether an NVIDIA driver is at work; nothing is loaded, as that could not be undone. */
async function hasDriver(): Promise<boolean> {
  for (const path of ["/dev/nvidiactl", "/dev/dxg"]) {
    try {
      await Deno.stat(path);
      return true;
    } catch {
      // Not this one.
    }
  }
  return false;
}

/** Lets ffi/ open the emulator; afterwards the environment, which child processes and other test files see, is as it was. */
async function loadEmulator(library: string): Promise<void> {
  const names = ["LINA_CUDART", "LINA_CUDA", "LINA_NVRTC", "LINA_CUBLAS"];
  const before = names.map((name) => Deno.env.get(name));
  for (const name of names) Deno.env.set(name, library);
  try {
    const { cudart } = await import("../../ffi/cudart.ts");
    const { cuda } = await import("../../ffi/cuda.ts");
    const { nvrtc } = await import("../../ffi/nvrtc.ts");
    const { cublas } = await import("../../ffi/cublas.ts");
    for (const { path } of [cudart(), cuda(), nvrtc(), cublas()]) {
      if (path !== library) {
        throw new Error(
          `Cannot emulate CUDA as its libraries must not be loaded yet: current value is ${path}`,
        );
      }
    }
  } finally {
    names.forEach((name, i) => {
      const value = before[i];
      if (value === undefined) Deno.env.delete(name);
      else Deno.env.set(name, value);
    });
  }
}
