// The choice between one level and two: on links whose times can be told by hand, and as a property of the model.

import assert from "node:assert/strict";
import fc from "fast-check";
import { chooseExchange, chooser, exchangeTimes } from "./levels.ts";
import { fitLevels, type LevelSample } from "./measure_levels.ts";

const equal = (size: number, n: number) => new Array<number>(size * size).fill(n);
const close = (got: number, want: number) => assert(Math.abs(got - want) <= 1e-9 * want, `${got}`);

Deno.test("two levels win where messages are small and many, and lose where bytes count", () => {
  const links = {
    inner: { alpha_us: 2, bytes_per_us: 10_000 },
    outer: { alpha_us: 30, bytes_per_us: 1250 },
  };
  const layout = { hosts: 4, perHost: 8 };
  const small = chooseExchange(links, layout, equal(32, 64), 4);
  assert.equal(small.way, "two-level");
  assert(small.direct_us > 5 * small.twoLevel_us, JSON.stringify(small));
  // 24 · 30 µs of messages saved do not matter beside a second of bytes, which travel twice.
  const large = chooseExchange(links, layout, equal(32, 1 << 24), 4);
  assert.equal(large.way, "direct");
  // An inner link as slow as the outer one: the detour costs more than it saves.
  const slow = { inner: { alpha_us: 30, bytes_per_us: 1250 }, outer: links.outer };
  assert.equal(chooseExchange(slow, { hosts: 2, perHost: 2 }, equal(4, 1 << 20), 4).way, "direct");
});

Deno.test("exchangeTimes() counts the messages and bytes of the busiest rank and host", () => {
  const links = {
    inner: { alpha_us: 1, bytes_per_us: 100 },
    outer: { alpha_us: 10, bytes_per_us: 10 },
  };
  const layout = { hosts: 2, perHost: 2 };
  // Rank 0 alone sends: 40 bytes to rank 2, 60 to rank 3.
  const counts = equal(4, 0);
  counts[2] = 40;
  counts[3] = 60;
  const apart = exchangeTimes({ ...links, shared: false }, layout, counts, 1);
  close(apart.direct_us, 2 * 10 + 100 / 10);
  close(apart.twoLevel_us, 1 + 60 / 100 + 10 + 60 / 10); // rank 1 takes 60 of them
  const shared = exchangeTimes(links, layout, counts, 1);
  close(shared.direct_us, 2 * 10 + 100 / 20); // the host's link has twice a rank's rate
  close(shared.twoLevel_us, 1 + 60 / 100 + 10 + 100 / 20);
  const handoff = exchangeTimes({ ...links, handoff_us: 7 }, layout, counts, 1);
  close(handoff.twoLevel_us, shared.twoLevel_us + 7);
  assert.deepEqual(exchangeTimes(links, layout, equal(4, 0), 1), { direct_us: 0, twoLevel_us: 0 });
  assert.throws(() => exchangeTimes(links, layout, equal(3, 1), 4), /counts must have 16 entries/);
  assert.throws(() => exchangeTimes(links, layout, equal(4, 1), 0), /positive number of bytes/);
  assert.throws(() => exchangeTimes(links, { hosts: 0, perHost: 2 }, [], 4), /hosts must be/);
});

Deno.test("more costly outer messages never turn the choice from two levels to the direct way", () => {
  const positive = fc.double({ min: 0.1, max: 1e4, noNaN: true });
  const link = fc.record({ alpha_us: positive, bytes_per_us: positive });
  const shape = fc.record({
    hosts: fc.integer({ min: 1, max: 4 }),
    perHost: fc.integer({ min: 1, max: 4 }),
  });
  const input = shape.chain((layout) => {
    const n = (layout.hosts * layout.perHost) ** 2;
    const counts = fc.array(fc.integer({ min: 1, max: 1000 }), { minLength: n, maxLength: n });
    return fc.record({
      layout: fc.constant(layout),
      counts,
      inner: link,
      outer: link,
      more: positive,
    });
  });
  fc.assert(fc.property(input, ({ layout, counts, inner, outer, more }) => {
    const now = chooseExchange({ inner, outer }, layout, counts, 4);
    const dearer = { ...outer, alpha_us: outer.alpha_us + more };
    const then = chooseExchange({ inner, outer: dearer }, layout, counts, 4);
    if (now.way === "two-level") assert.equal(then.way, "two-level");
    if (layout.hosts === 1 || layout.perHost === 1) assert.equal(now.way, "direct");
    assert.equal(chooser({ inner, outer }, layout)(counts, 4), now.way);
    assert.equal(chooser({ inner, outer }, null)(counts, 4), "direct");
  }));
});

Deno.test("fitLevels() finds links again from the times that they give", () => {
  const layout = { hosts: 3, perHost: 2 };
  const inner = { alpha_us: 3, bytes_per_us: 8000 };
  const outer = { alpha_us: 25, bytes_per_us: 900 };
  const samples = [1 << 10, 1 << 14, 1 << 18].map((bytes): LevelSample => {
    const model = exchangeTimes({ inner, outer, handoff_us: 12 }, layout, equal(6, bytes), 1);
    return {
      bytes,
      inner_us: inner.alpha_us + bytes / inner.bytes_per_us,
      outer_us: 2 * (outer.alpha_us + bytes / outer.bytes_per_us),
      direct_us: model.direct_us,
      twoLevel_us: model.twoLevel_us,
    };
  });
  const fits = fitLevels(samples, layout);
  const near = (got: number, want: number) => assert(Math.abs(got / want - 1) < 1e-6, `${got}`);
  near(fits.inner.alpha_us, 3);
  near(fits.inner.bytes_per_us, 8000);
  near(fits.outer.alpha_us, 25);
  near(fits.outer.bytes_per_us, 900);
  near(fits.direct.alpha_us, 25);
  near(fits.handoff_us, 12);
  for (const { direct, twoLevel } of fits.corrections) {
    near(direct, 1);
    near(twoLevel, 1);
  }
});

Deno.test("with equal counts the corrected model gives what was measured, however odd", () => {
  const layout = { hosts: 2, perHost: 3 };
  const time = fc.double({ min: 1, max: 1e6, noNaN: true });
  const sample = fc.record({ inner_us: time, outer_us: time, direct_us: time, twoLevel_us: time });
  fc.assert(fc.property(fc.array(sample, { minLength: 2, maxLength: 5 }), (times) => {
    const samples = times.map((one, i) => ({ bytes: 1000 * 4 ** i, ...one }));
    const fits = fitLevels(samples, layout);
    for (const { bytes, direct_us, twoLevel_us } of samples) {
      const got = exchangeTimes(fits, layout, equal(6, bytes / 4), 4);
      const near = (a: number, b: number) => assert(Math.abs(a / b - 1) < 1e-9, `${a} ${b}`);
      near(got.direct_us, direct_us);
      near(got.twoLevel_us, twoLevel_us);
      const choice = chooseExchange(fits, layout, equal(6, bytes / 4), 4);
      if (twoLevel_us < 0.94 * direct_us) assert.equal(choice.way, "two-level");
      if (twoLevel_us > 0.96 * direct_us) assert.equal(choice.way, "direct");
    }
  }));
});
