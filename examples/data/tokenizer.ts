// Learns a byte-level BPE tokenizer from a text and writes it as a tokenizer.json that train.ts, generate.ts and Hugging Face's libraries read.
//   deno run -A examples/data/tokenizer.ts examples/data/corpus/prose.txt --vocab 32000

import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { bpeTokenizer, learnBpe } from "../lib/bpe.ts";
import { runProgram } from "../lib/program.ts";

const HELP = `Learns a byte-level BPE tokenizer from a text.

  deno run -A examples/data/tokenizer.ts TEXT [flags]

  --vocab N   ids, 256 for the bytes among them (default: 32000)
  --out FILE  where it is written (default: tokenizer.json beside the text)`;

interface Options {
  readonly path: string;
  readonly vocab: number;
  readonly out: string;
}

function parse(args: readonly string[]): Options {
  const { values, positionals } = parseArgs({
    args: [...args],
    allowPositionals: true,
    options: { vocab: { type: "string", default: "32000" }, out: { type: "string" } },
  });
  if (positionals.length !== 1) {
    throw new TypeError(
      `Cannot learn as one text must be named: current value is ${positionals.length} of them`,
    );
  }
  const [path] = positionals;
  const out = values.out ?? join(dirname(path), "tokenizer.json");
  return { path, vocab: Number(values.vocab), out };
}

async function main({ path, vocab, out }: Options): Promise<void> {
  const text = await Deno.readTextFile(path).catch((cause) => {
    throw new Error(`Cannot read ${path}: ${cause.message}`, { cause });
  });
  const description = learnBpe(text, vocab);
  await Deno.writeTextFile(out, JSON.stringify(description) + "\n").catch((cause) => {
    throw new Error(`Cannot write ${out}: ${cause.message}`, { cause });
  });
  const sample = text.slice(0, 1_000_000);
  const ids = bpeTokenizer(description, out).encode(sample);
  const bytes = new TextEncoder().encode(sample).length;
  const size = Object.keys(description.model.vocab).length;
  console.log(`${out}: ${size} ids, ${(bytes / ids.length).toFixed(2)} bytes per token`);
}

await runProgram({ help: () => HELP, parse, main, lessMemory: "Less memory: a shorter text." });
