// Checks gradients against central differences in f64. For tests.

import assert from "node:assert/strict";
import type { Tensor } from "../../tensor/tensor.ts";

/** What is checked. */
export interface Checked {
  /** A name for the error. */
  readonly name: string;
  /** What the loss depends on, f64. */
  readonly value: Tensor;
  /** The gradient that was computed by hand, f64. */
  readonly grad: Tensor;
}

/**
 * Compares gradients with `(loss(x + h) − loss(x − h)) / 2h` at a few elements of each tensor.
 *
 * @param loss Computes the loss afresh.
 * @param tensors Values and gradients; the gradients are already there.
 * @param options Elements per tensor, distance h, and the largest error relative to the largest gradient of the tensor.
 */
export async function checkGradients(
  loss: () => Promise<number>,
  tensors: readonly Checked[],
  options: { readonly samples?: number; readonly h?: number; readonly tolerance?: number } = {},
): Promise<void> {
  const { samples = 6, h = 1e-5, tolerance = 1e-6 } = options;
  for (const { name, value, grad } of tensors) {
    const x = await value.toArray() as Float64Array, g = await grad.toArray() as Float64Array;
    assert.ok(x instanceof Float64Array && g instanceof Float64Array, `${name} must be f64`);
    const scale = Math.max(1e-6, ...Array.from(g, Math.abs));
    for (let s = 0; s < Math.min(samples, x.length); s++) {
      const i = Math.floor((s * 0.618034 + 0.13) % 1 * x.length);
      const moved = async (by: number) => {
        const y = x.slice();
        y[i] += by;
        value.device.write(y, value);
        return await loss();
      };
      const difference = (await moved(h) - await moved(-h)) / (2 * h);
      value.device.write(x, value);
      assert.ok(
        Math.abs(difference - g[i]) <= tolerance * scale,
        `${name}[${i}]: by hand ${g[i]}, by difference ${difference}`,
      );
    }
  }
}
