import assert from "node:assert/strict";
import fc from "fast-check";
import { LocalStore } from "../rendezvous/local_store.ts";
import { partnerOf, roundsOf, together } from "./connect.ts";

Deno.test("partnerOf() lets every rank meet every other exactly once, and both agree", () => {
  fc.assert(fc.property(fc.integer({ min: 2, max: 33 }), (size) => {
    const met = Array.from({ length: size }, () => new Set<number>());
    for (let round = 0; round < roundsOf(size); round++) {
      for (let rank = 0; rank < size; rank++) {
        const peer = partnerOf(rank, size, round);
        assert.equal(partnerOf(peer, size, round), rank);
        if (peer === rank) continue;
        assert(!met[rank].has(peer), `ranks ${rank} and ${peer} of ${size} meet twice`);
        met[rank].add(peer);
      }
    }
    for (const peers of met) assert.equal(peers.size, size - 1);
  }));
});

Deno.test("together() gives up when time is over or a rank has left", async () => {
  const context = { rank: 1, size: 2, localRank: 1, store: new LocalStore() };
  const never = new Promise<void>(() => {});
  assert.equal(await together(Promise.resolve(7), "world", context), 7);
  await assert.rejects(
    together(never, "world/dup1", { ...context, timeout_ms: 150 }),
    /^Error: Cannot connect as all ranks must join world\/dup1 within 150 ms on rank 1: current value is still waiting$/,
  );
  const departed = new Map([[0, "has ended without leaving the job"]]);
  await assert.rejects(
    together(never, "world", { ...context, departed }),
    /must join world on rank 1: current value is that rank 0 has ended without leaving the job$/,
  );
});
