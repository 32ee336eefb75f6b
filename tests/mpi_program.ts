// A rank of the MPI backend's tests, started by mpirun: `mpi_program.ts SCENARIO`. Prints `ok SCENARIO` on rank 0, or throws.

import assert from "node:assert/strict";
import { setTimeout } from "node:timers/promises";
import { createCommunicator } from "../collectives/communicator.ts";
import { openMpi } from "../collectives/mpi/mod.ts";
import type { BootContext, Store } from "../collectives/transport.ts";
import { type Communicator, type ReduceOp, REDUCIBLE } from "../collectives/types.ts";
import { linearBuffer } from "../tensor/cpu/memory.ts";
import { allocate } from "../tensor/cpu/memory.ts";
import { bytesOf, type DType, DTYPES, newArray, type TypedArray, viewAs } from "../tensor/dtype.ts";

const environment = (...names: string[]) =>
  Number(names.map((n) => Deno.env.get(n)).find((v) => v !== undefined) ?? NaN);
const rank = environment("OMPI_COMM_WORLD_RANK", "PMI_RANK");
const size = environment("OMPI_COMM_WORLD_SIZE", "PMI_SIZE");
const folder = Deno.env.get("LINA_TEST_STORE") ?? "/tmp";

/** A store of files, for ranks of one host. */
const store: Store = {
  async set(key, value) {
    const path = `${folder}/${key.replaceAll("/", "_")}`;
    await Deno.writeFile(`${path}.${rank}`, value);
    await Deno.rename(`${path}.${rank}`, path);
  },
  async get(key, timeout_ms = 1000) {
    const end = performance.now() + timeout_ms;
    for (;;) {
      try {
        return await Deno.readFile(`${folder}/${key.replaceAll("/", "_")}`);
      } catch {
        if (performance.now() > end) throw new Error(`Cannot get ${key}`);
        await setTimeout(5);
      }
    }
  },
  add: () => Promise.reject(new Error("not used")),
  close: () => Promise.resolve(),
};

const OPS: readonly ReduceOp[] = ["sum", "min", "max", "prod", "avg"];
const FLOATS: readonly DType[] = ["f32", "f64", "f16", "bf16"];
/** Elements: none, one, odd, both sides of the switch to the exchange by blocks, several chunks. */
const LENGTHS = [0, 1, 13, 5000, 40_001];

/** Element i of rank r: small numbers, most of which have no exact product or sum in 16 bits. */
function value(dtype: DType, r: number, i: number): number {
  const n = ((i * 7 + r * 13) % 11) - (dtype === "u8" ? -1 : 5);
  return FLOATS.includes(dtype) ? n / 3 + 0.125 : n;
}

function fill(x: TypedArray, dtype: DType, r: number): TypedArray {
  for (let i = 0; i < x.length; i++) put(x, dtype, i, value(dtype, r, i));
  return x;
}

const f32 = new Float32Array(1), f32bits = new Uint32Array(f32.buffer);

function put(x: TypedArray, dtype: DType, i: number, v: number): void {
  if (dtype === "i64") (x as BigInt64Array)[i] = BigInt(v);
  else if (dtype === "bf16") {
    f32[0] = v;
    const u = f32bits[0];
    x[i] = (u + 0x7fff + ((u >>> 16) & 1)) >>> 16;
  } else x[i] = v;
}

function take(x: TypedArray, dtype: DType, i: number): number {
  if (dtype !== "bf16") return Number(x[i]);
  f32bits[0] = (x[i] as number) << 16;
  return f32[0];
}

/** The reduction in rank order, in the precision that is promised. */
function reduced(xs: TypedArray[], dtype: DType, op: ReduceOp, i: number): number | bigint {
  const round = dtype === "f64" ? (v: number) => v : Math.fround;
  let a = take(xs[0], dtype, i);
  for (let r = 1; r < xs.length; r++) {
    const b = take(xs[r], dtype, i);
    a = op === "min"
      ? Math.min(a, b)
      : op === "max"
      ? Math.max(a, b)
      : op === "prod"
      ? (FLOATS.includes(dtype) ? round(a * b) : a * b)
      : (FLOATS.includes(dtype) ? round(a + b) : a + b);
    if (dtype === "u8") a &= 255;
  }
  if (op === "avg") a = FLOATS.includes(dtype) ? round(a / xs.length) : Math.trunc(a / xs.length);
  return a;
}

/** Host array or memory of tensors. */
function array(dtype: DType, length: number, linear: boolean): TypedArray {
  if (!linear) return newArray(dtype, length);
  return viewAs(dtype, linearBuffer(), allocate(length * bytesOf(dtype)), length);
}

function same(actual: TypedArray, expected: TypedArray, what: string): void {
  assert.equal(actual.length, expected.length, what);
  for (let i = 0; i < actual.length; i++) {
    if (!Object.is(Number(actual[i]) + 0, Number(expected[i]) + 0)) {
      assert.fail(`${what}: element ${i} is ${actual[i]}, must be ${expected[i]}`);
    }
  }
}

function truth(dtype: DType, op: ReduceOp, length: number, p: number): TypedArray {
  const xs = [...Array(p).keys()].map((r) => fill(newArray(dtype, length), dtype, r));
  const out = newArray(dtype, length);
  for (let i = 0; i < length; i++) put(out, dtype, i, Number(reduced(xs, dtype, op, i)));
  return out;
}

async function reductions(comm: Communicator): Promise<void> {
  for (const dtype of REDUCIBLE) {
    for (const op of OPS) {
      for (const [k, length] of LENGTHS.entries()) {
        const what = `${dtype} ${op} ${length}`;
        const linear = k % 2 === 1;
        const whole = truth(dtype, op, length, size);
        const x = fill(array(dtype, length, linear), dtype, rank);
        const before = x.slice() as TypedArray;
        const out = array(dtype, length, linear);
        await comm.allReduce(x, { op, out });
        same(out, whole, `allReduce ${what}`);
        same(x, before, `allReduce leaves x, ${what}`);
        await comm.allReduce(x, { op });
        same(x, whole, `allReduce in place ${what}`);

        const root = length % size;
        const y = fill(array(dtype, length, linear), dtype, rank);
        await comm.reduce(y, { op, root });
        same(y, rank === root ? whole : before, `reduce in place ${what}`);
        if (rank === root) {
          const into = array(dtype, length, linear);
          await comm.reduce(before, { op, root, out: into });
          same(into, whole, `reduce ${what}`);
        } else await comm.reduce(before, { op, root });

        const block = Math.ceil(length / size);
        const z = fill(array(dtype, block * size, linear), dtype, rank);
        const piece = array(dtype, block, linear);
        await comm.reduceScatter(z, piece, { op });
        const all = truth(dtype, op, block * size, size);
        same(
          piece,
          all.slice(rank * block, (rank + 1) * block) as TypedArray,
          `reduceScatter ${what}`,
        );
      }
    }
  }
}

/** Element i of the block that goes from rank s to rank d. */
const mark = (s: number, d: number, i: number) => (s * 16 + d * 4 + i) % 120;

async function movement(comm: Communicator): Promise<void> {
  const ranks = [...Array(size).keys()];
  for (const dtype of DTYPES) {
    const blocks = (lengths: number[], of: (r: number, i: number) => number) => {
      const x = newArray(dtype, lengths.reduce((a, b) => a + b, 0));
      let at = 0;
      for (const [r, n] of lengths.entries()) {
        for (let i = 0; i < n; i++) put(x, dtype, at++, of(r, i));
      }
      return x;
    };
    const like = (x: TypedArray) => array(dtype, x.length, x.length % 2 === 0);
    for (const n of [0, 1, 37, 20_000]) {
      const what = `${dtype} ${n}`;
      const equal = ranks.map(() => n);
      const mine = blocks([n], (_, i) => mark(rank, 0, i));
      const everyone = blocks(equal, (s, i) => mark(s, 0, i));

      const gathered = like(everyone);
      await comm.allGather(mine, gathered);
      same(gathered, everyone, `allGather ${what}`);
      new Uint8Array(gathered.buffer, gathered.byteOffset, gathered.byteLength).fill(0);
      gathered.set(mine as never, rank * n);
      await comm.allGather(
        gathered.subarray(rank * n, (rank + 1) * n) as TypedArray,
        gathered,
      );
      same(gathered, everyone, `allGather in place ${what}`);

      const root = n % size;
      const atRoot = rank === root ? like(everyone) : null;
      await comm.gather(mine, atRoot, root);
      if (atRoot) same(atRoot, everyone, `gather ${what}`);
      const got = like(mine);
      await comm.scatter(atRoot && everyone, got, root);
      same(got, mine, `scatter ${what}`);

      const x = rank === root ? mine : like(mine);
      const sent = blocks([n], (_, i) => mark(root, 0, i));
      await comm.broadcast(x, root);
      same(x, sent, `broadcast ${what}`);

      const out = like(everyone);
      await comm.allToAll(blocks(equal, (d, i) => mark(rank, d, i)), out);
      same(out, blocks(equal, (s, i) => mark(s, rank, i)), `allToAll ${what}`);

      // Uneven, with ranks that give or get nothing.
      const count = (s: number, d: number) => (s + 2 * d) % 3 === 0 ? 0 : (s + d) * (n >> 2);
      const sendCounts = ranks.map((d) => count(rank, d));
      const recvCounts = ranks.map((s) => count(s, rank));
      const expected = blocks(recvCounts, (s, i) => mark(s, rank, i));
      const received = like(expected);
      await comm.allToAllV(
        blocks(sendCounts, (d, i) => mark(rank, d, i)),
        sendCounts,
        received,
        Int32Array.from(recvCounts),
      );
      same(received, expected, `allToAllV ${what}`);

      const counts = ranks.map((r) => r * n);
      const uneven = blocks(counts, (s, i) => mark(s, 1, i));
      const collected = like(uneven);
      await comm.allGatherV(blocks([rank * n], (_, i) => mark(rank, 1, i)), collected, counts);
      same(collected, uneven, `allGatherV ${what}`);

      const to = (rank + 1) % size, from = (rank + size - 1) % size;
      const came = like(mine), second = like(mine);
      const works = [
        comm.recv(second, from, { tag: 5 }),
        comm.recv(came, from),
        comm.send(mine, to),
        comm.send(mine, to, { tag: 5 }),
      ];
      for (const work of works) await work;
      const theirs = blocks([n], (_, i) => mark(from, 0, i));
      same(came, theirs, `send and recv ${what}`);
      same(second, theirs, `send and recv with a tag ${what}`);
    }
    await comm.barrier();
  }
}

async function flights(comm: Communicator): Promise<void> {
  const xs = [...Array(12).keys()].map((k) =>
    new Float32Array(20_000 * (k % 4 + 1)).fill(rank + k)
  );
  const blocks = xs.map((x) => x.slice(0, x.length - x.length % size));
  const works = xs.map((x, k) => {
    if (k % 3 === 0) return comm.allToAll(blocks[k].slice(), blocks[k]);
    return k % 3 === 1 ? comm.allReduce(x) : comm.broadcast(x, k % size);
  });
  // Ranks await in different orders.
  const order = [...works.keys()].sort((a, b) =>
    ((a * 5 + rank * 7) % 12) - ((b * 5 + rank * 7) % 12)
  );
  for (const k of order) await works[k];
  for (const [k, x] of xs.entries()) {
    const last = x[x.length - 1];
    if (k % 3 === 0) assert.equal(blocks[k].at(-1), size - 1 + k);
    else if (k % 3 === 1) assert.equal(last, size * k + size * (size - 1) / 2);
    else assert.equal(last, k % size + k);
  }
}

/** A long reduction and a short one: ranks that were away begin their second exchanges in another order than the rest. */
async function overtaking(comm: Communicator): Promise<void> {
  const long = new Float32Array(1 << 20), short = new Float32Array(20_000);
  for (let round = 0; round < 5; round++) {
    long.fill(rank + round);
    short.fill(rank * round);
    const works = [comm.allReduce(long), comm.allReduce(short)];
    if (rank % 2 === round % 2) {
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 10); // busy with something else
    }
    for (const work of works) await work;
    const ranks = size * (size - 1) / 2;
    assert.ok(long.every((v) => v === ranks + size * round));
    assert.ok(short.every((v) => v === ranks * round));
  }
}

async function groups(comm: Communicator): Promise<void> {
  const half = (await comm.split(rank % 2, -rank))!;
  const members = [...Array(size).keys()].filter((r) => r % 2 === rank % 2).reverse();
  assert.equal(half.size, members.length);
  assert.equal(half.rank, members.indexOf(rank));
  const x = Int32Array.of(rank), out = new Int32Array(half.size);
  await half.allGather(x, out);
  assert.deepEqual([...out], members);

  const first = await comm.split(rank === 0 ? 3 : null);
  assert.equal(first === null, rank !== 0);
  if (first) {
    await first.allReduce(x);
    await first[Symbol.asyncDispose]();
  }

  // Independent of the original: begun in another order on other ranks.
  const twin = await comm.dup();
  const a = new Float32Array(30_000).fill(1), b = new Float32Array(30_000).fill(2);
  const works = rank % 2 === 0
    ? [comm.allReduce(a), twin.allReduce(b)]
    : [twin.allReduce(b), comm.allReduce(a)];
  for (const work of works) await work;
  assert.deepEqual([a[29_999], b[29_999]], [size, 2 * size]);
  // Made at once, but in one order everywhere: two ranks in two calls of MPI would wait for each other for ever.
  const many = await Promise.all(Array.from({ length: 8 }, () => comm.dup()));
  for (const one of many) await one[Symbol.asyncDispose]();
  const inner = (await twin.split(0))!;
  await inner.barrier();
  await inner[Symbol.asyncDispose]();
  await twin[Symbol.asyncDispose]();
  await half[Symbol.asyncDispose]();
}

/** The event loop runs while an operation waits for a rank that is late. */
async function late(comm: Communicator): Promise<void> {
  await comm.barrier();
  if (rank === size - 1) await setTimeout(700);
  let ticks = 0;
  const timer = setInterval(() => ticks++, 10);
  await comm.allReduce(new Float32Array(100_000));
  clearInterval(timer);
  // A blocking call would leave none; a busy machine leaves few.
  if (rank !== size - 1) assert.ok(ticks >= 3, `the event loop ran ${ticks} times in 700 ms`);
}

/** WebAssembly that leaves its memory must still throw: MPI must not have taken V8's signal handler. */
function traps(): void {
  const code = [
    0,
    97,
    115,
    109,
    1,
    0,
    0,
    0,
    1,
    6,
    1,
    96,
    1,
    127,
    1,
    127,
    3,
    2,
    1,
    0,
    5,
    3,
    1,
    0,
    1,
  ];
  code.push(7, 5, 1, 1, 102, 0, 0, 10, 9, 1, 7, 0, 32, 0, 40, 2, 0, 11);
  const { exports } = new WebAssembly.Instance(new WebAssembly.Module(Uint8Array.from(code)));
  assert.throws(() => (exports.f as (at: number) => number)(0x7ffffff0), WebAssembly.RuntimeError);
}

async function main(scenario: string): Promise<void> {
  const departed = new Map<number, string>();
  const context: BootContext = { rank, size, localRank: rank, store, departed };
  const transport = await openMpi(context);
  const timeout_ms = scenario === "missing" ? 1500 : 30_000;
  await using comm = createCommunicator(transport, { rank, size, name: "world", timeout_ms });
  if (scenario === "all") {
    traps();
    await reductions(comm);
    await movement(comm);
    await flights(comm);
    await overtaking(comm);
    await groups(comm);
    await late(comm);
  } else if (scenario === "throws") {
    await comm.barrier();
    if (rank === 1) throw new Error("rank 1 has a bad day");
    await comm.allReduce(new Float32Array(10));
  } else if (scenario === "exits") {
    await comm.barrier();
    if (rank === 1) Deno.exit(0);
    await comm.allReduce(new Float32Array(10));
  } else if (scenario === "missing") {
    await comm.barrier();
    if (rank === 1) await setTimeout(30_000); // the launcher ends this rank long before
    await assert.rejects(
      async () => await comm.allReduce(new Float32Array(10)),
      /allReduce 1 of world .* not arrived: rank 1$/,
    );
    if (rank === 0) console.log("ok missing");
    Deno.exitCode = 3;
    return;
  } else if (scenario === "stays") { // under a short LINA_TIMEOUT_MS
    await comm.barrier();
    if (rank === 1) await setTimeout(30_000); // the launcher ends this rank long before
    await comm[Symbol.asyncDispose]();
    Deno.exitCode = 3;
    return;
  } else if (scenario === "mismatch") {
    const counts = [...Array(size).keys()].map(() => 4);
    if (rank === 1) counts[0] = 2;
    const total = counts.reduce((a, b) => a + b);
    const run = async () =>
      await comm.allToAllV(
        new Int32Array(total),
        counts,
        new Int32Array(4 * size),
        Array(size).fill(4),
      );
    if (rank !== 0) await run();
    else {
      await assert.rejects(
        run,
        (error: Error) => /from rank 1 .* must have 16 bytes: .* is 8/.test(error.message),
      );
    }
  } else if (scenario === "order") { // under LINA_DEBUG: found before a byte moves, so nothing is overrun
    const x = new Float32Array(rank === 1 ? 400_000 : 4);
    await assert.rejects(
      async () => await comm.allReduce(x),
      (error: Error) => ((error.cause ?? error) as Error).name === "CollectiveOrderError",
    );
  } else throw new Error(`no scenario ${scenario}`);
  if (rank === 0) console.log(`ok ${scenario}`);
}

await main(Deno.args[0]);
