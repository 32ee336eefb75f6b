// Our sides of bench/layer.ts: the layer with gradients in f32 or bf16, and the experts' products alone. Shape letters: tokens, D width,
// F hidden, E experts.

import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import { MoeLayer } from "../moe/moe_layer.ts";
import { dropShown, readShown } from "../moe/shown.ts";
import { plainStep } from "../moe/step.ts";
import type { CudaDevice } from "../tensor/cuda/device.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";

/** Sizes of a layer. */
export interface Shape {
  readonly tokens: number;
  /** D. */
  readonly width: number;
  /** F. */
  readonly hidden: number;
  readonly experts: number;
  /** Experts per token. */
  readonly choices: number;
}

/** Element type of the weights' gradients. */
export type GradientDType = "f32" | "bf16";

/** What of a layer is timed. */
export type Half = "fwd" | "fwd_bwd";

/** The library's layer. */
export class Layer implements Disposable {
  readonly #device: CudaDevice;
  readonly #layer: MoeLayer;
  readonly #x: Tensor;
  readonly #dOut: Tensor;
  /** Memory that was in use before, but for the input. */
  readonly #before_bytes: number;

  /**
   * Makes it.
   *
   * @param device The GPU.
   * @param shape Sizes.
   * @param given The input bf16 [tokens, D], and the gate [E, D].
   * @param gradientDtype Element type of the weights' gradients.
   */
  constructor(
    device: CudaDevice,
    shape: Shape,
    given: { readonly x: Tensor; readonly gate: Float32Array },
    gradientDtype: GradientDType,
  ) {
    const { width, hidden, experts, choices } = shape;
    this.#device = device;
    this.#before_bytes = device.memory().used_bytes - given.x.bytes;
    this.#layer = new MoeLayer({
      device,
      comm: createCommunicator(openSelf(), { rank: 0, size: 1, name: "world", device }),
      layer: 0,
      width,
      hidden,
      experts,
      router: { kind: "softmax", topK: choices },
      activation: "gelu",
      dtype: "bf16",
      gradientDtype,
    });
    device.write(given.gate, this.#layer.gate.value);
    this.#x = given.x;
    this.#dOut = empty(device, given.x.shape, "bf16");
    device.kernels.normal(this.#dOut, [77, 88], 1);
  }

  /** Enqueues a forward pass, or a forward and a backward pass. */
  async run(what: Half): Promise<void> {
    const training = what === "fwd_bwd";
    const step = plainStep(this.#device, { training, number: 1, firstPass: true });
    const { out_ND, saved, shown } = await this.#layer.forward(this.#x, step);
    dropShown([shown]);
    using _out = out_ND;
    if (!training) return;
    using _dX = await this.#layer.backward(this.#dOut, saved, step);
  }

  /** Rows of each expert. */
  async counts(): Promise<number[]> {
    const { out_ND, shown } = await this.#layer.forward(this.#x, plainStep(this.#device));
    out_ND[Symbol.dispose]();
    const [{ stats }] = await readShown([shown]);
    return [...stats.counts];
  }

  /** Weights, inputs, gradients and all that a forward and backward pass holds, in bytes. */
  async peak_bytes(): Promise<number> {
    await this.run("fwd_bwd");
    this.#device.resetPeak();
    await this.run("fwd_bwd");
    return this.#device.memory().peak_bytes - this.#before_bytes;
  }

  /** Frees it, but for the input. */
  [Symbol.dispose](): void {
    this.#layer[Symbol.dispose]();
    this.#dOut[Symbol.dispose]();
  }
}

/** The six products of the experts, with gradients in bf16, and those two with gradients in f32. */
export const PRODUCTS = [
  "up",
  "down",
  "d_hidden",
  "d_rows",
  "d_up",
  "d_down",
  "d_up f32",
  "d_down f32",
] as const;

/** One of the {@linkcode PRODUCTS}. */
export type Product = (typeof PRODUCTS)[number];

/** What of the layer is which products, in its order. */
const ROWS_OF_PRODUCTS: Readonly<
  Record<GradientDType, Readonly<Record<Half, readonly Product[]>>>
> = {
  f32: {
    fwd: ["up", "down"],
    fwd_bwd: ["up", "down", "d_down f32", "d_hidden", "d_up f32", "d_rows"],
  },
  bf16: {
    fwd: ["up", "down"],
    fwd_bwd: ["up", "down", "d_down", "d_hidden", "d_up", "d_rows"],
  },
};

/** The experts' products alone, on rows that are sorted already, through our kernels. */
export class Products implements Disposable {
  readonly #runs: Readonly<Record<Product, () => void>>;
  readonly #tensors: readonly Tensor[];

  /**
   * Makes the operands.
   *
   * @param device The GPU.
   * @param shape Sizes.
   * @param counts Rows of each expert.
   */
  constructor(device: CudaDevice, { width, hidden, experts }: Shape, counts: readonly number[]) {
    const host = new Int32Array(experts + 1);
    counts.forEach((n, e) => host[e + 1] = host[e] + n);
    const offsets = fromArray(device, host), tensors = [offsets];
    const make = (sizes: readonly number[], dtype: GradientDType = "bf16") => {
      const tensor = empty(device, sizes, dtype);
      device.kernels.normal(tensor, [sizes[0], sizes[1]], 1);
      tensors.push(tensor);
      return tensor;
    };
    const matrices = (rows: number, columns: number, dtype?: GradientDType) => {
      const all = make([experts * rows, columns], dtype);
      return Array.from({ length: experts }, (_, e) => all.rows(e * rows, (e + 1) * rows));
    };
    const rows = host[experts];
    const x = make([rows, width]), h = make([rows, hidden]);
    const x2 = make([rows, width]), h2 = make([rows, hidden]);
    const ups = matrices(hidden, width), downs = matrices(width, hidden);
    const dUps = matrices(hidden, width), dDowns = matrices(width, hidden);
    const wideUps = matrices(hidden, width, "f32"), wideDowns = matrices(width, hidden, "f32");
    const groups = { offsets, host: null }, back = { transposeWeight: true };
    const { kernels } = device, overwrite = { beta: 0 };
    this.#tensors = tensors;
    this.#runs = {
      up: () => kernels.groupedGemm(x, ups, groups, h2),
      down: () => kernels.groupedGemm(h, downs, groups, x2),
      d_hidden: () => kernels.groupedGemm(x, downs, groups, h2, back),
      d_rows: () => kernels.groupedGemm(h, ups, groups, x2, back),
      d_up: () => kernels.groupedGemmWeightGrad(h, x, groups, dUps, overwrite),
      d_down: () => kernels.groupedGemmWeightGrad(x, h, groups, dDowns, overwrite),
      "d_up f32": () => kernels.groupedGemmWeightGrad(h, x, groups, wideUps, overwrite),
      "d_down f32": () => kernels.groupedGemmWeightGrad(x, h, groups, wideDowns, overwrite),
    };
  }

  /** Enqueues a product. */
  run(product: Product): void {
    this.#runs[product]();
  }

  /** Enqueues the products of a forward pass, or of both passes, one behind the other. */
  runAll(what: Half, gradientDtype: GradientDType): void {
    for (const product of ROWS_OF_PRODUCTS[gradientDtype][what]) this.#runs[product]();
  }

  /** Frees the operands. */
  [Symbol.dispose](): void {
    for (const tensor of this.#tensors) tensor[Symbol.dispose]();
  }
}
