// What an all-to-all on two levels sends, pure arithmetic: nothing here moves a byte. A rank has two numbers: its host h and its place l on
// it; there are H hosts of L ranks each, and rank = h · L + l. What (h, l) has for (h', l') goes
//   1. inside the host, to (h, l'), which gathers what its host has for every rank of its place;
//   2. between hosts, from (h, l') to (h', l'): one message per host instead of one per rank.
// What stays on the host takes the first way only. No rank packs or unpacks: the blocks for a host lie together in a rank's buffer, so the
// ranks' blocks arrive in the order in which they are sent on; and what a host sends lies together where it arrives.

/** Hosts of equally many ranks, numbered one after another. */
export interface HostLayout {
  /** Number of hosts H. */
  readonly hosts: number;
  /** Ranks of each L. */
  readonly perHost: number;
}

/** Elements that lie together, and who sends or gets them. */
export interface Block {
  /** The other rank, in the communicator of its level: l inside the host, h between hosts. */
  readonly peer: number;
  /** First element in the buffer. */
  readonly at: number;
  /** Number of elements, 1 at least. */
  readonly length: number;
}

/** Elements that a rank has for itself. */
export interface OwnBlock {
  /** First element in the source. */
  readonly from: number;
  /** First element in the destination. */
  readonly to: number;
  /** Number of elements, 1 at least. */
  readonly length: number;
}

/** What one rank does. Messages of a pair of ranks are listed in the same order on both. */
export interface ExchangePlan {
  /** Elements gathered for the other hosts. */
  readonly gathered: number;
  /** Inside the host, for other hosts: parts of the source. */
  readonly gatherSends: readonly Block[];
  /** The others' of those: parts of what is gathered. */
  readonly gatherReceives: readonly Block[];
  /** This rank's part of it: source → gathered. */
  readonly gatherOwn: readonly OwnBlock[];
  /** Inside the host, for its ranks: parts of the source. */
  readonly homeSends: readonly Block[];
  /** The others' of those: parts of the destination. */
  readonly homeReceives: readonly Block[];
  /** What this rank has for itself: source → destination; null if nothing. */
  readonly homeOwn: OwnBlock | null;
  /** Between hosts: parts of what is gathered. */
  readonly hostSends: readonly Block[];
  /** Between hosts: parts of the destination. */
  readonly hostReceives: readonly Block[];
}

/**
 * Finds hosts of equally many ranks.
 *
 * @param hostOfRank The host of every rank, by any number.
 * @returns The layout; or, in words, why an all-to-all on two levels is impossible or the same as a direct one.
 */
export function layoutOf(hostOfRank: ArrayLike<number>): HostLayout | string {
  const first = new Map<number, number>(); // of each host
  const sizes: number[] = [];
  let apart = -1;
  for (let rank = 0; rank < hostOfRank.length; rank++) {
    const host = hostOfRank[rank];
    if (!first.has(host)) {
      first.set(host, rank);
      sizes.push(0);
    } else if (hostOfRank[rank - 1] !== host) {
      if (apart < 0) apart = rank;
    }
    sizes[[...first.keys()].indexOf(host)]++;
  }
  const [perHost] = sizes;
  if (sizes.length === 1) return "all ranks share a host";
  if (sizes.every((n) => n === 1)) return "every rank has a host of its own";
  if (apart >= 0) return `the ranks of a host are not numbered one after another (rank ${apart})`;
  const other = sizes.findIndex((n) => n !== perHost);
  if (other >= 0) return `hosts have ${perHost} and ${sizes[other]} ranks`;
  return { hosts: sizes.length, perHost };
}

/**
 * Plans an all-to-all on two levels.
 *
 * @param layout The hosts.
 * @param rank Whose part is planned.
 * @param counts Elements from source to destination, row-major [R, R].
 * @returns What the rank does.
 */
export function planExchange(
  { hosts, perHost }: HostLayout,
  rank: number,
  counts: ArrayLike<number>,
): ExchangePlan {
  const size = hosts * perHost;
  const local = rank % perHost, host = (rank - local) / perHost;
  const home = host * perHost; // the first rank of this host
  const gatherSends: Block[] = [], gatherReceives: Block[] = [], gatherOwn: OwnBlock[] = [];
  const homeSends: Block[] = [], homeReceives: Block[] = [];
  const hostSends: Block[] = [], hostReceives: Block[] = [];

  let gathered = 0, sourceAt = 0, targetAt = 0;
  let homeFrom = 0, homeTo = 0;
  for (let h = 0; h < hosts; h++) {
    const begin = gathered, arrives = targetAt;
    for (let l = 0; l < perHost; l++) {
      const other = h * perHost + l;
      const sent = counts[rank * size + other];
      const received = counts[other * size + rank];
      if (h !== host) {
        const mine = counts[(home + l) * size + h * perHost + local]; // from l, by way of this rank, to host h
        if (l !== local && sent > 0) gatherSends.push({ peer: l, at: sourceAt, length: sent });
        if (l !== local && mine > 0) gatherReceives.push({ peer: l, at: gathered, length: mine });
        if (l === local && mine > 0) gatherOwn.push({ from: sourceAt, to: gathered, length: mine });
        gathered += mine;
      } else if (l !== local) {
        if (sent > 0) homeSends.push({ peer: l, at: sourceAt, length: sent });
        if (received > 0) homeReceives.push({ peer: l, at: targetAt, length: received });
      } else {
        homeFrom = sourceAt;
        homeTo = targetAt;
      }
      sourceAt += sent;
      targetAt += received;
    }
    if (h === host) continue;
    if (gathered > begin) hostSends.push({ peer: h, at: begin, length: gathered - begin });
    if (targetAt > arrives) hostReceives.push({ peer: h, at: arrives, length: targetAt - arrives });
  }
  const own = counts[rank * size + rank];
  return {
    gathered,
    gatherSends: fromNext(gatherSends, local),
    gatherReceives: fromNext(gatherReceives, local),
    gatherOwn,
    homeSends: fromNext(homeSends, local),
    homeReceives: fromNext(homeReceives, local),
    homeOwn: own > 0 ? { from: homeFrom, to: homeTo, length: own } : null,
    hostSends: fromNext(hostSends, host),
    hostReceives: fromNext(hostReceives, host),
  };
}

/** Begins with the next rank, so that not all send to the first one first; the order of messages to one rank stays. */
function fromNext(blocks: readonly Block[], me: number): Block[] {
  return [...blocks.filter(({ peer }) => peer > me), ...blocks.filter(({ peer }) => peer < me)];
}

/**
 * Elements in blocks.
 *
 * @param blocks The blocks.
 * @returns Their sum.
 */
export function lengthOf(blocks: readonly Block[]): number {
  let sum = 0;
  for (const { length } of blocks) sum += length;
  return sum;
}
