import assert from "node:assert/strict";
import fc from "fast-check";
import { detectMpi, failedRank, type MpiKind, mpirunArguments, TagSplitter } from "./mpirun.ts";
import { parseArguments } from "./arguments.ts";

/** What each rank wrote, joined; -1 is mpirun. */
function sort(kind: MpiKind, chunks: readonly string[]): Record<number, string> {
  const splitter = new TagSplitter(kind);
  const out: Record<number, string> = {};
  for (const { rank, text } of [...chunks.flatMap((c) => splitter.push(c)), ...splitter.flush()]) {
    out[rank] = (out[rank] ?? "") + text;
  }
  return out;
}

Deno.test("tags of Open MPI are taken off, wherever they stand", () => {
  const text = "[1,0]<stdout>:one\n[1,1]<stdout>:left[1,0]<stdout>:two\n" +
    "[1,1]<stdout>: right\nmpirun: a note\n";
  const expected = { "-1": "mpirun: a note\n", 0: "one\ntwo\n", 1: "leftright\n" };
  assert.deepEqual(sort("Open MPI", [text]), expected);
  assert.deepEqual(sort("MPICH", ["[0] a\n[1] b\nnote\n[0] c[3]\n"]), {
    "-1": "note\n",
    0: "a\nc[3]\n",
    1: "b\n",
  });
});

Deno.test("tags may be cut anywhere", () => {
  const line = fc.tuple(fc.nat(12), fc.stringMatching(/^[a-z[\], ]{0,12}$/));
  fc.assert(fc.property(
    fc.array(line, { maxLength: 8 }),
    fc.array(fc.integer({ min: 1, max: 30 }), { minLength: 1 }),
    (lines, cuts) => {
      const text = lines.map(([rank, t]) => `[1,${rank}]<stderr>:x${t}\n`).join("");
      const chunks: string[] = [];
      for (let at = 0, i = 0; at < text.length; at += cuts[i++ % cuts.length]) {
        chunks.push(text.slice(at, at + cuts[i % cuts.length]));
      }
      const expected: Record<number, string> = {};
      for (const [rank, t] of lines) expected[rank] = (expected[rank] ?? "") + `x${t}\n`;
      assert.deepEqual(sort("Open MPI", chunks), expected);
    },
  ));
});

Deno.test("failedRank() reads what Open MPI says", () => {
  const code = "  Process name: [[44437,1],3]\n  Exit code:    7\n";
  assert.deepEqual(failedRank(code), { rank: 3, signal: null });
  const signal =
    "mpirun noticed that process rank 1 with PID 0 on node vm exited on signal 9 (Killed).";
  assert.deepEqual(failedRank(signal), { rank: 1, signal: "signal 9 (Killed)" });
  assert.equal(failedRank("nothing"), null);
});

Deno.test("mpirunArguments() knows both libraries", () => {
  const options = parseArguments(["-n", "3", "--backend", "mpi", "https://x.org/s.ts", "arg"])!;
  const open = mpirunArguments("Open MPI", options, true, ["LINA_TOKEN"]).join(" ");
  assert.match(
    open,
    /^-n 3 --oversubscribe --allow-run-as-root --tag-output -x LINA_TOKEN .*deno run -A https:\/\/x.org\/s.ts arg$/,
  );
  const mpich = mpirunArguments("MPICH", options, true, []).join(" ");
  assert.match(mpich, /^-n 3 -prepend-rank .*deno run -A/);
});

Deno.test("detectMpi() says what to do when there is none", async () => {
  await assert.rejects(
    detectMpi("no-such-mpirun"),
    /Cannot use backend mpi as no-such-mpirun must be on PATH: current value is missing; install/,
  );
  await assert.rejects(detectMpi("true"), /must belong to Open MPI or MPICH/);
});
