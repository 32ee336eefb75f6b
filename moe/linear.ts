// The matrix product of every projection, and its gradients. No bias: the models here have none.

import type { DType } from "../tensor/dtype.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor, TensorScope } from "../tensor/tensor.ts";
import type { Parameter } from "./parameter.ts";
import { gradientBeta, type Step } from "./step.ts";

/**
 * `out = x wᵀ`
 *
 * @param x_NI Input, N rows of I.
 * @param weight Weights [O, I].
 * @param dtype Element type of the output: that of x, or f32 where that has 16 bits. @default {that of x}
 * @returns A new tensor [N, O].
 */
export function linear(x_NI: Tensor, weight: Tensor, dtype: DType = x_NI.dtype): Tensor {
  using scope = new TensorScope();
  const out_NO = empty(x_NI.device, [x_NI.shape[0], weight.shape[0]], dtype);
  ops.gemm(x_NI, weight, out_NO, { transposeB: true });
  return scope.keep(out_NO);
}

/**
 * Gradient of {@linkcode linear}: `dX = dOut w` and `dW += dOutᵀ x`.
 *
 * @param dOut_NO Gradient of the output.
 * @param x_NI The input.
 * @param weight The weights, whose gradient is added to, or overwritten if step and parameter say so.
 * @param options The step, and where the input's gradient is added.
 * @returns The input's gradient [N, I]: a new tensor, unless `dX_NI` is given.
 */
export function linearBackward(
  dOut_NO: Tensor,
  x_NI: Tensor,
  weight: Pick<Parameter, "value" | "grad" | "overwrites">,
  options: { readonly step?: Pick<Step, "firstPass">; readonly dX_NI?: Tensor } = {},
): Tensor {
  const { step, dX_NI } = options;
  using scope = new TensorScope();
  const out = dX_NI ?? empty(x_NI.device, x_NI.shape, x_NI.dtype);
  ops.gemm(dOut_NO, weight.value, out, { beta: dX_NI ? 1 : 0 });
  const beta = gradientBeta(weight, step);
  ops.gemm(dOut_NO, x_NI, weight.grad, { transposeA: true, beta });
  return scope.keep(out);
}
