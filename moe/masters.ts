// The f32 master weights of bf16 parameters in checkpoints. A bf16 run saves its parameters as they are and what they lack of their masters
// beside the optimizer's moments, `<name>.residual`; an f32 run saves f32 parameters. Either goes on from either, and from a
// checkpoint without residuals, and loses nothing that the file has.

import type { CheckpointTensor } from "./checkpoint.ts";

/**
 * Master weights as bf16 parameters and residuals: master bits = (parameter bits << 16) + residual, as `AdamWUpdate` of tensor/device.ts has
 * it. Rounds to nearest, ties away from zero, for a residual of a tie to fit in 16 bits.
 *
 * @param masters The master weights.
 * @returns bf16 bits and residuals.
 */
export function splitMasters(
  masters: Float32Array,
): { readonly values: Uint16Array; readonly residuals: Int16Array } {
  const bits = new Uint32Array(masters.buffer, masters.byteOffset, masters.length);
  const values = new Uint16Array(bits.length), residuals = new Int16Array(bits.length);
  for (let i = 0; i < bits.length; i++) {
    const nan = (bits[i] & 0x7fffffff) > 0x7f800000; // it would carry over into the sign
    values[i] = nan ? 0x7fc0 : (bits[i] + 0x8000) >>> 16;
    residuals[i] = nan ? 0 : bits[i] - (values[i] << 16);
  }
  return { values, residuals };
}

/**
 * The inverse of {@linkcode splitMasters}.
 *
 * @param parameters Numbers that bf16 has exactly.
 * @param residuals What they lack.
 * @returns The master weights.
 */
export function joinMasters(parameters: ArrayLike<number>, residuals: Int16Array): Float32Array {
  const masters = Float32Array.from(parameters), bits = new Uint32Array(masters.buffer);
  for (let i = 0; i < bits.length; i++) bits[i] += residuals[i];
  return masters;
}

/**
 * Makes the tensors of a training run fit for loading, whatever their dtype was when they were saved.
 *
 * @param parameters The run's parameters.
 * @param optimizer The optimizer's tensors, with a residual for every bf16 parameter.
 * @returns The same, so that a bf16 parameter is loaded with its whole master, and an f32 one takes a residual if there is one; to be loaded
 * in this order.
 */
export function loadingMasters(
  parameters: readonly CheckpointTensor[],
  optimizer: readonly CheckpointTensor[],
): { readonly parameters: CheckpointTensor[]; readonly optimizer: CheckpointTensor[] } {
  const residuals = new Map(optimizer.map((tensor) => [tensor.name, tensor]));
  const named = ({ name }: CheckpointTensor) => `${name}.residual`;
  const whole = parameters.map((parameter): CheckpointTensor => {
    const residual = residuals.get(named(parameter));
    if (!residual) return parameter;
    return {
      ...parameter,
      dtype: "f32",
      async write(masters) {
        const { values, residuals } = splitMasters(masters as Float32Array);
        await parameter.write(values);
        await residual.write(residuals);
      },
    };
  });
  const moments = optimizer.map((tensor) =>
    tensor.name.endsWith(".residual") ? { ...tensor, optional: true } : tensor
  );
  const joined = parameters.filter((parameter) => !residuals.has(named(parameter)))
    .map((parameter): CheckpointTensor => ({
      ...parameter,
      name: named(parameter),
      dtype: "i16",
      optional: true,
      async write(array) {
        const masters = joinMasters(await parameter.read() as Float32Array, array as Int16Array);
        await parameter.write(parameter.dtype === "f64" ? Float64Array.from(masters) : masters);
      },
    }));
  return { parameters: whole, optimizer: [...moments, ...joined] };
}
