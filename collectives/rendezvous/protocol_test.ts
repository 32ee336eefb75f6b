import assert from "node:assert/strict";
import fc from "fast-check";
import {
  decodeReply,
  decodeRequest,
  encodeReply,
  encodeRequest,
  FrameReader,
  MAX_FRAME_BYTES,
} from "./protocol.ts";

/** A connection that delivers given bytes in given pieces. */
function connOf(bytes: Uint8Array, pieces: readonly number[]): Deno.Conn {
  let at = 0, turn = 0;
  return {
    read(into: Uint8Array) {
      if (at === bytes.length) return Promise.resolve(null);
      const n = Math.min(into.length, bytes.length - at, pieces[turn++ % pieces.length]);
      into.set(bytes.subarray(at, at + n));
      at += n;
      return Promise.resolve(n);
    },
  } as unknown as Deno.Conn;
}

const requests = fc.record({
  operation: fc.nat(255),
  id: fc.nat(),
  key: fc.string({ maxLength: 200, unit: "binary" }),
  value: fc.uint8Array({ maxLength: 5000 }),
});

Deno.test("frames survive any cut of the stream", async () => {
  await fc.assert(fc.asyncProperty(
    fc.array(requests, { maxLength: 6 }),
    fc.array(fc.integer({ min: 1, max: 6000 }), { minLength: 1, maxLength: 5 }),
    async (sent, pieces) => {
      const bytes = new Uint8Array(await new Blob(sent.map(encodeRequest)).arrayBuffer());
      const reader = new FrameReader(connOf(bytes, pieces));
      for (const request of sent) {
        const { value, ...rest } = decodeRequest((await reader.next())!)!;
        assert.deepEqual({ ...rest, value: Array.from(value) }, {
          ...request,
          value: Array.from(request.value),
        });
      }
      assert.equal(await reader.next(), null);
    },
  ));
});

Deno.test("decoding never throws on noise", () => {
  fc.assert(fc.property(fc.uint8Array({ maxLength: 40 }), (noise) => {
    decodeRequest(noise);
    decodeReply(noise);
  }));
});

Deno.test("replies come back", () => {
  const reply = decodeReply(encodeReply(2, 7, "why").subarray(4))!;
  assert.deepEqual([reply.status, reply.id, new TextDecoder().decode(reply.value)], [2, 7, "why"]);
});

Deno.test("too long keys, values and frames are refused", async () => {
  const request = { operation: 2, id: 1, key: "k", value: new Uint8Array() };
  assert.throws(() => encodeRequest({ ...request, key: "k".repeat(1025) }), /at most 1024 bytes/);
  assert.throws(
    () => encodeRequest({ ...request, value: new Uint8Array(MAX_FRAME_BYTES) }),
    /Cannot store a value as it must have at most 1048568 bytes/,
  );
  const length = new Uint8Array(Uint32Array.of(MAX_FRAME_BYTES + 1).buffer);
  await assert.rejects(new FrameReader(connOf(length, [4])).next(), /Cannot read a frame/);
});
