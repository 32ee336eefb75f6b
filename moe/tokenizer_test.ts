import assert from "node:assert/strict";
import fc from "fast-check";
import { byteTokenizer, StreamDecoder } from "./tokenizer.ts";

Deno.test("the byte tokenizer gives back every text", () => {
  fc.assert(fc.property(fc.string({ unit: "binary" }), (text) => {
    fc.pre(text.isWellFormed());
    const ids = byteTokenizer.encode(text);
    assert.ok(ids.every((id) => id >= 0 && id < byteTokenizer.vocabularySize));
    assert.equal(byteTokenizer.decode(ids), text);
  }));
});

Deno.test("StreamDecoder gives whole characters, and in the end the same text", () => {
  fc.assert(fc.property(fc.array(fc.string({ unit: "grapheme" }), { maxLength: 40 }), (parts) => {
    const text = "x" + parts.join("");
    const decoder = new StreamDecoder(byteTokenizer);
    let out = "";
    for (const id of byteTokenizer.encode(text)) {
      const piece = decoder.push(id);
      assert.ok(!piece.includes("\ufffd") || text.includes("\ufffd"));
      out += piece;
    }
    assert.equal(out + decoder.flush(), text);
  }));
});

Deno.test("StreamDecoder does not hold back bytes that will never be a character", () => {
  const decoder = new StreamDecoder(byteTokenizer);
  let out = "";
  for (let i = 0; i < 20; i++) out += decoder.push(0xff);
  assert.ok(out.length >= 16);
});
