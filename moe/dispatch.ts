// Moves rows to their experts and back, as a routing plan says. There are two movements, each the other's inverse and gradient:
//   toExperts:   send order → all-to-all-v → rank-major → expert-major   (dispatch; gradient of combine)
//   fromExperts: expert-major → rank-major → all-to-all-v → send order   (combine; gradient of dispatch)
// Counts are exact: no padding travels. In a world of one nothing travels and the send order is the expert-major order; the step is told of
// the all-to-alls nevertheless. A rank's tokens move in slices, each by a plan of its own: one slice's rows travel while experts work on another's.
//
// Shape letters: N tokens of this rank or slice, D model width, K choices per token, S rows that this rank sends, M rows that it receives.

import { COMPLETED } from "../collectives/progress.ts";
import type { Communicator, Label } from "../collectives/types.ts";
import type { Device, RowGroups } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import * as routing from "../tensor/ops/routing.ts";
import { empty, fromArray, type Tensor, TensorScope } from "../tensor/tensor.ts";
import type { RowExchange } from "./moe_types.ts";
import { type PlanOutline, type RoutingPlan, sameOrder } from "./plan.ts";
import { sliceBounds } from "./slices.ts";
import type { AllToAllPlace, Step } from "./step.ts";

/** A routing plan of one slice of a rank's tokens, whose index arrays are on the device; not owned. */
export interface PlacedPlan {
  /** First token of the slice; there are as many as `slots_NK` has rows. */
  readonly firstToken: number;
  /** Rows to each rank [R]; null in a world of one, where nothing travels. */
  readonly sendCounts: Int32Array | null;
  /** Rows from each rank [R]; null in a world of one. */
  readonly recvCounts: Int32Array | null;
  /** Rows from each rank to each, [R, R]; alike on all ranks. */
  readonly rows_RR: Int32Array;
  /** Rows of each expert of this rank, M in all. */
  readonly groups: RowGroups;
  /** M. */
  readonly rows: number;
  /** Row of each (token, choice) in the send order, i32 [N, K]. */
  readonly slots_NK: Tensor;
  /** Token of each row in the send order, of the slice's tokens, i32 [S]. */
  readonly tokens_S: Tensor;
  /** Expert-major row i is rank-major row `toExpertMajor[i]`, i32 [M]; null where both orders are the same. */
  readonly toExpertMajor: Tensor | null;
  /** The inverse. */
  readonly toRankMajor: Tensor | null;
}

/** The plans of all slices of a rank's tokens; dispose of them together. */
export interface PlacedPlans extends Disposable {
  /** One plan per slice, in the order of the tokens. */
  readonly slices: readonly PlacedPlan[];
}

/**
 * Brings plans' index arrays to a device.
 *
 * @param device Where rows are moved.
 * @param plans The plan of each slice, in the order of the tokens.
 * @returns The plans with their index arrays.
 */
export function placePlans(device: Device, plans: readonly RoutingPlan[]): PlacedPlans {
  using scope = new TensorScope();
  let firstToken = 0;
  const owned: (Tensor | null)[] = [];
  const slices = plans.map((plan): PlacedPlan => {
    const alone = plan.sendCounts.length === 1;
    const offsets = fromArray(device, plan.offsets);
    const placed = {
      firstToken,
      sendCounts: alone ? null : plan.sendCounts,
      recvCounts: alone ? null : plan.recvCounts,
      rows_RR: plan.rows_RR,
      groups: { offsets, host: plan.offsets },
      rows: plan.offsets[plan.offsets.length - 1],
      slots_NK: fromArray(device, plan.slots_NK, [plan.tokens, plan.choices]),
      tokens_S: fromArray(device, plan.tokens_S),
      toExpertMajor: plan.toExpertMajor && fromArray(device, plan.toExpertMajor),
      toRankMajor: plan.toRankMajor && fromArray(device, plan.toRankMajor),
    };
    firstToken += plan.tokens;
    owned.push(offsets, placed.slots_NK, placed.tokens_S, placed.toExpertMajor, placed.toRankMajor);
    return placed;
  });
  return scope.keep(owning(slices, owned));
}

/**
 * Places rows on a device that does it by itself, in a world of one: the host learns nothing and waits for nothing.
 *
 * @param experts_NK Chosen experts, i32 [N, K], all of them chosen.
 * @param experts E.
 * @param options Number of slices; weights of the choices, f32 [N, K], and what becomes the weights of the rows, f32 [S], of one slice.
 * @returns The plans with their index arrays.
 */
export function placeAlone(
  experts_NK: Tensor,
  experts: number,
  options: {
    readonly slices: number;
    readonly factors: { readonly weights_NK: Tensor; readonly scales_S: Tensor } | null;
  },
): PlacedPlans {
  const { device, shape: [N, K], size } = experts_NK, { factors } = options;
  using scope = new TensorScope();
  const slots_NK = empty(device, [N, K], "i32"), tokens_S = empty(device, [size], "i32");
  const offsets_CE = empty(device, [options.slices * (experts + 1)], "i32");
  const bounds = sliceBounds(N, options.slices);
  const slices = Array.from({ length: options.slices }, (_, c): PlacedPlan => {
    const slots = slots_NK.rows(bounds[c], bounds[c + 1]);
    const tokens = tokens_S.rows(bounds[c] * K, bounds[c + 1] * K);
    const offsets = offsets_CE.rows(c * (experts + 1), (c + 1) * (experts + 1));
    const chosen = experts_NK.rows(bounds[c], bounds[c + 1]);
    routing.placeRows(chosen, { experts, starts: null, weights: factors?.weights_NK }, {
      slots,
      tokens,
      offsets,
      scales: factors?.scales_S,
    });
    return {
      firstToken: bounds[c],
      sendCounts: null,
      recvCounts: null,
      rows_RR: Int32Array.of(tokens.size),
      groups: { offsets, host: null },
      rows: tokens.size,
      slots_NK: slots,
      tokens_S: tokens,
      toExpertMajor: null,
      toRankMajor: null,
    };
  });
  return scope.keep(owning(slices, [slots_NK, tokens_S, offsets_CE]));
}

/**
 * Places rows on a device that does it by itself, from what counts and placement say: the index arrays are made there.
 *
 * @param experts_NK Chosen experts, i32 [N, K], all of them chosen.
 * @param experts E.
 * @param outlines The outline of each slice's plan.
 * @returns The plans with their index arrays.
 */
export function placeOutlines(
  experts_NK: Tensor,
  experts: number,
  outlines: readonly PlanOutline[],
): PlacedPlans {
  const { device, shape: [N, K], size } = experts_NK, bounds = sliceBounds(N, outlines.length);
  const seats = outlines[0].offsets.length - 1, ranks = outlines[0].sendCounts.length;
  // What the device must know travels in one copy.
  const parts = outlines.flatMap(({ pieces, offsets, rows_RL }) => [pieces, offsets, rows_RL]);
  const numbers = new Int32Array(parts.reduce((sum, { length }) => sum + length, 0));
  using scope = new TensorScope();
  let written = 0;
  for (const part of parts) {
    numbers.set(part, written);
    written += part.length;
  }
  const all = fromArray(device, numbers);
  const slots_NK = empty(device, [N, K], "i32"), tokens_S = empty(device, [size], "i32");
  const reorders = !sameOrder(outlines[0]);
  const rows = reorders ? outlines.reduce((sum, { offsets }) => sum + offsets[seats], 0) : 0;
  const toExpertMajor = reorders ? empty(device, [rows], "i32") : null;
  const toRankMajor = reorders ? empty(device, [rows], "i32") : null;
  let read = 0, row = 0;
  const next = (length: number) => all.rows(read, read += length);
  const slices = outlines.map((outline, c): PlacedPlan => {
    const { pieces, offsets, rows_RL, rows_RR, sendCounts, recvCounts } = outline;
    const starts = next(pieces.length).reshape(pieces.length / 3, 3);
    const offsets_L = next(offsets.length), counts_RL = next(rows_RL.length);
    const slots = slots_NK.rows(bounds[c], bounds[c + 1]);
    const tokens = tokens_S.rows(bounds[c] * K, bounds[c + 1] * K);
    routing.placeRows(experts_NK.rows(bounds[c], bounds[c + 1]), { experts, starts }, {
      slots,
      tokens,
      offsets: null,
    });
    const start = row, end = row += offsets[seats];
    const orders = {
      toExpertMajor: toExpertMajor && toExpertMajor.rows(start, end),
      toRankMajor: toRankMajor && toRankMajor.rows(start, end),
    };
    if (orders.toExpertMajor && orders.toRankMajor) {
      const counts = counts_RL.reshape(ranks, seats);
      routing.majorOrders(counts, orders.toExpertMajor, orders.toRankMajor);
    }
    return {
      firstToken: bounds[c],
      sendCounts,
      recvCounts,
      rows_RR,
      groups: { offsets: offsets_L, host: offsets },
      rows: offsets[seats],
      slots_NK: slots,
      tokens_S: tokens,
      ...orders,
    };
  });
  return scope.keep(owning(slices, [all, slots_NK, tokens_S, toExpertMajor, toRankMajor]));
}

function owning(slices: readonly PlacedPlan[], owned: readonly (Tensor | null)[]): PlacedPlans {
  return {
    slices,
    [Symbol.dispose]: () => owned.forEach((tensor) => tensor?.[Symbol.dispose]()),
  };
}

/**
 * The part of a tensor of all tokens that a slice has.
 *
 * @param x Tokens [N, …].
 * @param placed The slice's plan.
 * @returns A view.
 */
export function sliceOf(x: Tensor, { firstToken, slots_NK }: PlacedPlan): Tensor {
  return x.rows(firstToken, firstToken + slots_NK.shape[0]);
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

/** How the rows of one all-to-all travel. */
export interface Road {
  /** The expert-parallel ranks. */
  readonly comm: Communicator;
  /** Carries rows in place of the communicator's own all-to-all, or null. */
  readonly exchange: RowExchange | null;
  /** Runs the all-to-all. */
  readonly step: Pick<Step, "allToAll">;
  /** Which one it is. */
  readonly place: AllToAllPlace;
  /** Number of the layer's slices. */
  readonly slices: number;
}

/** Rows on their way. */
export interface Travelling {
  /**
   * The rows, once the device is past their arrival: a new tensor, the caller's; the same for every call.
   */
  arrive(): Promise<Tensor>;
  /** Frees the rows as soon as they have arrived, as nobody will use them; nothing happens to rows that were freed before. */
  drop(): void;
}

/**
 * Sends rows in the send order of each rank to the ranks of their experts.
 *
 * @param send_SD This rank's rows; freed once they have travelled, or could not.
 * @param placed The plan.
 * @param road How they travel.
 * @returns Rows for this rank's experts, grouped by expert [M, D], which travel now; `send_SD` itself in a world of one.
 */
export async function toExperts(
  send_SD: Tensor,
  placed: PlacedPlan,
  road: Road,
): Promise<Travelling> {
  const { sendCounts, recvCounts, toExpertMajor, rows_RR, rows } = placed;
  if (!sendCounts || !recvCounts) return await stay(send_SD, road);
  const counts = { sent: sendCounts, received: recvCounts, matrix: rows_RR, rows };
  return await exchange(send_SD, counts, road, (recv) => reorder(recv, toExpertMajor));
}

/**
 * Sends rows from the ranks of their experts back to the ranks of their tokens.
 *
 * @param y_MD Rows of this rank's experts, grouped by expert; freed once they have travelled, or could not.
 * @param placed The plan.
 * @param road How they travel.
 * @returns This rank's rows in the send order [S, D], which travel now; `y_MD` itself in a world of one.
 */
export async function fromExperts(
  y_MD: Tensor,
  placed: PlacedPlan,
  road: Road,
): Promise<Travelling> {
  const { sendCounts, recvCounts, toRankMajor, rows_RR, tokens_S: { size: rows } } = placed;
  if (!sendCounts || !recvCounts) return await stay(y_MD, road);
  const matrix = transposed(rows_RR, sendCounts.length);
  const counts = { sent: recvCounts, received: sendCounts, matrix, rows };
  return await exchange(reorder(y_MD, toRankMajor), counts, road, (recv) => recv);
}

/** Rows by rank, and how many arrive in all. */
interface ExchangeCounts {
  readonly sent: Int32Array;
  readonly received: Int32Array;
  /** From each rank to each. */
  readonly matrix: Int32Array;
  readonly rows: number;
}

/** In a world of one rows stay where they are; the step is told all the same. */
async function stay(rows: Tensor, { step, place }: Road): Promise<Travelling> {
  using undo = new DisposableStack();
  undo.use(rows);
  const ends = await step.allToAll(place, () => COMPLETED);
  undo.move();
  return travelling([rows], async () => {
    await ends();
    return rows;
  });
}

/** Rows to the other ranks, and theirs here; frees what was sent. */
async function exchange(
  send: Tensor,
  counts: ExchangeCounts,
  { comm, exchange, step, place, slices }: Road,
  finish: (recv: Tensor) => Tensor,
): Promise<Travelling> {
  using undo = new DisposableStack();
  undo.use(send);
  const { sent, received, matrix, rows } = counts, width = send.shape[1];
  const recv = undo.use(empty(send.device, [rows, width], send.dtype));
  const ends = await step.allToAll(place, (after) => {
    const options = { after, label: labelOf(place, slices) };
    if (exchange) return exchange.allToAllV(send, elements(matrix, width), recv, options);
    return comm.allToAllV(send, elements(sent, width), recv, elements(received, width), options);
  });
  undo.move();
  return travelling([send, recv], async () => {
    await ends();
    send[Symbol.dispose]();
    return finish(recv);
  });
}

/** What is on its way, of which `owned` is freed if it does not arrive. */
function travelling(owned: readonly Tensor[], arrives: () => Promise<Tensor>): Travelling {
  let arriving: Promise<Tensor> | null = null;
  const arrive = () =>
    arriving ??= arrives().catch((error) => {
      for (const tensor of owned) tensor[Symbol.dispose]();
      throw error;
    });
  return {
    arrive,
    drop: () => void arrive().then((tensor) => tensor[Symbol.dispose](), () => {}),
  };
}

/** Name and values of an all-to-all's span. */
function labelOf(place: AllToAllPlace, slices: number): Label {
  const { layer, phase, role, chunk } = place;
  const name = `layer ${layer} ${phase} ${role}`;
  return {
    name: slices === 1 ? name : `${name} ${chunk}/${slices}`,
    args: () => ({ layer, phase, role, chunk }),
  };
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

function transposed(matrix_RR: Int32Array, ranks: number): Int32Array {
  return matrix_RR.map((_, i) => matrix_RR[i % ranks * ranks + Math.floor(i / ranks)]);
}

/** Counts of rows as counts of elements, which may be beyond 2³¹. */
function elements(rows: Int32Array, width: number): number[] {
  return Array.from(rows, (n) => n * width);
}
