import assert from "node:assert/strict";
import { optionsOf, readArgs } from "./figures.ts";
import { sampleResults } from "./report/_sample.ts";
import { PARTS } from "./report/schedule_html.ts";

Deno.test("readArgs() takes its own options and leaves the others", () => {
  assert.deepEqual(readArgs(["--figure", "7", "--from", "r.json", "--out=p.html"]), {
    part: "figure 7",
    from: "r.json",
    out: "p.html",
    rest: [],
  });
  assert.deepEqual(readArgs(["--ranks", "8", "--table=3", "--mbit", "5000"]), {
    part: "table 3",
    from: undefined,
    out: "table_3.html",
    rest: ["--ranks", "8", "--mbit", "5000"],
  });
  assert.equal(readArgs([]).out, "schedules.html");
  const refused = (args: string[], why: RegExp) => assert.throws(() => readArgs(args), why);
  refused(["--figure", "8"], /one of figure 7, .*current value is figure 8/);
  refused(["--table"], /--table must have a value/);
  refused(["--figure", "7", "--table", "1"], /current value is table 1 beside figure 7/);
  refused(["--from", "r.json", "--ranks", "8"], /nothing is measured.*--ranks/);
});

Deno.test("optionsOf(): the profile's policy is always there, sizes are times on the link", () => {
  for (const part of [...PARTS, undefined]) {
    const words = optionsOf(part, 5000);
    assert.ok(words[words.indexOf("--policies") + 1].split(",").includes("outside"), part);
  }
  const sizes = (mbit: number) => optionsOf("figure 15", mbit).at(-1);
  assert.equal(sizes(10_000), "0.5,1,3,5,10");
  assert.equal(sizes(5000), "0.25,0.5,1.5,2.5,5");
  assert.equal(sizes(0), sizes(10_000));
});

Deno.test("figures.ts draws results that there are, and says what is wrong with them", async () => {
  const folder = await Deno.makeTempDir({ prefix: "lina-figures-" });
  try {
    const run = async (...args: string[]) => {
      const script = new URL("figures.ts", import.meta.url).pathname;
      const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
        args: ["run", "-A", "--no-check", script, ...args],
        stdin: "null",
      }).output();
      return { code, text: new TextDecoder().decode(code === 0 ? stdout : stderr) };
    };
    const from = `${folder}/results.json`, out = `${folder}/page.html`;
    await Deno.writeTextFile(from, JSON.stringify(sampleResults()));
    const { code, text } = await run("--figure", "7", "--from", from, "--out", out);
    assert.deepEqual([code, text], [0, `${out}: figure 7 of 27 rows\n`]);
    const html = await Deno.readTextFile(out);
    assert.match(html, /<h1>Counterpart of the paper&#39;s Figure 7<\/h1>/);
    assert.match(html, /<svg/);
    assert.match(html, /What differs from the paper/);
    const drawing = `${folder}/figure.svg`;
    assert.equal((await run("--figure", "7", "--from", from, "--out", drawing)).code, 0);
    assert.match(await Deno.readTextFile(drawing), /^<svg /);
    const none = await run("--table=1", "--from", from, "--out", drawing);
    assert.match(none.text, /must be a figure: current value is table 1/);
    await Deno.writeTextFile(from, "[]]");
    const wrong = await run("--from", from, "--out", out);
    assert.equal(wrong.code, 1);
    assert.match(wrong.text, /^error: Cannot read .*results\.json as it must be JSON/);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
