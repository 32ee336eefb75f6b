// How ranks of a test share one GPU, or the emulators of CUDA and NCCL where there is none.

import { buildEmulator } from "./emulator/build.ts";
import { buildNccl } from "./emulator/nccl.ts";

/** Whether there is an NVIDIA GPU, and the environment does not wish for the emulator. */
export async function hasGpu(): Promise<boolean> {
  try {
    await Deno.stat("/dev/nvidiactl");
    return Deno.env.get("LINA_EMULATOR") !== "1";
  } catch {
    return false;
  }
}

/**
 * What ranks need in their environment to compute on a GPU and talk by NCCL, real or emulated.
 *
 * @returns The variables; null, with a message, if there is neither a GPU nor a compiler.
 * @throws {Error} If there is neither and `LINA_CI` is set.
 */
export async function gpuRanksEnv(): Promise<Readonly<Record<string, string>> | null> {
  if (await hasGpu()) {
    return { LINA_TEST_BACKEND: "nccl", NCCL_SOCKET_IFNAME: "lo", NCCL_DEBUG: "WARN" };
  }
  const library = Deno.env.get("LINA_EMULATOR") !== "0" && await buildEmulator() &&
    await buildNccl(false);
  if (library) {
    return {
      LINA_TEST_BACKEND: "nccl",
      LINA_EMULATOR: "1",
      LINA_NCCL_LIB: library,
      LINA_EMULATOR_MEMORY_MIB: "256",
    };
  }
  const message = "Cannot test ranks with GPUs as there must be an NVIDIA GPU, or clang on Linux";
  if (Deno.env.get("LINA_CI")) throw new Error(message);
  console.warn(`skipped: ${message}`);
  return null;
}

/** A daemon by which ranks run on a GPU at the same time; without it they take turns, slowly. */
export class Mps implements AsyncDisposable {
  /** Variables that the ranks need. */
  readonly env: Record<string, string> = {};
  #folder = "";

  /** Starts one, unless one runs, or there is none, or no GPU. */
  static async start(): Promise<Mps> {
    const mps = new Mps();
    // Whoever has set it runs one.
    if (Deno.env.get("CUDA_MPS_PIPE_DIRECTORY") || !await hasGpu()) return mps;
    mps.#folder = await Deno.makeTempDir({ prefix: "lina-mps-" });
    const env = {
      CUDA_MPS_PIPE_DIRECTORY: mps.#folder,
      CUDA_MPS_LOG_DIRECTORY: mps.#folder,
      CUDA_DEVICE_MAX_CONNECTIONS: "8", // the default lets streams wait for each other falsely
    };
    try {
      await new Deno.Command("nvidia-cuda-mps-control", { args: ["-d"], env }).output();
      Object.assign(mps.env, env);
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
    return mps;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#folder === "") return;
    if (this.env.CUDA_MPS_PIPE_DIRECTORY) {
      const { env } = this;
      const child = new Deno.Command("nvidia-cuda-mps-control", { env, stdin: "piped" }).spawn();
      const writer = child.stdin.getWriter();
      await writer.write(new TextEncoder().encode("quit\n"));
      await writer.close();
      await child.status;
    }
    await Deno.remove(this.#folder, { recursive: true });
  }
}
