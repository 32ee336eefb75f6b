import assert from "node:assert/strict";
import fc from "fast-check";
import {
  collectiveCost,
  type CollectiveKind,
  fitCollective,
  fitLink,
  type Link,
  type LinkSample,
  stepCosts,
  timeAlone,
} from "./links.ts";

const KINDS: CollectiveKind[] = [
  "allReduce",
  "reduceScatter",
  "allGather",
  "allToAll",
  "allToAllV",
  "broadcast",
  "reduce",
  "send",
];

const link: fc.Arbitrary<Link> = fc.record({
  alpha_us: fc.double({ min: 0.1, max: 5000, noNaN: true }),
  bytes_per_us: fc.double({ min: 1, max: 1e6, noNaN: true }),
});

const ranks = fc.integer({ min: 2, max: 64 });

function near(actual: number, expected: number, relative = 1e-6): void {
  const bound = relative * Math.max(Math.abs(expected), 1e-9);
  assert.ok(Math.abs(actual - expected) <= bound, `${actual} instead of ${expected}`);
}

/** Sum of squared relative errors. */
function loss(a: number, perByte: number, samples: readonly LinkSample[]): number {
  return samples.reduce((sum, s) => sum + ((a + perByte * s.bytes) / s.time_us - 1) ** 2, 0);
}

Deno.test("fitLink: finds the link that made the times", () => {
  fc.assert(fc.property(link, ({ alpha_us, bytes_per_us }) => {
    // From messages that are all latency to messages that are nearly none.
    const knee = alpha_us * bytes_per_us;
    const samples = [0, 0.1, 1, 10, 100].map((part) => ({
      bytes: part * knee,
      time_us: alpha_us + part * knee / bytes_per_us,
    }));
    const fit = fitLink(samples);
    near(fit.alpha_us, alpha_us);
    near(fit.bytes_per_us, bytes_per_us);
    assert.ok(fit.error < 1e-6);
  }));
});

Deno.test("fitLink: no other latency and rate of at least 0 have a smaller error", () => {
  const sample = fc.record({
    bytes: fc.integer({ min: 0, max: 1e8 }),
    time_us: fc.double({ min: 1, max: 1e6, noNaN: true }),
  });
  const samples = fc.uniqueArray(sample, { selector: (s) => s.bytes, minLength: 2, maxLength: 8 });
  const factor = fc.constantFrom(0, 0.5, 0.9, 0.99, 1, 1.01, 1.1, 2);
  fc.assert(fc.property(samples, factor, factor, (samples, x, y) => {
    const { alpha_us, bytes_per_us, error } = fitLink(samples);
    assert.ok(alpha_us >= 0 && bytes_per_us > 0);
    const best = loss(alpha_us, 1 / bytes_per_us, samples);
    assert.ok(Math.abs(Math.sqrt(best / samples.length) - error) < 1e-9 * (1 + error));
    const mean = samples.reduce((sum, s) => sum + s.time_us, 0) / samples.length;
    const largest = Math.max(...samples.map((s) => s.bytes));
    for (
      const [a, perByte] of [
        [x * alpha_us, y / bytes_per_us],
        // Where one of them is 0, away from the edge.
        [alpha_us + (1 - x) ** 2 * mean, 1 / bytes_per_us],
        [alpha_us, 1 / bytes_per_us + (1 - y) ** 2 * mean / largest],
      ]
    ) assert.ok(loss(a, perByte, samples) >= best * (1 - 1e-9) - 1e-12);
  }));
});

Deno.test("fitLink: small messages count as much as large ones", () => {
  const exact = [1e3, 1e4, 1e5, 1e6, 1e7, 1e8].map((bytes) => ({
    bytes,
    time_us: 100 + bytes / 1000,
  }));
  const noisy = exact.map((s) => s.bytes === 1e8 ? { ...s, time_us: s.time_us * 1.1 } : s);
  // By absolute errors the 10 ms at the end would move α by far more than its size.
  near(fitLink(noisy).alpha_us, 100, 0.05);
});

Deno.test("fitLink: latency and rate are not below 0", () => {
  const falling = fitLink([{ bytes: 1, time_us: 20 }, { bytes: 100, time_us: 10 }]);
  assert.equal(falling.bytes_per_us, Infinity);
  assert.equal(timeAlone(collectiveCost("send", 1e9, { ranks: 2, link: falling })), 12);
  const steep = fitLink([{ bytes: 1000, time_us: 1 }, { bytes: 2000, time_us: 10 }]);
  assert.equal(steep.alpha_us, 0);
  assert.throws(() => fitLink([]), /must have two sizes at least: current value is 0/);
  const one = { bytes: 8, time_us: 1 };
  assert.throws(() => fitLink([one, one]), /two sizes at least: current value is 1/);
  assert.throws(() => fitLink([one, { bytes: 9, time_us: 0 }]), /times must be positive .* is 0/);
  assert.throws(() => fitLink([one, { bytes: -1, time_us: 1 }]), /at least 0 .* is -1/);
});

Deno.test("collectiveCost: bytes and messages of each algorithm", () => {
  const link = { alpha_us: 10, bytes_per_us: 100 };
  const cost = (kind: CollectiveKind) => {
    const { latency_us, bytes, link_us } = collectiveCost(kind, 8000, { ranks: 4, link });
    assert.equal(link_us, bytes / 100);
    return [latency_us, bytes];
  };
  assert.deepEqual(cost("allReduce"), [60, 12_000]);
  assert.deepEqual(cost("reduceScatter"), [30, 6000]);
  assert.deepEqual(cost("allGather"), [30, 6000]);
  assert.deepEqual(cost("allToAll"), [30, 6000]);
  assert.deepEqual(cost("allToAllV"), [30, 8000]);
  assert.deepEqual(cost("broadcast"), [30, 8000]);
  assert.deepEqual(cost("reduce"), [30, 8000]);
  assert.deepEqual(cost("send"), [10, 8000]);
  for (const kind of KINDS) {
    const alone = collectiveCost(kind, 8000, { ranks: 1, link });
    assert.deepEqual(alone, { latency_us: 0, link_us: 0, bytes: 0 });
  }
  assert.throws(() => collectiveCost("send", -1, { ranks: 2, link }), /bytes must be at least 0/);
  assert.throws(() => collectiveCost("send", 1, { ranks: 0, link }), /positive integer: .* is 0/);
  const still = { alpha_us: 0, bytes_per_us: 0 };
  assert.throws(
    () => collectiveCost("send", 1, { ranks: 2, link: still }),
    /positive rate: current value is 0 µs, 0 bytes/,
  );
});

Deno.test("collectiveCost: an allReduce is a reduceScatter and an allGather; nothing beats the link", () => {
  fc.assert(fc.property(link, ranks, fc.nat(1e9), (link, ranks, bytes) => {
    const time = (kind: CollectiveKind) => timeAlone(collectiveCost(kind, bytes, { ranks, link }));
    near(time("allReduce"), time("reduceScatter") + time("allGather"));
    for (const kind of KINDS) {
      const { bytes: sent } = collectiveCost(kind, bytes, { ranks, link });
      assert.ok(time(kind) >= sent / link.bytes_per_us);
    }
  }));
});

Deno.test("fitCollective: finds the link behind the times of a collective", () => {
  fc.assert(fc.property(link, ranks, fc.constantFrom(...KINDS), (link, ranks, kind) => {
    const knee = link.alpha_us * link.bytes_per_us;
    const samples = [0, 1, 10, 100].map((part) => {
      const bytes = part * knee;
      return { bytes, time_us: timeAlone(collectiveCost(kind, bytes, { ranks, link })) };
    });
    const fit = fitCollective(kind, ranks, samples);
    near(fit.alpha_us, link.alpha_us);
    near(fit.bytes_per_us, link.bytes_per_us);
  }));
  assert.throws(() => fitCollective("send", 1, []), /two at least: current value is 1/);
});

Deno.test("stepCosts: one link or two, allReduce or reduceScatter", () => {
  const slow = { alpha_us: 1, bytes_per_us: 1 }, fast = { alpha_us: 2, bytes_per_us: 10 };
  const both = stepCosts(slow, { ranks: 2 });
  assert.deepEqual(both.allToAll(10), { latency_us: 1, link_us: 10, bytes: 10 });
  assert.deepEqual(both.reduction(10), { latency_us: 2, link_us: 10, bytes: 10 });
  const each = stepCosts({ allToAll: slow, reduction: fast }, { ranks: 2, scatter: true });
  assert.deepEqual(each.allToAll(10), { latency_us: 1, link_us: 10, bytes: 10 });
  assert.deepEqual(each.reduction(20), { latency_us: 2, link_us: 1, bytes: 10 });
  assert.throws(() => stepCosts(slow, { ranks: 1.5 }), /positive integer: current value is 1.5/);
});
