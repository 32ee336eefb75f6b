// Moves rows to their experts and back, as a routing plan says. There are two movements, each the other's inverse and gradient:
//   toExperts:   send order → all-to-all-v → rank-major → expert-major   (dispatch; gradient of combine)
//   fromExperts: expert-major → rank-major → all-to-all-v → send order   (combine; gradient of dispatch)
// Counts are exact: no padding travels. In a world of one nothing travels and the send order is the expert-major order; the step is told of
// the all-to-alls nevertheless.
//
// Shape letters: N tokens of this rank, D model width, K choices per token, S rows that this rank sends, M rows that it receives.

import { COMPLETED } from "../collectives/progress.ts";
import type { Communicator, Work } from "../collectives/types.ts";
import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";
import type { RoutingPlan } from "./plan.ts";

/** Runs an all-to-all of the layer in its step. */
export type Transfer = (start: () => Work) => Promise<void>;

/** A routing plan whose index arrays are on the device. */
export interface PlacedPlan extends Disposable {
  /** The plan. */
  readonly plan: RoutingPlan;
  /** Row of each (token, choice) in the send order, i32 [N, K]. */
  readonly slots_NK: Tensor;
  /** Token of each row in the send order, i32 [S]. */
  readonly tokens_S: Tensor;
  /** Expert-major row i is rank-major row `toExpertMajor[i]`, i32 [M]; null where both orders are the same. */
  readonly toExpertMajor: Tensor | null;
  /** The inverse. */
  readonly toRankMajor: Tensor | null;
}

/**
 * Brings a plan's index arrays to a device.
 *
 * @param device Where rows are moved.
 * @param plan The plan.
 * @returns The plan with its index arrays; dispose of it.
 */
export function placePlan(device: Device, plan: RoutingPlan): PlacedPlan {
  const slots_NK = fromArray(device, plan.slots_NK, [plan.tokens, plan.choices]);
  const tokens_S = fromArray(device, plan.tokens_S);
  const toExpertMajor = plan.toExpertMajor && fromArray(device, plan.toExpertMajor);
  const toRankMajor = plan.toRankMajor && fromArray(device, plan.toRankMajor);
  const tensors = [slots_NK, tokens_S, toExpertMajor, toRankMajor];
  return {
    plan,
    slots_NK,
    tokens_S,
    toExpertMajor,
    toRankMajor,
    [Symbol.dispose]: () => tensors.forEach((tensor) => tensor?.[Symbol.dispose]()),
  };
}

/**
 * Rows of tokens in the send order: a token once for each of its choices.
 *
 * @param x_ND Tokens.
 * @param placed The plan.
 * @returns A new tensor [S, D].
 */
export function permute(x_ND: Tensor, placed: PlacedPlan): Tensor {
  const send_SD = empty(x_ND.device, [placed.tokens_S.size, x_ND.shape[1]], x_ND.dtype);
  if (send_SD.size > 0) ops.gatherRows(x_ND, placed.tokens_S, send_SD);
  return send_SD;
}

/**
 * Brings rows in the send order of each rank to the ranks of their experts.
 *
 * @param send_SD This rank's rows; freed once they have travelled.
 * @param placed The plan.
 * @param comm The expert-parallel ranks.
 * @param transfer Runs the all-to-all.
 * @returns Rows for this rank's experts, grouped by expert: a new tensor [M, D], or `send_SD` itself in a world of one.
 */
export async function toExperts(
  send_SD: Tensor,
  placed: PlacedPlan,
  comm: Communicator,
  transfer: Transfer,
): Promise<Tensor> {
  if (comm.size === 1) {
    await transfer(() => COMPLETED);
    return send_SD;
  }
  const { plan, toExpertMajor } = placed;
  const { device, dtype } = send_SD, width = send_SD.shape[1];
  const rows = plan.offsets[plan.offsets.length - 1];
  const recv_MD = empty(device, [rows, width], dtype);
  const sent = elements(plan.sendCounts, width), received = elements(plan.recvCounts, width);
  await transfer(() => comm.allToAllV(send_SD, sent, recv_MD, received));
  send_SD[Symbol.dispose]();
  if (!toExpertMajor || rows === 0) return recv_MD;
  using arrived = recv_MD;
  const x_MD = empty(device, [rows, width], dtype);
  ops.gatherRows(arrived, toExpertMajor, x_MD);
  return x_MD;
}

/**
 * Brings rows from the ranks of their experts back to the ranks of their tokens.
 *
 * @param y_MD Rows of this rank's experts, grouped by expert; freed once they have travelled.
 * @param placed The plan.
 * @param comm The expert-parallel ranks.
 * @param transfer Runs the all-to-all.
 * @returns This rank's rows in the send order: a new tensor [S, D], or `y_MD` itself in a world of one.
 */
export async function fromExperts(
  y_MD: Tensor,
  placed: PlacedPlan,
  comm: Communicator,
  transfer: Transfer,
): Promise<Tensor> {
  if (comm.size === 1) {
    await transfer(() => COMPLETED);
    return y_MD;
  }
  const { plan, toRankMajor } = placed;
  const { device, dtype } = y_MD, width = y_MD.shape[1];
  let leaving = y_MD;
  if (toRankMajor && y_MD.size > 0) {
    using grouped = y_MD;
    leaving = empty(device, y_MD.shape, dtype);
    ops.gatherRows(grouped, toRankMajor, leaving);
  }
  using send_MD = leaving;
  const back_SD = empty(device, [plan.tokens_S.length, width], dtype);
  const sent = elements(plan.recvCounts, width), received = elements(plan.sendCounts, width);
  await transfer(() => comm.allToAllV(send_MD, sent, back_SD, received));
  return back_SD;
}

/** Counts of rows as counts of elements, which may be beyond 2³¹. */
function elements(rows: Int32Array, width: number): number[] {
  return Array.from(rows, (n) => n * width);
}
