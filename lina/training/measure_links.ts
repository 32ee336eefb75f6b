// Measures what the links of all ranks do, as the α-β model has it: allReduces and all-to-alls of some sizes, alone. The arithmetic is in links.ts.

import type { Communicator, Work } from "../../collectives/types.ts";
import type { Device } from "../../tensor/device.ts";
import { empty, zeros } from "../../tensor/tensor.ts";
import { now } from "../../trace/mod.ts";
import { type CollectiveKind, fitCollective, type LinkFit, type LinkSample } from "./links.ts";

/** Options of {@linkcode measureLinks}. */
export interface MeasureLinksOptions {
  /** Bytes of the arrays; two sizes at least. @default {64 KiB to 8 MiB, each four times the one before, and 8 MiB} */
  readonly sizes?: readonly number[];
  /** Runs of each size that count; one before them does not. @default {5} */
  readonly repeats?: number;
}

/** What {@linkcode measureLinks} finds. */
export interface MeasuredLinks {
  /** The link as a ring allReduce uses it. */
  readonly allReduce: LinkFit;
  /** The link as an all-to-all uses it. */
  readonly allToAll: LinkFit;
}

const SIZES = [1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 23];
/** Time after which larger sizes are left out, in µs of one operation: slow links are known well by then. */
const LONG_US = 300_000;

/**
 * Measures the links. All ranks call it together, while nothing else uses them.
 *
 * @param comm All ranks, two at least.
 * @param device Where their tensors live.
 * @param options Sizes and repeats.
 * @returns The links, of medians of the slowest rank; the same bits on every rank.
 * @throws {RangeError} If there is one rank, or the sizes are fewer than two.
 */
export async function measureLinks(
  comm: Communicator,
  device: Device,
  options: MeasureLinksOptions = {},
): Promise<MeasuredLinks> {
  const { size } = comm, { sizes = SIZES, repeats = 5 } = options;
  const elements = (bytes: number) => Math.max(1, Math.round(bytes / 4 / size)) * size;
  const most = elements(Math.max(...sizes));
  using x = zeros(device, [most]), y = empty(device, [most]), token = zeros(device, [1]);
  /** The slowest rank's median time of an operation, in µs. */
  const time = async (start: () => Work): Promise<number> => {
    const times: number[] = [];
    for (let i = 0; i <= repeats; i++) {
      await comm.allReduce(token).wait(device.stream); // the devices begin together
      if (device.kind === "cpu") await comm.barrier();
      times.push(await timeOf(device, start));
    }
    const [slowest] = await maximum(comm, median(times.slice(1)));
    return slowest;
  };
  const sums: LinkSample[] = [], exchanges: LinkSample[] = [];
  for (const bytes of sizes.toSorted((a, b) => a - b)) {
    const n = elements(bytes);
    const sum_us = await time(() => comm.allReduce(x.rows(0, n)));
    const exchange_us = await time(() => comm.allToAll(x.rows(0, n), y.rows(0, n)));
    sums.push({ bytes: 4 * n, time_us: sum_us });
    exchanges.push({ bytes: 4 * n, time_us: exchange_us });
    if (sums.length > 1 && Math.max(sum_us, exchange_us) > LONG_US) break;
  }
  const fit = (kind: CollectiveKind, samples: readonly LinkSample[]) =>
    agreed(comm, fitCollective(kind, size, samples));
  return { allReduce: await fit("allReduce", sums), allToAll: await fit("allToAll", exchanges) };
}

/** Time of an operation on this rank's device, in µs. */
async function timeOf(device: Device, start: () => Work): Promise<number> {
  const { stream } = device;
  const begin = stream.recordTimed?.(), begin_us = now();
  await start().wait(stream);
  const end = stream.recordTimed?.();
  if (!begin || !end) return now() - begin_us;
  while (!end.done()) await new Promise((resolve) => setTimeout(resolve, 1));
  begin.done();
  return end.time() - begin.time();
}

async function maximum(comm: Communicator, value: number): Promise<Float64Array> {
  const array = Float64Array.of(value);
  await comm.allReduce(array, { op: "max" });
  return array;
}

/** Rank 0's fit. */
async function agreed(comm: Communicator, fit: LinkFit): Promise<LinkFit> {
  const array = Float64Array.of(fit.alpha_us, fit.bytes_per_us, fit.error);
  await comm.broadcast(array, 0);
  const [alpha_us, bytes_per_us, error] = array;
  return { alpha_us, bytes_per_us, error };
}

function median(numbers: readonly number[]): number {
  return numbers.toSorted((a, b) => a - b)[numbers.length >> 1];
}
