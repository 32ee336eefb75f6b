// Pace `device` on GPUs: schedulers are told of what happens when the device passes it, by threads that wait for events. On the emulator of
// CUDA with streams that run beside the host, and events that pass late.

import assert from "node:assert/strict";
import { gpuRanksEnv } from "./_gpu_env.ts";
import type { PumpArgs, PumpResult } from "./_pump_ranks.ts";
import { runRanks } from "./_ranks.ts";

const PROGRAM = new URL("./_pump_ranks.ts", import.meta.url);
const gpu = await gpuRanksEnv();
const ignore = gpu === null;

async function train(args: PumpArgs, pause_us: number): Promise<PumpResult[][]> {
  const results = await runRanks<PumpResult[]>(PROGRAM, args.ranks, {
    args,
    env: {
      ...gpu,
      LINA_EMULATOR_STREAMS: "asynchronous",
      LINA_EMULATOR_PAUSE_US: `${pause_us}`,
    },
    timeout_ms: 100_000,
  });
  return results.map(({ result }) => result!);
}

/** Checks that boundaries were told in the device's order: `expected` is the order of the program. */
function assertDeviceOrder({ told }: PumpResult, expected: readonly string[]): void {
  const heard = told.filter((what) => what !== "microOpEnds");
  assert.deepEqual(heard.toSorted(), expected.toSorted());
  const at = new Map(heard.map((what, i) => [what, i]));
  const computed = (what: string) => !what.startsWith("allToAllEnds");
  // The computation's own, in the order of the program.
  assert.deepEqual(heard.filter(computed), expected.filter(computed));
  assert.deepEqual(heard.filter((w) => !computed(w)), expected.filter((w) => !computed(w)));
  expected.forEach((what, i) => {
    if (computed(what)) return;
    // An all-to-all ends after its start, and before whatever comes behind it.
    assert.ok(at.get(what)! > at.get(what.replace("Ends", "Starts"))!, `${what} before its start`);
    const next = expected.slice(i + 1).find(computed)!;
    assert.ok(at.get(what)! < at.get(next)!, `${next} before ${what}`);
  });
}

for (const [ranks, chunks, replicas] of [[2, 1, 1], [2, 3, 1], [4, 2, 2]] as const) {
  Deno.test({
    name:
      `pump: all policies learn the same, told in the device's order (${ranks} ranks, ${chunks} chunks, ${replicas} replicas)`,
    ignore,
    async fn() {
      const policies = ["fifo", "outside", "priority", "lina"] as const;
      const results = await train({ ranks, chunks, replicas, policies, steps: 3 }, 150);
      const [[fifo]] = results;
      for (const all of results) {
        all.forEach((result, i) => {
          assert.deepEqual(result.loss, fifo.loss, policies[i]);
          assert.equal(result.launched.reduce((a, b) => a + b, 0), result.microOps);
        });
        const [, , priority, lina] = all;
        for (const result of [priority, lina]) {
          assertDeviceOrder(result, fifo.told);
          // It heard of ends in time to launch one after the other, and of none twice.
          const ends = result.told.filter((what) => what === "microOpEnds").length;
          assert.ok(ends > 0 && ends <= result.microOps, `${ends} ends`);
          assert.ok(result.launched.slice(0, -1).every((count) => count <= 1));
          assert.ok(result.launched.at(-1)! < result.microOps, "all wait for the end");
          assert.ok(
            result.eventWaits > 0 && result.eventWaits <= result.told.length + result.microOps,
          );
        }
        // Replicas' gradients go with the others.
        const seats = all.map(({ names }) => names.filter((name) => /seats\.\d/.test(name)).length);
        assert.ok(seats.every((count) => replicas > 1 ? count > 0 : count === 0), `${seats}`);
      }
    },
  });
}

Deno.test({
  name: "pump: a step that fails in the middle launches nothing more and rejects nowhere else",
  ignore,
  async fn() {
    const args = { ranks: 2, chunks: 1, replicas: 1, policies: ["lina"], steps: 3 } as const;
    const results = await runRanks(PROGRAM, 2, {
      args: { ...args, ends: "step" },
      env: { ...gpu, LINA_EMULATOR_STREAMS: "asynchronous", LINA_EMULATOR_PAUSE_US: "150" },
      check: false,
    });
    for (const { code, output } of results) {
      assert.match(output, /ended: \{"error":"the test ends this step","launchedAfterwards":0\}/);
      assert.equal(code, 4, output);
    }
  },
});

Deno.test({
  name: "pump: a rank that ends in the middle of a step ends the other's, by name and soon",
  ignore,
  async fn() {
    const args = { ranks: 2, chunks: 1, replicas: 1, policies: ["lina"], steps: 3 } as const;
    const start = performance.now();
    const results = await runRanks<PumpResult[]>(PROGRAM, 2, {
      args: { ...args, ends: "rank" },
      env: { ...gpu, LINA_EMULATOR_STREAMS: "asynchronous", LINA_TIMEOUT_MS: "4000" },
      check: false,
      timeout_ms: 60_000,
    });
    assert.ok(performance.now() - start < 40_000, "too late");
    const [survivor, gone] = results;
    assert.equal(gone.code, 3);
    const said = `${survivor.result?.[0].error ?? ""}${survivor.output}`;
    assert.match(said, /Cannot complete \w+/);
    assert.doesNotMatch(said, /Uncaught \(in promise\)/);
  },
});
