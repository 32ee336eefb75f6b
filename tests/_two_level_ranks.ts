// The rank programs of two_level_test.ts; `args.program` says which one runs. All-to-alls on two levels against direct ones.

import assert from "node:assert/strict";
import fc from "fast-check";
import { TwoLevel } from "../collectives/two_level.ts";
import type { Communicator, Data, Work } from "../collectives/types.ts";
import type { Device } from "../tensor/device.ts";
import { bytesOf, type DType, newArray, viewAs } from "../tensor/dtype.ts";
import { empty, fromArray, type Tensor } from "../tensor/tensor.ts";
import { recorder } from "../trace/mod.ts";
import { type RankContext, rankMain } from "./_ranks.ts";

interface Args {
  readonly program: keyof typeof PROGRAMS;
  /** Ranks of each host. */
  readonly perHost: number;
  readonly seed: number;
  readonly cases: number;
  readonly barrier: boolean;
}

interface Case {
  readonly dtype: DType;
  readonly counts: number[];
  readonly tensors: boolean;
  /** Elements that the buffers have and no count names. */
  readonly spare: number;
  /** How long ranks wait before they start, in ms. */
  readonly delays: number[];
}

/** The same cases on every rank. */
function casesOf(size: number, seed: number, numRuns: number): Case[] {
  const small = fc.oneof(
    { weight: 2, arbitrary: fc.constant(0) },
    { weight: 4, arbitrary: fc.integer({ min: 0, max: 40 }) },
    { weight: 1, arbitrary: fc.integer({ min: 0, max: 30_000 }) },
  );
  const counts = fc.array(small, { minLength: size * size, maxLength: size * size });
  const sparse = fc.tuple(counts, fc.nat({ max: size - 1 })).map(([all, to]) =>
    all.map((n, i) => i % size === to ? n : 0) // everything for one rank
  );
  const record = fc.record({
    dtype: fc.constantFrom<DType>("f32", "bf16", "f64", "u8", "i64", "i32"),
    counts: fc.oneof(
      { weight: 4, arbitrary: counts },
      sparse,
      fc.constant(Array(size * size).fill(0)),
    ),
    tensors: fc.boolean(),
    spare: fc.nat({ max: 3 }),
    delays: fc.array(fc.nat({ max: 3 }), { minLength: size, maxLength: size }),
  });
  return fc.sample(record, { seed, numRuns });
}

function bytesLike(length: number, seed: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(length);
  for (let i = 0, x = seed | 1; i < length; i++) {
    x = Math.imul(x, 1664525) + 1013904223 | 0;
    bytes[i] = x >>> 24;
  }
  return bytes;
}

/** An exchange of a case: what is sent, where it arrives both ways. */
class Exchange {
  readonly send: Data;
  readonly direct: Data;
  readonly levels: Data;
  readonly row: number[];
  readonly column: number[];
  readonly #case: Case;

  constructor(device: Device, rank: number, size: number, one: Case, number: number) {
    this.#case = one;
    const { dtype, counts, tensors, spare } = one;
    this.row = counts.slice(rank * size, (rank + 1) * size);
    this.column = Array.from({ length: size }, (_, s) => counts[s * size + rank]);
    const sum = (all: number[]) => all.reduce((a, b) => a + b, 0) + spare;
    const bytes = bytesLike(sum(this.row) * bytesOf(dtype), number * size + rank);
    const send = viewAs(dtype, bytes.buffer, 0, sum(this.row));
    const place = () => {
      const array = newArray(dtype, sum(this.column));
      return tensors ? fromArray(device, array) : array;
    };
    this.send = tensors ? fromArray(device, send) : send;
    this.direct = place();
    this.levels = place();
  }

  startDirect(comm: Communicator): Work {
    return comm.allToAllV(this.send, this.row, this.direct, this.column);
  }

  startLevels(two: TwoLevel): Work {
    const { counts } = this.#case;
    return two.allToAllV(this.send, Int32Array.from(counts), this.levels);
  }

  async check(): Promise<void> {
    const [direct, levels] = await Promise.all(
      [this.direct, this.levels].map(async (data) => {
        const array = ArrayBuffer.isView(data) ? data : await data.toArray();
        return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
      }),
    );
    assert.equal(direct.length, levels.length);
    for (let i = 0; i < direct.length; i++) {
      if (direct[i] !== levels[i]) assert.equal(levels[i], direct[i], `byte ${i}`);
    }
  }

  free(): void {
    for (const data of [this.send, this.direct, this.levels]) {
      if (!ArrayBuffer.isView(data)) data[Symbol.dispose]();
    }
  }
}

const pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

function open({ comm, size, args }: RankContext): Promise<TwoLevel> {
  const { perHost } = args as Args;
  const hosts = Array.from({ length: size }, (_, r) => Math.floor(r / perHost));
  return TwoLevel.create(comm, { hosts });
}

/** One after another and three at a time, awaited in another order on every rank, with delays. */
async function random(context: RankContext): Promise<object> {
  const { comm, rank, size, args } = context;
  const device = context.device!;
  const { seed, cases } = args as Args;
  await using two = await open(context);
  const all = casesOf(size, seed, cases);
  let number = 0;
  for (let i = 0; i < all.length;) {
    const group = all.slice(i, i += number % 2 === 0 ? 1 : 3);
    const exchanges = group.map((one) => new Exchange(device, rank, size, one, number++));
    await pause(group[0].delays[rank]);
    const works = exchanges.map((exchange) => exchange.startLevels(two));
    const direct = exchanges.map((exchange) => exchange.startDirect(comm));
    for (const k of rank % 2 === 0 ? [...works.keys()] : [...works.keys()].reverse()) {
      await (rank % 3 === 0 ? direct[k] : works[k]);
    }
    for (const work of [...works, ...direct]) {
      await work;
      assert.equal(work.done, true);
      await work.wait(device.stream);
    }
    for (const exchange of exchanges) await exchange.check();
    exchanges.forEach((exchange) => exchange.free());
  }
  const { calls, direct } = two.traffic;
  return { calls, direct, reason: two.reason };
}

/** On a stream: buffers are written, sent, read and freed without a wait of the host, again and again. */
async function stream(context: RankContext): Promise<number> {
  const { rank, size } = context;
  const device = context.device!;
  await using two = await open(context);
  const results: Tensor[] = [];
  const rounds = 12;
  for (let round = 0; round < rounds; round++) {
    const n = round % 3 === 0 ? 700 : 50 + round; // memory grows and is used again
    const send = empty(device, [size * n], "f32"), recv = empty(device, [size * n], "f32");
    device.kernels.fill(send, rank * 100 + round);
    device.kernels.fill(recv, -1);
    const after = device.stream.record();
    const work = two.allToAllV(send, new Int32Array(size * size).fill(n), recv, { after });
    await work.wait(device.stream);
    const result = empty(device, [size * n], "f32");
    device.kernels.copy(recv, result);
    send[Symbol.dispose]();
    recv[Symbol.dispose]();
    results.push(result);
  }
  for (const [round, result] of results.entries()) {
    const array = await result.toArray();
    const n = array.length / size;
    for (let i = 0; i < array.length; i++) {
      const want = Math.floor(i / n) * 100 + round;
      if (array[i] !== want) assert.equal(array[i], want, `round ${round}, element ${i}`);
    }
    result[Symbol.dispose]();
  }
  return rounds;
}

/** On a stream: exchanges that were all ready at once, so that halves of several overlap, in memory that was just somebody else's. */
async function ahead(context: RankContext): Promise<number> {
  const { rank, size } = context;
  const device = context.device!;
  await using two = await open(context);
  const rounds = 8, n = 512;
  const counts = new Int32Array(size * size).fill(n);
  const sends = Array.from({ length: rounds }, (_, round) => {
    const send = empty(device, [size * n], "f32");
    device.kernels.fill(send, rank * 100 + round);
    return send;
  });
  const recvs = sends.map(() => empty(device, [size * n], "f32"));
  const after = device.stream.record();
  const before = Array.from({ length: 2 }, () => empty(device, [1 << 14], "f32"));
  for (const tensor of before) for (let i = 0; i < 20; i++) device.kernels.fill(tensor, -7);
  for (const tensor of before) tensor[Symbol.dispose]();
  const works = sends.map((send, i) => two.allToAllV(send, counts, recvs[i], { after }));
  if ((context.args as Args).barrier) await two.levels!.inner.barrier(); // what is inside the hosts has run, as far as it may
  for (const [i, work] of works.entries()) {
    if (work.end !== undefined && i % 2 === 1) device.stream.wait(work.end);
    else await work.wait(device.stream);
  }
  for (const [round, recv] of recvs.entries()) {
    const array = await recv.toArray();
    for (let i = 0; i < array.length; i++) {
      const want = Math.floor(i / n) * 100 + round;
      if (array[i] !== want) assert.equal(array[i], want, `round ${round}, element ${i}`);
    }
  }
  for (const tensor of [...sends, ...recvs]) tensor[Symbol.dispose]();
  return rounds;
}

/** Wrong arguments throw at the call, on every rank alike, and nothing is sent. */
async function errors(context: RankContext): Promise<string[]> {
  const { rank, size } = context;
  await using two = await open(context);
  const counts = Array.from({ length: size * size }, (_, i) => i % 3 + Math.floor(i / size));
  const row = counts.slice(rank * size, (rank + 1) * size).reduce((a, b) => a + b, 0);
  const column = counts.filter((_, i) => i % size === rank).reduce((a, b) => a + b, 0);
  const send = new Float32Array(row), recv = new Float32Array(column);
  const messages: string[] = [];
  const fails = (run: () => unknown, pattern: RegExp) =>
    assert.throws(run, (error: Error) => {
      messages.push(error.message);
      assert.match(error.message, pattern);
      return true;
    });
  const transposed = counts.map((_, i) => counts[i % size * size + Math.floor(i / size)]);
  if (row !== column) {
    fails(() => two.allToAllV(send, transposed, recv), /(send|recv) must have at least/);
  }
  fails(() => two.allToAllV(send, counts.slice(1), recv), /counts must have \d+ entries/);
  fails(() => two.allToAllV(send.subarray(1), counts, recv), /send must have at least/);
  fails(() => two.allToAllV(send, counts, recv.subarray(1)), /recv must have at least/);
  fails(() => two.allToAllV(send, counts, new Int32Array(column)), /out must be f32/);
  fails(() => two.allToAllV(send, counts.map((n) => n / 2), recv), /whole numbers/);
  fails(() => two.allToAllV(send, counts.map((n) => -n), recv), /whole numbers/);
  const both = new Float32Array(row + column);
  const overlapping = () =>
    two.allToAllV(both.subarray(0, row), counts, both.subarray(row - 1, row - 1 + column));
  fails(overlapping, /must not overlap/);
  await two.allToAllV(send, counts, recv); // nothing was sent, so that this one meets no stranger
  assert.equal(two.traffic.calls + two.traffic.direct, 1);
  return messages;
}

/** A label names the span; bytes are counted by level; `choose` takes the direct way. */
async function traced(context: RankContext): Promise<object> {
  const { size, comm } = context;
  await using two = await open(context);
  const counts = new Int32Array(size * size).fill(8);
  const send = new Float32Array(8 * size).fill(1), recv = new Float32Array(8 * size);
  recorder.capturing = true;
  const label = { name: "layer 3 dispatch", args: () => ({ layer: 3 }) };
  await two.allToAllV(send, counts, recv, { label });
  const spans = recorder.spans.filter(({ category }) => category === "allToAll");
  recorder.capturing = false;
  const before = comm.traffic.allToAllV?.calls ?? 0;
  two.choose = (counts, bytes) => counts[0] * bytes > 16 ? "direct" : "two-level";
  await two.allToAllV(send, counts, recv);
  assert.equal((comm.traffic.allToAllV?.calls ?? 0) - before, 1);
  return { spans, traffic: two.traffic };
}

/** In debug mode: rank 1 passes counts that differ in one place. */
async function disagree(context: RankContext): Promise<string> {
  const { rank, size } = context;
  const two = await open(context);
  const counts = new Int32Array(size * size).fill(3);
  const length = 3 * size + 1;
  await two.allToAllV(new Float32Array(length), counts, new Float32Array(length));
  if (rank === 1) counts[2 * size + 3]++; // the last two ranks know nothing of it
  try {
    await two.allToAllV(new Float32Array(length), counts, new Float32Array(length));
    return "";
  } catch (error) {
    return (error as Error).message;
  }
}

/** The last rank never calls. */
async function hang(context: RankContext): Promise<string> {
  const { rank, size } = context;
  const two = await open(context);
  const counts = new Int32Array(size * size).fill(3);
  const send = new Float32Array(3 * size), recv = new Float32Array(3 * size);
  let message = "";
  if (rank < size - 1) {
    try {
      await two.allToAllV(send, counts, recv);
    } catch (error) {
      message = (error as Error).message;
    }
  } else {
    await pause(1500);
  }
  await two[Symbol.asyncDispose]();
  return message;
}

/** Without options the ranks of this machine share a host. */
async function found({ comm, size }: RankContext): Promise<object> {
  await using two = await TwoLevel.create(comm);
  await using uneven = await TwoLevel.create(comm, {
    hosts: Array.from({ length: size }, (_, r) => r === 0 ? 0 : 1),
  });
  const counts = new Int32Array(size * size).fill(1);
  for (const exchange of [two, uneven]) {
    const recv = new Int32Array(size);
    await exchange.allToAllV(new Int32Array(size).fill(comm.rank), counts, recv);
    assert.deepEqual([...recv], [...Array(size).keys()]);
  }
  return { reasons: [two.reason, uneven.reason], direct: two.traffic.direct };
}

const PROGRAMS = { random, stream, ahead, errors, traced, hang, disagree, found };

if (import.meta.main) {
  await rankMain((context) =>
    PROGRAMS[(context.args as Args).program](context) as Promise<unknown>
  );
}
