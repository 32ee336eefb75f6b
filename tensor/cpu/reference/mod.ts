// The kernels of `Kernels` in plain TypeScript: what the compiled kernels are tested against, and the version to read first.

import type { Kernels } from "../../device.ts";
import { groupedActivation } from "../../grouped_activation.ts";
import * as elementwise from "./elementwise.ts";
import * as matrix from "./matrix.ts";
import * as rows from "./rows.ts";

/** The reference kernels; f32 and f64 (fill, copy and gatherRows take every dtype). */
export const referenceKernels: Kernels = {
  fill: elementwise.fill,
  normal: elementwise.normal,
  copy: elementwise.copy,
  add: elementwise.add,
  axpy: elementwise.axpy,
  scale: elementwise.scale,
  gemm: matrix.gemm,
  groupedGemm: matrix.groupedGemm,
  groupedGemmWeightGrad: matrix.groupedGemmWeightGrad,
  ...groupedActivation({
    groupedGemm: matrix.groupedGemm,
    activation: elementwise.activation,
    activationBackward: elementwise.activationBackward,
  }),
  gatherRows: rows.gatherRows,
  scatterAddRows: rows.scatterAddRows,
  combineRows: rows.combineRows,
  combineRowsBackward: rows.combineRowsBackward,
  rmsNorm: rows.rmsNorm,
  addRmsNorm: rows.addRmsNorm,
  rmsNormBackward: rows.rmsNormBackward,
  rope: rows.rope,
  splitQkv: rows.splitQkv,
  joinQkv: rows.joinQkv,
  attention: matrix.attention,
  attentionBackward: matrix.attentionBackward,
  activation: elementwise.activation,
  activationBackward: elementwise.activationBackward,
  softmax: rows.softmax,
  softmaxBackward: rows.softmaxBackward,
  crossEntropy: rows.crossEntropy,
  sumSquares: elementwise.sumSquares,
  sum: elementwise.sum,
  clipScale: elementwise.clipScale,
  adamW: elementwise.adamW,
};
