// The memory of one expert: weights, gradient, and AdamW's moments, which lie on the device or, where it has no room for them, in host
// memory. Every part is one flat block, so that an expert is updated and sent in few pieces. Which experts a rank holds is
// expert_store.ts's, how they travel expert_moves.ts's, and how moments in host memory are updated offload.ts's.

import type { Device, HostMemory, StreamEvent } from "../tensor/device.ts";
import { bytesOf, type DType, newArray, type TypedArray, wideDtype } from "../tensor/dtype.ts";
import * as ops from "../tensor/ops.ts";
import { empty, Tensor, TensorScope } from "../tensor/tensor.ts";
import type { Moments } from "./parameter.ts";

/** Parts of a block of moments begin at multiples of so many bytes. */
const ALIGN = 256;

/** Which of AdamW's tensors. */
export type MomentKind = keyof Moments;

/** How the moments of a flat block of weights lie in one block of bytes. */
export interface MomentLayout {
  /** Elements of the weights. */
  readonly size: number;
  /** Bytes of all parts. */
  readonly bytes: number;
  /** The parts; `residual` only for bf16 weights. */
  readonly parts: readonly {
    /** Which. */
    readonly kind: MomentKind;
    /** Element type. */
    readonly dtype: DType;
    /** First byte. */
    readonly offset: number;
  }[];
}

/**
 * The layout of the moments of some weights.
 *
 * @param size Elements of the weights.
 * @param dtype Their type.
 * @returns The layout.
 */
export function momentLayout(size: number, dtype: DType): MomentLayout {
  const wide = wideDtype(dtype);
  const kinds: [MomentKind, DType][] = [["moment1", wide], ["moment2", wide]];
  if (dtype === "bf16") kinds.push(["residual", "i16"]);
  let bytes = 0;
  const parts = kinds.map(([kind, dtype]) => {
    const offset = bytes;
    bytes += Math.ceil(size * bytesOf(dtype) / ALIGN) * ALIGN;
    return { kind, dtype, offset };
  });
  return { size, bytes, parts };
}

/**
 * A tensor's memory as bytes.
 *
 * @param tensor Any tensor.
 * @returns A view, u8 [bytes].
 */
export function bytesOfTensor(tensor: Tensor): Tensor {
  const { device, bytes, address } = tensor;
  return new Tensor(device, "u8", [bytes], { address, owner: tensor });
}

/**
 * The moments in a block of device memory.
 *
 * @param block u8, as many bytes as the layout has.
 * @param layout The layout.
 * @returns Views, flat.
 */
export function momentsIn(block: Tensor, layout: MomentLayout): Moments {
  const found: Partial<Record<MomentKind, Tensor>> = {};
  for (const { kind, dtype, offset } of layout.parts) {
    const memory = { address: block.address + offset, owner: block };
    found[kind] = new Tensor(block.device, dtype, [layout.size], memory);
  }
  return { moment1: found.moment1!, moment2: found.moment2!, residual: found.residual ?? null };
}

/** Moments on the device. */
export class ResidentMoments implements Disposable {
  /** Where they are. */
  readonly place = "device";
  /** All of them, u8. */
  readonly block: Tensor;
  /** Each, flat. */
  readonly tensors: Moments;

  /**
   * Takes memory; its contents are undefined.
   *
   * @param device Where.
   * @param layout Sizes.
   * @throws {OutOfMemoryError} If it does not suffice.
   */
  constructor(device: Device, layout: MomentLayout) {
    this.block = empty(device, [layout.bytes], "u8");
    this.tensors = momentsIn(this.block, layout);
  }

  /** Sets them to zero, as training begins. */
  clear(): void {
    ops.fill(this.block, 0);
  }

  /** Frees the memory. */
  [Symbol.dispose](): void {
    this.block[Symbol.dispose]();
  }
}

/** Moments in host memory. */
export class HostedMoments implements Disposable {
  /** Where they are. */
  readonly place = "host";
  /** Sizes. */
  readonly layout: MomentLayout;
  /** The bytes. */
  readonly memory: HostMemory;
  /** When the last copy to or from the memory has passed; null if none is under way. Copies of other streams wait for it. */
  busy: StreamEvent | null = null;
  readonly #device: Device;

  /**
   * Takes memory; its contents are undefined.
   *
   * @param device Whose host memory.
   * @param layout Sizes.
   */
  constructor(device: Device, layout: MomentLayout) {
    this.#device = device;
    this.layout = layout;
    this.memory = device.hostMemory(layout.bytes);
  }

  /** Sets them to zero, as training begins. No copy may be under way. */
  clear(): void {
    new Uint8Array(this.memory.buffer).fill(0);
  }

  /**
   * Enqueues a copy of a range to a tensor, on the device's stream.
   *
   * @param offset First byte.
   * @param target u8; is filled whole.
   */
  load(offset: number, target: Tensor): void {
    this.#copy((stream) => this.memory.load(offset, target, stream));
  }

  /**
   * Enqueues a copy of a tensor to a range, on the device's stream.
   *
   * @param source u8.
   * @param offset First byte.
   */
  store(source: Tensor, offset: number): void {
    this.#copy((stream) => this.memory.store(source, offset, stream));
  }

  #copy(enqueue: (stream: Device["stream"]) => void): void {
    const { stream } = this.#device;
    if (this.busy) stream.wait(this.busy);
    enqueue(stream);
    this.busy = stream.record();
  }

  /** Resolves once no copy is under way: the host may then look at the bytes and change them. */
  async settle(): Promise<void> {
    if (!this.busy) return;
    const { stream } = this.#device;
    stream.wait(this.busy);
    await stream.synchronize();
    this.busy = null;
  }

  /**
   * A copy of the elements of one kind.
   *
   * @param kind Which.
   * @param start First element.
   * @param end Element after the last.
   * @returns They, once no copy is under way; null if there are none of that kind.
   */
  async read(kind: MomentKind, start: number, end: number): Promise<TypedArray | null> {
    await this.settle();
    return this.#view(kind, start, end)?.slice() ?? null;
  }

  /**
   * Puts elements of one kind in their place, once no copy is under way.
   *
   * @param kind Which; there must be such elements.
   * @param start Where the first one goes.
   * @param array The elements.
   */
  async write(kind: MomentKind, start: number, array: TypedArray): Promise<void> {
    await this.settle();
    (this.#view(kind, start, start + array.length) as Float32Array).set(array as Float32Array);
  }

  #view(kind: MomentKind, start: number, end: number): TypedArray | null {
    const part = this.layout.parts.find((part) => part.kind === kind);
    if (!part) return null;
    const { dtype, offset } = part;
    const array = newArray(dtype, 0).constructor as Float32ArrayConstructor;
    return new array(this.memory.buffer, offset + start * bytesOf(dtype), end - start);
  }

  /** Gives the memory back; no copy may be under way. */
  [Symbol.dispose](): void {
    this.memory[Symbol.dispose]();
  }
}

/** AdamW's moments of an expert. */
export type ExpertMoments = ResidentMoments | HostedMoments;

/** A gradient that takes memory once it is asked for: an expert in inference has none. */
class Gradient implements Disposable {
  readonly #make: () => Tensor;
  #flat: Tensor | null = null;

  constructor(make: () => Tensor) {
    this.#make = make;
  }

  get flat(): Tensor {
    if (!this.#flat) {
      using scope = new TensorScope();
      const flat = this.#make();
      ops.fill(flat, 0);
      this.#flat = scope.keep(flat);
    }
    return this.#flat;
  }

  [Symbol.dispose](): void {
    this.#flat?.[Symbol.dispose]();
  }
}

/** Sizes of an expert's memory. */
export interface ExpertMemoryOptions {
  /** Where. */
  readonly device: Device;
  /** Elements of the weights. */
  readonly size: number;
  /** Their type. */
  readonly dtype: DType;
  /** Type of the gradient. */
  readonly gradientDtype: DType;
}

/** The memory of an expert, each tensor flat: [up | down]. */
export class ExpertMemory implements Disposable {
  /** The weights. */
  readonly weights: Tensor;
  /** The moments; null without a trainer. */
  moments: ExpertMoments | null = null;
  readonly #options: ExpertMemoryOptions;
  readonly #gradient: Gradient;

  /**
   * Takes memory for the weights, whose contents are undefined.
   *
   * @param options Sizes.
   * @throws {OutOfMemoryError} If it does not suffice.
   */
  constructor(options: ExpertMemoryOptions) {
    const { device, size, dtype, gradientDtype } = options;
    this.#options = options;
    this.weights = empty(device, [size], dtype);
    this.#gradient = new Gradient(() => empty(device, [size], gradientDtype));
  }

  /** The gradient: zeros when it is asked for first. */
  get gradient(): Tensor {
    return this.#gradient.flat;
  }

  /**
   * Memory for this expert's moments, contents undefined; they become its own only when `moments` is set.
   *
   * @param place Where.
   * @returns The memory.
   */
  takeMoments(place: ExpertMoments["place"]): ExpertMoments {
    const { device, size, dtype } = this.#options;
    const layout = momentLayout(size, dtype);
    return place === "host"
      ? new HostedMoments(device, layout)
      : new ResidentMoments(device, layout);
  }

  /** Frees all of it. No copy of moments in host memory may be under way. */
  [Symbol.dispose](): void {
    this.weights[Symbol.dispose]();
    this.#gradient[Symbol.dispose]();
    this.moments?.[Symbol.dispose]();
  }
}
