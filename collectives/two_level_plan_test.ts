// Plans of all ranks, carried out in one process on arrays, against what an all-to-all must give.

import assert from "node:assert/strict";
import fc from "fast-check";
import {
  type Block,
  type ExchangePlan,
  type HostLayout,
  layoutOf,
  lengthOf,
  planExchange,
} from "./two_level_plan.ts";

/** The i-th element from source to destination: no two are alike. */
const element = (s: number, r: number, i: number) => s * 10_000 + r * 1000 + i + 1;

function sourceOf(size: number, counts: readonly number[], s: number): number[] {
  return Array.from(
    { length: size },
    (_, r) => Array.from({ length: counts[s * size + r] }, (_, i) => element(s, r, i)),
  ).flat();
}

function targetOf(size: number, counts: readonly number[], r: number): number[] {
  return Array.from(
    { length: size },
    (_, s) => Array.from({ length: counts[s * size + r] }, (_, i) => element(s, r, i)),
  ).flat();
}

/** Moves blocks between the buffers of ranks: messages of a pair match in their order. */
function deliver(
  ranks: readonly number[],
  messages: (rank: number) => { sends: readonly Block[]; receives: readonly Block[] },
  from: readonly number[][],
  to: readonly number[][],
): void {
  for (const [me, rank] of ranks.entries()) {
    for (const [peer, other] of ranks.entries()) {
      const sends = messages(rank).sends.filter((block) => block.peer === peer);
      const receives = messages(other).receives.filter((block) => block.peer === me);
      assert.deepEqual(sends.map((b) => b.length), receives.map((b) => b.length));
      for (const [i, { at, length }] of sends.entries()) {
        for (let e = 0; e < length; e++) to[other][receives[i].at + e] = from[rank][at + e];
      }
    }
  }
}

/** Carries out the plans of all ranks. @returns What every rank has received. */
function carryOut(
  { hosts, perHost }: HostLayout,
  counts: readonly number[],
  plans: readonly ExchangePlan[],
): number[][] {
  const size = hosts * perHost;
  const all = [...Array(size).keys()];
  const sources = all.map((s) => sourceOf(size, counts, s));
  const gathered = plans.map((plan) => new Array<number>(plan.gathered).fill(NaN));
  const targets = all.map((r) => targetOf(size, counts, r).fill(NaN));
  for (let h = 0; h < hosts; h++) {
    const ranks = all.slice(h * perHost, (h + 1) * perHost);
    const first = (r: number) => ({
      sends: plans[r].gatherSends,
      receives: plans[r].gatherReceives,
    });
    const home = (r: number) => ({ sends: plans[r].homeSends, receives: plans[r].homeReceives });
    deliver(ranks, first, sources, gathered);
    deliver(ranks, home, sources, targets);
  }
  for (const [r, { gatherOwn, homeOwn }] of plans.entries()) {
    for (const { from, to, length } of gatherOwn) {
      for (let e = 0; e < length; e++) gathered[r][to + e] = sources[r][from + e];
    }
    for (let e = 0; e < (homeOwn?.length ?? 0); e++) {
      targets[r][homeOwn!.to + e] = sources[r][homeOwn!.from + e];
    }
  }
  for (let l = 0; l < perHost; l++) {
    const ranks = all.filter((r) => r % perHost === l);
    const second = (r: number) => ({ sends: plans[r].hostSends, receives: plans[r].hostReceives });
    deliver(ranks, second, gathered, targets);
  }
  return targets;
}

const cases = fc.record({ hosts: fc.integer({ min: 1, max: 4 }), perHost: fc.nat({ max: 3 }) })
  .map(({ hosts, perHost }) => ({ hosts, perHost: perHost + 1 }))
  .chain((layout) => {
    const size = layout.hosts * layout.perHost;
    const count = fc.oneof(fc.constant(0), fc.integer({ min: 0, max: 5 }));
    return fc.record({
      layout: fc.constant(layout),
      counts: fc.array(count, { minLength: size * size, maxLength: size * size }),
    });
  });

const plansOf = (layout: HostLayout, counts: readonly number[]) =>
  Array.from(
    { length: layout.hosts * layout.perHost },
    (_, rank) => planExchange(layout, rank, counts),
  );

Deno.test("planExchange() brings every element to its place, with one message per other host", () => {
  fc.assert(fc.property(cases, ({ layout, counts }) => {
    const plans = plansOf(layout, counts);
    const targets = carryOut(layout, counts, plans);
    const size = layout.hosts * layout.perHost;
    for (const [rank, target] of targets.entries()) {
      assert.deepEqual(target, targetOf(size, counts, rank));
      const { hostSends, hostReceives, gatherSends, homeSends } = plans[rank];
      for (const blocks of [hostSends, hostReceives]) {
        assert.equal(new Set(blocks.map(({ peer }) => peer)).size, blocks.length);
        assert(blocks.length < layout.hosts);
      }
      for (const { length } of [...hostSends, ...gatherSends, ...homeSends]) assert(length > 0);
    }
    // What leaves the hosts is what must.
    let leaves = 0;
    for (let s = 0; s < size; s++) {
      for (let r = 0; r < size; r++) {
        const away = Math.floor(s / layout.perHost) !== Math.floor(r / layout.perHost);
        if (away) leaves += counts[s * size + r];
      }
    }
    assert.equal(plans.reduce((sum, { hostSends }) => sum + lengthOf(hostSends), 0), leaves);
  }));
});

Deno.test("a plan that gathers in another order is caught", () => {
  const layout = { hosts: 2, perHost: 3 };
  const counts = Array.from({ length: 36 }, () => 2);
  const plans = plansOf(layout, counts);
  const [a, b] = plans[0].gatherReceives;
  const broken = {
    ...plans[0],
    gatherReceives: [{ ...a, at: b.at }, { ...b, at: a.at }],
  };
  const targets = carryOut(layout, counts, [broken, ...plans.slice(1)]);
  assert.notDeepEqual(targets[3], targetOf(6, counts, 3)); // what rank 0 sends on is wrong
  assert.deepEqual(targets[4], targetOf(6, counts, 4));
});

Deno.test("planExchange() takes counts beyond 2³¹", () => {
  const n = 2 ** 33;
  const plan = planExchange({ hosts: 2, perHost: 2 }, 1, new Float64Array(16).fill(n));
  assert.equal(plan.gathered, 2 * n);
  assert.deepEqual(plan.hostSends, [{ peer: 1, at: 0, length: 2 * n }]);
  assert.deepEqual(plan.hostReceives, [{ peer: 1, at: 2 * n, length: 2 * n }]);
  assert.deepEqual(plan.gatherOwn, [{ from: 3 * n, to: n, length: n }]);
});

Deno.test("layoutOf() finds hosts of equally many ranks or says why not", () => {
  assert.deepEqual(layoutOf([7, 7, 3, 3, 9, 9]), { hosts: 3, perHost: 2 });
  assert.deepEqual(layoutOf([0, 0, 0, 4, 4, 4]), { hosts: 2, perHost: 3 });
  assert.equal(layoutOf([5, 5]), "all ranks share a host");
  assert.equal(layoutOf([0]), "all ranks share a host");
  assert.equal(layoutOf([0, 1, 2]), "every rank has a host of its own");
  assert.match(layoutOf([0, 1, 1, 0]) as string, /not numbered one after another \(rank 3\)/);
  assert.equal(layoutOf([0, 0, 1]), "hosts have 2 and 1 ranks");
});
