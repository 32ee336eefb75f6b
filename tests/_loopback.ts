// A world of several ranks inside one process, for property tests of SPMD code: thousands of cases without starting a process. Every
// rank is an async function; an operation happens when all ranks have called it. Only the operations that the MoE layer needs.
// It checks what a real communicator cannot see alone: that all ranks call the same operations in the same order, with matching counts.

import type { Communicator, Counts, Data, Work } from "../collectives/types.ts";
import { newArray, type TypedArray, viewAs } from "../tensor/dtype.ts";
import { linearBuffer } from "../tensor/cpu/memory.ts";
import { Tensor } from "../tensor/tensor.ts";

interface Call {
  readonly operation: string;
  readonly send: TypedArray;
  readonly recv: TypedArray;
  readonly sendCounts: Counts;
  readonly recvCounts: Counts;
}

type Perform = (calls: readonly Call[]) => void;

interface Meeting {
  readonly calls: (Call | undefined)[];
  arrived: number;
  readonly done: PromiseWithResolvers<void>;
}

class LoopbackGroup {
  readonly meetings: Meeting[] = [];
  readonly splits = new Map<number, Map<number, PromiseWithResolvers<Communicator | null>>>();
  readonly colors = new Map<number, Map<number, number | null>>();
  /** Names of the operations, in order: alike for every run that should be alike. */
  readonly log: string[] = [];
  readonly mail = new Map<
    string,
    { data: TypedArray[]; waiting: ((data: TypedArray) => void)[] }
  >();
  constructor(readonly size: number) {}

  meet(rank: number, sequence: number, call: Call, perform: Perform): Work {
    const meeting = this.meetings[sequence] ??= {
      calls: new Array(this.size).fill(undefined),
      arrived: 0,
      done: Promise.withResolvers<void>(),
    };
    const other = meeting.calls.find((c) => c !== undefined);
    if (other && other.operation !== call.operation) {
      throw new Error(
        `operation ${sequence}: rank ${rank} calls ${call.operation}, others ${other.operation}`,
      );
    }
    meeting.calls[rank] = call;
    if (++meeting.arrived === this.size) {
      this.log.push(call.operation);
      perform(meeting.calls as Call[]);
      meeting.done.resolve();
    }
    return workOf(meeting.done.promise, () => meeting.arrived === this.size);
  }
}

function workOf(promise: Promise<void>, done: () => boolean): Work {
  return {
    get done() {
      return done();
    },
    wait: () => promise,
    then: (resolve, reject) => promise.then(resolve, reject),
  };
}

/** The memory of data; that of an emulated GPU is this process's, too, once its stream is done. */
function host(x: Data): TypedArray {
  if (!(x instanceof Tensor)) return x;
  if (x.device.kind === "cpu") return viewAs(x.dtype, linearBuffer(), x.address, x.size);
  if (x.size === 0) return newArray(x.dtype, 0);
  const pointer = Deno.UnsafePointer.create(BigInt(x.address))!;
  return viewAs(x.dtype, Deno.UnsafePointerView.getArrayBuffer(pointer, x.bytes), 0, x.size);
}

/** Resolves when a GPU has done what was enqueued for these; null where there is none. */
function settled(...data: Data[]): Promise<void> | null {
  const tensor = data.find((x) => x instanceof Tensor && x.device.kind === "cuda");
  return tensor ? (tensor as Tensor).device.stream.synchronize() : null;
}

function copy(from: TypedArray, to: TypedArray): void {
  if (from.length !== to.length) throw new RangeError(`${from.length} elements for ${to.length}`);
  (to as Float32Array).set(from as Float32Array);
}

/** Starts of blocks of these sizes. */
function starts(counts: Counts): number[] {
  const out = [0];
  for (const n of counts) out.push(out[out.length - 1] + n);
  return out;
}

function loopback(group: LoopbackGroup, rank: number, name: string): Communicator {
  let sequence = 0, splits = 0;
  const none: Counts = [];
  const meet = (operation: string, send: Data, recv: Data, perform: Perform, counts?: Counts[]) => {
    const number = sequence++;
    const start = () =>
      group.meet(rank, number, {
        operation,
        send: host(send),
        recv: host(recv),
        sendCounts: counts?.[0] ?? none,
        recvCounts: counts?.[1] ?? none,
      }, perform);
    const before = settled(send, recv);
    return before ? workOf(before.then(async () => await start()), () => false) : start();
  };
  const box = (from: number, to: number, tag: number) => {
    const key = `${from} ${to} ${tag}`;
    if (!group.mail.has(key)) group.mail.set(key, { data: [], waiting: [] });
    return group.mail.get(key)!;
  };
  const gather: Perform = (calls) => {
    const at = starts(calls.map(({ send }) => send.length));
    for (const { recv } of calls) {
      calls.forEach(({ send }, r) => copy(send, recv.subarray(at[r], at[r + 1])));
    }
  };
  const communicator: Partial<Communicator> = {
    rank,
    size: group.size,
    backend: "self",
    name,
    traffic: {},
    allReduce: (x) =>
      meet("allReduce", x, x, (calls) => {
        const arrays = calls.map(({ recv }) => recv as Float64Array);
        const sum = arrays[0].slice();
        for (const array of arrays.slice(1)) array.forEach((v, i) => sum[i] += v);
        for (const array of arrays) array.set(sum);
      }),
    allGather: (x, out) => meet("allGather", x, out, gather),
    allGatherV: (x, out) => meet("allGatherV", x, out, gather),
    allToAllV: (send, sendCounts, recv, recvCounts) =>
      meet("allToAllV", send, recv, (calls) => {
        calls.forEach((to, t) => {
          const at = starts(to.recvCounts);
          calls.forEach((from, f) => {
            const start = starts(from.sendCounts);
            copy(from.send.subarray(start[t], start[t + 1]), to.recv.subarray(at[f], at[f + 1]));
          });
          if (at[at.length - 1] !== to.recv.length) throw new RangeError("recv has another size");
        });
      }, [sendCounts, recvCounts]),
    send: (x, to, options) => {
      const { data, waiting } = box(rank, to, options?.tag ?? 0);
      const start = () => {
        const message = host(x).slice();
        const receiver = waiting.shift();
        if (receiver) receiver(message);
        else data.push(message);
      };
      const before = settled(x);
      if (before) return workOf(before.then(start), () => false);
      start();
      return workOf(Promise.resolve(), () => true);
    },
    recv: (out, from, options) => {
      const { data, waiting } = box(from, rank, options?.tag ?? 0);
      const arrived = Promise.withResolvers<void>();
      const take = (message: TypedArray) => {
        copy(message, host(out));
        arrived.resolve();
      };
      const message = data.shift();
      if (message) take(message);
      else waiting.push(take);
      return workOf(arrived.promise, () => false);
    },
    split: (color) => {
      const number = splits++;
      if (!group.colors.has(number)) {
        group.colors.set(number, new Map());
        group.splits.set(number, new Map());
      }
      const colors = group.colors.get(number)!, answers = group.splits.get(number)!;
      const answer = Promise.withResolvers<Communicator | null>();
      colors.set(rank, color);
      answers.set(rank, answer);
      if (colors.size === group.size) {
        const groups = new Map<number, LoopbackGroup>();
        for (const c of new Set(colors.values())) {
          const members = [...colors].filter(([, k]) => k === c).map(([r]) => r).sort((a, b) =>
            a - b
          );
          if (c === null) { for (const r of members) answers.get(r)!.resolve(null); }
          else {
            const sub = groups.set(c, new LoopbackGroup(members.length)).get(c)!;
            members.forEach((r, i) => answers.get(r)!.resolve(loopback(sub, i, `${name}/${c}`)));
          }
        }
      }
      return answer.promise;
    },
  };
  return communicator as Communicator;
}

/** A world in one process. */
export interface LoopbackWorld {
  /** One communicator per rank. */
  readonly ranks: readonly Communicator[];
  /** Operations of all ranks, in order. */
  readonly log: readonly string[];
  /** Runs one async function per rank and gives their results. */
  run<T>(body: (comm: Communicator) => Promise<T>): Promise<T[]>;
}

/** A world of `size` ranks in this process. */
export function loopbackWorld(size: number): LoopbackWorld {
  const group = new LoopbackGroup(size);
  const ranks = Array.from({ length: size }, (_, rank) => loopback(group, rank, "loopback"));
  return {
    ranks,
    log: group.log,
    run: (body) => Promise.all(ranks.map((comm) => body(comm))),
  };
}
