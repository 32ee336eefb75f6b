// A rank of moe_ranks_test.ts: runs every router on this rank's tokens, plain and with replicas, twice each.

import { replicatedPlacement } from "../moe/placement.ts";
import { inputs, type RankOutcome, ROUTERS, runRank } from "./_moe_case.ts";
import { rankMain } from "./_ranks.ts";

await rankMain(async ({ comm, args }) => {
  const { splits, seed } = args as { splits: number[][]; seed: number };
  const outcomes: Record<string, RankOutcome> = {};
  for (const [name, router] of Object.entries(ROUTERS)) {
    for (const split of splits) {
      const batch = inputs(split.reduce((a, b) => a + b, 0), seed);
      for (const replicas of [1, 2]) {
        const placement = replicatedPlacement(replicas);
        const c = { router, placement, sharedExperts: 1 };
        const first = await runRank(c, batch, split, comm);
        const again = await runRank(c, batch, split, comm);
        if (JSON.stringify(first) !== JSON.stringify(again)) throw new Error(`${name} differs`);
        outcomes[`${name} ${split} ${replicas}`] = first;
      }
    }
  }
  return outcomes;
});
