// What the GPU benchmarks share: asking for a GPU, timing by events with a cold L2 cache, running the PyTorch side as a process of its own, and the
// description of the machine that every result carries.

import { countGpus, NO_GPU } from "../collectives/device_choice.ts";
import { type CudaDevice, findCuda } from "../tensor/cuda/device.ts";
import type { Device } from "../tensor/device.ts";
import type { CudaEvent } from "../tensor/cuda/streams.ts";

/** Bytes that are written between two timed runs, so that no run finds its data in the L2 cache. */
const FLUSH_BYTES = 256 * 2 ** 20;

/** Ends this process with exit code 1 and a line that says why, if no GPU can be used here. Programs call it before they start anything. */
export function needGpu(): void {
  needGpuHardware();
  const found = findCuda();
  if (!found.ok) refuse(found.reason);
}

/** The same for programs whose own process leaves CUDA alone: ends it if the machine has no GPU. */
export function needGpuHardware(): void {
  if (countGpus() === 0 && !Deno.env.has("LINA_CUDART")) refuse(NO_GPU);
}

function refuse(reason: string): never {
  console.error(`error: Cannot measure a GPU: ${reason}`);
  Deno.exit(1);
}

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
    for (let i = 0; i < warm; i++) await work();
    await this.#device.stream.synchronize();
    const { gpu_ms, host_ms } = await this.#runs(work, repeats);
    return { gpu_ms: median(gpu_ms), host_ms: median(host_ms) };
  }

  /**
   * Times of a function's GPU work, each run with a cold L2 cache, behind so much of the same work that the GPU's clock is what it is in a long
   * run: without a gap in between. The host waits three times for the GPU.
   *
   * @param work Enqueues the work; may be asynchronous on the host.
   * @param repeats Timed runs.
   * @param warm_ms Time of the runs before.
   * @returns Milliseconds on the GPU, and milliseconds of the host for enqueuing, of each run.
   */
  async times(
    work: () => unknown,
    repeats: number,
    warm_ms: number,
  ): Promise<{ readonly gpu_ms: number[]; readonly host_ms: number[] }> {
    const { stream } = this.#device;
    await work();
    await stream.synchronize();
    const began = performance.now();
    await work();
    await stream.synchronize();
    const count = Math.ceil(warm_ms / (performance.now() - began));
    for (let i = 0; i < count; i++) await work();
    return await this.#runs(work, repeats);
  }

  async #runs(
    work: () => unknown,
    repeats: number,
  ): Promise<{ readonly gpu_ms: number[]; readonly host_ms: number[] }> {
    const { stream } = this.#device;
    // All runs are enqueued one after another, as in a training loop: the GPU does not wait for the host between them.
    const runs: (readonly [CudaEvent, CudaEvent])[] = [], host_ms: number[] = [];
    for (let i = 0; i < repeats; i++) {
      this.#device.context.clear(this.#flush, FLUSH_BYTES);
      const start = stream.recordTimed();
      const began = performance.now();
      await work();
      host_ms.push(performance.now() - began);
      runs.push([start, stream.recordTimed()]);
    }
    await stream.synchronize();
    return { gpu_ms: runs.map(([start, end]) => (end.time() - start.time()) / 1000), host_ms };
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

/** The Python of the other sides. */
const PYTHON = Deno.env.get("PYTHON") ?? "python3";

/**
 * Whether the other sides can run: says what to do if there is no Python, or one without PyTorch.
 *
 * @returns Whether `peer` and `Peer` can start.
 */
export async function hasPyTorch(): Promise<boolean> {
  const code = "import importlib.util as u; exit(0 if u.find_spec('torch') else 3)";
  let what = "has no PyTorch";
  try {
    const { code: exit } = await new Deno.Command(PYTHON, { args: ["-c", code] }).output();
    if (exit !== 3) return true; // what else is wrong, the script says itself
  } catch (error) {
    what = `does not start (${(error as Error).message})`;
  }
  console.error(`no peer: ${PYTHON} ${what}: install torch, or set PYTHON to a Python that has it`);
  return false;
}

/**
 * Runs the other side of a comparison and reads the JSON lines that it prints.
 *
 * @param script File under bench/peers/.
 * @param args Its arguments.
 * @returns One object per line; empty, with a message, where Python or PyTorch is missing.
 */
export async function peer(script: string, args: readonly string[]): Promise<PeerRow[]> {
  if (!await hasPyTorch()) return [];
  const path = new URL(`peers/${script}`, import.meta.url).pathname;
  const result = await new Deno.Command(PYTHON, { args: [path, ...args], stdin: "null" }).output();
  const decoder = new TextDecoder();
  if (result.code !== 0) {
    console.error(`no peer: ${script} ended with ${result.code}\n${decoder.decode(result.stderr)}`);
  }
  return decoder.decode(result.stdout).split("\n").filter((line) => line.startsWith("{"))
    .map((line) => JSON.parse(line));
}

/**
 * The other side of a comparison as a process that stays and does what it is told, so that the sides can take turns: it answers each JSON line
 * with one.
 */
export class Peer implements AsyncDisposable {
  readonly #script: string;
  readonly #child: Deno.ChildProcess;
  readonly #requests: WritableStreamDefaultWriter<Uint8Array>;
  readonly #answers: AsyncGenerator<string>;

  /**
   * Starts it.
   *
   * @param script File under bench/peers/.
   * @throws {Deno.errors.NotFound} If there is no Python.
   */
  constructor(script: string) {
    this.#script = script;
    this.#child = new Deno.Command(PYTHON, {
      args: [new URL(`peers/${script}`, import.meta.url).pathname],
      stdin: "piped",
      stdout: "piped",
    }).spawn();
    this.#requests = this.#child.stdin.getWriter();
    this.#answers = jsonLines(this.#child.stdout);
  }

  /**
   * Asks for something; requests are answered in their order.
   *
   * @param request Plain data.
   * @returns The answer; null, with a message, if it could not be done or the process has ended.
   */
  async ask(request: Readonly<Record<string, unknown>>): Promise<Record<string, unknown> | null> {
    const line = new TextEncoder().encode(JSON.stringify(request) + "\n");
    this.#requests.write(line).catch(() => {}); // an end shows in the answers
    const { done, value } = await this.#answers.next();
    const answer = done ? { error: "it has ended" } : JSON.parse(value);
    if (!("error" in answer)) return answer;
    console.error(`${this.#script}: ${JSON.stringify(request)}: ${answer.error}`);
    return null;
  }

  /** Ends it. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#requests.close().catch(() => {});
    this.#child.kill();
    await this.#answers.return(undefined);
    await this.#child.status;
  }
}

/** The lines that hold JSON objects. */
async function* jsonLines(stream: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  let rest = "";
  for await (const text of stream.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n");
    rest = lines.pop()!;
    for (const line of lines) if (line.startsWith("{")) yield line;
  }
}

/** A line that the other side printed. */
export interface PeerRow {
  /** Which side. */
  readonly side: string;
  readonly [name: string]: unknown;
}

/** What every result says of where it was measured. */
export function origin(device: Device, command: string): Record<string, string> {
  return {
    date: new Date().toISOString(),
    machine: `${device.name}, Deno ${Deno.version.deno}`,
    command,
  };
}
