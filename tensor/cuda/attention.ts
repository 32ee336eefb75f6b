// Launches of the attention kernels: which of them a dtype, a head width and a GPU get, and the tables that say which tile of which
// sequence a block has. Tables are built once per list of offsets and kept.

import type { AttentionShape, Kernels } from "../device.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext, CudaKernel, ModuleSource, ParameterType } from "./context.ts";
import tileSource from "./attention_tile.cuh" with { type: "text" };
import forwardSource from "./attention.cu" with { type: "text" };
import backwardSource from "./attention_backward.cu" with { type: "text" };
import generalSource from "./attention_general.cu" with { type: "text" };
import hopperSource from "./attention_hopper.cu" with { type: "text" };

// deno-fmt-ignore
const FORWARD: readonly ParameterType[] = ["ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "i32", "i32", "i32", "f32"];
// deno-fmt-ignore
const QUERIES: readonly ParameterType[] = ["ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "i32", "i32", "i32", "i32", "f32"];
// deno-fmt-ignore
const KEYS: readonly ParameterType[] = ["ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "i32", "i32", "i32", "i32", "f32"];

/** Head widths of the tensor-core kernels; others in between are padded with zeros in shared memory. */
const WIDTHS = [32, 64, 96, 128] as const;
/** Head widths of the general kernels. */
const GENERAL_WIDTHS = [64, 128, 256] as const;
/** Hopper's kernels: warpgroups of a block of the forward pass, dQ, and dK with dV, and keys at a time of the forward pass. */
const HOPPER = [
  { width: 64, groups: [1, 1, 1], keys: 64 },
  { width: 128, groups: [2, 2, 2], keys: 128 },
] as const;
/** Rows of a tile of the general kernels, keys at a time in the forward pass, and in the gradient. */
const GENERAL_ROWS = 32, GENERAL_KEYS = 16, GENERAL_STEP = 8;

/** Attention's forward pass in bf16 on tensor cores. */
export const attentionModule: ModuleSource = {
  name: "attention",
  overlaps: true,
  source: tileSource + forwardSource,
  kernels: Object.fromEntries(WIDTHS.map((C) => [`attention_forward_${C}`, FORWARD])),
};

/** Attention's gradient in bf16 on tensor cores. */
export const attentionBackwardModule: ModuleSource = {
  name: "attention_backward",
  overlaps: true,
  source: tileSource + backwardSource,
  kernels: Object.fromEntries(
    [...WIDTHS, "96_small", "128_small"].flatMap((name) => [
      [`attention_queries_${name}`, QUERIES],
      [`attention_keys_${name}`, KEYS],
    ]),
  ),
};

/** Attention and its gradient in bf16 by Hopper's own instructions, for heads of 64 and 128 columns. */
export const attentionHopperModule: ModuleSource = {
  name: "attention_hopper",
  overlaps: true,
  source: tileSource + hopperSource,
  kernels: Object.fromEntries(
    [64, 128].flatMap((C) => [
      [`attention_hopper_${C}`, FORWARD],
      [`attention_queries_hopper_${C}`, QUERIES],
      [`attention_keys_hopper_${C}`, KEYS],
    ]),
  ),
  from: 90,
  exact: true,
};

/** Attention and its gradient in f32, and in bf16 for heads that the others do not take. */
export const attentionGeneralModule: ModuleSource = {
  name: "attention_general",
  overlaps: true,
  source: generalSource,
  kernels: Object.fromEntries(
    ["f32", "bf16"].flatMap((dtype) =>
      GENERAL_WIDTHS.flatMap((width) => [
        [`general_forward_${dtype}_${width}`, FORWARD],
        [`general_queries_${dtype}_${width}`, QUERIES],
        [`general_keys_${dtype}_${width}`, KEYS],
      ])
    ),
  ),
};

/** A kernel with the rows of its tile, its threads and its shared memory. */
interface Launch {
  readonly kernel: CudaKernel;
  readonly rows: number;
  readonly threads: number;
  readonly shared_bytes: number;
}

/** The three kernels of a head width. */
interface Launches {
  readonly forward: Launch;
  readonly queries: Launch;
  readonly keys: Launch;
}

/** Tables of a list of offsets; by rows of a tile, and for keys by minus that. */
interface Tables {
  readonly offsets: Int32Array;
  readonly tables: Map<number, { readonly address: number; readonly tiles: number }>;
  /** Places of row statistics, a multiple of 128 for each sequence. */
  readonly slots: number;
}

/** Lists of offsets that are remembered: a training step has one, packed batches of changing lengths come and go. */
const REMEMBERED = 16;
/** Each sequence's statistics begin at a multiple of this many rows: the largest tile. */
const SLOT_ROWS = 128;

/**
 * The tiles of all sequences, those with the most work first, as (first row of the sequence, its length, first row of the tile in it, first
 * place of its statistics).
 *
 * @param offsets First row of each sequence and, last, the number of rows.
 * @param rows Rows of a tile.
 * @param keys Whether tiles are of keys, whose work is the queries from there on, instead of queries, whose work is the keys up to there.
 * @returns i32 [tiles, 4].
 */
export function attentionTiles(offsets: Int32Array, rows: number, keys: boolean): Int32Array {
  // counted by work in tiles, then placed: longest first, otherwise in order
  let longest = 0;
  for (let s = 0; s + 1 < offsets.length; s++) {
    longest = Math.max(longest, Math.ceil((offsets[s + 1] - offsets[s]) / rows));
  }
  const counts = new Int32Array(longest + 1);
  for (let s = 0; s + 1 < offsets.length; s++) {
    const tiles = Math.ceil((offsets[s + 1] - offsets[s]) / rows);
    for (let work = 1; work <= tiles; work++) counts[work]++;
  }
  const at = new Int32Array(longest + 1);
  let total = 0;
  for (let work = longest; work > 0; work--) {
    at[work] = total;
    total += counts[work];
  }
  const table = new Int32Array(total * 4);
  for (let s = 0, slot = 0; s + 1 < offsets.length; s++) {
    const start = offsets[s], length = offsets[s + 1] - start, tiles = Math.ceil(length / rows);
    for (let tile = 0; tile < tiles; tile++) {
      const place = at[keys ? tiles - tile : tile + 1]++ * 4, first = tile * rows;
      table[place] = start;
      table[place + 1] = length;
      table[place + 2] = first;
      table[place + 3] = slot + first;
    }
    slot += Math.ceil(length / SLOT_ROWS) * SLOT_ROWS;
  }
  return table;
}

function equal(a: Int32Array, b: Int32Array): boolean {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
}

/**
 * Attention and its gradient: on tensor cores in bf16 for heads of up to 128 columns (a multiple of 8), plainly in f32 and otherwise.
 *
 * @param context What the rooms of the device share.
 * @param hopper Whether Hopper's own instructions are used, where the GPU has them. @default {true}
 * @returns The kernels.
 */
export function attentionKernels(
  context: CudaContext,
  hopper = true,
): Pick<Kernels, "attention" | "attentionBackward"> {
  const roomy = context.properties.sharedMemory_bytes >= 132 * 1024;
  const fast = WIDTHS.map((C): Launches => {
    const wide = C > 64, name = `${C}${wide && !roomy ? "_small" : ""}`;
    const warps = wide && roomy ? 8 : 4, rows = wide ? warps * 16 : 128;
    const backward = (kernel: CudaKernel, more_bytes: number): Launch => ({
      kernel,
      rows,
      threads: warps * 32,
      shared_bytes: (2 * rows + 4 * 64) * C * 2 + more_bytes,
    });
    return {
      forward: {
        kernel: context.kernel(attentionModule, `attention_forward_${C}`),
        rows: 128,
        threads: 128,
        shared_bytes: (128 + 4 * 64) * C * 2,
      },
      queries: backward(context.kernel(attentionBackwardModule, `attention_queries_${name}`), 0),
      // beside its tiles, two stages of two numbers for each of 64 rows
      keys: backward(context.kernel(attentionBackwardModule, `attention_keys_${name}`), 1024),
    };
  });
  // Hopper's kernels, by width; warpgroups of a block and keys at a time as attention_hopper.cu says
  const onHopper = new Map<number, Launches>();
  if (hopper && context.has(attentionHopperModule)) {
    for (const { width: C, groups, keys } of HOPPER) {
      const launch = (name: string, groups: number, shared_bytes: number): Launch => ({
        kernel: context.kernel(attentionHopperModule, `${name}_${C}`),
        rows: groups * 64,
        threads: groups * 128,
        shared_bytes,
      });
      const rows = groups.map((n) => n * 64);
      onHopper.set(C, {
        forward: launch("attention_hopper", groups[0], (rows[0] + 4 * keys) * C * 2),
        queries: launch("attention_queries_hopper", groups[1], (2 * rows[1] + 4 * 64) * C * 2),
        keys: launch("attention_keys_hopper", groups[2], (2 * rows[2] + 4 * 64) * C * 2 + 1024),
      });
    }
  }
  const general = (["f32", "bf16"] as const).map((dtype) =>
    GENERAL_WIDTHS.map((width) => ({
      forward: context.kernel(attentionGeneralModule, `general_forward_${dtype}_${width}`),
      queries: context.kernel(attentionGeneralModule, `general_queries_${dtype}_${width}`),
      keys: context.kernel(attentionGeneralModule, `general_keys_${dtype}_${width}`),
    }))
  );
  const generalLaunches = new Map<string, Launches>();

  function launches(op: string, x: Tensor, C: number, addresses: number): Launches {
    if (x.dtype === "bf16" && C <= 128 && C % 8 === 0 && addresses % 16 === 0) {
      return onHopper.get(C) ?? fast[C <= 32 ? 0 : C <= 64 ? 1 : C <= 96 ? 2 : 3];
    }
    if (x.dtype !== "f32" && x.dtype !== "bf16") {
      throw new TypeError(
        `Cannot ${op} on the GPU as the dtype must be f32 or bf16: current value is ${x.dtype}`,
      );
    }
    if (C > 256) {
      throw new RangeError(
        `Cannot ${op} on the GPU as headDim must be <= 256: current value is ${C}`,
      );
    }
    const key = `${x.dtype} ${C}`;
    let found = generalLaunches.get(key);
    if (found === undefined) {
      const kernels = general[x.dtype === "f32" ? 0 : 1][C <= 64 ? 0 : C <= 128 ? 1 : 2];
      const pitch_bytes = (C | 1) * 4, rows = GENERAL_ROWS, threads = 4 * GENERAL_ROWS;
      const launch = (kernel: CudaKernel, tileRows: number, scores: number): Launch => ({
        kernel,
        rows,
        threads,
        shared_bytes: tileRows * pitch_bytes + scores * 4,
      });
      found = {
        // deno-fmt-ignore
        forward: launch(kernels.forward, rows + 2 * GENERAL_KEYS, rows * (GENERAL_KEYS + 1)),
        queries: launch(kernels.queries, 2 * rows + 2 * GENERAL_STEP, rows * (GENERAL_STEP + 1)),
        keys: launch(kernels.keys, 2 * rows + 2 * GENERAL_STEP, 2 * rows * (GENERAL_STEP + 1)),
      };
      generalLaunches.set(key, found);
    }
    return found;
  }

  /** The remembered lists of offsets, last used first. */
  const remembered: Tables[] = [];
  function tablesOf(offsets: Int32Array): Tables {
    for (let i = 0; i < remembered.length; i++) {
      const found = remembered[i];
      if (!equal(found.offsets, offsets)) continue;
      if (i > 0) {
        remembered.splice(i, 1);
        remembered.unshift(found);
      }
      return found;
    }
    let slots = 0;
    for (let s = 0; s + 1 < offsets.length; s++) {
      slots += Math.ceil((offsets[s + 1] - offsets[s]) / SLOT_ROWS) * SLOT_ROWS;
    }
    const made: Tables = { offsets: offsets.slice(), tables: new Map(), slots };
    remembered.unshift(made);
    if (remembered.length > REMEMBERED) {
      for (const { address } of remembered.pop()!.tables.values()) context.free(address);
    }
    return made;
  }
  function tableOf(
    of: Tables,
    rows: number,
    keys: boolean,
  ): { readonly address: number; readonly tiles: number } {
    const key = keys ? -rows : rows;
    let found = of.tables.get(key);
    if (found === undefined) {
      const tiles = attentionTiles(of.offsets, rows, keys);
      const address = context.allocate(tiles.byteLength);
      context.upload(tiles, address);
      found = { address, tiles: tiles.length / 4 };
      of.tables.set(key, found);
    }
    return found;
  }

  return {
    attention(q, k, v, out, lse, shape: AttentionShape): void {
      const { heads: H, kvHeads: G, headDim: C, offsets } = shape;
      const addresses = q.address | k.address | v.address | out.address;
      const { forward } = launches("attend", q, C, addresses);
      if (q.shape[0] === 0) return;
      const table = tableOf(tablesOf(offsets), forward.rows, false);
      const scale = 1 / Math.sqrt(C);
      // the tensor-core kernel computes powers of two
      const factor = forward.rows === GENERAL_ROWS ? scale : scale * Math.LOG2E;
      // deno-fmt-ignore
      forward.kernel.launch(table.tiles * H, 1, 1, forward.threads, forward.shared_bytes, q.address, k.address, v.address, out.address,
        lse.address, table.address, H, G, C, factor);
    },

    attentionBackward(dOut, q, k, v, out, lse, shape: AttentionShape, dQ, dK, dV): void {
      const { heads: H, kvHeads: G, headDim: C, offsets } = shape;
      const addresses = dOut.address | q.address | k.address | v.address | out.address |
        dQ.address | dK.address | dV.address;
      const { queries, keys } = launches("take the attention's gradient", q, C, addresses);
      if (q.shape[0] === 0) return;
      const tables = tablesOf(offsets), { slots } = tables, scale = 1 / Math.sqrt(C);
      const ofQueries = tableOf(tables, queries.rows, false);
      const ofKeys = tableOf(tables, keys.rows, true);
      const statistics = context.allocate(slots * H * 8);
      // deno-fmt-ignore
      {
        queries.kernel.launch(ofQueries.tiles * H, 1, 1, queries.threads, queries.shared_bytes, dOut.address, q.address, k.address,
          v.address, out.address, lse.address, dQ.address, statistics, ofQueries.address, slots, H, G, C, scale);
        keys.kernel.launch(ofKeys.tiles * G, 1, 1, keys.threads, keys.shared_bytes, dOut.address, q.address, k.address, v.address,
          dK.address, dV.address, statistics, ofKeys.address, slots, H, G, C, scale);
      }
      context.free(statistics);
    },
  };
}
