// Launches of gate.cu and routing.cu: the router of a MoE layer on the device. Which kernel a shape gets, and how work is split into blocks, is
// decided here, by shapes alone, so that equal inputs give equal bits.

import { bytesOf } from "../dtype.ts";
import {
  MOST_CHOICES,
  MOST_EXPERTS,
  type RouteOptions,
  type RoutingKernels,
} from "../routing_kernels.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext, ModuleSource, ParameterType } from "./context.ts";
import gateSource from "./gate.cu" with { type: "text" };
import routingSource from "./routing.cu" with { type: "text" };
import { Sorter } from "./sort.ts";

// deno-fmt-ignore
const GATE: readonly ParameterType[] = ["ptr", "ptr", "ptr", "ptr", "ptr", "i32", "i32", "i32", "i32", "i32"];
const GATE_PLAIN: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i64", "i32", "i32"];
// deno-fmt-ignore
const GATE_DX: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i32", "i32", "i32", "i32", "i32", "i32"];
const GATE_DX_PLAIN: readonly ParameterType[] = [...GATE_PLAIN, "i32"];
const GATE_DW: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i32", "i32", "i32", "i32"];
const GATE_DW_WIDE: readonly ParameterType[] = [...GATE_DW, "i32"];

/** Blocks of the gate: tiles of 8 experts, tokens, columns of a slice; as gate.cu has them. */
const GATE_BLOCKS = [
  { tiles: 1, tokens: 128, columns: 128 },
  { tiles: 2, tokens: 128, columns: 128 },
  { tiles: 4, tokens: 128, columns: 64 },
  { tiles: 8, tokens: 256, columns: 64 },
];
/** Steps of 16 experts in the blocks of its gradients. */
const GRADIENT_TILES = [1, 2, 4];
/** Most slices that a block of the gate or of its gradient has in flight. */
const MOST_STAGES = 5;
/** Most shares of the columns that the gate's sums are split into. */
const MOST_SHARES = 8;
/** Tokens of a slice, and columns of a block, of the gate's gradient. */
const GRADIENT_SLICE = 64, GRADIENT_COLUMNS = 256;

/** The kernels of gate.cu. */
export const gateModule: ModuleSource = {
  name: "gate",
  source: gateSource,
  kernels: Object.fromEntries([
    ...GATE_BLOCKS.map(({ tiles }) => [`gate_${tiles}`, GATE] as const),
    ...GRADIENT_TILES.flatMap((tiles) => [
      [`gate_dx_${tiles}`, GATE_DX] as const,
      [`gate_dw_${tiles}`, GATE_DW_WIDE] as const,
    ]),
    ...["f32", "bf16"].flatMap((dtype) => [
      [`gate_plain_${dtype}`, GATE_PLAIN] as const,
      [`gate_dx_plain_${dtype}`, GATE_DX_PLAIN] as const,
      [`gate_dw_plain_${dtype}`, GATE_DW] as const,
    ]),
    ["gate_dw_sum", ["ptr", "ptr", "i64", "i32"] as const],
  ]),
};

/** Bytes of the struct `Route` of routing.cu. */
const ROUTE_BYTES = 56;
const ROUTE: ParameterType = { bytes: ROUTE_BYTES };
/** Experts per lane that the kernels are made for. */
const PER_LANE = [1, 2, 4, 8, 32];

const SPREAD: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i64", "i32", "i64", "i32"];
/** Sizes of a unit that rows are spread by. */
const SPREAD_UNITS = [16, 4, 2];

/** The kernels of routing.cu. */
export const routingModule: ModuleSource = {
  name: "routing",
  source: routingSource,
  kernels: Object.fromEntries([
    ...PER_LANE.flatMap((n): [string, readonly ParameterType[]][] => [
      [`route_${n}`, ["ptr", "ptr", ROUTE, "ptr", "ptr", "ptr", "ptr", "ptr"]],
      [`route_backward_${n}`, ["ptr", "ptr", "ptr", "ptr", "ptr", ROUTE, "ptr"]],
    ]),
    ["route_record", ["ptr", "ptr", "i32", "i32", "i64", "ptr"]] as const,
    ...SPREAD_UNITS.map((unit) => [`spread_rows_${unit}`, SPREAD] as const),
    ["major_orders", ["ptr", "i32", "i32", "i64", "ptr", "ptr"]] as const,
  ]),
};

/** Blocks of the routing kernels, tokens permitting: a block adds up its tokens' scores, so their number is in the bits of the sums. */
const ROUTE_BLOCKS = 256;
/** Blocks that the gate and its gradient are split into at most, where that takes shares of a sum. */
const SHARED_BLOCKS = 132;
/** Blocks of gate_dx that a multiprocessor holds, by their registers. */
const GRADIENT_OCCUPANCY = [4, 3, 2];

/**
 * The routing kernels.
 *
 * @param context The GPU.
 * @returns The kernels; tokens in f32 and bf16.
 */
export function routingKernels(
  context: CudaContext,
): Omit<RoutingKernels, "scatterWeights" | "gatherWeights"> {
  const ofGate = (name: string) => context.kernel(gateModule, name);
  const ofRouting = (name: string) => context.kernel(routingModule, name);
  const gates = GATE_BLOCKS.map(({ tiles }) => ofGate(`gate_${tiles}`));
  const gateDx = GRADIENT_TILES.map((tiles) => ofGate(`gate_dx_${tiles}`));
  const gateDw = GRADIENT_TILES.map((tiles) => ofGate(`gate_dw_${tiles}`));
  const plain = (dtype: string) => ({
    gate: ofGate(`gate_plain_${dtype}`),
    dx: ofGate(`gate_dx_plain_${dtype}`),
    dw: ofGate(`gate_dw_plain_${dtype}`),
  });
  const f32 = plain("f32"), bf16 = plain("bf16");
  // How many shares of a block's sums have been computed: SHARED_BLOCKS counters, zero between launches.
  const counters = context.allocate(4 * SHARED_BLOCKS);
  context.clear(counters, 4 * SHARED_BLOCKS);
  const gateDwSum = ofGate("gate_dw_sum");
  const routes = PER_LANE.map((n) => ofRouting(`route_${n}`));
  const backwards = PER_LANE.map((n) => ofRouting(`route_backward_${n}`));
  const routeRecord = ofRouting("route_record"), majorOrders = ofRouting("major_orders");
  const spreads = SPREAD_UNITS.map((unit) => ofRouting(`spread_rows_${unit}`));
  const sorter = new Sorter(context);
  const struct = new Uint8Array(ROUTE_BYTES), view = new DataView(struct.buffer);

  function plainOf(op: string, x: Tensor): typeof f32 {
    if (x.dtype === "bf16") return bf16;
    if (x.dtype === "f32") return f32;
    throw new TypeError(
      `Cannot ${op} as the dtype of the tokens must be f32 or bf16: current value is ${x.dtype}`,
    );
  }

  /** Writes the struct `Route`; returns the index of the kernel for that many experts. */
  function describe(
    tokens: number,
    o: RouteOptions,
    losses?: { readonly auxLoss: number; readonly zLoss: number; readonly ranks: number },
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
    return { way: PER_LANE.findIndex((n) => n >= perLane), shift };
  }

  /** Whether the kernels that use tensor cores take these: 16 bits, and every row begins at a multiple of 16 bytes. */
  function fits(x: Tensor, gate: Tensor): boolean {
    return x.dtype === "bf16" && x.shape[1] % 8 === 0 && (x.address | gate.address) % 16 === 0 &&
      x.shape[0] < 2 ** 31;
  }

  /** How many stages of so many bytes fit into shared memory beside `rest`; the kernels need two. */
  function stagesOf(stage_bytes: number, rest_bytes: number): number {
    const { sharedMemory_bytes } = context.properties;
    return Math.min(MOST_STAGES, Math.floor((sharedMemory_bytes - rest_bytes) / stage_bytes));
  }

  return {
    gate(x, gate, logits) {
      const kernels = plainOf("compute the gate", x), [N, D] = x.shape, E = gate.shape[0];
      if (logits.size === 0) return;
      if (fits(x, gate)) {
        const found = GATE_BLOCKS.findIndex(({ tiles }) => tiles * 8 >= E);
        const way = found < 0 ? GATE_BLOCKS.length - 1 : found;
        const { tiles, tokens, columns } = GATE_BLOCKS[way], weights = tiles * 8 * columns;
        const stage = tokens * columns * 2 + weights * 4, terms = 2 * 3 * weights * 2;
        const stages = stagesOf(stage, terms);
        if (stages >= 2) {
          const blocks = Math.ceil(N / tokens), parts = Math.ceil(E / (8 * tiles));
          const slices = Math.ceil(D / columns);
          const wanted = Math.max(1, Math.floor(SHARED_BLOCKS / (blocks * parts)));
          const perShare = Math.ceil(slices / Math.min(wanted, MOST_SHARES)),
            shares = Math.ceil(slices / perShare);
          const sums = shares > 1
            ? context.allocate(4 * shares * blocks * parts * tokens * tiles * 8)
            : 0;
          // deno-fmt-ignore
          gates[way].launch(blocks, parts, shares, 256, stages * stage + terms, x.address, gate.address, logits.address, sums, counters,
            N, E, D, perShare * columns, stages);
          if (sums !== 0) context.free(sums);
          return;
        }
      }
      // deno-fmt-ignore
      kernels.gate.launch(Math.ceil(N / 32), Math.ceil(E / 4), 1, 256, 0, x.address, gate.address, logits.address, N, E, D);
    },
    gateBackward(dLogits, x, gate, dX, dGate, options) {
      const kernels = plainOf("take the gate's gradient", x), [N, D] = x.shape, E = gate.shape[0];
      if (x.size === 0) return;
      const wide = fits(x, gate), adds = options?.beta === 0 ? 0 : 1;
      if (wide && dX.address % 16 === 0) {
        for (let first = 0; first < E; first += 64) {
          const way = E - first <= 16 ? 0 : E - first <= 32 ? 1 : 2;
          // One wave of blocks: each loads its weights once, and then tokens go by.
          const blocks = context.properties.multiprocessors * GRADIENT_OCCUPANCY[way];
          const perBlock = Math.max(32, Math.ceil(N * Math.ceil(D / 128) / blocks / 32) * 32);
          // deno-fmt-ignore
          gateDx[way].launch(Math.ceil(D / 128), Math.ceil(N / perBlock), 1, 128, 0,
            dLogits.address, gate.address, dX.address, N, E, first, D, perBlock, first > 0 ? 1 : adds);
        }
      } else {
        // deno-fmt-ignore
        kernels.dx.launch(Math.ceil(N / 4), Math.ceil(D / 128), 1, 128, 0, dLogits.address, gate.address, dX.address, N, E, D, adds);
      }
      const step = GRADIENT_TILES.findIndex((tiles) => tiles * 16 >= E);
      const way = step < 0 ? GRADIENT_TILES.length - 1 : step, most = GRADIENT_TILES[way] * 16;
      const stage = GRADIENT_SLICE * (GRADIENT_COLUMNS * 2 + most * 4);
      const terms = 2 * 3 * GRADIENT_SLICE * (most + 8) * 2, stages = stagesOf(stage, terms);
      const tensorCores = wide && E % 4 === 0 && dLogits.address % 16 === 0 && stages >= 2;
      const columns = Math.ceil(D / (tensorCores ? GRADIENT_COLUMNS : 128));
      const parts = Math.ceil(E / (tensorCores ? most : 8));
      const wanted = Math.max(1, Math.floor(SHARED_BLOCKS / (columns * parts)));
      const perSplit = Math.ceil(N / wanted / GRADIENT_SLICE) * GRADIENT_SLICE,
        splits = Math.ceil(N / perSplit);
      const sums = context.allocate(4 * splits * E * D);
      if (tensorCores) {
        // deno-fmt-ignore
        gateDw[way].launch(columns, parts, splits, 256, stages * stage + terms, dLogits.address, x.address, sums, N, E, D, perSplit, stages);
      } else {
        // deno-fmt-ignore
        kernels.dw.launch(columns, parts, splits, 128, 0, dLogits.address, x.address, sums, N, E, D, perSplit);
      }
      // deno-fmt-ignore
      gateDwSum.launch(Math.ceil(E * D / 256), 1, 1, 256, 0, sums, dGate.address, E * D, splits);
      context.free(sums);
    },
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
      const { way, shift } = describe(N, options, options);
      const blocks = Math.min(4 * ROUTE_BLOCKS, Math.ceil(N / (256 >> shift)));
      // deno-fmt-ignore
      backwards[way].launch(blocks, 1, 1, 256, 4 * E, dWeights.address, saved.logits.address, saved.lse.address,
        saved.experts.address, saved.records.address, struct, dLogits.address);
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
