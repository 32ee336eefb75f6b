// Where experts sit, the plain way: fixed for the whole run. Contiguous blocks of experts on each rank, or several such copies
// (replicas). Placements that follow the load plug in through the same interface, `ExpertPlacement` of hooks.ts.
//
// Shape letters: E experts, R ranks.

import type { ExpertPlacement, PlacementPlan } from "./hooks.ts";

/**
 * Every expert on one rank, in contiguous blocks whose sizes differ by at most one.
 *
 * @returns The placement.
 *
 * @example
 * ```ts
 * import { staticPlacement } from "./placement.ts";
 * import assert from "node:assert/strict";
 *
 * const plan = staticPlacement().plan({ layer: 0, experts: 5, ranks: 2, counts: null });
 * assert.deepEqual(plan.seats, [[0, 1], [2, 3, 4]]);
 * ```
 */
export function staticPlacement(): ExpertPlacement {
  return replicatedPlacement(1);
}

/**
 * Every expert on `replicas` ranks: the ranks form that many groups of neighbours, and each group holds every expert once. A rank's
 * rows go to the replica in its own group, so all-to-all stays inside the group.
 *
 * @param replicas Copies of each expert; divides the number of ranks.
 * @returns The placement. Its `plan` throws a RangeError if a group would have more ranks than there are experts.
 */
export function replicatedPlacement(replicas: number): ExpertPlacement {
  return {
    name: replicas === 1 ? "static" : `replicated-${replicas}`,
    plan({ experts, ranks }) {
      const perGroup = ranks / replicas;
      if (!Number.isInteger(replicas) || replicas < 1 || !Number.isInteger(perGroup)) {
        throw new RangeError(
          `Cannot place experts as the number of replicas must divide ${ranks} ranks: current value is ${replicas}`,
        );
      }
      if (experts < perGroup) {
        const group = replicas === 1 ? "ranks" : "ranks of a group";
        throw new RangeError(
          `Cannot place experts as every rank must hold one, so ${perGroup} ${group} need at least ${perGroup} experts: current value is ${experts}; use fewer ranks, more experts or ${
            replicas === 1 ? "" : "more "
          }replicas`,
        );
      }
      const seats = Array.from({ length: ranks }, (_, rank) => {
        const i = rank % perGroup;
        const start = Math.floor(i * experts / perGroup);
        const end = Math.floor((i + 1) * experts / perGroup);
        return Array.from({ length: end - start }, (_, k) => start + k);
      });
      const split = (source: number, _expert: number, count: number) => {
        const rows = new Array<number>(replicas).fill(0);
        rows[Math.floor(source / perGroup)] = count; // replicas ascend with the groups
        return rows;
      };
      return { seats, split };
    },
  };
}

/**
 * The ranks that hold each expert.
 *
 * @param seats Experts of each rank.
 * @param experts E.
 * @returns For each expert its ranks, ascending.
 * @throws {RangeError} If an expert has no seat, sits twice on one rank, or is not an expert.
 */
export function holdersOf(seats: PlacementPlan["seats"], experts: number): number[][] {
  const holders: number[][] = Array.from({ length: experts }, () => []);
  seats.forEach((held, rank) => {
    for (const e of held) {
      if (!Number.isInteger(e) || e < 0 || e >= experts) {
        throw new RangeError(
          `Cannot place experts as a seat must hold one of 0..${
            experts - 1
          }: current value is ${e} on rank ${rank}`,
        );
      }
      if (holders[e].at(-1) === rank) {
        throw new RangeError(
          `Cannot place experts as a rank must hold an expert once: current value is expert ${e} twice on rank ${rank}`,
        );
      }
      holders[e].push(rank);
    }
  });
  const homeless = holders.findIndex((ranks) => ranks.length === 0);
  if (homeless >= 0) {
    throw new RangeError(
      `Cannot place experts as every expert must have a seat: current value is none for expert ${homeless}`,
    );
  }
  return holders;
}
