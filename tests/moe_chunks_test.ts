// The MoE layer on real ranks, over shared memory, with tokens that travel in slices: losses and gradients are those of one slice, to 1e-6 in
// f32, for every router, with ranks that have no tokens and ranks with fewer tokens than slices. The order check of the communicator is on.

import { alike, join, type RankOutcome, ROUTERS } from "./_moe_case.ts";
import { runRanks } from "./_ranks.ts";

const CHUNKS = [1, 2, 3, 5];
const SPLITS: Record<number, number[][]> = {
  1: [[30]],
  2: [[20, 21], [0, 40]],
  4: [[10, 10, 10, 10], [0, 27, 1, 12]],
};

for (const [size, splits] of Object.entries(SPLITS)) {
  Deno.test(`in slices, every router on ${size} ranks has the loss and gradients of one`, async () => {
    const ranks = await runRanks<Record<string, RankOutcome>>(
      new URL("./_moe_chunks_ranks.ts", import.meta.url),
      Number(size),
      { args: { splits, chunks: CHUNKS, dtype: "f32" }, env: { LINA_DEBUG: "1" } },
    );
    for (const name of Object.keys(ROUTERS)) {
      for (const split of splits) {
        const of = (chunks: number) =>
          join(ranks.map(({ result }) => result![`${name}, ${split}, ${chunks}`]));
        const whole = of(1);
        for (const chunks of CHUNKS.slice(1)) alike(of(chunks), whole, 1e-6);
      }
    }
  });
}
