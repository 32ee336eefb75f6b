// What the GPU benchmarks share: timing by events with a cold L2 cache, running the PyTorch side as a process of its own, and the
// description of the machine that every result carries.

import type { CudaDevice } from "../tensor/cuda/device.ts";
import type { CudaEvent } from "../tensor/cuda/streams.ts";

/** Bytes that are written between two timed runs, so that no run finds its data in the L2 cache. */
const FLUSH_BYTES = 256 * 2 ** 20;

/** Times work on the GPU. */
export class GpuTimer implements Disposable {
  readonly #device: CudaDevice;
  readonly #flush: number;

  /** Takes the memory that flushes the cache. */
  constructor(device: CudaDevice) {
    this.#device = device;
    this.#flush = device.allocate(FLUSH_BYTES);
  }

  /**
   * Median time of a function's GPU work, each run with a cold L2 cache.
   *
   * @param work Enqueues the work; may be asynchronous on the host.
   * @param repeats Timed runs, after `warm` others.
   * @returns Milliseconds on the GPU, and milliseconds of the host for enqueuing; medians.
   */
  async time(
    work: () => unknown,
    repeats: number,
    warm = 3,
  ): Promise<{ readonly gpu_ms: number; readonly host_ms: number }> {
    const { stream } = this.#device;
    for (let i = 0; i < warm; i++) await work();
    await stream.synchronize();
    // All runs are enqueued one after another, as in a training loop: the GPU does not wait for the host between them.
    const runs: (readonly [CudaEvent, CudaEvent])[] = [], host: number[] = [];
    for (let i = 0; i < repeats; i++) {
      this.#device.context.clear(this.#flush, FLUSH_BYTES);
      const start = stream.recordTimed();
      const began = performance.now();
      await work();
      host.push(performance.now() - began);
      runs.push([start, stream.recordTimed()]);
    }
    await stream.synchronize();
    const gpu = runs.map(([start, end]) => (end.time() - start.time()) / 1000);
    return { gpu_ms: median(gpu), host_ms: median(host) };
  }

  /** Frees the memory. */
  [Symbol.dispose](): void {
    this.#device.free(this.#flush);
  }
}

/** The median of numbers. */
export function median(numbers: readonly number[]): number {
  const sorted = [...numbers].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/**
 * Runs the other side of a comparison and reads the JSON lines that it prints.
 *
 * @param script File under bench/peers/.
 * @param args Its arguments.
 * @returns One object per line; empty, with a message, where Python or PyTorch is missing.
 */
export async function peer(script: string, args: readonly string[]): Promise<PeerRow[]> {
  const path = new URL(`peers/${script}`, import.meta.url).pathname;
  let result: Deno.CommandOutput;
  try {
    result = await new Deno.Command(Deno.env.get("PYTHON") ?? "python3", {
      args: [path, ...args],
      stdin: "null",
    }).output();
  } catch (error) {
    console.error(`no peer: ${error instanceof Error ? error.message : error}`);
    return [];
  }
  const decoder = new TextDecoder();
  if (result.code !== 0) {
    console.error(`no peer: ${script} ended with ${result.code}\n${decoder.decode(result.stderr)}`);
  }
  return decoder.decode(result.stdout).split("\n").filter((line) => line.startsWith("{"))
    .map((line) => JSON.parse(line));
}

/** A line that the other side printed. */
export interface PeerRow {
  /** Which side. */
  readonly side: string;
  readonly [name: string]: unknown;
}

/** What every result says of where it was measured. */
export function origin(device: CudaDevice, command: string): Record<string, string> {
  return {
    date: new Date().toISOString(),
    machine: `${device.name}, Deno ${Deno.version.deno}`,
    command,
  };
}
