// When an all-to-all on two levels wins: the α-β model of both ways, for one matrix of counts. A rank sends R − 1 messages directly; on two levels
// it sends H − 1 to other hosts, which carry the same bytes, and first those bytes inside its host. So two levels save (R − L − (H − 1)) α of
// the outer links and cost a step on the inner ones. Plain arithmetic: measures and sends nothing (measure_levels.ts does), and says the
// same on every rank that is given the same numbers.

import type { ChooseWay, ExchangeWay } from "../../collectives/two_level.ts";
import type { HostLayout } from "../../collectives/two_level_plan.ts";
import type { Link } from "./links.ts";

/** Links as the ranks of all hosts use them at once; every α is that of one message. */
export interface LevelLinks {
  /** Inside a host; bytes per µs of a rank. */
  readonly inner: Link;
  /** Between hosts, as the second half of two levels uses it; bytes per µs of a rank. */
  readonly outer: Link;
  /** Between hosts, as a direct all-to-all uses it. @default {outer} */
  readonly direct?: Link;
  /** What two levels take beyond their messages: the change from one to the other, in µs. @default {0} */
  readonly handoff_us?: number;
  /**
   * Whether the ranks of a host share one link to the others, of as many times `outer`'s rate: then the sum of what they send counts, not the
   * rank that sends most. @default {true}
   */
  readonly shared?: boolean;
  /**
   * What was measured with equal counts, by size: the model's times are multiplied by what it was wrong by there, in between by what lies
   * between its neighbours. @default {the model is right}
   */
  readonly corrections?: readonly ModelCorrection[];
}

/** By what the model was wrong at a size. */
export interface ModelCorrection {
  /** Bytes that each rank gave to each rank. */
  readonly bytes: number;
  /** Measured time of the direct way / the model's. */
  readonly direct: number;
  /** Measured time on two levels / the model's. */
  readonly twoLevel: number;
}

/** Both ways of an all-to-all. */
export interface ExchangeTimes {
  /** Time of the direct way in µs. */
  readonly direct_us: number;
  /** Time on two levels in µs. */
  readonly twoLevel_us: number;
}

/** The way of an all-to-all, and why. */
export interface ExchangeChoice extends ExchangeTimes {
  /** The way. */
  readonly way: ExchangeWay;
}

/** By how much two levels must be faster: a model's error should not send rows on a detour. */
const MARGIN = 0.05;

/** What every rank sends and gets in one step. */
class Loads {
  readonly sent: Float64Array;
  readonly received: Float64Array;
  /** Messages, the larger number of both directions. */
  readonly #sends: Int32Array;
  readonly #receives: Int32Array;

  constructor(size: number) {
    this.sent = new Float64Array(size);
    this.received = new Float64Array(size);
    this.#sends = new Int32Array(size);
    this.#receives = new Int32Array(size);
  }

  add(from: number, to: number, bytes: number): void {
    if (bytes === 0) return;
    this.sent[from] += bytes;
    this.received[to] += bytes;
    this.#sends[from]++;
    this.#receives[to]++;
  }

  /** Most messages of a rank in one direction. */
  get messages(): number {
    let most = 0;
    for (let r = 0; r < this.#sends.length; r++) {
      most = Math.max(most, this.#sends[r], this.#receives[r]);
    }
    return most;
  }

  /** Bytes of the busiest rank; with hosts that share a link, an equal part of the busiest host's. */
  bytes(perHost = 1): number {
    let most = 0;
    for (let first = 0; first < this.sent.length; first += perHost) {
      let sent = 0, received = 0;
      for (let r = first; r < first + perHost; r++) {
        sent += this.sent[r];
        received += this.received[r];
      }
      most = Math.max(most, sent, received);
    }
    return most / perHost;
  }
}

function check(layout: HostLayout, counts: ArrayLike<number>, elementBytes: number): number {
  const { hosts, perHost } = layout;
  for (const [what, value] of [["hosts", hosts], ["ranks per host", perHost]] as const) {
    if (Number.isInteger(value) && value >= 1) continue;
    throw new RangeError(
      `Cannot tell an exchange's time as ${what} must be a positive integer: current value is ${value}`,
    );
  }
  const size = hosts * perHost;
  if (counts.length !== size * size) {
    throw new RangeError(
      `Cannot tell an exchange's time as counts must have ${
        size * size
      } entries: current value is ${counts.length}`,
    );
  }
  if (!(elementBytes > 0)) {
    throw new RangeError(
      `Cannot tell an exchange's time as an element must have a positive number of bytes: current value is ${elementBytes}`,
    );
  }
  return size;
}

/**
 * Time of an all-to-all both ways, by the model: messages one after another and the bytes of the busiest link. Inside a host and between
 * hosts bytes travel at once, but on two levels the outer messages wait for the inner ones that they are made of.
 *
 * @param links The links.
 * @param layout Hosts and their ranks.
 * @param counts Elements from source to destination, row-major [R, R].
 * @param elementBytes Size of an element in bytes.
 * @returns Both times.
 * @throws {RangeError} If the counts do not fit the hosts.
 *
 * @example
 * ```ts
 * import { exchangeTimes } from "./levels.ts";
 * import assert from "node:assert/strict";
 *
 * const links = {
 *   inner: { alpha_us: 2, bytes_per_us: 100_000 },
 *   outer: { alpha_us: 20, bytes_per_us: 1000 },
 * };
 * const counts = new Array(64).fill(250); // 1000 bytes from each of 8 ranks to each
 * const { direct_us, twoLevel_us } = exchangeTimes(links, { hosts: 2, perHost: 4 }, counts, 4);
 * assert.equal(Math.round(direct_us), 4 * 20 + 3 * 2 + 4);
 * assert.equal(Math.round(twoLevel_us), 3 * 2 + 20 + 4); // one message instead of four
 * ```
 */
export function exchangeTimes(
  links: LevelLinks,
  layout: HostLayout,
  counts: ArrayLike<number>,
  elementBytes: number,
): ExchangeTimes {
  const size = check(layout, counts, elementBytes);
  const { perHost, hosts } = layout;
  const out = new Loads(size), home = new Loads(size); // the direct messages
  const gather = new Loads(size), second = new Loads(size);
  const between = new Float64Array(size * hosts); // from (h, l) to the rank of place l on another host
  for (let s = 0; s < size; s++) {
    const h = Math.floor(s / perHost);
    for (let r = 0; r < size; r++) {
      const bytes = counts[s * size + r] * elementBytes;
      if (bytes === 0 || s === r) continue;
      const to = Math.floor(r / perHost);
      if (to === h) {
        home.add(s, r, bytes);
        continue;
      }
      out.add(s, r, bytes);
      const relay = h * perHost + r % perHost;
      if (relay !== s) gather.add(s, relay, bytes);
      between[relay * hosts + to] += bytes;
    }
  }
  for (let relay = 0; relay < size; relay++) {
    for (let h = 0; h < hosts; h++) {
      second.add(relay, h * perHost + relay % perHost, between[relay * hosts + h]);
    }
  }
  const { inner, outer, direct = outer, handoff_us = 0, shared = true } = links;
  const together = shared ? perHost : 1;
  const time = (link: Link, load: Loads, ranks = 1) =>
    load.messages * link.alpha_us + load.bytes(ranks) / link.bytes_per_us;
  const direct_us = out.messages * direct.alpha_us + home.messages * inner.alpha_us +
    Math.max(out.bytes(together) / direct.bytes_per_us, home.bytes() / inner.bytes_per_us);
  // The messages of the first step to one rank, one per other host, go as one group: they cost what one does.
  const first_us = gather.messages === 0
    ? 0
    : Math.min(gather.messages, perHost - 1) * inner.alpha_us +
      gather.bytes() / inner.bytes_per_us;
  const second_us = Math.max(time(outer, second, together), time(inner, home));
  const right = correctionAt(links.corrections ?? [], elementBytes * sumOf(counts) / size ** 2);
  return {
    direct_us: right.direct * direct_us,
    twoLevel_us: right.twoLevel * (first_us + second_us + handoff_us),
  };
}

function sumOf(counts: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < counts.length; i++) sum += counts[i];
  return sum;
}

/** Corrections at a size; before the first and after the last they stay as they are. */
function correctionAt(
  corrections: readonly ModelCorrection[],
  bytes: number,
): Omit<ModelCorrection, "bytes"> {
  if (corrections.length === 0) return { direct: 1, twoLevel: 1 };
  const after = corrections.findIndex((correction) => correction.bytes >= bytes);
  if (after === 0) return corrections[0];
  if (after < 0) return corrections[corrections.length - 1];
  const [low, high] = [corrections[after - 1], corrections[after]];
  const part = Math.log(bytes / low.bytes) / Math.log(high.bytes / low.bytes);
  const between = (a: number, b: number) => a ** (1 - part) * b ** part;
  return {
    direct: between(low.direct, high.direct),
    twoLevel: between(low.twoLevel, high.twoLevel),
  };
}

/**
 * Chooses the way of an all-to-all: two levels where the model has them faster by a twentieth at least.
 *
 * @param links The links.
 * @param layout Hosts and their ranks.
 * @param counts Elements from source to destination, row-major [R, R].
 * @param elementBytes Size of an element in bytes.
 * @returns The way and both times.
 * @throws {RangeError} As {@linkcode exchangeTimes}.
 */
export function chooseExchange(
  links: LevelLinks,
  layout: HostLayout,
  counts: ArrayLike<number>,
  elementBytes: number,
): ExchangeChoice {
  const times = exchangeTimes(links, layout, counts, elementBytes);
  const way = times.twoLevel_us < (1 - MARGIN) * times.direct_us ? "two-level" : "direct";
  return { ...times, way };
}

/**
 * What `TwoLevel.choose` takes: {@linkcode chooseExchange} with these links.
 *
 * @param links The links, the same numbers on all ranks.
 * @param layout Hosts and their ranks; without two levels everything is direct.
 * @returns The choice.
 */
export function chooser(links: LevelLinks, layout: HostLayout | null): ChooseWay {
  if (layout === null) return () => "direct";
  return (counts, elementBytes) => chooseExchange(links, layout, counts, elementBytes).way;
}
