// The plain scheduler, first in, first out, as DeepSpeed and PyTorch's DistributedDataParallel do it: gradients are collected in
// buckets in the order in which they become ready, and a full bucket is reduced at once, beside whatever all-to-all is running.

import { reducedGradients } from "./graph.ts";
import type {
  Boundary,
  CollectiveScheduler,
  LaunchState,
  MicroOp,
  MicroOpPart,
  Schedule,
  StepGraph,
} from "./hooks.ts";

/** Bytes of a bucket of DistributedDataParallel: 25 MiB. */
export const BUCKET_BYTES: number = 25 * 2 ** 20;

/** Options of {@linkcode Fifo}. */
export interface FifoOptions {
  /** Most bytes of one bucket; a gradient that is larger has a bucket of its own. @default {26_214_400} */
  readonly bucketBytes?: number;
}

/** Buckets that are launched as their gradients become ready. */
export class Fifo implements CollectiveScheduler {
  /** Name for traces and tables. */
  readonly name: string = "fifo";
  readonly #bucketBytes: number;

  /**
   * Makes the scheduler.
   *
   * @param options Size of the buckets.
   * @throws {RangeError} If the size is not positive.
   */
  constructor(options: FifoOptions = {}) {
    this.#bucketBytes = options.bucketBytes ?? BUCKET_BYTES;
    if (!(this.#bucketBytes > 0)) {
      throw new RangeError(
        `Cannot bucket gradients as the bucket must be larger than 0 bytes: current value is ${this.#bucketBytes}`,
      );
    }
  }

  /**
   * Fills buckets with whole gradients, in the order of the graph. A bucket holds gradients of one element type only, reduced over the same
   * ranks; one of each kind is open at a time, so that small gradients of one type between large ones of another do not cut their buckets short.
   *
   * @param graph The step.
   * @returns One micro-op per bucket, in the order in which their last gradients become ready; all-to-alls stay whole.
   */
  plan(graph: StepGraph): Schedule {
    const buckets: { parts: MicroOpPart[]; bytes: number }[] = [];
    const open = new Map<string, { parts: MicroOpPart[]; bytes: number }>();
    for (const { id, elements, bytes, group } of reducedGradients(graph)) {
      if (elements === 0) continue;
      const kind = `${group} ${bytes / elements}`;
      let bucket = open.get(kind);
      if (!bucket || bucket.bytes + bytes > this.#bucketBytes) {
        bucket = { parts: [], bytes: 0 };
        open.set(kind, bucket);
        buckets.push(bucket);
      }
      bucket.parts.push({ gradient: id, start: 0, end: elements });
      bucket.bytes += bytes;
    }
    const last = ({ parts }: MicroOp) => parts[parts.length - 1].gradient;
    return { microOps: buckets.sort((a, b) => last(a) - last(b)), chunks: new Map() };
  }

  /**
   * Everything that is ready goes.
   *
   * @param _boundary What has happened; of no interest here.
   * @param state What is ready.
   * @returns All of it.
   */
  launch(_boundary: Boundary, state: LaunchState): number {
    return state.ready;
  }
}
