// Moves rows to their experts and back, as a routing plan says. There are two movements, each the other's inverse and gradient:
//   toExperts:   send order → all-to-all-v → rank-major → expert-major   (dispatch; gradient of combine)
//   fromExperts: expert-major → rank-major → all-to-all-v → send order   (combine; gradient of dispatch)
// Counts are exact: no padding travels. In a world of one nothing travels and the send order is the expert-major order; the step is told of
// the all-to-alls nevertheless.
//
// Shape letters: N tokens of this rank, D model width, K choices per token, S rows that this rank sends, M rows that it receives.

import { COMPLETED } from "../collectives/progress.ts";
import type { Communicator, Work } from "../collectives/types.ts";
import type { Device, RowGroups } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import * as routing from "../tensor/ops/routing.ts";
import { empty, fromArray, type Tensor, TensorScope } from "../tensor/tensor.ts";
import { type PlanOutline, type RoutingPlan, sameOrder } from "./plan.ts";

/** Runs an all-to-all of the layer in its step. */
export type Transfer = (start: () => Work) => Promise<void>;

/** A routing plan whose index arrays are on the device. */
export interface PlacedPlan extends Disposable {
  /** Rows to each rank [R]; null in a world of one, where nothing travels. */
  readonly sendCounts: Int32Array | null;
  /** Rows from each rank [R]; null in a world of one. */
  readonly recvCounts: Int32Array | null;
  /** Rows of each expert of this rank, M in all. */
  readonly groups: RowGroups;
  /** M. */
  readonly rows: number;
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
  const alone = plan.sendCounts.length === 1;
  using scope = new TensorScope();
  const placed = owned({
    sendCounts: alone ? null : plan.sendCounts,
    recvCounts: alone ? null : plan.recvCounts,
    groups: { offsets: fromArray(device, plan.offsets), host: plan.offsets },
    rows: plan.offsets[plan.offsets.length - 1],
    slots_NK: fromArray(device, plan.slots_NK, [plan.tokens, plan.choices]),
    tokens_S: fromArray(device, plan.tokens_S),
    toExpertMajor: plan.toExpertMajor && fromArray(device, plan.toExpertMajor),
    toRankMajor: plan.toRankMajor && fromArray(device, plan.toRankMajor),
  });
  return scope.keep(placed);
}

/**
 * Places rows on a device that does it by itself, in a world of one: the host learns nothing and waits for nothing.
 *
 * @param experts_NK Chosen experts, i32 [N, K], all of them chosen.
 * @param experts E.
 * @param factors Weights of the choices, f32 [N, K], and what becomes the weights of the rows, f32 [S]; or null.
 * @returns The plan with its index arrays; dispose of it.
 */
export function placeAlone(
  experts_NK: Tensor,
  experts: number,
  factors: { readonly weights_NK: Tensor; readonly scales_S: Tensor } | null,
): PlacedPlan {
  const { device, shape, size } = experts_NK;
  using scope = new TensorScope();
  const slots_NK = empty(device, shape, "i32"), tokens_S = empty(device, [size], "i32");
  const offsets = empty(device, [experts + 1], "i32");
  routing.placeRows(experts_NK, { experts, starts: null, weights: factors?.weights_NK }, {
    slots: slots_NK,
    tokens: tokens_S,
    offsets,
    scales: factors?.scales_S,
  });
  const placed = owned({
    sendCounts: null,
    recvCounts: null,
    groups: { offsets, host: null },
    rows: size,
    slots_NK,
    tokens_S,
    toExpertMajor: null,
    toRankMajor: null,
  });
  return scope.keep(placed);
}

/**
 * Places rows on a device that does it by itself, from what counts and placement say: the index arrays are made there.
 *
 * @param experts_NK Chosen experts, i32 [N, K], all of them chosen.
 * @param experts E.
 * @param outline The plan's outline.
 * @returns The plan with its index arrays; dispose of it.
 */
export function placeOutline(
  experts_NK: Tensor,
  experts: number,
  outline: PlanOutline,
): PlacedPlan {
  const { device, shape, size } = experts_NK;
  const { pieces, offsets, rows_RL, sendCounts, recvCounts } = outline;
  const ranks = sendCounts.length, seats = offsets.length - 1, rows = offsets[seats];
  // What the device must know travels in one copy.
  const numbers = new Int32Array(pieces.length + offsets.length + rows_RL.length);
  numbers.set(pieces);
  numbers.set(offsets, pieces.length);
  numbers.set(rows_RL, pieces.length + offsets.length);
  using scope = new TensorScope();
  const all = fromArray(device, numbers);
  const offsets_L = all.rows(pieces.length, pieces.length + offsets.length);
  const slots_NK = empty(device, shape, "i32"), tokens_S = empty(device, [size], "i32");
  const starts = all.rows(0, pieces.length).reshape(pieces.length / 3, 3);
  routing.placeRows(experts_NK, { experts, starts }, {
    slots: slots_NK,
    tokens: tokens_S,
    offsets: null,
  });
  let toExpertMajor: Tensor | null = null, toRankMajor: Tensor | null = null;
  if (!sameOrder(outline)) {
    const counts = all.rows(pieces.length + offsets.length, numbers.length);
    toExpertMajor = empty(device, [rows], "i32");
    toRankMajor = empty(device, [rows], "i32");
    routing.majorOrders(counts.reshape(ranks, seats), toExpertMajor, toRankMajor);
  }
  const placed = owned({
    sendCounts,
    recvCounts,
    groups: { offsets: offsets_L, host: offsets },
    rows,
    slots_NK,
    tokens_S,
    toExpertMajor,
    toRankMajor,
  }, all);
  return scope.keep(placed);
}

function owned(plan: Omit<PlacedPlan, typeof Symbol.dispose>, more?: Tensor): PlacedPlan {
  const { slots_NK, tokens_S, toExpertMajor, toRankMajor, groups } = plan;
  const tensors = [slots_NK, tokens_S, toExpertMajor, toRankMajor, groups.offsets, more];
  return {
    ...plan,
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
  using scope = new TensorScope();
  const send_SD = empty(x_ND.device, [placed.tokens_S.size, x_ND.shape[1]], x_ND.dtype);
  if (send_SD.size > 0) {
    // A GPU reads each token once so.
    if (x_ND.device.routing) routing.spreadRows(x_ND, placed.slots_NK, send_SD);
    else ops.gatherRows(x_ND, placed.tokens_S, send_SD);
  }
  return scope.keep(send_SD);
}

/**
 * Brings rows in the send order of each rank to the ranks of their experts.
 *
 * @param send_SD This rank's rows; freed once they have travelled, or could not.
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
  const { sendCounts, recvCounts, toExpertMajor, rows } = placed;
  if (!sendCounts || !recvCounts) return await stay(send_SD, transfer);
  const counts = { sent: sendCounts, received: recvCounts, rows };
  return reorder(await exchange(send_SD, counts, comm, transfer), toExpertMajor);
}

/**
 * Brings rows from the ranks of their experts back to the ranks of their tokens.
 *
 * @param y_MD Rows of this rank's experts, grouped by expert; freed once they have travelled, or could not.
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
  const { sendCounts, recvCounts, toRankMajor, tokens_S: { size: rows } } = placed;
  if (!sendCounts || !recvCounts) return await stay(y_MD, transfer);
  const counts = { sent: recvCounts, received: sendCounts, rows };
  return await exchange(reorder(y_MD, toRankMajor), counts, comm, transfer);
}

/** Rows by rank, and how many arrive in all. */
interface ExchangeCounts {
  readonly sent: Int32Array;
  readonly received: Int32Array;
  readonly rows: number;
}

/** In a world of one rows stay where they are; the step is told all the same. */
async function stay(rows: Tensor, transfer: Transfer): Promise<Tensor> {
  try {
    await transfer(() => COMPLETED);
    return rows;
  } catch (error) {
    rows[Symbol.dispose]();
    throw error;
  }
}

/** Rows to the other ranks, and theirs here; frees what was sent. */
async function exchange(
  send: Tensor,
  counts: ExchangeCounts,
  comm: Communicator,
  transfer: Transfer,
): Promise<Tensor> {
  using undo = new DisposableStack();
  undo.use(send);
  const { sent, received, rows } = counts, width = send.shape[1];
  const recv = undo.use(empty(send.device, [rows, width], send.dtype));
  await transfer(() =>
    comm.allToAllV(send, elements(sent, width), recv, elements(received, width))
  );
  undo.move();
  send[Symbol.dispose]();
  return recv;
}

/** Rows in another order; frees the old ones. Without an order they are the same. */
function reorder(rows: Tensor, order: Tensor | null): Tensor {
  if (!order || rows.size === 0) return rows;
  using from = rows;
  using scope = new TensorScope();
  const to = empty(from.device, from.shape, from.dtype);
  ops.gatherRows(from, order, to);
  return scope.keep(to);
}

/** Counts of rows as counts of elements, which may be beyond 2³¹. */
function elements(rows: Int32Array, width: number): number[] {
  return Array.from(rows, (n) => n * width);
}
