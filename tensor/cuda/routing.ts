// Launches of routing.cu: the choices of a MoE layer's router on the device, and the order of rows. Which kernel a shape gets, and how work is
// split into blocks, is decided here, by shapes alone, so that equal inputs give equal bits. The gate's products are in gate.ts.

import { bytesOf } from "../dtype.ts";
import {
  MOST_CHOICES,
  MOST_EXPERTS,
  type RouteBackwardOptions,
  type RouteOptions,
  type RoutingKernels,
} from "../routing_kernels.ts";
import type { CudaContext, ModuleSource, ParameterType } from "./context.ts";
import routingSource from "./routing.cu" with { type: "text" };
import type { GateKernel } from "./gate.ts";
import { Sorter } from "./sort.ts";

/** Bytes of the struct `Route` of routing.cu. */
const ROUTE_BYTES = 64;
const ROUTE: ParameterType = { bytes: ROUTE_BYTES };
/** Experts per lane that the kernels are made for. */
const PER_LANE = [1, 2, 4, 8, 32];

const SPREAD: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i64", "i32", "i64", "i32"];
/** Sizes of a unit that rows are spread by. */
const SPREAD_UNITS = [16, 4, 2];

/** The kernels of routing.cu. */
export const routingModule: ModuleSource = {
  name: "routing",
  overlaps: true,
  source: routingSource,
  kernels: Object.fromEntries([
    ...PER_LANE.flatMap((n): [string, readonly ParameterType[]][] => [
      [`route_${n}`, ["ptr", "ptr", ROUTE, "ptr", "ptr", "ptr", "ptr", "ptr"]],
      [`route_backward_${n}`, ["ptr", "ptr", "ptr", "ptr", "ptr", "ptr", ROUTE, "ptr"]],
    ]),
    ["route_record", ["ptr", "ptr", "i32", "i32", "i64", "ptr"]] as const,
    ["count_slices", ["ptr", "i64", "i32", "i32", "i32", "ptr"]] as const,
    ...SPREAD_UNITS.map((unit) => [`spread_rows_${unit}`, SPREAD] as const),
    ["major_orders", ["ptr", "i32", "i32", "i64", "ptr", "ptr"]] as const,
  ]),
};

/** Blocks of the routing kernels, tokens permitting: a block adds up its tokens' scores, so their number is in the bits of the sums. */
const ROUTE_BLOCKS = 256;
/** Most blocks that count the choices of a slice. */
const SLICE_BLOCKS = 32;

/**
 * The routing kernels.
 *
 * @param context The GPU.
 * @returns The kernels; rows in any dtype.
 */
export function routingKernels(
  context: CudaContext,
): Omit<RoutingKernels, GateKernel> {
  const ofRouting = (name: string) => context.kernel(routingModule, name);
  const routes = PER_LANE.map((n) => ofRouting(`route_${n}`));
  const backwards = PER_LANE.map((n) => ofRouting(`route_backward_${n}`));
  const routeRecord = ofRouting("route_record"), majorOrders = ofRouting("major_orders");
  const slicesCount = ofRouting("count_slices");
  const spreads = SPREAD_UNITS.map((unit) => ofRouting(`spread_rows_${unit}`));
  const sorter = new Sorter(context);
  const struct = new Uint8Array(ROUTE_BYTES), view = new DataView(struct.buffer);

  /** Writes the struct `Route`; returns the index of the kernel for that many experts. */
  function describe(
    tokens: number,
    o: RouteOptions,
    losses?: RouteBackwardOptions,
    record = 0,
  ): { readonly way: number; readonly shift: number } {
    if (o.experts > MOST_EXPERTS || o.choices > MOST_CHOICES) {
      throw new RangeError(
        `Cannot route on the GPU as there must be at most ${MOST_EXPERTS} experts and ${MOST_CHOICES} of a token: current value is ${o.experts} and ${o.choices}`,
      );
    }
    // Few lanes of many experts: a step of a search among lanes takes longer than one among registers. Each choice needs a lane, too.
    const least = Math.max(o.choices, Math.ceil(o.experts / (o.experts > 32 ? 8 : 4)));
    const shift = Math.min(5, least <= 1 ? 0 : 32 - Math.clz32(least - 1));
    const perLane = Math.ceil(o.experts / 2 ** shift);
    view.setBigInt64(0, BigInt(tokens), true);
    view.setInt32(8, o.experts, true);
    view.setInt32(12, o.choices, true);
    view.setInt32(16, o.scores === "sigmoid" ? 1 : 0, true);
    view.setInt32(20, o.renormalise ? 1 : 0, true);
    view.setFloat32(24, o.scale, true);
    view.setInt32(28, o.groups, true);
    view.setInt32(32, o.groupLimit, true);
    view.setInt32(36, o.firstOnly ? 1 : 0, true);
    view.setInt32(40, shift, true);
    view.setFloat32(44, losses?.auxLoss ?? 0, true);
    view.setFloat32(48, losses?.zLoss ?? 0, true);
    view.setInt32(52, losses?.ranks ?? 1, true);
    view.setInt32(56, record, true);
    return { way: PER_LANE.findIndex((n) => n >= perLane), shift };
  }

  return {
    route(logits, bias, options, out) {
      const [N, E] = logits.shape, { way, shift } = describe(N, options);
      const perPass = 256 >> shift;
      const blocks = Math.max(1, Math.min(ROUTE_BLOCKS, Math.ceil(N / perPass)));
      const sums_bytes = 8 * (E + 1) * blocks;
      const sums = context.allocate(sums_bytes + 4 * 2 * E * blocks), counts = sums + sums_bytes;
      const limits = options.groupLimit < options.groups ? perPass * (E + options.groups) * 4 : 0;
      // deno-fmt-ignore
      routes[way].launch(blocks, 1, 1, 256, 8 * 8 * (E + 1) + 8 * E + limits, logits.address, bias ? bias.address : 0, struct,
        out.experts.address, out.weights.address, out.lse.address, counts, sums);
      // deno-fmt-ignore
      routeRecord.launch(Math.ceil((3 * E + 2) / 8), 1, 1, 256, 0, counts, sums, E, blocks, N, out.record.address);
      context.free(sums);
    },
    routeBackward(dWeights, saved, options, dLogits) {
      const [N, E] = dLogits.shape;
      if (N === 0) return;
      const { way, shift } = describe(N, options, options, saved.records.shape[1]);
      const blocks = Math.min(4 * ROUTE_BLOCKS, Math.ceil(N / (256 >> shift)));
      // deno-fmt-ignore
      backwards[way].launch(blocks, 1, 1, 256, 4 * E, dWeights.address, saved.slots ? saved.slots.address : 0, saved.logits.address, saved.lse.address,
        saved.experts.address, saved.records.address, struct, dLogits.address);
    },
    countSlices(experts, slices, counts) {
      const [N, K] = experts.shape, [counted, E] = counts.shape;
      if (counts.size === 0) return;
      context.clear(counts.address, counts.bytes);
      if (experts.size === 0) return;
      const blocks = Math.min(SLICE_BLOCKS, Math.ceil(experts.size / slices / 1024)) || 1;
      slicesCount.launch(
        blocks,
        counted,
        1,
        256,
        4 * E,
        experts.address,
        N,
        K,
        slices,
        E,
        counts.address,
      );
    },
    placeRows(experts, layout, out) {
      const { starts } = layout, [, choices = 1] = experts.shape;
      const pieces = starts !== null && starts.shape.length === 2;
      if (layout.experts > MOST_EXPERTS) {
        throw new RangeError(
          `Cannot place rows on the GPU as there must be at most ${MOST_EXPERTS} experts: current value is ${layout.experts}`,
        );
      }
      sorter.placeChoices({
        experts: experts.address,
        size: experts.size,
        bins: layout.experts,
        choices,
        starts: starts && !pieces ? starts.address : 0,
        pieces: pieces ? starts.address : 0,
        pieceCount: pieces ? starts.shape[0] : 0,
        rows: out.tokens.size,
        slots: out.slots.address,
        tokens: out.tokens.address,
        offsets: out.offsets ? out.offsets.address : 0,
        weights: layout.weights ? layout.weights.address : 0,
        scales: layout.weights && out.scales ? out.scales.address : 0,
      });
    },
    spreadRows(x, slots, out) {
      const [tokens, choices] = slots.shape;
      if (slots.size === 0 || x.size === 0) return;
      const bytes = x.shape[1] * bytesOf(x.dtype);
      let way = 0;
      while ((bytes | x.address % 16 | out.address % 16) % SPREAD_UNITS[way] !== 0) way++;
      const units = bytes / SPREAD_UNITS[way];
      // log2 of the threads of a token, which each take 4 units at a time.
      const wanted = Math.ceil(units / 4);
      const shift = Math.min(8, wanted <= 1 ? 0 : 32 - Math.clz32(wanted - 1));
      // deno-fmt-ignore
      spreads[way].launch(Math.ceil(tokens * 2 ** shift / 256), 1, 1, 256, 0, x.address, slots.address, out.address, tokens, choices, units, shift);
    },
    majorOrders(counts, toExpertMajor, toRankMajor) {
      const [ranks, seats] = counts.shape;
      if (counts.size === 0) return;
      // deno-fmt-ignore
      majorOrders.launch(seats, ranks, 1, 128, 0, counts.address, ranks, seats, toExpertMajor.size, toExpertMajor.address, toRankMajor.address);
    },
  };
}
