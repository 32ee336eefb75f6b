// Times the kernels that route tokens and move rows on a GPU, at the shapes of three MoE layers, against the bytes that each must move. L2-cold:
// before each timed run, behind which the host has enqueued the whole run before it starts, half a gigabyte is read. (Written, it would leave
// a cache whose lines must go to memory first: 8 µs more for whatever reads as much as the cache holds.)
//
//   deno run -A bench/routing.ts

import type { RouteOptions } from "../tensor/routing_kernels.ts";
import { cudaDevice } from "../tensor/cuda/device.ts";
import * as ops from "../tensor/ops.ts";
import * as routing from "../tensor/ops/routing.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";
import { needGpu } from "./_gpu.ts";

const FLUSH_BYTES = 2 ** 29, REPEATS = 15;
/** What a copy reaches on an H200, counting both ways. */
const COPY_GBS = 4300;

needGpu();
const device = await cudaDevice();
const flush = empty(device, [FLUSH_BYTES / 4]), flushed = empty(device, [1], "f64");
ops.fill(flush, 1);

let seed = 1;
function uniform(): number {
  seed = Math.imul(seed, 1664525) + 1013904223 | 0;
  return (seed >>> 8) / 2 ** 24;
}

/** Median µs of work on the GPU. */
async function time(work: () => void): Promise<number> {
  const times: number[] = [];
  for (let i = 0; i < REPEATS + 2; i++) {
    device.kernels.sumSquares([flush], flushed);
    const start = device.stream.recordTimed();
    work();
    const end = device.stream.recordTimed();
    await device.stream.synchronize();
    if (i >= 2) times.push(end.time() - start.time());
  }
  return times.sort((a, b) => a - b)[REPEATS >> 1];
}

function bf16(...shape: number[]): Tensor {
  const x = empty(device, shape, "bf16");
  device.kernels.normal(x, [++seed, 7], 1);
  return x;
}

function f32(...shape: number[]): Tensor {
  const x = empty(device, shape, "f32");
  device.kernels.normal(x, [++seed, 7], 1);
  return x;
}

const shapes: readonly (readonly [N: number, D: number, E: number, K: number])[] = [
  [16384, 1024, 16, 2],
  [8192, 2048, 64, 8],
  [16384, 4096, 8, 2],
];
for (const [N, D, E, K] of shapes) {
  console.log(`N ${N}, D ${D}, E ${E}, K ${K}`);
  const row = async (name: string, bytes: number, work: () => void) => {
    const us = await time(work), gbs = bytes / us / 1000;
    console.log(
      `  ${name.padEnd(28)}${us.toFixed(1).padStart(8)} µs ${gbs.toFixed(0).padStart(6)} GB/s ${
        (100 * gbs / COPY_GBS).toFixed(0).padStart(4)
      } %`,
    );
  };
  const S = N * K, wide = D * 2;
  const x = bf16(N, D), gate = f32(E, D), logits = empty(device, [N, E]);
  await row("gate", N * wide + 4 * N * E, () => routing.gate(x, gate, logits));
  const dGate = f32(E, D), dLogits = f32(N, E);
  await row("gateWeightGrad", N * wide + 4 * N * E, () => {
    routing.gateWeightGrad(dLogits, x, dGate);
  });
  for (const scores of ["softmax", "sigmoid"] as const) {
    const groups = scores === "sigmoid" && E >= 64 ? 8 : 1;
    const options: RouteOptions = {
      experts: E,
      choices: K,
      scores,
      renormalise: true,
      scale: 1,
      groups,
      groupLimit: Math.max(1, groups / 2),
      firstOnly: false,
    };
    const experts = empty(device, [N, K], "i32"), weights = empty(device, [N, K]);
    const lse = empty(device, [N]), record = empty(device, [3 * E + 2], "f64");
    const dWeights = f32(N, K);
    const bytes = 4 * N * E + 8 * N * K;
    await row(
      `route, ${scores}`,
      bytes,
      () => routing.route(logits, null, options, { experts, weights, lse, record }),
    );
    const saved = { logits, lse, experts, records: record.reshape(1, 3 * E + 2) };
    const losses = { ...options, auxLoss: 0.01, zLoss: 0.001, ranks: 1 };
    await row(
      `routeBackward, ${scores}`,
      bytes + 4 * N * E,
      () => routing.routeBackward(dWeights, saved, losses, dLogits),
    );
    if (scores === "sigmoid") continue;
    const slots = empty(device, [N, K], "i32"), tokens = empty(device, [S], "i32");
    const offsets = empty(device, [E + 1], "i32");
    await row(
      "placeRows",
      16 * S,
      () => routing.placeRows(experts, { experts: E, starts: null }, { slots, tokens, offsets }),
    );
    const y = bf16(S, D), dY = empty(device, [S, D], "bf16"), out = empty(device, [N, D], "bf16");
    const dOut = bf16(N, D), dW = empty(device, [N, K]);
    await row("spreadRows (permute)", (N + S) * wide, () => routing.spreadRows(x, slots, y));
    await row("gatherRows (permute)", (N + S) * wide, () => ops.gatherRows(x, tokens, y));
    await row("combineRows", (N + S) * wide, () => ops.combineRows(y, slots, weights, out));
    await row(
      "combineRows, residual",
      (2 * N + S) * wide,
      () => ops.combineRows(y, slots, weights, out, x),
    );
    await row(
      "combineRows, no weights",
      (N + S) * wide,
      () => ops.combineRows(y, slots, null, out),
    );
    await row(
      "combineRowsGate",
      (N + S) * wide,
      () => routing.combineRowsGate(y, slots, dLogits, gate, out),
    );
    await row(
      "combineRowsBackward",
      (N + 2 * S) * wide,
      () => ops.combineRowsBackward(dOut, y, slots, weights, dY, dW),
    );
    // The embedding's gradient: Zipf-like tokens.
    const V = 32_000, ids = Int32Array.from({ length: N }, () => Math.floor(V * uniform() ** 6));
    const rows = fromArray(device, ids), sums = empty(device, [V, D]);
    ops.fill(sums, 0);
    const distinct = new Set(ids).size;
    await row(
      "scatterAddRows, Zipf",
      N * wide + 8 * distinct * D,
      () => ops.scatterAddRows(dOut, rows, sums),
    );
    const even = fromArray(device, ids.map(() => Math.floor(V * uniform())));
    await row(
      "scatterAddRows, uniform",
      N * wide + 8 * N * 0.8 * D,
      () => ops.scatterAddRows(dOut, even, sums),
    );
    const counts = fromArray(device, new Int32Array(8 * 8).fill(Math.floor(S / 64)), [8, 8]);
    const M = 64 * Math.floor(S / 64);
    const to = empty(device, [M], "i32"), back = empty(device, [M], "i32");
    await row("majorOrders, 8 x 8", 8 * M, () => routing.majorOrders(counts, to, back));
    for (const t of [y, dY, out, dOut, dW, slots, tokens, offsets, rows, sums, even, to, back]) {
      t[Symbol.dispose]();
    }
  }
  for (const t of [x, gate, logits, dGate, dLogits]) t[Symbol.dispose]();
}
