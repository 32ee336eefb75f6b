// Launches of gate.cu and gate_combine.cu: the gate's products, logits and gradients. Which kernel a shape gets, and how work is split into blocks,
// is decided here, by shapes and the GPU alone, so that equal inputs give equal bits.

import type { RoutingKernels } from "../routing_kernels.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext, ModuleSource, ParameterType } from "./context.ts";
import combineSource from "./gate_combine.cu" with { type: "text" };
import gateSource from "./gate.cu" with { type: "text" };
import hopperSource from "./gate_hopper.cu" with { type: "text" };
import termsSource from "./gate_terms.cuh" with { type: "text" };
import hopperHeader from "./grouped_hopper.cuh" with { type: "text" };
import { type Box, GroupTables, MAP_BYTES } from "./grouped_tables.ts";
import walkHeader from "./grouped_walk.cuh" with { type: "text" };

/** The kernels of this room. */
export type GateKernel = "gate" | "gateWeightGrad" | "combineRowsGate";

// deno-fmt-ignore
const GATE: readonly ParameterType[] = ["ptr", "ptr", "ptr", "ptr", "ptr", "i32", "i32", "i32", "i32", "i32"];
const GATE_PLAIN: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i64", "i32", "i32"];
// deno-fmt-ignore
const GATE_DX: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i32", "i32", "i32", "i32", "i32"];
const GATE_DW: readonly ParameterType[] = ["ptr", "ptr", "ptr", "i32", "i32", "i32", "i32"];
// deno-fmt-ignore
const COMBINE: readonly ParameterType[] = ["ptr", "ptr", "ptr", "ptr", "ptr", "i32", "i32", "i32", "i32", "i32", "i32"];
// deno-fmt-ignore
const COMBINE_PLAIN: readonly ParameterType[] = ["ptr", "ptr", "ptr", "ptr", "ptr", "i64", "i32", "i32", "i32", "i32"];
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
  overlaps: true,
  source: termsSource + gateSource,
  kernels: Object.fromEntries([
    ...GATE_BLOCKS.map(({ tiles }) => [`gate_${tiles}`, GATE] as const),
    ...GRADIENT_TILES.map((tiles) => [`gate_dw_${tiles}`, GATE_DW_WIDE] as const),
    ...["f32", "bf16"].flatMap((dtype) => [
      [`gate_plain_${dtype}`, GATE_PLAIN] as const,
      [`gate_dw_plain_${dtype}`, GATE_DW] as const,
    ]),
    ["gate_dw_sum", ["ptr", "ptr", "i64", "i32"] as const],
  ]),
};

/** Ways of gate_combine.cu: steps of 16 experts, tokens of a chunk, tokens of which a warp loads up to 8 rows at once; the best first. */
const COMBINE_WAYS: readonly (readonly [number, number, number])[] = [
  [1, 32, 4],
  [1, 32, 2],
  [1, 16, 1],
  [2, 16, 2],
  [2, 16, 1],
  [4, 16, 2],
  [4, 16, 1],
];
/** Columns of a block there, and floats of a row of its results. */
const COMBINE_COLUMNS = 256, COMBINE_ROW = 264;

/** The kernels of gate_combine.cu. */
export const gateCombineModule: ModuleSource = {
  name: "gate_combine",
  overlaps: true,
  source: termsSource + combineSource,
  kernels: Object.fromEntries([
    ...COMBINE_WAYS.map(([steps, _, tokens]) =>
      [`gate_combine_${steps}_${tokens}`, COMBINE] as const
    ),
    ...GRADIENT_TILES.map((tiles) => [`gate_dx_${tiles}`, GATE_DX] as const),
    ...["f32", "bf16"].map((dtype) => [`gate_combine_plain_${dtype}`, COMBINE_PLAIN] as const),
  ]),
};

/** The kernels of gate_hopper.cu. */
export const gateHopperModule: ModuleSource = {
  name: "gate_hopper",
  overlaps: true,
  source: walkHeader + hopperHeader + termsSource + hopperSource,
  // deno-fmt-ignore
  kernels: {
    gate_hopper: [{ bytes: MAP_BYTES }, "ptr", "ptr", "ptr", "ptr", "i32", "i32", "i32", "i32"],
    gate_dw_hopper: [{ bytes: MAP_BYTES }, "ptr", "ptr", "i32", "i32", "i32", "i32"],
  },
  from: 90,
  exact: true,
};
/** Experts from which Hopper's kernels are faster: with fewer, memory takes longer than arithmetic. */
const HOPPER_EXPERTS = 33;
/** Experts, tokens and threads of a block there, and the shared memory of stages and of room to begin at a multiple of 1024. */
const HOPPER_BLOCK = { experts: 64, tokens: 128, threads: 512 };
const HOPPER_GATE_BYTES = 5 * 5 * 8192 + 1024, HOPPER_GRADIENT_BYTES = 4 * 7 * 8192 + 1024;
/** What its copy engine loads at once: tokens of the gate, and of its gradient. */
const HOPPER_TOKENS: Box = { columns: 64, rows: 128 },
  HOPPER_SQUARE: Box = { columns: 64, rows: 64 };

/** Blocks that the gate and its gradient are split into at most, where that takes shares of a sum. */
const SHARED_BLOCKS = 132;
/** Blocks of gate_dx that a multiprocessor holds, by their registers. */
const GRADIENT_OCCUPANCY = [4, 3, 2];

/**
 * The gate's kernels.
 *
 * @param context The GPU.
 * @returns The kernels; tokens in f32 and bf16.
 */
export function gateKernels(context: CudaContext): Pick<RoutingKernels, GateKernel> {
  const ofGate = (name: string) => context.kernel(gateModule, name);
  const gates = GATE_BLOCKS.map(({ tiles }) => ofGate(`gate_${tiles}`));
  const gateDx = GRADIENT_TILES.map((tiles) =>
    context.kernel(gateCombineModule, `gate_dx_${tiles}`)
  );
  const gateDw = GRADIENT_TILES.map((tiles) => ofGate(`gate_dw_${tiles}`));
  const plain = (dtype: string) => ({
    gate: ofGate(`gate_plain_${dtype}`),
    dw: ofGate(`gate_dw_plain_${dtype}`),
    combine: context.kernel(gateCombineModule, `gate_combine_plain_${dtype}`),
  });
  const f32 = plain("f32"), bf16 = plain("bf16");
  // How many shares of a block's sums have been computed: SHARED_BLOCKS counters, zero between launches.
  const counters = context.allocate(4 * SHARED_BLOCKS);
  context.clear(counters, 4 * SHARED_BLOCKS);
  const gateDwSum = ofGate("gate_dw_sum");
  const combines = COMBINE_WAYS.map(([steps, _, tokens]) =>
    context.kernel(gateCombineModule, `gate_combine_${steps}_${tokens}`)
  );

  const hopper = context.has(gateHopperModule)
    ? {
      gate: context.kernel(gateHopperModule, "gate_hopper"),
      dw: context.kernel(gateHopperModule, "gate_dw_hopper"),
      tables: new GroupTables(context),
    }
    : null;

  function plainOf(op: string, x: Tensor): typeof f32 {
    if (x.dtype === "bf16") return bf16;
    if (x.dtype === "f32") return f32;
    throw new TypeError(
      `Cannot ${op} as the dtype of the tokens must be f32 or bf16: current value is ${x.dtype}`,
    );
  }

  /** Whether the kernels that use tensor cores take these: tokens of 16 bits, and every row begins at a multiple of 16 bytes. */
  function fits(x: Tensor, ...others: readonly Tensor[]): boolean {
    return x.dtype === "bf16" && x.shape[1] % 8 === 0 && x.shape[0] < 2 ** 31 &&
      x.address % 16 === 0 && others.every(({ address }) => address % 16 === 0);
  }

  /** How many stages of so many bytes fit into shared memory beside `rest`; the kernels need two. */
  function stagesOf(stage_bytes: number, rest_bytes: number): number {
    const { sharedMemory_bytes } = context.properties;
    return Math.min(MOST_STAGES, Math.floor((sharedMemory_bytes - rest_bytes) / stage_bytes));
  }

  /** Blocks of the gate over tokens and experts, and shares of the columns so that there are about as many as multiprocessors. */
  function shareOut(
    N: number,
    E: number,
    D: number,
    block: { readonly tokens: number; readonly experts: number; readonly columns: number },
  ) {
    const blocks = Math.ceil(N / block.tokens), parts = Math.ceil(E / block.experts);
    const slices = Math.ceil(D / block.columns);
    const wanted = Math.min(MOST_SHARES, Math.floor(SHARED_BLOCKS / (blocks * parts)));
    const perShare = Math.ceil(slices / Math.max(1, wanted)), shares = Math.ceil(slices / perShare);
    const tile_bytes = 4 * block.tokens * block.experts;
    const sums = shares > 1 ? context.allocate(shares * blocks * parts * tile_bytes) : 0;
    return { blocks, parts, shares, perShare: perShare * block.columns, sums };
  }

  /** `dX += dLogits gate`, from an expert on. */
  function moreExperts(dLogits: Tensor, gate: Tensor, dX: Tensor, from: number): void {
    const [N, D] = dX.shape, E = gate.shape[0], columns = Math.ceil(D / 128);
    for (let first = from; first < E; first += 64) {
      const way = E - first <= 16 ? 0 : E - first <= 32 ? 1 : 2;
      // One wave of blocks: each loads its weights once, and then tokens go by.
      const perBlock = tokensOf(N, columns, GRADIENT_OCCUPANCY[way], 32);
      // deno-fmt-ignore
      gateDx[way].launch(columns, Math.ceil(N / perBlock), 1, 128, 0,
        dLogits.address, gate.address, dX.address, N, E, first, D, perBlock);
    }
  }

  /** Tokens of a block, a multiple of `chunk`, so that all blocks run at once: so many on a multiprocessor, beside each other over the columns. */
  function tokensOf(N: number, columns: number, occupancy: number, chunk: number): number {
    const blocks = Math.max(1, context.properties.multiprocessors * occupancy / columns);
    return Math.max(1, Math.ceil(N / blocks / chunk)) * chunk;
  }

  /** `dGate += dLogitsᵀ x`. */
  function weightGrad(dLogits: Tensor, x: Tensor, dGate: Tensor): void {
    const kernels = plainOf("take the gate's gradient", x), [N, D] = x.shape, E = dGate.shape[0];
    const step = GRADIENT_TILES.findIndex((tiles) => tiles * 16 >= E);
    const way = step < 0 ? GRADIENT_TILES.length - 1 : step, most = GRADIENT_TILES[way] * 16;
    const stage = GRADIENT_SLICE * (GRADIENT_COLUMNS * 2 + most * 4);
    const terms = 2 * 3 * GRADIENT_SLICE * (most + 8) * 2, stages = stagesOf(stage, terms);
    const wide = fits(x, dLogits) && E % 4 === 0 && stages >= 2;
    const onHopper = wide && E >= HOPPER_EXPERTS ? hopper : null;
    const columns = Math.ceil(D / (wide ? GRADIENT_COLUMNS : 128));
    const parts = Math.ceil(E / (wide ? most : 8));
    const wanted = Math.max(1, Math.floor(SHARED_BLOCKS / (columns * parts)));
    const perSplit = Math.ceil(N / wanted / GRADIENT_SLICE) * GRADIENT_SLICE;
    const splits = Math.ceil(N / perSplit), sums = context.allocate(4 * splits * E * D);
    if (onHopper) {
      const map = onHopper.tables.map(x, HOPPER_SQUARE);
      // deno-fmt-ignore
      onHopper.dw.launch(columns, parts, splits, HOPPER_BLOCK.threads, HOPPER_GRADIENT_BYTES, map, dLogits.address, sums, N, E, D, perSplit);
    } else if (wide) {
      // deno-fmt-ignore
      gateDw[way].launch(columns, parts, splits, 256, stages * stage + terms, dLogits.address, x.address, sums, N, E, D, perSplit, stages);
    } else {
      // deno-fmt-ignore
      kernels.dw.launch(columns, parts, splits, 128, 0, dLogits.address, x.address, sums, N, E, D, perSplit);
    }
    // deno-fmt-ignore
    gateDwSum.launch(Math.ceil(E * D / 256), 1, 1, 256, 0, sums, dGate.address, E * D, splits);
    context.free(sums);
  }

  return {
    gate(x, gate, logits) {
      const kernels = plainOf("compute the gate", x), [N, D] = x.shape, E = gate.shape[0];
      if (logits.size === 0) return;
      const found = GATE_BLOCKS.findIndex(({ tiles }) => tiles * 8 >= E);
      const way = found < 0 ? GATE_BLOCKS.length - 1 : found;
      if (hopper && E >= HOPPER_EXPERTS && fits(x, gate)) {
        const { blocks, parts, shares, perShare, sums } = shareOut(N, E, D, {
          ...HOPPER_BLOCK,
          columns: 64,
        });
        const map = hopper.tables.map(x, HOPPER_TOKENS);
        // deno-fmt-ignore
        hopper.gate.launch(blocks, parts, shares, HOPPER_BLOCK.threads, HOPPER_GATE_BYTES, map, gate.address, logits.address, sums, counters,
          N, E, D, perShare);
        if (sums !== 0) context.free(sums);
        return;
      }
      const { tiles, tokens, columns } = GATE_BLOCKS[way], weights = tiles * 8 * columns;
      const stage = tokens * columns * 2 + weights * 4, terms = 2 * 3 * weights * 2;
      const stages = stagesOf(stage, terms);
      if (!fits(x, gate) || stages < 2) {
        // deno-fmt-ignore
        kernels.gate.launch(Math.ceil(N / 32), Math.ceil(E / 4), 1, 256, 0, x.address, gate.address, logits.address, N, E, D);
        return;
      }
      const block = { experts: tiles * 8, tokens, columns };
      const { blocks, parts, shares, perShare, sums } = shareOut(N, E, D, block);
      // deno-fmt-ignore
      gates[way].launch(blocks, parts, shares, 256, stages * stage + terms, x.address, gate.address, logits.address, sums, counters,
        N, E, D, perShare, stages);
      if (sums !== 0) context.free(sums);
    },
    gateWeightGrad(dLogits, x, dGate) {
      if (x.size > 0) weightGrad(dLogits, x, dGate);
    },
    combineRowsGate(y, slots, dLogits, gate, out, options) {
      const kernels = plainOf("combine rows", out), [N, K] = slots.shape, [E, D] = gate.shape;
      if (out.size === 0) return;
      const adds = options?.beta === 1 ? 1 : 0;
      const way = COMBINE_WAYS.findIndex(([steps, , tokens], i) =>
        i === COMBINE_WAYS.length - 1 || (steps * 16 >= E && (tokens === 1 || tokens * K <= 8))
      );
      const [steps, chunk] = COMBINE_WAYS[way], row = steps * 16 + 8;
      const shared = steps * 16384 + 2 * chunk * (COMBINE_ROW * 4 + 2 * row * 2);
      if (!fits(out, y) || K > 16 || shared > context.properties.sharedMemory_bytes) {
        // deno-fmt-ignore
        kernels.combine.launch(Math.ceil(N / 4), Math.ceil(D / 128), 1, 128, 0, y.address, slots.address, dLogits.address, gate.address,
          out.address, N, K, E, D, adds);
        return;
      }
      const columns = Math.ceil(D / COMBINE_COLUMNS), perBlock = tokensOf(N, columns, 2, chunk);
      // deno-fmt-ignore
      combines[way].launch(columns, Math.ceil(N / perBlock), 1, 256, shared, y.address, slots.address, dLogits.address, gate.address,
        out.address, N, K, E, D, perBlock, adds);
      moreExperts(dLogits, gate, out, steps * 16);
    },
  };
}
