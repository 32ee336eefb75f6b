// A dense, row-major array on a device. It owns memory or looks into memory that another tensor owns; there is no
// autograd, no lazy evaluation and no stride: operations live in `tensor/ops.ts`, gradients beside them.

import { bytesOf, type DType, dtypeOf, newArray, type TypedArray } from "./dtype.ts";
import type { Device } from "./device.ts";

/** Sizes of the dimensions, outermost first. */
export type Shape = readonly number[];

/**
 * The number of elements of a shape.
 *
 * @param shape Sizes of the dimensions; an empty shape is a scalar.
 * @returns Their product.
 */
export function sizeOf(shape: Shape): number {
  let size = 1;
  for (let i = 0; i < shape.length; i++) size *= shape[i];
  return size;
}

/** How many scopes are open, and the tensors that were made in them, those of the innermost last: `count` of the list. */
let open = 0, count = 0;
const made: (Tensor | null)[] = [];

/**
 * All or nothing for code that makes tensors and may fail half-way, as memory may not suffice: tensors that are made while a scope is open
 * are freed at its end unless it was told to keep them. Only for code without `await`: what runs in between would be in the scope, too.
 * Scopes may be nested.
 *
 * @example
 * ```ts
 * import { empty, type Tensor, TensorScope } from "./tensor.ts";
 * import type { Device } from "./device.ts";
 *
 * function pair(device: Device): [Tensor, Tensor] {
 *   using scope = new TensorScope();
 *   return scope.keep([empty(device, [1000]), empty(device, [1000])]);
 * }
 * ```
 */
export class TensorScope implements Disposable {
  readonly #start = count;
  #kept = false;

  /** Opens the scope. */
  constructor() {
    open++;
  }

  /**
   * Lets all tensors that were made in the scope, and were not freed there, live on.
   *
   * @param result What the code returns.
   * @returns The same.
   */
  keep<T>(result: T): T {
    this.#kept = true;
    return result;
  }

  /** Closes the scope. */
  [Symbol.dispose](): void {
    open--;
    const end = count;
    count = this.#start;
    for (let i = this.#start; i < end; i++) {
      const tensor = made[i]!;
      made[i] = null;
      if (!this.#kept) tensor[Symbol.dispose]();
      else if (open > 0 && !tensor.disposed) made[count++] = tensor; // now the outer scope's
    }
  }
}

/**
 * A dense, row-major array on a device. A tensor made by {@linkcode empty}, {@linkcode zeros} or {@linkcode fromArray}
 * owns its memory and frees it when disposed (`using`); views do not.
 */
export class Tensor implements Disposable {
  /** Where the elements live. */
  readonly device: Device;
  /** Element type. */
  readonly dtype: DType;
  /** Sizes of the dimensions. */
  readonly shape: Shape;
  /** Number of elements. */
  readonly size: number;
  /** First byte: offset in the CPU's linear memory, or device address. */
  readonly address: number;
  /** Whose memory it is: its own, or that of the tensor which it views. */
  readonly #owner: Tensor;
  /** Of an owner: whether the memory has been freed. */
  #freed = false;

  /**
   * Looks at memory that exists. Prefer {@linkcode empty}, {@linkcode zeros} and {@linkcode fromArray}.
   *
   * @param device Where the memory is.
   * @param dtype Element type.
   * @param shape Sizes of the dimensions.
   * @param memory Address, and the owner whose life the view shares; without an owner the tensor owns the address.
   */
  constructor(
    device: Device,
    dtype: DType,
    shape: Shape,
    memory: { readonly address: number; readonly owner?: Tensor },
  ) {
    this.device = device;
    this.dtype = dtype;
    this.shape = shape;
    this.size = sizeOf(shape);
    this.address = memory.address;
    this.#owner = memory.owner === undefined ? this : memory.owner.#owner;
    if (open > 0 && this.#owner === this) made[count++] = this;
  }

  /** Size in bytes. */
  get bytes(): number {
    return this.size * bytesOf(this.dtype);
  }

  /** Whether the memory has been freed, by this tensor or by the one whose memory it views. */
  get disposed(): boolean {
    return this.#owner.#freed;
  }

  /**
   * The same elements under another shape of the same size.
   *
   * @param shape The new shape.
   * @returns A view; it shares memory.
   * @throws {RangeError} If the sizes differ.
   */
  reshape(...shape: number[]): Tensor {
    if (sizeOf(shape) !== this.size) {
      throw new RangeError(
        `Cannot reshape as the size must stay ${this.size} ([${this.shape}]): current value is [${shape}]`,
      );
    }
    return new Tensor(this.device, this.dtype, shape, { address: this.address, owner: this });
  }

  /**
   * Rows `start` to `end` of the first dimension.
   *
   * @param start First row.
   * @param end Row after the last.
   * @returns A view; it shares memory.
   * @throws {RangeError} If the rows are not inside the tensor.
   */
  rows(start: number, end: number): Tensor {
    const n = this.shape[0] ?? 0;
    if (
      !(Number.isInteger(start) && Number.isInteger(end) && 0 <= start && start <= end && end <= n)
    ) {
      throw new RangeError(
        `Cannot take rows as the range must lie in 0..${n}: current value is ${start}..${end}`,
      );
    }
    const rest = this.shape.slice(1);
    return new Tensor(this.device, this.dtype, [end - start, ...rest], {
      address: this.address + start * sizeOf(rest) * bytesOf(this.dtype),
      owner: this,
    });
  }

  /**
   * A copy of the elements on the host, once the device has computed them.
   *
   * @returns A typed array of `size` elements.
   */
  toArray(): Promise<TypedArray> {
    return this.device.read(this);
  }

  /** Frees the memory if this tensor owns it; further use of it or of its views is an error. */
  [Symbol.dispose](): void {
    if (this.#owner !== this || this.#freed) return;
    this.#freed = true;
    this.device.free(this.address);
  }
}

/**
 * A tensor whose contents are undefined.
 *
 * @param device Where.
 * @param shape Sizes of the dimensions.
 * @param dtype Element type. @default {"f32"}
 * @returns The tensor; dispose of it.
 * @throws {RangeError} If a dimension is not a whole number ≥ 0.
 * @throws {OutOfMemoryError} If the memory does not suffice.
 */
export function empty(device: Device, shape: Shape, dtype: DType = "f32"): Tensor {
  for (let i = 0; i < shape.length; i++) {
    if (!Number.isSafeInteger(shape[i]) || shape[i] < 0) {
      throw new RangeError(
        `Cannot make a tensor as every dimension must be a whole number >= 0: current value is [${shape}]`,
      );
    }
  }
  const bytes = sizeOf(shape) * bytesOf(dtype);
  return new Tensor(device, dtype, shape, { address: device.allocate(bytes) });
}

/**
 * A tensor of zeros.
 *
 * @param device Where.
 * @param shape Sizes of the dimensions.
 * @param dtype Element type. @default {"f32"}
 * @returns The tensor; dispose of it.
 */
export function zeros(device: Device, shape: Shape, dtype: DType = "f32"): Tensor {
  using scope = new TensorScope();
  const tensor = empty(device, shape, dtype);
  device.kernels.fill(tensor, 0);
  return scope.keep(tensor);
}

/**
 * A tensor with the elements of a host array.
 *
 * @param device Where.
 * @param array The elements, row-major; their type gives the dtype (`Uint16Array` is bf16).
 * @param shape Sizes of the dimensions. @default {[array.length]}
 * @returns The tensor; dispose of it.
 * @throws {RangeError} If the shape has another size than the array.
 */
export function fromArray(
  device: Device,
  array: TypedArray,
  shape: Shape = [array.length],
): Tensor {
  if (sizeOf(shape) !== array.length) {
    throw new RangeError(
      `Cannot make a tensor as [${shape}] must hold ${
        sizeOf(shape)
      } elements: current value is ${array.length}`,
    );
  }
  using scope = new TensorScope();
  const tensor = empty(device, shape, dtypeOf(array));
  device.write(array, tensor);
  return scope.keep(tensor);
}

/**
 * A host array of the same dtype and size as a tensor, for results.
 *
 * @param tensor The tensor.
 * @returns Zeros.
 */
export function hostLike(tensor: Tensor): TypedArray {
  return newArray(tensor.dtype, tensor.size);
}
