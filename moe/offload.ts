// The update of experts whose moments stay in host memory, as there is no room for them on the device: one expert after another, its moments
// pass through a few buffers there. Copies in and out have streams of their own, so that they run beside the updates of other experts. The
// arithmetic is AdamW's, the same as for moments that stay on the device, to the bit. Who is offloaded is expert_store.ts's to say.

import type { AdamWUpdate, Device, Stream, StreamEvent } from "../tensor/device.ts";
import { empty, type Tensor, TensorScope } from "../tensor/tensor.ts";
import {
  type ExpertMemory,
  type HostedMoments,
  type MomentLayout,
  momentsIn,
} from "./expert_memory.ts";

/** Buffers on the device: one is filled, one is updated, one is emptied. */
const SLOTS = 3;

/** A buffer for the moments of one expert. */
interface Slot {
  readonly block: Tensor;
  /** When it may be filled again; null if at once. */
  free: StreamEvent | null;
}

/** Experts that are updated through buffers. All have the same sizes. */
export class OffloadedUpdates implements Disposable {
  readonly #device: Device;
  readonly #experts: readonly ExpertMemory[];
  readonly #slots: readonly Slot[];
  readonly #updates: readonly AdamWUpdate[];
  readonly #in: Stream;
  readonly #out: Stream;
  /** When the moments of an expert have arrived in their buffer. */
  readonly #arrived: StreamEvent[] = [];

  /**
   * Takes the buffers.
   *
   * @param experts Experts whose moments are in host memory, one at least.
   * @param weightDecay Decoupled weight decay.
   * @param streams The streams of copies in and out, from {@linkcode offloadStreams}.
   * @throws {OutOfMemoryError} If the device has no room for the buffers.
   */
  constructor(
    experts: readonly ExpertMemory[],
    weightDecay: number,
    streams: readonly [Stream, Stream],
  ) {
    const { device } = experts[0].weights;
    const { layout } = hosted(experts[0]);
    this.#device = device;
    this.#experts = experts;
    [this.#in, this.#out] = streams;
    using scope = new TensorScope();
    this.#slots = Array.from({ length: Math.min(SLOTS, experts.length) }, () => ({
      block: empty(device, [layout.bytes], "u8"),
      free: null,
    }));
    // What the buffers were before is read or written by work of the device's stream: copies come after it.
    const event = device.stream.record();
    for (const slot of this.#slots) slot.free = event;
    this.#updates = experts.map((expert, i) =>
      updateOf(expert, this.#slot(i), layout, weightDecay)
    );
    scope.keep(this);
  }

  /** Bytes of the buffers. */
  get bytes(): number {
    return this.#slots.reduce((bytes, { block }) => bytes + block.bytes, 0);
  }

  /** Starts to fill the buffers; other parameters may be updated meanwhile. */
  begin(): void {
    for (let i = 0; i < this.#slots.length; i++) this.#load(i);
  }

  /**
   * Updates all experts, one after another. After {@linkcode begin}.
   *
   * @param update Enqueues the update of one expert on the device's stream.
   */
  run(update: (update: AdamWUpdate) => void): void {
    const { stream } = this.#device, slots = this.#slots.length;
    for (let i = 0; i < this.#experts.length; i++) {
      stream.wait(this.#arrived[i]);
      update(this.#updates[i]);
      const slot = this.#slot(i), moments = hosted(this.#experts[i]);
      this.#out.wait(stream.record());
      moments.memory.store(slot.block, 0, this.#out);
      moments.busy = slot.free = this.#out.record();
      if (i + slots < this.#experts.length) this.#load(i + slots);
    }
  }

  #load(i: number): void {
    const slot = this.#slot(i), moments = hosted(this.#experts[i]);
    if (slot.free) this.#in.wait(slot.free);
    if (moments.busy) this.#in.wait(moments.busy);
    moments.memory.load(0, slot.block, this.#in);
    this.#arrived[i] = this.#in.record();
  }

  #slot(i: number): Slot {
    return this.#slots[i % this.#slots.length];
  }

  /** Frees the buffers, in the order of the device's stream. */
  [Symbol.dispose](): void {
    for (const { block, free } of this.#slots) {
      if (free) this.#device.stream.wait(free);
      block[Symbol.dispose]();
    }
  }
}

/**
 * The streams of copies.
 *
 * @param device The device.
 * @returns That of copies to the device, and that of copies from it.
 */
export function offloadStreams(device: Device): [Stream, Stream] {
  return [device.createStream("offload in"), device.createStream("offload out")];
}

function hosted({ moments }: ExpertMemory): HostedMoments {
  if (moments?.place === "host") return moments;
  throw new Error(
    "Cannot update an expert through buffers as its moments must be in host memory: current value is on the device",
  );
}

function updateOf(
  { weights, gradient }: ExpertMemory,
  { block }: Slot,
  layout: MomentLayout,
  weightDecay: number,
): AdamWUpdate {
  return { parameter: weights, gradient, ...momentsIn(block, layout), weightDecay };
}
