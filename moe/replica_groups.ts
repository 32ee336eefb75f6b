// Communicators among ranks that hold replicas of the same experts. One registry per parent communicator, which all layers share: layers
// with the same sets of ranks use the same groups. Which experts these are is not known here.

import type { Communicator } from "../collectives/types.ts";

const registries = new WeakMap<Communicator, ReplicaGroups>();

/** The groups of ranks within one communicator. They end with it (NCCL's before it, newest first). */
export class ReplicaGroups {
  readonly #comm: Communicator;
  /** By the ranks that they join; null where this rank is not one of them. */
  readonly #groups = new Map<string, Communicator | null>();
  #opening: Promise<void> = Promise.resolve();

  /** Use {@linkcode ReplicaGroups.of}. @ignore */
  private constructor(comm: Communicator) {
    this.#comm = comm;
  }

  /**
   * The groups of a communicator.
   *
   * @param comm The communicator.
   * @returns The same for every call.
   */
  static of(comm: Communicator): ReplicaGroups {
    let groups = registries.get(comm);
    if (groups === undefined) registries.set(comm, groups = new ReplicaGroups(comm));
    return groups;
  }

  /**
   * Makes the groups that do not exist yet; sets that do not meet are made by one split. All ranks call it in the same order with the same
   * sets, so that all make the same splits in the same order.
   *
   * @param sets Ranks, ascending; those with one rank need no group.
   */
  async open(sets: readonly (readonly number[])[]): Promise<void> {
    const opened = this.#opening.then(() => this.#open(sets));
    this.#opening = opened.catch(() => {}); // whoever has called it gets the error
    await opened;
  }

  /**
   * A group that exists.
   *
   * @param ranks Its ranks, ascending.
   * @returns The group; null where this rank is not one of them.
   * @throws {RangeError} If it has not been opened.
   */
  get(ranks: readonly number[]): Communicator | null {
    const group = this.#groups.get(ranks.join());
    if (group !== undefined) return group;
    throw new RangeError(
      `Cannot use the replicas' group as its ranks must have opened it: current value is ${ranks.join()}`,
    );
  }

  async #open(sets: readonly (readonly number[])[]): Promise<void> {
    const wanted = sets.filter((ranks) => ranks.length > 1).map((ranks) => ranks.join());
    let missing = [...new Set(wanted)].filter((set) => !this.#groups.has(set)).sort();
    while (missing.length > 0) {
      const taken = new Set<number>(), now: number[][] = [], later: string[] = [];
      for (const set of missing) {
        const ranks = set.split(",").map(Number);
        if (ranks.some((rank) => taken.has(rank))) later.push(set);
        else {
          ranks.forEach((rank) => taken.add(rank));
          now.push(ranks);
        }
      }
      const color = now.findIndex((ranks) => ranks.includes(this.#comm.rank));
      const group = await this.#comm.split(color < 0 ? null : color);
      now.forEach((ranks, i) => this.#groups.set(ranks.join(), i === color ? group : null));
      missing = later;
    }
  }
}
