// A rank of gpu_soak_test.ts: trains for many steps on a GPU or its emulator and measures what must not grow. Its process must have V8's
// --expose-gc, and a young generation that holds all garbage of `WINDOW` steps, so that the heap's growth over them is what they allocate.

import assert from "node:assert/strict";
import { addressOf } from "../ffi/address.ts";
import { checkCudart, cudart } from "../ffi/cudart.ts";
import type { Recompute } from "../moe/block.ts";
import { inFlight } from "../collectives/progress.ts";
import type { Communicator } from "../collectives/types.ts";
import { modelConfig, type ModelOptions } from "../moe/config.ts";
import { Trainer } from "../moe/trainer.ts";
import { trainingData } from "../moe/training_data.ts";
import { Transformer } from "../moe/transformer.ts";
import type { CudaDevice } from "../tensor/cuda/device.ts";
import { rankMain } from "./_ranks.ts";
import { smallText } from "./_train_ranks.ts";

/** What a test asks for. */
export interface SoakArgs {
  readonly model: ModelOptions;
  /** Tokens of a sequence, and sequences of a global batch. */
  readonly sequence: number;
  readonly batch: number;
  readonly accumulate?: number;
  readonly recompute?: Recompute;
  readonly shardOptimizer?: boolean;
  /** Steps after which is looked what is held, ascending; the last ends the run. */
  readonly marks: readonly number[];
  /** Steps after which a checkpoint is saved, and where. The first loads code that stays: let it come before all is warm. */
  readonly saveAt?: readonly number[];
  readonly directory?: string;
}

/** What is held after a step. */
export interface Held {
  readonly step: number;
  /** Device memory that tensors take, and that the device's arena holds. */
  readonly used_bytes: number;
  readonly reserved_bytes: number;
  /** Memory of the GPU that is taken, by whomever: what CUDA and its libraries take shows only here. */
  readonly gpu_bytes: number;
  /** JavaScript's heap, and array buffers beside it, after a collection. */
  readonly heap_bytes: number;
  readonly external_bytes: number;
  /** Memory of the process. */
  readonly rss_bytes: number;
  /** CUDA events. */
  readonly events: number;
  /** Collectives that are not known to have ended. */
  readonly works: number;
}

/** What a rank has measured. */
export interface SoakResult {
  readonly held: readonly Held[];
  /** Host waits of a step, lowest and highest. */
  readonly waits: readonly [number, number];
  /** Bytes that JavaScript allocates per step: its heap, and array buffers. */
  readonly garbage_bytes: number;
  readonly buffers_bytes: number;
  /** Loss of the first step and of the last. */
  readonly loss: readonly [number, number];
  /** Peak of the device memory after half of the steps, and after all. */
  readonly peak_bytes: readonly [number, number];
  readonly step_ms: number;
}

/** Steps over which allocations are counted. */
const WINDOW = 10;

async function soak(
  comm: Communicator,
  args: SoakArgs,
  device: CudaDevice,
): Promise<SoakResult> {
  const { model: sizes, sequence, batch, accumulate = 1, marks } = args;
  const [warm] = marks, steps = marks.at(-1)!;
  const { recompute, shardOptimizer, saveAt, directory } = args;
  const text = smallText(100_000);
  const parts = { train: text, validation: text, vocabularySize: 64, bytesPerToken: 1 };
  const shape = { sequence, batch, accumulate, seed: 5, rank: comm.rank, size: comm.size };
  const config = modelConfig(sizes);
  using model = new Transformer({ device, comm, config, seed: 11, recompute });
  await using trainer = await Trainer.create({
    world: comm,
    device,
    model,
    data: trainingData(parts, shape),
    learningRate: { peak: 2e-3, warmup: 10, steps },
    accumulate,
    shardOptimizer,
  });
  const held: Held[] = [];
  const waits: [number, number] = [Infinity, 0];
  const loss: [number, number] = [0, 0];
  const peak: [number, number] = [0, 0];
  const counted = new Garbage();
  let start = 0;
  for (let step = 1; step <= steps; step++) {
    const before = device.hostWaits;
    counted.stepStarts();
    const row = await trainer.step();
    counted.stepEnds();
    const waited = device.hostWaits - before;
    waits[0] = Math.min(waits[0], waited);
    waits[1] = Math.max(waits[1], waited);
    if (step === 1) loss[0] = row.loss;
    loss[1] = row.loss;
    if (step === Math.floor(steps / 2)) peak[0] = row.peak_bytes;
    peak[1] = row.peak_bytes;
    if (saveAt?.includes(step)) await trainer.save(directory!);
    if (step % WINDOW === 0) counted.collect(step >= warm);
    if (step === warm) start = performance.now();
    if (marks.includes(step)) held.push(holding(step, device));
  }
  return {
    held,
    waits,
    loss,
    peak_bytes: peak,
    ...counted.perStep(),
    step_ms: (performance.now() - start) / (steps - warm),
  };
}

function collect(): void {
  (globalThis as unknown as { gc(): void }).gc();
}

function gpuBytes(): number {
  const out = new BigUint64Array(new ArrayBuffer(16)), at = addressOf(out.buffer);
  checkCudart(cudart().calls.cudaMemGetInfo(at, at + 8n), "cudaMemGetInfo");
  return Number(out[1] - out[0]);
}

function holding(step: number, device: CudaDevice): Held {
  collect();
  collect();
  const { heapUsed, external, rss } = Deno.memoryUsage();
  const { used_bytes, reserved_bytes } = device.memory();
  return {
    step,
    used_bytes,
    reserved_bytes,
    gpu_bytes: gpuBytes(),
    heap_bytes: heapUsed,
    external_bytes: external,
    rss_bytes: rss,
    events: device.events,
    works: inFlight(),
  };
}

/** Counts what steps allocate: the heap only grows while nothing is collected. */
class Garbage {
  #heap = 0;
  #external = 0;
  #grown = 0;
  #buffers = 0;
  #steps = 0;
  #counting = false;

  stepStarts(): void {
    if (!this.#counting) return;
    const { heapUsed, external } = Deno.memoryUsage();
    this.#heap = heapUsed;
    this.#external = external;
  }

  stepEnds(): void {
    if (!this.#counting) return;
    const { heapUsed, external } = Deno.memoryUsage();
    // A collection on V8's own account would hide what the step has allocated.
    if (heapUsed < this.#heap || external < this.#external) return;
    this.#grown += heapUsed - this.#heap;
    this.#buffers += external - this.#external;
    this.#steps++;
  }

  /** Collects what the steps have left, so that V8 need not; the steps after this are counted, or not. */
  collect(counting: boolean): void {
    collect();
    this.#counting = counting;
  }

  perStep(): { readonly garbage_bytes: number; readonly buffers_bytes: number } {
    assert(this.#steps > 0, "no step has passed without a collection");
    return { garbage_bytes: this.#grown / this.#steps, buffers_bytes: this.#buffers / this.#steps };
  }
}

await rankMain(({ comm, args, device }) => soak(comm, args as SoakArgs, device as CudaDevice));
