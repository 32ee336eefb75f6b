import assert from "node:assert/strict";
import fc from "fast-check";
import { crc32 } from "node:zlib";
import { loopbackWorld } from "../tests/_loopback.ts";
import {
  decodeRoutingRecord,
  encodeRoutingRecord,
  type RoutingRecord,
  RoutingRecorder,
  RoutingReplay,
} from "./routing_record.ts";

const records: fc.Arbitrary<RoutingRecord> = fc.record({
  experts: fc.integer({ min: 3, max: 300 }),
  layers: fc.integer({ min: 1, max: 3 }),
  passes: fc.integer({ min: 0, max: 3 }),
  tokens: fc.nat(9),
  seed: fc.nat(),
}).map(({ experts, layers, passes, tokens, seed }) => {
  const choices = 3;
  const blocks = Array.from({ length: layers * passes }, (_, i) => ({
    pass: Math.floor(i / layers),
    layer: i % layers,
    experts_NK: Uint16Array.from({ length: tokens * choices }, (_, j) => {
      const e = (seed + i + Math.floor(j / choices) + j % choices) % experts;
      return (seed + j) % 5 === 0 ? 65535 : e;
    }),
  }));
  return { experts, choices, blocks };
});

Deno.test("a routing record comes back from its bytes", () => {
  fc.assert(fc.property(records, fc.nat(7), (record, offset) => {
    const bytes = encodeRoutingRecord(record);
    const shifted = new Uint8Array(bytes.length + offset);
    shifted.set(bytes, offset);
    assert.deepEqual(decodeRoutingRecord(shifted.subarray(offset)), record);
  }));
});

Deno.test("a damaged routing record is refused, and never a crash", () => {
  fc.assert(
    fc.property(records, fc.nat(), fc.integer({ min: 1, max: 255 }), (record, at, change) => {
      const bytes = encodeRoutingRecord(record);
      const flipped = bytes.slice();
      flipped[at % bytes.length] ^= change;
      let decoded: RoutingRecord | null = null;
      try {
        decoded = decodeRoutingRecord(flipped);
      } catch (error) {
        assert.match(String(error), /Cannot use a routing record as/);
      }
      // The header is not in the checksum: a change there may give another valid record, of more experts for instance.
      if (decoded) assert.ok(at % bytes.length < 24);
      assert.throws(
        () => decodeRoutingRecord(bytes.subarray(0, at % bytes.length)),
        /Cannot use a routing record as/,
      );
    }),
    { numRuns: 500 },
  );
});

Deno.test("a routing record whose checksum is right is still checked", () => {
  const record = {
    experts: 4,
    choices: 2,
    blocks: [{ pass: 0, layer: 0, experts_NK: new Uint16Array([0, 1, 2, 3]) }],
  };
  const forged = (change: (view: DataView) => void) => {
    const bytes = encodeRoutingRecord(record), view = new DataView(bytes.buffer);
    change(view);
    view.setUint32(24, crc32(bytes.subarray(28)), true);
    return () => decodeRoutingRecord(bytes);
  };
  assert.doesNotThrow(forged(() => {}));
  assert.throws(forged((v) => v.setUint16(40, 4, true)), /an expert must be below 4/);
  assert.throws(forged((v) => v.setUint16(40, 1, true)), /expert once: current value is expert 1/);
  assert.throws(forged((v) => v.setUint32(36, 0xffffffff, true)), /block 0 must end within/);
  assert.throws(forged((v) => v.setUint32(20, 0xffffffff, true)), /must hold 4294967295 blocks/);
  assert.throws(forged((v) => v.setUint32(20, 0, true)), /must end after 28 bytes/);
  assert.throws(forged((v) => v.setUint32(8, 2, true)), /version must be 1: current value is 2/);
  assert.throws(forged((v) => v.setUint32(16, 5, true)), /choices must be in 1..4/);
});

Deno.test("a record gathered from some ranks replays on others", async () => {
  const experts_NK = new Int32Array([3, -1, 0, 2, 1, 4, 2, 3, 4, 0]);
  const gatherOn = async (split: readonly number[]) => {
    const world = loopbackWorld(split.length);
    const [first, ...others] = await world.run((comm) => {
      const recorder = new RoutingRecorder();
      const start = split.slice(0, comm.rank).reduce((a, b) => a + b, 0);
      const part = experts_NK.subarray(start * 2, (start + split[comm.rank]) * 2);
      for (const layer of [1, 2, 1]) recorder.record(layer, { choices: 2, experts_NK: part });
      return recorder.gather(comm, 5);
    });
    for (const other of others) assert.deepEqual(other, first);
    return first;
  };
  const record = await gatherOn([5]);
  assert.deepEqual(record.blocks.map(({ pass, layer }) => [pass, layer]), [[0, 1], [0, 2], [1, 1]]);
  assert.deepEqual(await gatherOn([2, 0, 3]), record);
  const replay = new RoutingReplay(record);
  for (let pass = 0; pass < 2; pass++) {
    assert.deepEqual(replay.replay(1, 1, 3).experts_NK, experts_NK.slice(2, 8));
  }
  assert.throws(() => replay.replay(1, 0, 1), /pass 2 of layer 1 .* no such pass/);
  replay.rewind();
  assert.throws(() => replay.replay(1, 3, 3), /must have 6 tokens of it: current value is 5/);
});
