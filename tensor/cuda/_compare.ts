// For the tests of norms.ts and attention.ts: inputs that both devices get, and how far a result may be from the CPU's.

import assert from "node:assert/strict";
import { cpuDevice } from "../cpu/device.ts";
import type { Device } from "../device.ts";
import { fromArray, Tensor } from "../tensor.ts";

/** The dtypes of the kernels. */
export type Dtype = "f32" | "bf16";

const float = new Float32Array(1), bits = new Uint32Array(float.buffer);

/** The bf16 that is nearest to a number, as bits. */
function toBf16(x: number): number {
  float[0] = x;
  return (bits[0] + 0x7fff + (bits[0] >>> 16 & 1)) >>> 16;
}

/** Numbers of an array on the host; a `Uint16Array` holds bf16. */
export function numbers(array: ArrayLike<number> | ArrayLike<bigint>): Float32Array {
  if (array instanceof Uint16Array) {
    const wide = new Uint32Array(array.length);
    for (let i = 0; i < wide.length; i++) wide[i] = array[i] << 16;
    return new Float32Array(wide.buffer);
  }
  return Float32Array.from(array as ArrayLike<number>);
}

/** One operand: f32 on the CPU, the same numbers on the GPU in the dtype under test, at an address that is `shift` elements off. */
export interface Pair {
  readonly cpu: Tensor;
  readonly gpu: Tensor;
}

/** Makes operands of one test and compares them; frees all of them when disposed. */
export class Case implements Disposable {
  readonly #gpu: Device;
  readonly #dtype: Dtype;
  readonly #shift: number;
  readonly #owned: Tensor[] = [];
  #seed = 12345;

  /**
   * @param gpu The device under test.
   * @param dtype Element type on it.
   * @param shift Elements by which its addresses miss their alignment.
   */
  constructor(gpu: Device, dtype: Dtype, shift = 0) {
    this.#gpu = gpu;
    this.#dtype = dtype;
    this.#shift = shift;
  }

  #noise(): number {
    this.#seed = Math.imul(this.#seed, 1664525) + 1013904223 | 0;
    return ((this.#seed >>> 8) / 2 ** 24 - 0.5) * 3.4;
  }

  /** A pair from numbers, in the dtype under test or another. */
  pair(shape: readonly number[], values: Float32Array, dtype: Dtype = this.#dtype): Pair {
    const size = values.length, shift = this.#shift;
    const array = dtype === "bf16"
      ? new Uint16Array(size + shift).fill(0x7fc0)
      : new Float32Array(size + shift).fill(NaN);
    for (let i = 0; i < size; i++) {
      array[shift + i] = dtype === "bf16" ? toBf16(values[i]) : values[i];
    }
    const owner = fromArray(this.#gpu, array),
      cpu = fromArray(cpuDevice(), numbers(array).slice(shift), shape);
    this.#owned.push(owner, cpu);
    return {
      cpu,
      gpu: new Tensor(this.#gpu, dtype, shape, {
        address: owner.address + shift * (dtype === "bf16" ? 2 : 4),
        owner,
      }),
    };
  }

  /** Random numbers with mean 0 and deviation 1. */
  random(...shape: number[]): Pair {
    const size = shape.reduce((a, b) => a * b, 1);
    return this.pair(shape, new Float32Array(size).map(() => this.#noise()));
  }

  /** Room for a result; NaN, so that what is not written shows. */
  result(...shape: number[]): Pair {
    return this.pair(shape, new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(NaN));
  }

  /** The same in f32 whatever the dtype under test. */
  resultF32(...shape: number[]): Pair {
    return this.pair(shape, new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(NaN), "f32");
  }

  /** Row numbers or positions. */
  integers(values: Int32Array): Pair {
    const cpu = fromArray(cpuDevice(), values), gpu = fromArray(this.#gpu, values);
    this.#owned.push(cpu, gpu);
    return { cpu, gpu };
  }

  /**
   * The GPU's numbers must be the CPU's: no element further off than `bound` of the largest, and all together than half of that.
   */
  async same(name: string, { cpu, gpu }: Pair, bound: number): Promise<void> {
    const want = numbers(await cpu.toArray()), got = numbers(await gpu.toArray());
    let most = 0, worst = 0, at = 0, squares = 0, errors = 0;
    for (let i = 0; i < want.length; i++) {
      const error = Math.abs(got[i] - want[i]);
      most = Math.max(most, Math.abs(want[i]));
      squares += want[i] ** 2;
      errors += error ** 2;
      if (!(error <= worst)) worst = error, at = i;
      if (Number.isNaN(error)) break;
    }
    assert.ok(
      worst <= bound * most && Math.sqrt(errors) <= bound / 2 * Math.sqrt(squares) || worst === 0,
      `${name}: element ${at} of [${cpu.shape}] is ${got[at]} instead of ${
        want[at]
      }; all together ${Math.sqrt(errors / squares)} off, ${bound / 2} is allowed`,
    );
  }

  [Symbol.dispose](): void {
    for (const tensor of this.#owned) tensor[Symbol.dispose]();
  }
}
