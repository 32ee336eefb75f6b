import assert from "node:assert/strict";
import { join } from "node:path";
import fc from "fast-check";
import { bpeTokenizer, isPlainBpe, learnBpe } from "./bpe.ts";
import { loadTokenizer } from "./hf_tokenizer.ts";
import { tokenizerOf } from "./tokenizer.ts";

const TEXT = Deno.readTextFileSync(new URL("../data/austen.txt", import.meta.url)).slice(
  0,
  200_000,
);
const description = learnBpe(TEXT, 1000);

Deno.test("BPE: the most frequent pair is merged first, the lowest ids where counts are equal", () => {
  const { merges } = learnBpe("ab ab ab cd cd xy xy", 400).model;
  // "ab" comes three times; the others twice, and of these the space (32) before "c" (99) has the lowest ids, before "ab" (256) the highest.
  assert.deepEqual(merges, ["a b", "Ġ c", "Ġ x", "Ġ ab", "Ġc d", "Ġx y"]);
  assert.throws(() => learnBpe("a", 100), /its size must be in 256 .. 65536: current value is 100/);
});

Deno.test("BPE: any text comes back, also of other scripts and of lone halves of characters", () => {
  const tokenizer = bpeTokenizer(description, "test");
  assert.equal(tokenizer.vocabularySize, 1000);
  fc.assert(fc.property(fc.string({ unit: "binary" }), (text) => {
    const ids = tokenizer.encode(text);
    assert(ids.every((id) => id >= 0 && id < 1000));
    assert.equal(tokenizer.decode(ids), text.toWellFormed());
  }));
  assert(tokenizer.encode(TEXT).length < 0.45 * TEXT.length);
});

Deno.test("BPE: the file is read without a package, and gives the ids that Hugging Face's gives", async () => {
  const folder = await Deno.makeTempDir({ prefix: "lina-bpe-" });
  try {
    const file = join(folder, "tokenizer.json");
    await Deno.writeTextFile(file, JSON.stringify(description));
    assert(isPlainBpe(JSON.parse(await Deno.readTextFile(file))));
    const own = await tokenizerOf(folder), theirs = loadTokenizer(file);
    assert.equal(own.name, theirs.name);
    assert.equal(own.vocabularySize, theirs.vocabularySize);
    const texts = [
      TEXT.slice(50_000, 90_000),
      "I'll  say: “naïve” 12½ — d'accord?\n\n\t Ünïcode 漢字 🦕 ",
    ];
    for (const text of texts) assert.deepEqual(own.encode(text), theirs.encode(text));
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
