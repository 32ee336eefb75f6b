import assert from "node:assert/strict";
import fc from "fast-check";
import { LineAssembler } from "./lines.ts";
import { headlineOf, isConsequence, JobOutput, type Sink } from "./output.ts";

const bytes = (text: string) => new TextEncoder().encode(text);
const text = (value: Uint8Array) => new TextDecoder().decode(value);

/** A sink that keeps what is written. */
function record(terminal: boolean) {
  let written = "";
  const sink: Sink = {
    write: (_, chunk) => void (written += text(chunk)),
    isTerminal: () => terminal,
  };
  return { sink, take: () => [written, written = ""][0] };
}

Deno.test("lines come out whole however the bytes are cut", () => {
  const line = fc.string({ unit: "binary" }).map((s) => s.replace(/[\r\n]/g, ""));
  fc.assert(fc.property(
    fc.array(line),
    line,
    fc.array(fc.integer({ min: 1, max: 9 }), { minLength: 1, maxLength: 20 }),
    (lines, rest, cuts) => {
      const all = bytes(lines.map((l) => l + "\n").join("") + rest);
      const assembler = new LineAssembler();
      const seen: string[] = [];
      for (let at = 0, i = 0; at < all.length; i++) {
        const end = at + cuts[i % cuts.length];
        seen.push(...assembler.push(all.subarray(at, end)).map(text));
        at = end;
      }
      assert.deepEqual(seen, lines.map((l) => text(bytes(l))));
      assert.equal(text(assembler.flush() ?? new Uint8Array()), text(bytes(rest)));
    },
  ));
});

Deno.test("a carriage return drops what it overwrites, and ends Windows lines", () => {
  const assembler = new LineAssembler();
  assert.deepEqual(assembler.push(bytes("a\r\nb\rc\n")).map(text), ["a", "c"]);
  assert.equal(assembler.live, null);
  assert.deepEqual(assembler.push(bytes("\rstep 1")), []);
  assert.equal(text(assembler.live!), "step 1");
  assembler.push(bytes("\rstep 2\r"));
  assert.equal(text(assembler.live!), "step 2");
  assert.deepEqual(assembler.push(bytes("done\n")).map(text), ["done"]);
  assembler.push(bytes("partial"));
  assert.equal(assembler.live, null);
  assert.equal(text(assembler.flush()!), "partial");
  assert.equal(assembler.flush(), null);
});

Deno.test("a line without end is given out before it fills the memory", () => {
  const assembler = new LineAssembler();
  const lines = Array.from({ length: 40 }, () => assembler.push(new Uint8Array(100_000))).flat();
  assert.ok(lines.length > 0 && lines.every((line) => line.length <= 1_200_000));
});

Deno.test("output is prefixed by rank and never mixed", () => {
  const { sink, take } = record(false);
  const output = new JobOutput({ ranks: [0, 1], sink });
  output.push(0, "stdout", bytes("he"));
  output.push(1, "stdout", bytes("one\ntwo\nthr"));
  output.push(0, "stdout", bytes("llo\n"));
  output.push(0, "stderr", bytes("no end"));
  output.end(1, "stdout");
  output.end(0, "stderr");
  output.close();
  assert.equal(take(), "[1] one\n[1] two\n[0] hello\n[1] thr\n[0] no end\n");
});

Deno.test("a progress line stays below the other lines on a terminal", () => {
  const { sink, take } = record(true);
  const output = new JobOutput({ ranks: [0, 1], sink });
  output.push(0, "stdout", bytes("\rstep 1"));
  assert.equal(take(), "\r\x1b[K[0] step 1");
  output.push(1, "stderr", bytes("note\n"));
  assert.equal(take(), "\r\x1b[K[1] note\n[0] step 1");
  output.push(1, "stdout", bytes("\rnot rank 0"));
  assert.equal(take(), "");
  output.push(0, "stdout", bytes("\rstep 2"));
  assert.equal(take(), "\r\x1b[K[0] step 2");
  output.push(0, "stdout", bytes("\rdone\n"));
  assert.equal(take(), "\r\x1b[K[0] done\n");
  output.push(0, "stdout", bytes("\rstep 3"));
  output.close();
  assert.equal(take(), "\r\x1b[K[0] step 3\n");
});

Deno.test("a progress line is its last state when nobody looks", () => {
  const { sink, take } = record(false);
  const output = new JobOutput({ ranks: [0], sink });
  for (let i = 0; i < 9; i++) output.push(0, "stdout", bytes(`\rstep ${i}`));
  assert.equal(take(), "");
  output.end(0, "stdout");
  assert.equal(take(), "[0] step 8\n");
});

Deno.test("log files have what each rank wrote, byte for byte", () => {
  const logDir = Deno.makeTempDirSync();
  try {
    for (const append of [false, true]) {
      const output = new JobOutput({ ranks: [2, 3], logDir, append, sink: record(false).sink });
      output.push(2, "stdout", bytes("\ra\rb"));
      output.push(2, "stderr", bytes("err\n"));
      output.close();
    }
    assert.equal(Deno.readTextFileSync(`${logDir}/rank_2.log`), "\ra\rberr\n".repeat(2));
    assert.equal(Deno.readTextFileSync(`${logDir}/rank_3.log`), "");
  } finally {
    Deno.removeSync(logDir, { recursive: true });
  }
});

Deno.test("headlineOf() finds the message of an uncaught error", () => {
  const tail = [
    "warning: slow",
    "\x1b[0m\x1b[1m\x1b[31merror\x1b[0m: Uncaught (in promise) RangeError: k is 9",
    'throw new RangeError("k is 9");',
    "      ^",
    "    at file:///x.ts:3:7",
  ];
  assert.equal(headlineOf(tail), "RangeError: k is 9");
  assert.equal(headlineOf(["a", "", "b", "c", "d"]), "b | c | d");
  assert.equal(headlineOf([]), "");
});

Deno.test("isConsequence() tells errors for lack of another rank", () => {
  assert.ok(
    isConsequence("Error: Cannot complete allReduce 3 of world on rank 0: rank 1 must take part"),
  );
  assert.ok(isConsequence("Error: Cannot connect as rank 1 must join world/dup1: it has died"));
  assert.ok(
    !isConsequence("Error: Cannot run allReduce on rank 0 of world as out must have 8 elements"),
  );
});
