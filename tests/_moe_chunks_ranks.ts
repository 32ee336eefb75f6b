// A rank of moe_chunks_test.ts: runs routers on this rank's tokens, in one slice and in several, each twice.

import { inputs, type RankOutcome, ROUTERS, runRank } from "./_moe_case.ts";
import { rankMain } from "./_ranks.ts";

interface Args {
  readonly splits: number[][];
  readonly chunks: number[];
  readonly dtype: "f32" | "f64";
}

await rankMain(async ({ comm, args }) => {
  const { splits, chunks, dtype } = args as Args;
  const outcomes: Record<string, RankOutcome> = {};
  for (const [name, router] of Object.entries(ROUTERS)) {
    for (const split of splits) {
      const batch = inputs(split.reduce((a, b) => a + b, 0), 7);
      for (const cut of chunks) {
        const c = { router, dtype, sharedExperts: 1, firstPass: true, chunks: cut };
        const first = await runRank(c, batch, split, comm);
        const again = await runRank(c, batch, split, comm);
        if (JSON.stringify(first) !== JSON.stringify(again)) throw new Error(`${name} differs`);
        outcomes[`${name}, ${split}, ${cut}`] = first;
      }
    }
  }
  return outcomes;
});
