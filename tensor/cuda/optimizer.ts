// Launches of optimizer.cu: sums in f64, the clipping factor, and AdamW, over lists of tensors in one launch each. The table that tells a
// kernel where the tensors of a list lie stays on the device and is uploaded again only when an address changes.

import type { AdamWUpdate, Kernels } from "../device.ts";
import type { Tensor } from "../tensor.ts";
import type { CudaContext, ModuleSource } from "./context.ts";
import source from "./optimizer.cu" with { type: "text" };

type Optimizer = Pick<Kernels, "sum" | "sumSquares" | "clipScale" | "adamW">;

/** The kernels of optimizer.cu. */
export const optimizerModule: ModuleSource = {
  name: "optimizer",
  overlaps: true,
  source,
  kernels: {
    square_partials: ["ptr", "i32", "i32", "ptr"],
    sum_partials_f32: ["ptr", "i64", "i32", "ptr"],
    sum_partials_bf16: ["ptr", "i64", "i32", "ptr"],
    add_partials: ["ptr", "i32", "ptr"],
    clip_scale: ["ptr", "f64", "ptr"],
    // deno-fmt-ignore
    adamw: ["ptr", "i32", "i32", "ptr", "i32", "f32", "f32", "f32", "f32", "f32", "f32", "f32", "f32"],
  },
};

/** Threads of a block (THREADS in optimizer.cu). */
const THREADS = 256;
/** Elements of a block of a sum. Part of the result: it says which elements are added first. */
const SUM_CHUNK = 32768;
/** Elements of a block of AdamW: one pack per thread. More were slower (bench/NOTES.md). */
const UPDATE_CHUNK = 4 * THREADS;
/** Lists whose tables are kept. A step has few: parameters, their gradients, by group of ranks. */
const TABLES = 16;

/** The key of a table that holds no list. */
const NOTHING = new Float64Array(0);

/** A list of tensors as a kernel reads it. */
interface Table {
  /** What it was made of: the fields of all entries. */
  key: Float64Array;
  /** Where it lies on the device. */
  address: number;
  /** How many bytes are allocated there. */
  bytes: number;
  /** Blocks of a launch. */
  chunks: number;
  /** When it was used last. */
  used: number;
}

/** How the entries of a kind of table are laid out. */
interface Layout {
  /** Numbers of the key per entry; the size is the first of them, addresses follow. */
  readonly fields: number;
  /** Bytes per entry. */
  readonly entry_bytes: number;
  /** Elements of a block. */
  readonly chunk: number;
  /** Writes an entry from its fields, and the first of its chunks. */
  write(to: DataView, offset: number, key: Float64Array, at: number, first: number): void;
}

/** Writes an integer of 64 bits, without a BigInt. */
function setInteger(to: DataView, offset: number, value: number): void {
  to.setUint32(offset, value >>> 0, true);
  to.setUint32(offset + 4, Math.floor(value / 2 ** 32), true);
}

const SUMMANDS: Layout = {
  fields: 3,
  entry_bytes: 24,
  chunk: SUM_CHUNK,
  write(to, offset, key, at, first) {
    setInteger(to, offset, key[at + 1]);
    setInteger(to, offset + 8, key[at]);
    to.setInt32(offset + 16, first, true);
    to.setInt32(offset + 20, key[at + 2], true);
  },
};

const PARAMETERS: Layout = {
  fields: 8,
  entry_bytes: 64,
  chunk: UPDATE_CHUNK,
  write(to, offset, key, at, first) {
    for (let i = 0; i < 5; i++) setInteger(to, offset + 8 * i, key[at + 1 + i]);
    setInteger(to, offset + 40, key[at]);
    to.setInt32(offset + 48, first, true);
    to.setInt32(offset + 52, key[at + 6], true);
    to.setFloat32(offset + 56, key[at + 7], true);
    to.setFloat32(offset + 60, 0, true);
  },
};

/** The tables of one layout: found again by what they were made of. */
class Tables {
  readonly #context: CudaContext;
  readonly #layout: Layout;
  readonly #tables: Table[] = [];
  #clock = 0;

  constructor(context: CudaContext, layout: Layout) {
    this.#context = context;
    this.#layout = layout;
  }

  /** The table of the entries whose fields are the first `length` numbers of `key`. */
  find(key: Float64Array, length: number): Table {
    this.#clock++;
    for (const table of this.#tables) {
      const known = table.key;
      if (known.length !== length) continue;
      let i = 0;
      while (i < length && known[i] === key[i]) i++;
      if (i < length) continue;
      table.used = this.#clock;
      return table;
    }
    return this.#make(key.slice(0, length));
  }

  #make(key: Float64Array): Table {
    const { fields, entry_bytes, chunk } = this.#layout;
    const entries = key.length / fields, bytes = entries * entry_bytes;
    const view = new DataView(new ArrayBuffer(bytes));
    let chunks = 0;
    for (let i = 0; i < entries; i++) {
      this.#layout.write(view, i * entry_bytes, key, i * fields, chunks);
      chunks += Math.ceil(key[i * fields] / chunk);
    }
    const table = this.#place(bytes);
    this.#context.upload(view, table.address);
    return Object.assign(table, { key, chunks, used: this.#clock });
  }

  /** A table with memory for so many bytes: a new one, or, when there are many, the one unused for longest. */
  #place(bytes: number): Table {
    let table = this.#tables[0];
    if (this.#tables.length < TABLES) {
      table = { key: NOTHING, address: 0, bytes: 0, chunks: 0, used: 0 };
      this.#tables.push(table);
    } else {
      for (const each of this.#tables) if (each.used < table.used) table = each;
    }
    table.key = NOTHING; // should memory or the upload fail, it is not found again
    if (table.bytes < bytes) {
      // Kernels that still read the old table come before whatever gets its memory: both are in the order of the stream.
      if (table.bytes > 0) this.#context.free(table.address);
      table.bytes = 0;
      table.address = this.#context.allocate(bytes);
      table.bytes = bytes;
    }
    return table;
  }
}

/** Numbers that grow as they must, for keys. */
class Scratch {
  numbers: Float64Array = new Float64Array(1024);

  /** At least so many numbers. */
  of(length: number): Float64Array {
    if (this.numbers.length < length) this.numbers = new Float64Array(2 * length);
    return this.numbers;
  }
}

function refuse(op: string, name: string, expected: string, x: Tensor): never {
  throw new TypeError(
    `Cannot ${op} as the dtype of ${name} must be ${expected}: current value is ${x.dtype}`,
  );
}

/** The `kind` of a parameter in optimizer.cu. */
function kindOf({ parameter, gradient, residual, moment1, moment2 }: AdamWUpdate): number {
  const op = "take an AdamW step";
  if (moment1.dtype !== "f32") refuse(op, "moment1", "f32", moment1);
  if (moment2.dtype !== "f32") refuse(op, "moment2", "f32", moment2);
  if (parameter.dtype === "f32") {
    if (gradient.dtype !== "f32") refuse(op, "gradient", "f32", gradient);
    return 2;
  }
  if (parameter.dtype !== "bf16") refuse(op, "parameter", "f32 or bf16", parameter);
  if (!residual) {
    throw new TypeError(
      "Cannot take an AdamW step as a bf16 parameter must have a residual: current value is null",
    );
  }
  if (residual.dtype !== "i16") refuse(op, "residual", "i16", residual);
  if (gradient.dtype === "f32") return 0;
  if (gradient.dtype !== "bf16") refuse(op, "gradient", "f32 or bf16", gradient);
  return 1;
}

/**
 * The kernels at the end of a step.
 *
 * @param context The GPU.
 * @returns The kernels; f32 and bf16.
 */
export function optimizerKernels(context: CudaContext): Optimizer {
  const kernel = (name: string) => context.kernel(optimizerModule, name);
  const squarePartials = kernel("square_partials"), addPartials = kernel("add_partials");
  const sumF32 = kernel("sum_partials_f32"), sumBf16 = kernel("sum_partials_bf16");
  const clip = kernel("clip_scale"), update = kernel("adamw");
  const summands = new Tables(context, SUMMANDS), parameters = new Tables(context, PARAMETERS);
  const scratch = new Scratch();

  /** Calls back with room for so many partial sums, then adds them to `out`. */
  function reduce(chunks: number, out: Tensor, partials: (address: number) => void): void {
    const address = context.allocate(8 * chunks);
    try {
      partials(address);
      addPartials.launch(1, 1, 1, 1024, 0, address, chunks, out.address);
    } finally {
      context.free(address);
    }
  }

  return {
    sum(x, out) {
      if (x.dtype !== "f32" && x.dtype !== "bf16") refuse("sum", "x", "f32 or bf16", x);
      if (x.size === 0) return;
      const chunks = Math.ceil(x.size / SUM_CHUNK), partial = x.dtype === "f32" ? sumF32 : sumBf16;
      reduce(chunks, out, (address) => {
        partial.launch(chunks, 1, 1, THREADS, 0, x.address, x.size, SUM_CHUNK, address);
      });
    },
    sumSquares(xs, out) {
      if (xs.length === 0) return;
      const key = scratch.of(3 * xs.length);
      for (let i = 0; i < xs.length; i++) {
        const x = xs[i];
        if (x.dtype !== "f32" && x.dtype !== "bf16") refuse("sum squares", "x", "f32 or bf16", x);
        key[3 * i] = x.size;
        key[3 * i + 1] = x.address;
        key[3 * i + 2] = x.dtype === "f32" ? 1 : 0;
      }
      const { address: table, chunks } = summands.find(key, 3 * xs.length);
      if (chunks === 0) return;
      reduce(chunks, out, (address) => {
        squarePartials.launch(chunks, 1, 1, THREADS, 0, table, xs.length, SUM_CHUNK, address);
      });
    },
    clipScale(squares, limit, out) {
      clip.launch(1, 1, 1, 1, 0, squares.address, limit, out.address);
    },
    adamW(updates, options) {
      if (updates.length === 0) return;
      const { lr, beta1, beta2, eps, step, gradScale, zeroGradient } = options;
      const key = scratch.of(8 * updates.length);
      for (let i = 0; i < updates.length; i++) {
        const each = updates[i], at = 8 * i;
        key[at] = each.parameter.size;
        key[at + 1] = each.parameter.address;
        key[at + 2] = each.residual === null ? 0 : each.residual.address;
        key[at + 3] = each.gradient.address;
        key[at + 4] = each.moment1.address;
        key[at + 5] = each.moment2.address;
        key[at + 6] = kindOf(each);
        key[at + 7] = each.weightDecay;
      }
      const { address, chunks } = parameters.find(key, 8 * updates.length);
      if (chunks === 0) return;
      // deno-fmt-ignore
      update.launch(chunks, 1, 1, THREADS, 0, address, updates.length, UPDATE_CHUNK, gradScale.address, zeroGradient ? 1 : 0,
        lr, beta1, beta2, 1 - beta1, 1 - beta2, eps, 1 / (1 - beta1 ** step), 1 / (1 - beta2 ** step));
    },
  };
}
