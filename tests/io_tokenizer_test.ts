import assert from "node:assert/strict";
import fc from "fast-check";
import { loadTokenizer } from "../examples/lib/hf_tokenizer.ts";
import { loadText } from "../moe/data.ts";
import { StreamDecoder } from "../moe/tokenizer.ts";

const folder = Deno.makeTempDirSync({ prefix: "lina-tokenizer-" });
Deno.test.afterAll(() => Deno.removeSync(folder, { recursive: true }));

/** The letters that stand for bytes in a byte-level tokenizer, as GPT-2 defined them. */
function byteLetters(): string[] {
  const shown = (b: number) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let extra = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(shown(b) ? b : extra++));
}

/** A byte-level BPE tokenizer with three merges and an end-of-text token. */
function description() {
  const words = [...byteLetters(), "th", "the", "Ġthe"];
  return {
    version: "1.0",
    added_tokens: [{
      id: words.length,
      content: "<|end|>",
      special: true,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
    }],
    normalizer: null,
    pre_tokenizer: {
      type: "ByteLevel",
      add_prefix_space: false,
      trim_offsets: true,
      use_regex: true,
    },
    post_processor: null,
    decoder: { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: "",
      end_of_word_suffix: "",
      fuse_unk: false,
      vocab: Object.fromEntries(words.map((word, id) => [word, id])),
      merges: ["t h", "th e", "Ġ the"],
    },
  };
}

function write(name: string, text: string): string {
  Deno.writeTextFileSync(`${folder}/${name}`, text);
  return `${folder}/${name}`;
}

Deno.test("a tokenizer.json is loaded, by file or by folder", () => {
  write("tokenizer.json", JSON.stringify(description()));
  write("tokenizer_config.json", JSON.stringify({ eos_token: "<|end|>" }));
  const tokenizer = loadTokenizer(folder);
  assert.equal(tokenizer.vocabularySize, 260);
  assert.equal(tokenizer.endOfText, 259);
  assert.deepEqual([...tokenizer.encode("the the")], [257, 258]);
  assert.equal(tokenizer.decode([257, 258]), "the the");
  assert.equal(tokenizer.decode([]), "");
  assert.deepEqual(loadTokenizer(`${folder}/tokenizer.json`).encode("th"), Int32Array.of(256));
});

Deno.test("what it encodes it decodes, at once and id by id", () => {
  const tokenizer = loadTokenizer(folder);
  fc.assert(fc.property(fc.string({ unit: "grapheme", minLength: 1, maxLength: 30 }), (text) => {
    const ids = tokenizer.encode(text);
    assert.equal(tokenizer.decode(ids), text);
    const stream = new StreamDecoder(tokenizer);
    let out = "";
    for (const id of ids) out += stream.push(id);
    assert.equal(out + stream.flush(), text);
  }));
});

Deno.test("a text file becomes its tokens", async () => {
  const path = write("text.txt", "over the hills\n".repeat(20_000));
  const tokenizer = loadTokenizer(folder);
  const data = await loadText(path, { sequence: 32, tokenizer, validationShare: 0 });
  assert.equal(data.vocabularySize, 260);
  assert.ok(data.train instanceof Uint16Array);
  assert.equal(data.train.length, 20_000 * 12);
  assert.equal(data.bytesPerToken, 15 / 12);
});

Deno.test("a broken tokenizer file says what is wrong", () => {
  const good = description();
  const cases: [string, RegExp][] = [
    ["", /must be JSON/],
    ['{"model":', /must be JSON/],
    ["[]", /must be a JSON object: current value is \[\]/],
    ["{}", /must describe a model with a vocabulary/],
    ['{"model":{"type":"BPE"}}', /must describe a model with a vocabulary/],
    [JSON.stringify({ ...good, model: { ...good.model, type: "Oracle" } }), /model must be one of/],
    [JSON.stringify({ ...good, model: { ...good.model, merges: 7 } }), /understands/],
    [
      JSON.stringify({ ...good, model: { ...good.model, vocab: {} }, added_tokens: [] }),
      /understands/,
    ],
    [JSON.stringify({ ...good, model: { ...good.model, vocab: { a: -1 } } }), /understands/],
    [JSON.stringify({ ...good, decoder: { type: "None" } }), /understands/],
  ];
  for (const [text, message] of cases) {
    const path = write("broken.json", text);
    assert.throws(() => loadTokenizer(path), message, text.slice(0, 60));
    assert.throws(() => loadTokenizer(path), /^Error: Cannot load the tokenizer .*broken.json/);
  }
  assert.throws(() => loadTokenizer(`${folder}/absent.json`), /absent.json as the file must exist/);
});
