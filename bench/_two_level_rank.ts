// One rank of bench/two_level.ts: both ways of an all-to-all in turns, on what carries this job's data. Rank 0 prints a line `ROW {…}` per measured
// size. Argument: JSON of what is measured.

import { init } from "../collectives/world.ts";
import { TwoLevel } from "../collectives/two_level.ts";
import type { Work } from "../collectives/types.ts";
import { chooseExchange } from "../lina/training/levels.ts";
import { measureLevels } from "../lina/training/measure_levels.ts";
import type { CudaDevice } from "../tensor/cuda/device.ts";
import { fromArray, zeros } from "../tensor/tensor.ts";

/** What is measured. */
export interface TwoLevelJob {
  /** Where the data lies: on processors, over MPI, or on GPUs, over NCCL. */
  readonly device: "cpu" | "cuda";
  /** Bytes that the rank which sends most gives in all. */
  readonly sizes: readonly number[];
  /** Timed turns of each way and size. */
  readonly rounds: number;
  /** Nothing begins after so many seconds. */
  readonly budget_s: number;
}

/** A measured size. */
export interface TwoLevelRow {
  readonly backend: string;
  readonly hosts: number;
  readonly per_host: number;
  readonly counts: string;
  readonly bytes: number;
  /** Medians over turns of the slowest rank's mean. */
  readonly direct_us: number;
  readonly two_level_us: number;
  /** direct_us / two_level_us: above 1 two levels win. */
  readonly speedup: number;
  /** Time of the calls alone, on the slowest rank. */
  readonly direct_host_us: number;
  readonly two_level_host_us: number;
  /** The same by lina/training/levels.ts, and what it chooses. */
  readonly model_direct_us: number;
  readonly model_two_level_us: number;
  readonly chosen: string;
  /** Time of the chosen way / time of the faster one. */
  readonly regret: number;
}

/** Counts as routing gives them: `skewed` has ranks that get five times what others get. */
const COUNTS: Record<string, (s: number, r: number) => number> = {
  equal: () => 5,
  skewed: (s, r) => 1 + (s + 3 * r) % 5,
};

const { device: kind, sizes, rounds, budget_s } = JSON.parse(Deno.args[0]) as TwoLevelJob;
const begun_ms = performance.now();
await using world = await init(
  kind === "cuda" ? { device: "cuda" } : { device: "cpu", backend: "mpi" },
);
const { rank, size, device } = world;
await using two = await TwoLevel.create(world);
const { levels } = two;
if (levels === null) throw new Error(`There are no two levels: ${two.reason}`);
const cuda = device.kind === "cuda" ? device as CudaDevice : null;

function median(numbers: number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}

/** Mean time of operations, each begun when the one before has ended, and of their calls, in µs. */
async function turn(start: () => Work, times: number): Promise<[time_us: number, host_us: number]> {
  const { stream } = device;
  await world.barrier();
  let host_ms = 0;
  const begin = cuda?.stream.recordTimed(), begin_ms = performance.now();
  for (let i = 0; i < times; i++) {
    const call_ms = performance.now();
    const work = start();
    if (cuda) work.wait(stream);
    host_ms += performance.now() - call_ms;
    if (!cuda) await work;
  }
  const end = cuda?.stream.recordTimed();
  await stream.synchronize();
  const time_us = end !== undefined && end.done()
    ? end.time() - begin!.time()
    : 1000 * (performance.now() - begin_ms);
  const both = Float64Array.of(time_us / times, 1000 * host_ms / times);
  await world.allReduce(both, { op: "max" });
  return [both[0], both[1]];
}

async function measure(kind: string, bytes: number): Promise<Omit<TwoLevelRow, "backend">> {
  const parts = Array.from(
    { length: size * size },
    (_, i) => COUNTS[kind](Math.floor(i / size), i % size),
  );
  const rowOf = (all: number[], s: number) => all.slice(s * size, (s + 1) * size);
  const sum = (all: number[]) => all.reduce((a, b) => a + b, 0);
  const most = Math.max(...Array.from({ length: size }, (_, s) => sum(rowOf(parts, s))));
  const counts = parts.map((part) => Math.floor(part * bytes / 4 / most));
  const row = rowOf(counts, rank);
  const column = Array.from({ length: size }, (_, s) => counts[s * size + rank]);
  const data = Float32Array.from({ length: sum(row) }, (_, i) => rank * 1e6 + i);
  using send = fromArray(device, data);
  using recv = zeros(device, [sum(column)]), other = zeros(device, [sum(column)]);
  const direct = () => world.allToAllV(send, row, recv, column);
  const levelled = () => two.allToAllV(send, counts, other);
  await direct();
  await levelled();
  const [want, got] = [await recv.toArray(), await other.toArray()];
  if (want.some((x, i) => x !== got[i])) throw new Error(`rank ${rank}: the ways differ`);
  const times = bytes <= 1 << 16 ? 20 : bytes <= 1 << 20 ? 6 : 2;
  const samples: [number, number][][] = [[], []];
  for (let round = -1; round < rounds; round++) {
    for (const way of round % 2 === 0 ? [0, 1] : [1, 0]) {
      const sample = await turn(way === 0 ? direct : levelled, times);
      if (round >= 0) samples[way].push(sample);
    }
  }
  const of = (way: number, which: number) => median(samples[way].map((sample) => sample[which]));
  const direct_us = of(0, 0), two_level_us = of(1, 0);
  const choice = chooseExchange(fits!, levels!, counts, 4);
  const chosen_us = choice.way === "direct" ? direct_us : two_level_us;
  return {
    hosts: levels!.hosts,
    per_host: levels!.perHost,
    counts: kind,
    bytes,
    direct_us,
    two_level_us,
    speedup: direct_us / two_level_us,
    direct_host_us: of(0, 1),
    two_level_host_us: of(1, 1),
    model_direct_us: choice.direct_us,
    model_two_level_us: choice.twoLevel_us,
    chosen: choice.way,
    regret: chosen_us / Math.min(direct_us, two_level_us),
  };
}

cuda?.anchor();
const fits = await measureLevels(world, two, device);
if (rank === 0) console.log(`FITS ${JSON.stringify({ backend: world.backend, ...fits })}`);
outer: for (const kind of Object.keys(COUNTS)) {
  for (const bytes of sizes) {
    const late = Int32Array.of(performance.now() - begun_ms > 1000 * budget_s ? 1 : 0);
    await world.allReduce(late, { op: "max" });
    if (late[0] > 0) break outer;
    const row = { backend: world.backend, ...await measure(kind, bytes) };
    if (rank === 0) console.log(`ROW ${JSON.stringify(row)}`);
  }
}
