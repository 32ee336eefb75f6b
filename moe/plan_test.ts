// Invariants of the routing plan: every choice is sent once, counts are transposes, both orders are permutations and each expert's
// rows arrive in the order of the global batch.

import assert from "node:assert/strict";
import fc from "fast-check";
import type { PlacementPlan } from "./hooks.ts";
import { holdersOf, replicatedPlacement, staticPlacement } from "./placement.ts";
import { makePlan, regularReplicas, type RoutingPlan, rowsPerRank } from "./plan.ts";

/** Any valid seats: each expert on at least one rank, in any order; rows split over replicas by a rule of (source, expert). */
const placements = (ranks: number, experts: number): fc.Arbitrary<PlacementPlan> =>
  fc.record({
    homes: fc.array(
      fc.uniqueArray(fc.nat(ranks - 1), { minLength: 1, maxLength: ranks }),
      { minLength: experts, maxLength: experts },
    ),
    salt: fc.nat(100),
  }).map(({ homes, salt }) => {
    const seats = Array.from({ length: ranks }, (_, r) => {
      const held = homes.flatMap((ranks, e) => ranks.includes(r) ? [e] : []);
      return salt % 2 ? held.reverse() : held;
    });
    const split = (source: number, expert: number, count: number) => {
      const rows = new Array<number>(homes[expert].length).fill(0);
      for (let i = 0; i < count; i++) rows[(i * salt + source) % rows.length]++;
      return rows;
    };
    return { seats, split };
  });

const cases = fc.record({
  ranks: fc.integer({ min: 1, max: 5 }),
  experts: fc.integer({ min: 1, max: 7 }),
  choices: fc.integer({ min: 1, max: 3 }),
}).chain(({ ranks, experts, choices }) =>
  fc.record({
    ranks: fc.constant(ranks),
    experts: fc.constant(experts),
    choices: fc.constant(choices),
    placement: placements(ranks, experts),
    experts_RNK: fc.array(
      fc.array(
        fc.array(fc.integer({ min: -1, max: experts - 1 }), {
          minLength: choices,
          maxLength: choices,
        }),
        { maxLength: 8 },
      ),
      { minLength: ranks, maxLength: ranks },
    ),
  })
);

type Case = typeof cases extends fc.Arbitrary<infer T> ? T : never;

function plansOf(c: Case): RoutingPlan[] {
  const counts_RE = new Int32Array(c.ranks * c.experts);
  c.experts_RNK.forEach((tokens, r) => {
    for (const e of tokens.flat()) if (e >= 0) counts_RE[r * c.experts + e]++;
  });
  return c.experts_RNK.map((tokens, rank) =>
    makePlan({ ...c, rank, experts_NK: Int32Array.from(tokens.flat()), counts_RE })
  );
}

Deno.test("every kept choice is sent exactly once, to a rank that holds its expert", () => {
  fc.assert(
    fc.property(cases, (c) => {
      plansOf(c).forEach((plan, rank) => {
        const rows = new Uint8Array(plan.tokens_S.length);
        const ends = plan.sendCounts.map((_, r) =>
          plan.sendCounts.slice(0, r + 1).reduce((a, b) => a + b, 0)
        );
        c.experts_RNK[rank].flat().forEach((e, i) => {
          const slot = plan.slots_NK[i];
          if (e < 0) return assert.equal(slot, -1);
          rows[slot]++;
          assert.equal(plan.tokens_S[slot], Math.floor(i / c.choices));
          const destination = ends.findIndex((end) => slot < end);
          assert.ok(c.placement.seats[destination].includes(e));
        });
        assert.ok(rows.every((n) => n === 1));
      });
    }),
    { numRuns: 500 },
  );
});

Deno.test("send counts are the transpose of receive counts, and rows per rank their sums", () => {
  fc.assert(
    fc.property(cases, (c) => {
      const plans = plansOf(c);
      for (let r = 0; r < c.ranks; r++) {
        for (let s = 0; s < c.ranks; s++) {
          assert.equal(plans[r].sendCounts[s], plans[s].recvCounts[r]);
        }
        const received = plans[r].recvCounts.reduce((a, b) => a + b, 0);
        assert.equal(plans[r].offsets.at(-1), received);
        for (const plan of plans) {
          assert.equal(rowsPerRank([plan])[r], received);
          const row = plan.rows_RR.slice(r * c.ranks, (r + 1) * c.ranks);
          assert.deepEqual(row, plans[r].sendCounts);
        }
        assert.equal(rowsPerRank([plans[0], plans[0]])[r], 2 * received);
      }
    }),
    { numRuns: 500 },
  );
});

Deno.test("replicas are regular where seats repeat from group to group, alike in number", () => {
  for (let ranks = 1; ranks <= 6; ranks++) {
    for (let experts = 1; experts <= 12; experts++) {
      for (let replicas = 1; replicas <= ranks; replicas++) {
        const group = ranks / replicas;
        if (!Number.isInteger(group) || group > experts) continue;
        const context = { layer: 0, experts, ranks, counts: null };
        const { seats } = replicatedPlacement(replicas).plan(context);
        const want = experts % group === 0 ? replicas : 0;
        assert.equal(
          regularReplicas(seats, experts),
          want,
          `${experts} experts, ${seats.join("|")}`,
        );
      }
    }
  }
  assert.equal(regularReplicas([[0, 1], [1, 0]], 2), 0, "another order of seats");
  assert.equal(regularReplicas([[0], [0], [1], [1]], 2), 0, "no groups of neighbours");
  assert.equal(regularReplicas([[0, 1, 2], [0, 1, 2], [0], [1, 2]], 3), 0);
});

Deno.test("each expert gets its rows together, in the order of the global batch", () => {
  fc.assert(
    fc.property(cases, (c) => {
      const plans = plansOf(c), holders = holdersOf(c.placement.seats, c.experts);
      // Carry (rank, token, expert) by hand: send order, all-to-all-v, expert-major order.
      const sent = plans.map((plan, rank) => {
        const rows = Array.from(plan.tokens_S, (token) => ({ rank, token, expert: -1 }));
        plan.slots_NK.forEach((slot, i) => {
          if (slot >= 0) rows[slot].expert = c.experts_RNK[rank].flat()[i];
        });
        return rows;
      });
      const seen = new Map<number, { rank: number; token: number }[]>();
      plans.forEach((plan, to) => {
        const arrived = sent.flatMap((rows, from) => {
          const start = plans[from].sendCounts.slice(0, to).reduce((a, b) => a + b, 0);
          return rows.slice(start, start + plan.recvCounts[from]);
        });
        const grouped = plan.toExpertMajor
          ? Array.from(plan.toExpertMajor, (i) => arrived[i])
          : arrived;
        plan.toRankMajor?.forEach((i, row) => assert.equal(plan.toExpertMajor![i], row));
        c.placement.seats[to].forEach((expert, seat) => {
          const rows = grouped.slice(plan.offsets[seat], plan.offsets[seat + 1]);
          for (const row of rows) assert.equal(row.expert, expert);
          const order = rows.map(({ rank, token }) => rank * 1e6 + token);
          assert.deepEqual(order, order.toSorted((a, b) => a - b));
          seen.set(expert, [...seen.get(expert) ?? [], ...rows]);
        });
      });
      for (let e = 0; e < c.experts; e++) {
        const chosen = c.experts_RNK.flat(2).filter((x) => x === e).length;
        assert.equal(seen.get(e)?.length ?? 0, chosen);
        assert.ok(holders[e].length > 0);
      }
    }),
    { numRuns: 500 },
  );
});

Deno.test("the receiver's reorder of counts [2, 3 | 1, 4], by hand", () => {
  const counts_RE = new Int32Array([0, 0, 2, 3, 0, 0, 1, 4]);
  const placement = staticPlacement().plan({ layer: 0, experts: 4, ranks: 2, counts: null });
  const plan = makePlan({
    rank: 1,
    ranks: 2,
    experts: 4,
    choices: 1,
    experts_NK: new Int32Array([3, 3, 2, 3, 3]),
    counts_RE,
    placement,
  });
  assert.deepEqual([...plan.tokens_S], [2, 0, 1, 3, 4]);
  assert.deepEqual([...plan.recvCounts], [5, 5]);
  assert.deepEqual([...plan.offsets], [0, 3, 10]);
  assert.deepEqual([...plan.toExpertMajor!], [0, 1, 5, 2, 3, 4, 6, 7, 8, 9]);
  assert.deepEqual([...plan.toRankMajor!], [0, 1, 3, 4, 5, 2, 6, 7, 8, 9]);
});

Deno.test("plans refuse counts that are not the tokens', and splits that lose rows", () => {
  const placement = staticPlacement().plan({ layer: 0, experts: 2, ranks: 1, counts: null });
  const input = { rank: 0, ranks: 1, experts: 2, choices: 1, placement };
  const experts_NK = new Int32Array([0, 1, 1]);
  for (const counts of [[2, 1], [1, 1], [1, 3]]) {
    assert.throws(
      () => makePlan({ ...input, experts_NK, counts_RE: Int32Array.from(counts) }),
      /must be those of its tokens, \[1,2\]/,
    );
  }
  const lossy = { seats: [[0], [0]], split: () => [1, 1] };
  assert.throws(
    () =>
      makePlan({
        ...input,
        ranks: 2,
        experts: 1,
        experts_NK: new Int32Array(3),
        counts_RE: new Int32Array([3, 0]),
        placement: lossy,
      }),
    /3 rows of expert 0 must be split over 2 replicas: current value is \[1,1\]/,
  );
});

Deno.test("static placement seats every expert once, ranks differ by at most one", () => {
  fc.assert(fc.property(fc.integer({ min: 1, max: 64 }), fc.integer({ min: 1, max: 8 }), (e, r) => {
    const make = () => staticPlacement().plan({ layer: 0, experts: e, ranks: r, counts: null });
    if (e < r) return assert.throws(make, /use fewer ranks, more experts or replicas/);
    const { seats } = make();
    assert.deepEqual(seats.flat(), Array.from({ length: e }, (_, i) => i));
    const sizes = seats.map((held) => held.length);
    assert.ok(Math.max(...sizes) - Math.min(...sizes) <= 1);
  }));
});

Deno.test("replicated placement keeps a rank's rows inside its group", () => {
  const plan = replicatedPlacement(2).plan({ layer: 0, experts: 4, ranks: 4, counts: null });
  assert.deepEqual(plan.seats, [[0, 1], [2, 3], [0, 1], [2, 3]]);
  assert.deepEqual(plan.split(1, 0, 7), [7, 0]);
  assert.deepEqual(plan.split(2, 3, 7), [0, 7]);
  const make = (k: number) => () =>
    replicatedPlacement(k).plan({ layer: 0, experts: 4, ranks: 4, counts: null });
  assert.throws(make(3), /must divide 4 ranks: current value is 3/);
});

Deno.test("seats are checked: homeless, twice on a rank, no such expert", () => {
  assert.throws(() => holdersOf([[0], [2]], 3), /every expert must have a seat.* expert 1/);
  assert.throws(() => holdersOf([[0, 1, 0]], 2), /expert 0 twice on rank 0/);
  assert.throws(() => holdersOf([[0, 1, 2]], 2), /one of 0..1: current value is 2/);
});
