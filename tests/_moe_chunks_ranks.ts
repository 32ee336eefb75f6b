// A rank of moe_chunks_test.ts: runs routers on this rank's tokens, in one slice and in several, each twice; on a GPU where there is one.

import { inputs, type RankOutcome, ROUTERS, runRank } from "./_moe_case.ts";
import { rankMain } from "./_ranks.ts";

interface Args {
  readonly splits: number[][];
  readonly chunks: number[];
  /** Names of the routers; all without it. */
  readonly routers?: readonly string[];
}

await rankMain(async ({ comm, args, device }) => {
  const { splits, chunks, routers = Object.keys(ROUTERS) } = args as Args;
  const place = device?.kind === "cuda" ? { device } : {};
  const outcomes: Record<string, RankOutcome> = {};
  for (const name of routers) {
    const router = ROUTERS[name];
    for (const split of splits) {
      const batch = inputs(split.reduce((a, b) => a + b, 0), 7);
      for (const cut of chunks) {
        const c = {
          ...place,
          router,
          dtype: "f32",
          sharedExperts: 1,
          firstPass: true,
          chunks: cut,
        } as const;
        const first = await runRank(c, batch, split, comm);
        const again = await runRank(c, batch, split, comm);
        if (JSON.stringify(first) !== JSON.stringify(again)) throw new Error(`${name} differs`);
        outcomes[`${name}, ${split}, ${cut}`] = first;
      }
    }
  }
  return outcomes;
});
