// Weak scaling of communication: what a rank sends per step is what the formula of moe/volume.ts says, to the byte.

import assert from "node:assert/strict";
import { runRanks } from "./_ranks.ts";
import type { TrainArgs, TrainResult } from "./_train_ranks.ts";

const PROGRAM = new URL("./_train_ranks.ts", import.meta.url);

for (const ranks of [2, 4]) {
  Deno.test(`volume: bytes of a step at ${ranks} ranks are the formula's`, async () => {
    const capacityFactor = 2;
    const model = { router: { kind: "softmax", topK: 2, capacityFactor } } as const;
    for (const more of [{}, { accumulate: 2 }, { model }]) {
      const args: TrainArgs = { steps: 2, batch: 4 * ranks, balanced: true, ...more };
      const passes = args.accumulate ?? 1, layers = 2;
      for (const { result } of await runRanks<TrainResult>(PROGRAM, ranks, { args })) {
        const { bytes, formula } = result!;
        // A replay asks for token counts.
        const counts = passes * layers * (ranks - 1) * 8;
        const expected: Record<string, number> = {
          ...formula,
          allGather: formula.allGather + counts,
        };
        assert.deepEqual(sorted(bytes), sorted(expected));
        assert.equal(expected.allToAllV, 4 * layers * 4 * 16 * 2 * 32 * 4 * (ranks - 1) / ranks);
      }
    }
  });
}

function sorted(bytes: Readonly<Record<string, number>>): [string, number][] {
  return Object.entries(bytes).filter(([, n]) => n > 0).sort();
}
