// Measures what `levels.ts` reasons about: all-to-alls inside hosts, between them, and of both ways, on the ranks' own links. Nothing is chosen here.

import type { TwoLevel } from "../../collectives/two_level.ts";
import type { HostLayout } from "../../collectives/two_level_plan.ts";
import type { Communicator, Work } from "../../collectives/types.ts";
import type { Device } from "../../tensor/device.ts";
import { empty } from "../../tensor/tensor.ts";
import { exchangeTimes, type LevelLinks, type ModelCorrection } from "./levels.ts";
import { fitLink, type LinkFit, type LinkSample } from "./links.ts";

/** Links of the levels, fitted to measured times. */
export interface LevelFits extends LevelLinks {
  /** Inside a host. */
  readonly inner: LinkFit;
  /** Between hosts, on two levels. */
  readonly outer: LinkFit;
  /** Between hosts, directly. */
  readonly direct: LinkFit;
  /** The change from one level to the other in µs. */
  readonly handoff_us: number;
  /** By what the model is wrong at the measured sizes. */
  readonly corrections: readonly ModelCorrection[];
}

/** A measured all-to-all with equal counts; times in µs, of the slowest rank. */
export interface LevelSample {
  /** Bytes that each rank gives to each rank. */
  readonly bytes: number;
  /** Inside the hosts only: all-to-alls of L ranks. */
  readonly inner_us: number;
  /** Between hosts only: all-to-alls of H ranks. */
  readonly outer_us: number;
  /** Of all ranks, directly. */
  readonly direct_us: number;
  /** Of all ranks, on two levels. */
  readonly twoLevel_us: number;
}

/** Options of {@linkcode measureLevels}. */
export interface MeasureLevelsOptions {
  /** Bytes that each rank gives to each rank. @default {1 KiB to 512 KiB} */
  readonly sizes?: readonly number[];
  /** Times that every size is measured; the shortest counts, as whatever else the machine does only adds to it. @default {6} */
  readonly rounds?: number;
}

const SIZES = [1 << 10, 1 << 13, 1 << 16, 1 << 19];
/** All-to-alls that are timed together, each begun when the one before has ended. */
const IN_A_ROW = 4;

/**
 * Fits links to measured times.
 *
 * @param samples Times at two sizes at least.
 * @param layout The hosts.
 * @returns The links.
 */
export function fitLevels(samples: readonly LevelSample[], layout: HostLayout): LevelFits {
  const { hosts, perHost } = layout;
  const size = hosts * perHost;
  // A step's messages and the bytes of one rank, as the model counts them.
  const fit = (messages: number, of: (sample: LevelSample) => LinkSample) => {
    const link = fitLink(samples.map(of));
    return { ...link, alpha_us: link.alpha_us / messages };
  };
  const inner = fit(perHost - 1, ({ bytes, inner_us }) => ({
    bytes: (perHost - 1) * bytes,
    time_us: inner_us,
  }));
  const outer = fit(hosts - 1, ({ bytes, outer_us }) => ({
    bytes: (hosts - 1) * bytes,
    time_us: outer_us,
  }));
  // What stays inside costs the direct way its messages; that much of its time is not the outer link's.
  const home_us = (perHost - 1) * inner.alpha_us;
  const direct = fit(size - perHost, ({ bytes, direct_us }) => ({
    bytes: (size - perHost) * bytes,
    time_us: Math.max(direct_us - home_us, direct_us / 2),
  }));
  const sorted = [...samples].sort((a, b) => a.bytes - b.bytes);
  const model = (links: LevelLinks, bytes: number) =>
    exchangeTimes(links, layout, new Array<number>(size * size).fill(bytes), 1);
  const [smallest] = sorted;
  const handoff_us = Math.max(
    0,
    smallest.twoLevel_us - model({ inner, outer }, smallest.bytes).twoLevel_us,
  );
  const links = { inner, outer, direct, handoff_us };
  const corrections = sorted.map(({ bytes, direct_us, twoLevel_us }) => {
    const told = model(links, bytes);
    return { bytes, direct: direct_us / told.direct_us, twoLevel: twoLevel_us / told.twoLevel_us };
  });
  return { ...links, corrections };
}

/**
 * Measures the links of both levels and fits them. All ranks call it; they get the same numbers. Nothing else should use the links.
 *
 * @param comm The ranks.
 * @param two Their two levels; its `choose` is as before afterwards.
 * @param device Where the data lies.
 * @param options Sizes and rounds.
 * @returns The links and what they were fitted to; null where there are no two levels.
 */
export async function measureLevels(
  comm: Communicator,
  two: TwoLevel,
  device: Device,
  options: MeasureLevelsOptions = {},
): Promise<(LevelFits & { readonly samples: readonly LevelSample[] }) | null> {
  const { levels } = two;
  if (levels === null) return null;
  const { sizes = SIZES, rounds = 6 } = options;
  const { inner, outer } = levels;
  const { size } = comm;
  const most = Math.max(...sizes);
  const { choose } = two;
  two.choose = null;
  const send = empty(device, [size * most], "u8"), recv = empty(device, [size * most], "u8");
  device.kernels.fill(send, 1);
  const samples: LevelSample[] = [];
  try {
    for (const bytes of sizes) {
      const part = (n: number) => [send.rows(0, n * bytes), recv.rows(0, n * bytes)] as const;
      const all = new Array<number>(size).fill(bytes);
      const matrix = new Array<number>(size * size).fill(bytes);
      const [inside, between, every] = [inner.size, outer.size, size].map(part);
      const ways: (() => Work)[] = [
        () => inner.allToAll(...inside),
        () => outer.allToAll(...between),
        () => comm.allToAllV(every[0], all, every[1], all),
        () => two.allToAllV(every[0], matrix, every[1]),
      ];
      const times = ways.map((): number[] => []);
      for (let round = -1; round < rounds; round++) { // the first warms up
        for (const [way, start] of ways.entries()) {
          const time_us = await timed(comm, device, start);
          if (round >= 0) times[way].push(time_us);
        }
      }
      const [inner_us, outer_us, direct_us, twoLevel_us] = times.map((all) => Math.min(...all));
      samples.push({ bytes, inner_us, outer_us, direct_us, twoLevel_us });
    }
  } finally {
    two.choose = choose;
    send[Symbol.dispose]();
    recv[Symbol.dispose]();
  }
  return { ...fitLevels(samples, levels), samples };
}

/** Time of one of several all-to-alls in a row, on the slowest rank: the same number on all. */
async function timed(comm: Communicator, device: Device, start: () => Work): Promise<number> {
  const { stream } = device;
  await comm.barrier();
  const begin = performance.now();
  for (let i = 0; i < IN_A_ROW; i++) await start().wait(stream);
  await stream.synchronize();
  const time_us = Float64Array.of((performance.now() - begin) * 1000 / IN_A_ROW);
  await comm.allReduce(time_us, { op: "max" });
  return time_us[0];
}
