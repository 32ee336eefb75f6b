// The MoE layer on real ranks, over shared memory: the loss and every gradient are those of one rank, whatever the number of ranks, the
// number of tokens on each and the number of replicas. The order check of the communicator is on.

import { likeOneRank, type RankOutcome } from "./_moe_case.ts";
import { runRanks } from "./_ranks.ts";

const SPLITS: Record<number, number[][]> = {
  2: [[20, 20], [0, 40]],
  4: [[10, 10, 10, 10], [0, 27, 1, 12]],
};

for (const [size, splits] of Object.entries(SPLITS)) {
  Deno.test(`every router on ${size} ranks gives one rank's loss and gradients`, async () => {
    const ranks = await runRanks<Record<string, RankOutcome>>(
      new URL("./moe_program.ts", import.meta.url),
      Number(size),
      { args: { splits, seed: 3 }, env: { LINA_DEBUG: "1" } },
    );
    await likeOneRank(ranks.map(({ result }) => result!), splits, 3, 1e-12);
  });
}
