// What the links of a rank do, for bench/schedule.ts: large collectives alone and beside each other. Every rank calls these together.

import { progress } from "../collectives/progress.ts";
import type { Communicator, Work } from "../collectives/types.ts";
import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, zeros } from "../tensor/tensor.ts";
import { now, recorder } from "../trace/mod.ts";
import type { LinksReply } from "./_schedule_messages.ts";

const MIB = 1 << 20;
/** Runs of each, after one that is not counted. */
const REPEATS = 5;
/** Bytes of the collectives, for links of 10 Gbit/s; slower ones carry as much less, but more than what a link sends at once. */
const ALL_TO_ALL_BYTES = 8 * MIB, ALL_REDUCE_BYTES = 32 * MIB, RATE_MBIT = 10_000;
const LEAST_SCALE = 1 / 8;

/** What {@linkcode measureBandwidth} needs. */
export interface LinkPlace {
  /** Carries all-to-alls. */
  readonly world: Communicator;
  /** Carries gradients. */
  readonly gradients: Communicator;
  /** Where the data is. */
  readonly device: Device;
  /** Nominal rate of the links; 0 without a limit. */
  readonly mbit: number;
}

/**
 * Times of a large all-to-all and a large allReduce, alone, and of the all-to-all while the other runs.
 *
 * @param place Where.
 * @returns Medians of this rank.
 */
export async function measureBandwidth(
  place: LinkPlace,
): Promise<Omit<LinksReply, "allToAll" | "reduction">> {
  const { world, gradients, device, mbit } = place, { size } = world;
  const scale = mbit === 0 ? 1 : Math.min(1, Math.max(LEAST_SCALE, mbit / RATE_MBIT));
  const elements = (bytes: number) => Math.ceil(bytes * scale / 4 / size) * size;
  const n = elements(ALL_TO_ALL_BYTES), m = elements(ALL_REDUCE_BYTES);
  using send = zeros(device, [n]), recv = empty(device, [n]), sum = zeros(device, [m]);
  const exchange = () => world.allToAll(send, recv), reduce = () => gradients.allReduce(sum);
  const allToAll_us = await timeOf(place, [exchange]);
  const allReduce_us = await timeOf(place, [reduce]);
  const capturing = recorder.capturing, beside: number[] = [];
  recorder.capturing = true;
  for (let i = 0; i < REPEATS; i++) {
    recorder.clearSpans();
    await runTogether(place, [reduce, exchange]);
    progress();
    const span = recorder.spans.find(({ category }) => category === "allToAll");
    if (span) beside.push(span.end - span.start);
  }
  recorder.capturing = capturing;
  recorder.clearSpans();
  const share = (size - 1) / size;
  return {
    allToAll_us,
    allReduce_us,
    allToAllBeside_us: median(beside),
    allToAll_bytes: 4 * n * share,
    allReduce_bytes: 2 * 4 * m * share,
  };
}

/** Median time of operations that are started together. */
async function timeOf(place: LinkPlace, starts: readonly (() => Work)[]): Promise<number> {
  await runTogether(place, starts);
  const times: number[] = [];
  for (let i = 0; i < REPEATS; i++) times.push(await runTogether(place, starts));
  return median(times);
}

/** Starts operations together, when all ranks are there. @returns Time until they have ended, in µs. */
async function runTogether(
  { world, device }: LinkPlace,
  starts: readonly (() => Work)[],
): Promise<number> {
  const { stream } = device;
  using token = zeros(device, [1]);
  ops.fill(token, 0);
  await world.allReduce(token).wait(stream); // the devices begin together
  if (device.kind === "cpu") await world.barrier();
  const begin = stream.recordTimed?.();
  const begin_us = now();
  const works = starts.map((start) => start());
  for (const work of works) await work.wait(stream);
  const end = stream.recordTimed?.();
  if (!begin || !end) return now() - begin_us;
  while (!end.done()) await new Promise((resolve) => setTimeout(resolve, 1));
  begin.done();
  return end.time() - begin.time();
}

function median(numbers: readonly number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b);
  return sorted.length === 0 ? NaN : sorted[sorted.length >> 1];
}
