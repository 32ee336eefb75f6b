// The rank programs of collectives_shm_test.ts; `args.program` says which one runs.

import assert from "node:assert/strict";
import type { Device } from "../tensor/device.ts";
import { type DType, DTYPES, newArray, type TypedArray } from "../tensor/dtype.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";
import {
  type Communicator,
  type Data,
  type ReduceOp,
  REDUCIBLE,
  type Work,
} from "../collectives/types.ts";
import { type RankContext, rankMain } from "./_ranks.ts";
import { emulated } from "./emulator/device.ts";

interface Args {
  readonly program: keyof typeof PROGRAMS;
  readonly lengths: readonly number[];
  readonly seed: number;
  readonly steps: number;
  readonly count: number;
  readonly more: number;
  readonly delay_ms: number;
}

/** Where tensors live: the CPU, or the GPU of the ranks of gpu_ranks_test.ts. */
let device: Device = cpuDevice();

const OPS: readonly ReduceOp[] = ["sum", "min", "max", "prod", "avg"];

/** Small whole numbers, exact in every dtype as are their sums and products over four ranks. */
function value(rank: number, i: number): number {
  return 1 + (i * 7 + rank * 3) % 3;
}

function make(dtype: DType, length: number, at: (i: number) => number): TypedArray {
  const array = newArray(dtype, length);
  for (let i = 0; i < length; i++) array[i] = bits(dtype, at(i)) as never;
  return array;
}

function bits(dtype: DType, x: number): number | bigint {
  if (dtype === "i64") return BigInt(x);
  if (dtype !== "bf16") return x;
  return new Uint32Array(Float32Array.of(x).buffer)[0] >>> 16; // exact for small whole numbers
}

function reduced(dtype: DType, op: ReduceOp, size: number, i: number): number {
  let x = value(0, i);
  for (let r = 1; r < size; r++) {
    const y = value(r, i);
    x = op === "min"
      ? Math.min(x, y)
      : op === "max"
      ? Math.max(x, y)
      : op === "prod"
      ? x * y
      : x + y;
  }
  if (op !== "avg") return x;
  if (dtype === "i32" || dtype === "u8" || dtype === "i64") return Math.trunc(x / size);
  if (dtype === "f64") return x / size;
  if (dtype === "f16") return Math.f16round(Math.fround(x / size));
  return Math.fround(x / size);
}

/** Compares without building a message for every element. */
function same(got: TypedArray, want: TypedArray, what: string): void {
  assert.equal(got.length, want.length, what);
  for (let i = 0; i < want.length; i++) {
    if (got[i] !== want[i]) assert.equal(got[i], want[i], `${what}, element ${i}`);
  }
}

/** Runs one operation with arrays, then with tensors of the same contents. */
async function both(
  inputs: (TypedArray | null)[],
  run: (...data: (Data | null)[]) => Work,
  check: (outputs: TypedArray[]) => void,
): Promise<number> {
  const arrays = inputs.map((a) => a?.slice() ?? null);
  await run(...arrays);
  check(arrays as TypedArray[]);
  const tensors = inputs.map((a) => a && fromArray(device, a));
  try {
    await run(...tensors);
    check(await Promise.all(tensors.map((t) => t === null ? newArray("u8", 0) : t.toArray())));
  } finally {
    for (const tensor of tensors) tensor?.[Symbol.dispose]();
  }
  return 2;
}

async function operations({ comm, rank, size, args }: RankContext): Promise<number> {
  const { lengths } = args as Args;
  let cases = 0;
  for (const n of lengths) {
    const all = n <= 100 ? DTYPES : n <= 20_000 ? ["f32", "bf16"] as const : ["f32"] as const;
    for (const dtype of all) {
      if (REDUCIBLE.includes(dtype)) cases += await reductions(comm, rank, size, dtype, n);
      cases += await movements(comm, rank, size, dtype, n);
    }
  }
  return cases;
}

async function reductions(
  comm: Communicator,
  rank: number,
  size: number,
  dtype: DType,
  n: number,
): Promise<number> {
  let cases = 0;
  for (const op of n <= 100 ? OPS : ["sum", "avg"] as const) {
    if (op === "avg" && dtype === "bf16" && size === 3) continue; // thirds: see the kernel's test
    const mine = (length: number) => make(dtype, length, (i) => value(rank, i));
    const want = make(dtype, n, (i) => reduced(dtype, op, size, i));
    const what = `${op} of ${n} ${dtype}`;
    cases += await both(
      [mine(n)],
      (x) => comm.allReduce(x!, { op }),
      ([x]) => same(x, want, `allReduce ${what}`),
    );
    cases += await both(
      [mine(n), newArray(dtype, n)],
      (x, out) => comm.allReduce(x!, { op, out: out! }),
      ([x, out]) => {
        same(out, want, `allReduce to out ${what}`);
        same(x, mine(n), "allReduce leaves x alone");
      },
    );
    const root = n % size;
    cases += await both(
      [mine(n)],
      (x) => comm.reduce(x!, { op, root }),
      ([x]) => same(x, rank === root ? want : mine(n), `reduce ${what}`),
    );
    cases += await both(
      [make(dtype, n * size, (i) => value(rank, i)), newArray(dtype, n)],
      (x, out) => comm.reduceScatter(x!, out!, { op }),
      ([, out]) =>
        same(
          out,
          make(dtype, n, (i) => reduced(dtype, op, size, rank * n + i)),
          `reduceScatter ${what}`,
        ),
    );
  }
  return cases;
}

async function movements(
  comm: Communicator,
  rank: number,
  size: number,
  dtype: DType,
  n: number,
): Promise<number> {
  const of = (r: number, length: number) => make(dtype, length, (i) => value(r, i));
  const none = (length: number) => newArray(dtype, length);
  const gathered = make(dtype, n * size, (i) => value(Math.floor(i / n), i % n));
  const root = (n + 1) % size;
  const isRoot = rank === root;
  const what = `of ${n} ${dtype}`;
  let cases = 0;
  cases += await both(
    [of(rank, n), none(n * size)],
    (x, out) => comm.allGather(x!, out!),
    ([, out]) => same(out, gathered, `allGather ${what}`),
  );
  cases += await both(
    [of(rank, n)],
    (x) => comm.broadcast(x!, root),
    ([x]) => same(x, of(root, n), `broadcast ${what}`),
  );
  cases += await both(
    [of(rank, n), isRoot ? none(n * size) : null],
    (x, out) => comm.gather(x!, out, root),
    ([, out]) => isRoot && same(out, gathered, `gather ${what}`),
  );
  cases += await both(
    [isRoot ? of(root, n * size) : null, none(n)],
    (x, out) => comm.scatter(x, out!, root),
    ([, out]) =>
      same(
        out,
        of(root, n * size).subarray(rank * n, (rank + 1) * n) as TypedArray,
        `scatter ${what}`,
      ),
  );
  cases += await both(
    [of(rank, n * size), none(n * size)],
    (x, out) => comm.allToAll(x!, out!),
    ([, out]) =>
      same(
        out,
        make(dtype, n * size, (i) => value(Math.floor(i / n), rank * n + i % n)),
        `allToAll ${what}`,
      ),
  );
  const count = (s: number, r: number) => (s + r) % 3 === 0 ? 0 : n + s - (r > n ? 0 : r % (n + 1));
  const row = Array.from({ length: size }, (_, r) => count(rank, r));
  const column = Int32Array.from({ length: size }, (_, s) => count(s, rank));
  const sum = (xs: ArrayLike<number>) => Array.from(xs).reduce((a, b) => a + b, 0);
  const parts = Array.from({ length: size }, (_, s) => {
    let before = 0;
    for (let r = 0; r < rank; r++) before += count(s, r);
    return Array.from({ length: column[s] }, (_, i) => value(s, before + i));
  }).flat();
  cases += await both(
    [of(rank, sum(row)), none(sum(column))],
    (x, out) => comm.allToAllV(x!, row, out!, column),
    ([, out]) => same(out, make(dtype, parts.length, (i) => parts[i]), `allToAllV ${what}`),
  );
  const counts = Array.from({ length: size }, (_, r) => r === 1 ? 0 : n + r);
  const joined = counts.flatMap((c, r) => Array.from({ length: c }, (_, i) => value(r, i)));
  cases += await both(
    [of(rank, counts[rank]), none(sum(counts))],
    (x, out) => comm.allGatherV(x!, out!, counts),
    ([, out]) => same(out, make(dtype, joined.length, (i) => joined[i]), `allGatherV ${what}`),
  );
  const to = (rank + 1) % size, from = (rank + size - 1) % size;
  cases += await both([of(rank, n), none(n)], (x, out) => {
    const sent = comm.send(x!, to, { tag: 5 });
    const work = comm.recv(out!, from, { tag: 5 });
    return size === 1 ? work : joint(sent, work);
  }, ([, out]) => same(out, of(from, n), `send ${what}`));
  await comm.barrier();
  return cases + 1;
}

/** Two operations as one. */
function joint(a: Work, b: Work): Work {
  return {
    get done() {
      return a.done && b.done;
    },
    wait: () => {},
    then: (done, failed) => Promise.all([a, b]).then(() => {}).then(done, failed),
  };
}

async function errors({ comm, rank, size }: RankContext): Promise<string[]> {
  const messages: string[] = [];
  const fails = (run: () => unknown, pattern: RegExp) => {
    assert.throws(run, (error: Error) => {
      messages.push(error.message);
      assert.match(error.message, pattern);
      assert.match(error.message, new RegExp(`rank ${rank} of world.*current value is`));
      return true;
    });
  };
  const f = (n: number) => new Float32Array(n);
  const counts = Array(size).fill(1);
  fails(() => comm.allReduce(f(4), { out: f(5) }), /allReduce.*out must have 4 elements.*5$/);
  fails(() => comm.allReduce(f(4), { out: new Int32Array(4) }), /out must be f32.*i32$/);
  fails(() => comm.allReduce(f(4), { op: "xor" as ReduceOp }), /op must be one of.*xor$/);
  fails(() => comm.allReduce([1] as unknown as TypedArray), /x must be a typed array or a tensor/);
  fails(() => comm.allReduce(null as unknown as TypedArray), /x must be.*null$/);
  fails(() => comm.reduceScatter(f(3), f(3 * size + 1)), /x must have/);
  fails(() => comm.allGather(f(2), f(2 * size + 1)), /out must have/);
  fails(() => comm.allGatherV(f(1), f(size), [...counts, 1]), /counts must have/);
  fails(() => comm.allGatherV(f(2), f(size), counts), /x must have 1/);
  fails(() => comm.broadcast(f(1), size), /root must be a rank.*current value is/);
  fails(() => comm.broadcast(f(1), 0.5), /root/);
  fails(() => comm.gather(f(1), rank === 0 ? null : f(size), 0), /out must be/);
  fails(() => comm.scatter(rank === 0 ? null : f(size), f(1), 0), /x must be/);
  fails(() => comm.allToAllV(f(size), counts.map(() => -1), f(size), counts), /sendCounts must be/);
  fails(() => comm.allToAllV(f(size), counts.map(() => 0.5), f(size), counts), /0.5 for rank 0/);
  fails(() => comm.allToAllV(f(size - 1), counts, f(size), counts), /send must have at least/);
  fails(() => comm.allToAllV(f(size), counts, f(size - 1), counts), /recv must have at least/);
  const buffer = f(4 * size);
  fails(
    () => comm.allToAll(buffer.subarray(0, 2 * size), buffer.subarray(size, 3 * size)),
    /overlap/,
  );
  const half = buffer.subarray(0, 2 * size), next = buffer.subarray(1, 2 * size + 1);
  const block = 1 + 2 * rank, shifted = buffer.subarray(block, block + 2);
  const twos = counts.map(() => 2);
  const same = /begin at (the same element|element \d+ of (out|x)) or not overlap/;
  fails(() => comm.allReduce(half, { out: next }), same);
  fails(() => comm.reduceScatter(half, shifted), same);
  fails(() => comm.allGather(shifted, half), same);
  fails(() => comm.allGatherV(shifted, half, twos), same);
  const tensor = empty(device, [8]);
  fails(() => comm.allReduce(tensor.rows(0, 4), { out: tensor.rows(1, 5) }), same);
  tensor[Symbol.dispose]();
  if (rank === 0) {
    fails(() => comm.reduce(half, { out: next }), same);
    fails(() => comm.gather(shifted, half), same);
    fails(() => comm.scatter(half, shifted), same);
  }
  if (size > 1) fails(() => comm.allToAll(f(size + 1), f(size + 1)), /multiple of/);
  fails(() => comm.send(f(1), size), /to must be a rank/);
  fails(() => comm.send(f(1), 0, { tag: -1 }), /tag/);
  fails(() => comm.recv(f(1), -1), /from must be a rank/);
  const freed = empty(device, [4]);
  freed[Symbol.dispose]();
  fails(() => comm.allReduce(freed), /must not be disposed/);
  await assert.rejects(comm.split(-1), /color must be a whole number/);
  // Nothing was sent: the communicator still works.
  const x = Float32Array.of(1);
  await comm.allReduce(x);
  assert.equal(x[0], size);
  return messages;
}

/** Operations whose source or destination is this rank's block of the other, as arrays and as tensors. */
async function inPlace({ comm, rank, size }: RankContext): Promise<void> {
  const root = size - 1, isRoot = rank === root;
  for (const n of [5, 70_001]) {
    const all = (at: (r: number, i: number) => number) =>
      Float32Array.from({ length: n * size }, (_, j) => at(Math.floor(j / n), j % n));
    const mine = all((_, i) => value(rank, i));
    const gathered = all((r, i) => value(r, i));
    const summed = Float32Array.from({ length: n }, (_, i) => reduced("f32", "sum", size, i));
    for (const asTensor of [false, true]) {
      const run = async (from: Float32Array, call: (whole: Data, block: Data) => Work) => {
        const array = asTensor ? fromArray(device, from) : from.slice();
        const block = array instanceof Float32Array
          ? array.subarray(rank * n, (rank + 1) * n)
          : array.rows(rank * n, (rank + 1) * n);
        await call(array, block);
        if (array instanceof Float32Array) return array;
        const result = await array.toArray() as Float32Array;
        array[Symbol.dispose]();
        return result;
      };
      const part = (whole: Float32Array) => whole.subarray(rank * n, (rank + 1) * n);
      const what = `in place, ${n}, ${asTensor}`;
      same(await run(mine, (whole, block) => comm.allGather(block, whole)), gathered, what);
      const counts = Array(size).fill(n);
      same(
        await run(mine, (whole, block) => comm.allGatherV(block, whole, counts)),
        gathered,
        what,
      );
      const gather = (whole: Data, block: Data) => comm.gather(block, isRoot ? whole : null, root);
      same(await run(mine, gather), isRoot ? gathered : mine, what);
      const scatter = (whole: Data, block: Data) =>
        comm.scatter(isRoot ? whole : null, block, root);
      const offered = isRoot ? gathered : all(() => -1);
      same(part(await run(offered, scatter)), part(gathered), what);
      // Every block of the source is the same, so every rank gets the same sums.
      same(part(await run(mine, (whole, block) => comm.reduceScatter(whole, block))), summed, what);
      const both = (whole: Data) => comm.allReduce(whole, { out: whole });
      same(part(await run(mine, both)), summed, what);
    }
  }
}

/** The same bits whatever the size of a message and its place in it; floats whose sums depend on their order. */
async function bitEqual({ comm, rank, size }: RankContext): Promise<void> {
  const n = 300_001;
  const at = (r: number, i: number) =>
    Math.fround(Math.sin(i * 12.9898 + r * 78.233) * 10 ** (i % 7));
  const x = Float32Array.from({ length: n }, (_, i) => at(rank, i));
  const want = Float32Array.from({ length: n }, (_, i) => {
    let sum = at(0, i);
    for (let r = 1; r < size; r++) sum = Math.fround(sum + at(r, i));
    return sum;
  });
  const whole = new Float32Array(n), parts = x.slice();
  await comm.allReduce(x, { out: whole });
  same(whole, want, "one message");
  const pending: Work[] = [];
  for (let start = 0, part = 1; start < n; start += part, part = part * 3 % 70_001 + 1) {
    pending.push(comm.allReduce(parts.subarray(start, start + part)));
  }
  await Promise.all(pending);
  same(parts, want, "many messages");
}

/** Random operations on two communicators at once, in the order of a shared seed, with delays of each rank's own. */
async function random({ comm, rank, size, args }: RankContext): Promise<number> {
  const { seed, steps } = args as Args;
  const second = await comm.dup();
  const agreed = generator(seed), own = generator(seed * 31 + rank);
  const pending: Promise<void>[] = [];
  for (let step = 0; step < steps; step++) {
    const on = agreed() < 0.5 ? comm : second;
    const n = Math.floor(10 ** (agreed() * 5.2));
    const kind = Math.floor(agreed() * 4), root = Math.floor(agreed() * size);
    pending.push(one(on, kind, n, root, rank, size, step, own() < 0.5));
    if (agreed() < 0.1) await on.barrier();
    if (own() < 0.2) await new Promise((resolve) => setTimeout(resolve, own() * 4));
    if (own() < 0.3) await Promise.all(pending.splice(0));
  }
  await Promise.all(pending);
  await second[Symbol.asyncDispose]();
  return steps;
}

async function one(
  comm: Communicator,
  kind: number,
  n: number,
  root: number,
  rank: number,
  size: number,
  step: number,
  asTensor: boolean,
): Promise<void> {
  const x = Float32Array.from({ length: n }, (_, i) => i % 5 + rank + step % 11);
  const tensor: Tensor | null = asTensor ? fromArray(device, x) : null;
  const data = tensor ?? x;
  const out = new Float32Array(n * size);
  if (kind === 0) await comm.allReduce(data);
  else if (kind === 1) await comm.broadcast(data, root);
  else if (kind === 2) await comm.allGather(data, out);
  else await comm.allToAllV(data, shares(n, size, rank, rank), out, columns(n, size, rank));
  const got = tensor ? await tensor.toArray() as Float32Array : x;
  tensor?.[Symbol.dispose]();
  const ranks = size * (size - 1) / 2;
  for (let i = 0; i < n; i += 1 + (n >> 6)) {
    const base = i % 5 + step % 11;
    const where = `step ${step}, kind ${kind}, element ${i} of ${n}`;
    if (kind === 0) assert.equal(got[i], base * size + ranks, where);
    if (kind === 1) assert.equal(got[i], base + root, where);
    if (kind === 2) {
      for (let r = 0; r < size; r++) assert.equal(out[r * n + i], base + r, where);
    }
  }
  if (kind !== 3) return;
  const counts = columns(n, size, rank);
  for (let s = 0, at = 0; s < size; at += counts[s++]) {
    const mine = shares(n, size, s, s);
    const before = mine.slice(0, rank).reduce((a, b) => a + b, 0);
    for (let i = 0; i < counts[s]; i += 1 + (n >> 6)) {
      assert.equal(out[at + i], (before + i) % 5 + s + step % 11, `step ${step}, from ${s}, ${i}`);
    }
  }
}

/** How rank s divides n elements among the ranks: unevenly, sometimes with nothing for one. */
function shares(n: number, size: number, s: number, salt: number): number[] {
  const counts = Array(size).fill(0);
  let left = n;
  for (let r = 0; r < size - 1; r++) {
    counts[r] = (s + r + salt) % 4 === 1 ? 0 : Math.floor(left * ((s + 2 * r) % 5) / 7);
    left -= counts[r];
  }
  counts[size - 1] = left;
  return counts;
}

function columns(n: number, size: number, rank: number): number[] {
  return Array.from({ length: size }, (_, s) => shares(n, size, s, s)[rank]);
}

function generator(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = state + 0x6d2b79f5 | 0;
    let t = Math.imul(state ^ state >>> 15, 1 | state);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
  };
}

async function groups({ comm, rank, size }: RankContext): Promise<unknown> {
  const duplicates = await Promise.all([comm.dup(), comm.dup()]);
  assert.deepEqual(duplicates.map((d) => d.name), ["world/dup1", "world/dup2"]);
  const sub = await comm.split(rank % 2, -rank);
  const none = await comm.split(rank === 0 ? null : 3);
  assert.equal(none === null, rank === 0);
  // Opposite orders on independent communicators must not block.
  const x = Float32Array.of(rank), y = Float32Array.of(rank);
  const ahead = rank % 2 === 0 || emulated; // the emulator of NCCL has no operations that wait side by side
  const works = ahead
    ? [duplicates[0].allReduce(x), duplicates[1].allReduce(y, { op: "max" })]
    : [duplicates[1].allReduce(y, { op: "max" }), duplicates[0].allReduce(x)].reverse();
  for (const work of ahead ? works : works.reverse()) await work;
  assert.deepEqual([x[0], y[0]], [size * (size - 1) / 2, size - 1]);
  const z = Float32Array.of(rank);
  await sub!.allReduce(z);
  const grand = await sub!.dup();
  assert.equal(grand.name, `world/split1.${rank % 2}/dup1`);
  await grand.barrier();
  // Tags keep messages apart; one that nobody has asked for is set aside. NCCL has none: messages match in order.
  if (comm.backend === "nccl") {
    const one = Float64Array.of(rank + 1);
    if (rank === 0) await comm.send(one, 1);
    else if (rank === 1) await comm.recv(one, 0);
    if (rank < 2) assert.equal(one[0], 1);
  } else if (rank === 0 && size > 1) {
    await comm.send(Float64Array.of(1), 1, { tag: 1 });
    await comm.send(Float64Array.of(2), 1, { tag: 2 });
  } else if (rank === 1) {
    const [a, b] = [new Float64Array(1), new Float64Array(1)];
    await comm.recv(b, 0, { tag: 2 });
    await comm.recv(a, 0, { tag: 1 });
    assert.deepEqual([a[0], b[0]], [1, 2]);
  }
  const dropped = await comm.dup();
  await dropped.barrier();
  await dropped[Symbol.asyncDispose]();
  assert.throws(() => dropped.barrier(), /must be open: current value is closed/);
  return { name: sub!.name, rank: sub!.rank, sum: z[0] };
}

async function attempt(run: () => PromiseLike<unknown>): Promise<unknown> {
  const start = performance.now();
  try {
    await run();
    return { message: "" };
  } catch (error) {
    return { message: (error as Error).message, ms: performance.now() - start };
  }
}

const PROGRAMS = {
  operations,
  errors,
  bitEqual,
  inPlace,
  random,
  groups,
  /** Rank 1 calls another operation. */
  order: ({ comm, rank }: RankContext) =>
    attempt(async () => {
      const x = new Float32Array(8);
      await comm.allReduce(x);
      await (rank === 1 ? comm.broadcast(x, 0) : comm.allReduce(x));
      await comm.barrier();
    }),
  /** Rank 0 says it sends more to rank 1 than that expects. */
  counts: ({ comm, rank, size, args }: RankContext) =>
    attempt(async () => {
      const { count, more, delay_ms } = args as Args;
      const send = Array(size).fill(count), recv = Array(size).fill(count);
      if (rank === 0) {
        send[1] += more;
        await new Promise((resolve) => setTimeout(resolve, delay_ms));
      }
      const room = size * count + more;
      await comm.allToAllV(new Float32Array(room), send, new Float32Array(room), recv);
    }),
  /** The last rank does not arrive; timers keep running on the others. */
  hang: async ({ comm, rank, size, store }: RankContext) => {
    await comm.barrier();
    if (rank === size - 1) {
      for (let r = 0; r < size - 1; r++) await store.get(`over.${r}`);
      return null;
    }
    let ticks = 0;
    const timer = setInterval(() => ticks++, 10);
    const result = await attempt(() => comm.allReduce(new Float32Array(10)));
    clearInterval(timer);
    const after = await attempt(() => Promise.resolve(comm.barrier()));
    await store.set(`over.${rank}`, new Uint8Array(1));
    return { ...result as object, ticks, after };
  },
  /** The last rank leaves without a word while the others wait. */
  leave: async ({ comm, rank, size }: RankContext) => {
    await comm.barrier();
    if (rank === size - 1) Deno.exit(0);
    return await attempt(() => comm.barrier());
  },
  /** The last rank is killed by the test. */
  killed: async ({ comm, rank, size, store }: RankContext) => {
    await comm.barrier();
    if (rank === size - 1) {
      await store.set("ready", new Uint8Array(1));
      await new Promise((resolve) => setTimeout(resolve, 60_000));
    }
    return await attempt(() => comm.allReduce(new Float32Array(1 << 20)));
  },
  /** A receiver that is posted while its message is on the way to one of another tag. */
  crossing: async ({ comm, rank, store }: RankContext) => {
    const long = new Float64Array(1 << 17), short = new Float64Array(1);
    if (rank === 0) {
      const works = [
        comm.send(long.fill(3), 1, { tag: 2 }),
        comm.send(short.fill(4), 1, { tag: 1 }),
      ];
      await store.get("receivers");
      await Promise.all(works);
      await comm.barrier();
      return null;
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
    const first = comm.recv(short, 0, { tag: 1 });
    assert.equal(first.done, false); // the first fragments of the other message have been set aside
    const second = comm.recv(long, 0, { tag: 2 });
    await store.set("receivers", new Uint8Array(1));
    await Promise.all([first, second]);
    await comm.barrier();
    return [short[0], long[0], long[long.length - 1]];
  },
  /** Rank 0 computes for longer than the time-out before it awaits what it has started. */
  busy: async ({ comm, rank }: RankContext) => {
    const x = new Float64Array(4);
    await comm.barrier();
    if (rank === 1) {
      await new Promise((resolve) => setTimeout(resolve, 900));
      await comm.send(x, 0);
      return { message: "" };
    }
    const work = comm.recv(x, 1);
    const end = performance.now() + 700;
    while (performance.now() < end);
    return await attempt(() => work);
  },
  /** Rank 0 only asks whether an operation is done; rank 1 never takes part. */
  asking: async ({ comm, rank, store }: RankContext) => {
    if (rank === 1) {
      await store.get("over");
      return null;
    }
    const work = comm.recv(new Float64Array(4), 1);
    const result = await attempt(async () => {
      for (let i = 0; i < 1000 && !work.done; i++) await new Promise((done) => setTimeout(done, 5));
    });
    await store.set("over", new Uint8Array(1));
    return result;
  },
  /** Rank 0 aborts the job. */
  abort: async ({ comm, rank, store }: RankContext) => {
    await comm.barrier();
    if (rank !== 0) {
      const result = await attempt(() => comm.barrier());
      await store.set(`over.${rank}`, new Uint8Array(1));
      return result;
    }
    assert.throws(() => comm.abort("the data is wrong"), /Rank 0 of world.*the data is wrong/);
    await store.get("over.1");
    return null;
  },
  /** Bytes by the formulas. */
  volume: async ({ comm, rank, size }: RankContext) => {
    const f = (n: number) => new Float32Array(n);
    await comm.allReduce(f(1001));
    await comm.allGather(f(10), f(10 * size));
    await comm.broadcast(f(7), 1);
    await comm.allToAllV(f(3 * size), Array(size).fill(3), f(3 * size), Array(size).fill(3));
    await comm.reduceScatter(f(5 * size), f(5));
    await comm.gather(f(2), rank === 0 ? f(2 * size) : null);
    await comm.barrier();
    return comm.traffic;
  },
};

await rankMain(async (context) => {
  device = context.device!;
  return await PROGRAMS[(context.args as Args).program](context);
});
