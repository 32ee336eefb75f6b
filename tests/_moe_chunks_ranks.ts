// A rank of moe_chunks_test.ts: runs routers on this rank's tokens, in one slice and in several, each twice; on a GPU where there is one.

import { TwoLevel } from "../collectives/two_level.ts";
import type { MoeLayer } from "../moe/moe_layer.ts";
import { inputs, type RankOutcome, ROUTERS, runRank } from "./_moe_case.ts";
import { rankMain } from "./_ranks.ts";

interface Args {
  readonly splits: number[][];
  readonly chunks: number[];
  /** Names of the routers; all without it. */
  readonly routers?: readonly string[];
  /** Host of each rank, for all-to-alls in two levels. */
  readonly hosts?: readonly number[];
}

await rankMain(async ({ comm, args, device }) => {
  const { splits, chunks, routers = Object.keys(ROUTERS) } = args as Args;
  const place = device?.kind === "cuda" ? { device } : {};
  const { hosts } = args as Args;
  await using two = hosts ? await TwoLevel.create(comm, { hosts }) : null;
  if (two && !two.levels) throw new Error(`not in two levels: ${two.reason}`);
  const prepare = (layer: MoeLayer) => void (layer.exchange = two);
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
          prepare,
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
