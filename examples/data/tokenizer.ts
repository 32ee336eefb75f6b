// Learns a byte-level BPE tokenizer from a text and writes it as a tokenizer.json that train.ts, generate.ts and Hugging Face's libraries read.
//   deno run -A examples/data/tokenizer.ts examples/data/corpus/prose.txt --vocab 32000

import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { bpeTokenizer, learnBpe } from "../lib/bpe.ts";

const { values, positionals } = parseArgs({
  args: Deno.args,
  allowPositionals: true,
  options: { vocab: { type: "string", default: "32000" }, out: { type: "string" } },
});
const [path] = positionals;
if (positionals.length !== 1) {
  console.error("usage: deno run -A examples/data/tokenizer.ts TEXT [--vocab N] [--out FILE]");
  Deno.exit(2);
}
const text = await Deno.readTextFile(path);
const out = values.out ?? join(dirname(path), "tokenizer.json");
const description = learnBpe(text, Number(values.vocab));
await Deno.writeTextFile(out, JSON.stringify(description) + "\n");
const sample = text.slice(0, 1_000_000);
const ids = bpeTokenizer(description, out).encode(sample);
const bytes = new TextEncoder().encode(sample).length;
console.log(
  `${out}: ${Object.keys(description.model.vocab).length} ids, ${
    (bytes / ids.length).toFixed(2)
  } bytes per token`,
);
