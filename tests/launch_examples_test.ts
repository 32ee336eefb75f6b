// The short examples print what their head says they print; the order of the ranks is left open.

import assert from "node:assert/strict";
import { launch } from "./launch_support.ts";

for (const name of ["01_hello", "02_pi", "03_ring", "04_all_to_all", "05_split", "06_moe_layer"]) {
  Deno.test(`examples/${name}.ts prints what it says`, async () => {
    const url = new URL(`../examples/${name}.ts`, import.meta.url);
    const code = await Deno.readTextFile(url);
    assert.ok(code.split("\n").length < 80);
    const ranks = /launch\.ts -n (\d+) examples\//.exec(code)![1];
    const expected = [...code.matchAll(/^\/\/ {3}(\[\d+\] .*)$/gm)].map((match) => match[1]);
    const result = await launch(["-n", ranks, url.href]);
    assert.equal(result.stderr, "");
    assert.deepEqual(result.stdout.trimEnd().split("\n").sort(), expected.sort());
    assert.equal(result.code, 0);
  });
}

Deno.test("examples/07_schedule.ts prints what it says, but for times and numbers", async () => {
  const url = new URL("../examples/07_schedule.ts", import.meta.url);
  const code = await Deno.readTextFile(url);
  const words = (lines: readonly string[]) =>
    lines.map((line) => line.replaceAll(/\d+(\.\d+)?/g, "#"));
  const expected = [...code.matchAll(/^\/\/ {3}(\[\d+\] .*)$/gm)].map((match) => match[1]);
  const { stdout, stderr, code: exit } = await launch(["-n", "2", url.href]);
  assert.equal(stderr, "");
  assert.equal(exit, 0);
  assert.deepEqual(words(stdout.trimEnd().split("\n")), words(expected)); // "same bits: true" among them
});
