// A rank of moe_ranks_test.ts, nccl_test.ts and gpu_ranks_test.ts: runs every router on this rank's tokens, plain and with replicas, twice
// each. On a GPU it computes in f32.

import { replicatedPlacement } from "../moe/placement.ts";
import { inputs, type RankOutcome, ROUTERS, runRank } from "./_moe_case.ts";
import { rankMain } from "./_ranks.ts";

interface Args {
  readonly splits: number[][];
  readonly seed: number;
  /** Names of the routers; all without it. */
  readonly routers?: readonly string[];
}

await rankMain(async ({ comm, args, device }) => {
  const { splits, seed, routers } = args as Args;
  const place = device?.kind === "cuda" ? { device, dtype: "f32" as const } : {};
  const outcomes: Record<string, RankOutcome> = {};
  for (const [name, router] of Object.entries(ROUTERS)) {
    if (routers && !routers.includes(name)) continue;
    for (const split of splits) {
      const batch = inputs(split.reduce((a, b) => a + b, 0), seed);
      for (const replicas of [1, 2]) {
        const placement = replicatedPlacement(replicas);
        const c = { router, placement, sharedExperts: 1, ...place };
        const first = await runRank(c, batch, split, comm);
        const again = await runRank(c, batch, split, comm);
        if (JSON.stringify(first) !== JSON.stringify(again)) throw new Error(`${name} differs`);
        outcomes[`${name} ${split} ${replicas}`] = first;
      }
    }
  }
  return outcomes;
});
