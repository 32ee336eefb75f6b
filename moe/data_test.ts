import assert from "node:assert/strict";
import fc from "fast-check";
import { Batches, bigramLoss, loadText, permute } from "./data.ts";
import { byteTokenizer, type Tokenizer } from "./tokenizer.ts";

const folder = Deno.makeTempDirSync({ prefix: "lina-data-" });
Deno.test.afterAll(() => Deno.removeSync(folder, { recursive: true }));

function file(name: string, contents: string | Uint8Array): string {
  const path = `${folder}/${name}`;
  if (typeof contents === "string") Deno.writeTextFileSync(path, contents);
  else Deno.writeFileSync(path, contents);
  return path;
}

/** Tokens that are their own places. */
function counting(length: number): Int32Array {
  return Int32Array.from({ length }, (_, i) => i);
}

const sizes = fc.record({
  length: fc.integer({ min: 2, max: 300 }),
  sequence: fc.integer({ min: 1, max: 40 }),
  batch: fc.integer({ min: 1, max: 12 }),
  seed: fc.option(fc.nat()),
}).filter(({ length, sequence }) => length > sequence);

Deno.test("the shares of all ranks and parts are the global batch, whatever their number", () => {
  fc.assert(
    fc.property(
      sizes,
      fc.nat(1000),
      fc.integer({ min: 1, max: 9 }),
      fc.integer({ min: 1, max: 4 }),
      ({ length, ...options }, step, size, parts) => {
        const batches = new Batches(counting(length), options);
        const whole = batches.get(step);
        assert.equal(whole.sequences, options.batch);
        const inputs: number[] = [], targets: number[] = [];
        // A part is the same, by whatever number of ranks it is shared.
        for (let part = 0; part < parts; part++) {
          for (let rank = 0; rank < size; rank++) {
            const share = batches.get(step, { rank, size, part, parts });
            inputs.push(...share.inputs);
            targets.push(...share.targets);
          }
          const { inputs: alone } = batches.get(step, { part, parts });
          assert.deepEqual(inputs.slice(inputs.length - alone.length), [...alone]);
        }
        assert.deepEqual(inputs, [...whole.inputs]);
        assert.deepEqual(targets, [...whole.targets]);
      },
    ),
  );
});

Deno.test("targets are the next tokens, windows are whole, an epoch has each window once", () => {
  fc.assert(fc.property(sizes, ({ length, ...options }) => {
    const tokens = counting(length);
    const batches = new Batches(tokens, { ...options, batch: 1 });
    const T = options.sequence;
    for (const epoch of [0, 1]) {
      const starts = new Set<number>();
      for (let i = 0; i < batches.windows; i++) {
        const { inputs, targets } = batches.get(epoch * batches.windows + i);
        inputs.forEach((id, t) => assert.equal(id, inputs[0] + t));
        targets.forEach((id, t) => assert.equal(id, inputs[t] + 1));
        starts.add(inputs[0]);
      }
      assert.equal(starts.size, batches.windows);
      const sorted = [...starts].sort((a, b) => a - b);
      sorted.forEach((start, i) => assert.equal(start, sorted[0] + i * T));
    }
  }));
});

Deno.test("the same seed gives the same order at any step, another seed another one", () => {
  const tokens = counting(5000);
  const make = (seed: number) => new Batches(tokens, { sequence: 16, batch: 8, seed });
  const first = make(1), again = make(1), other = make(2);
  const walked = Array.from({ length: 60 }, (_, step) => first.get(step));
  assert.deepEqual(again.get(57), walked[57]); // asked for first, as a resumed run does
  assert.notDeepEqual(other.get(57).inputs, walked[57].inputs);
  const starts = walked.flatMap(({ inputs }) => [...inputs].filter((_, i) => i % 16 === 0));
  const ahead = starts.filter((start, i) => i > 0 && start > starts[i - 1]).length;
  assert.ok(ahead > 150 && ahead < 330, `${ahead} of ${starts.length} follow a smaller one`);
  const big = make(2 ** 40 + 1);
  assert.notDeepEqual(big.get(0).inputs, walked[0].inputs);
});

Deno.test("permute() is a permutation and mixes", () => {
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 500 }), fc.nat(), fc.nat(50), (n, seed, epoch) => {
      const places = Array.from({ length: n }, (_, i) => permute(i, n, seed, epoch));
      assert.equal(new Set(places).size, n);
      assert.ok(places.every((place) => place >= 0 && place < n));
    }),
  );
  const n = 4096;
  const places = Array.from({ length: n }, (_, i) => permute(i, n, 1, 0));
  const stayed = places.filter((place, i) => Math.abs(place - i) < n / 64).length;
  assert.ok(stayed < n / 16, `${stayed} of ${n} stay near their place`);
});

Deno.test("loadText() splits a text into its beginning and its end", async () => {
  const path = file("split.txt", Uint8Array.from({ length: 1000 }, (_, i) => i % 256));
  const data = await loadText(path, { sequence: 10, validationShare: 0.25 });
  assert.equal(data.train.length, 750);
  assert.equal(data.validation.length, 250);
  assert.equal(data.validation[0], 750 % 256);
  assert.equal(data.vocabularySize, 256);
  assert.equal(data.bytesPerToken, 1);
  const all = await loadText(path, { sequence: 10, validationShare: 0 });
  assert.deepEqual([all.train.length, all.validation.length], [1000, 0]);
});

Deno.test("loadText() gives a tokenizer the text in pieces that lose nothing", async () => {
  const text = Array.from({ length: 9000 }, (_, i) => `line ${i} é漢\n`).join("");
  const path = file("pieces.txt", text);
  const pieces: string[] = [];
  const tokenizer: Tokenizer = {
    ...byteTokenizer,
    name: "letters",
    vocabularySize: 70_000,
    encode(piece) {
      pieces.push(piece);
      return Int32Array.from(piece, (c) => c.charCodeAt(0));
    },
  };
  const { train, bytesPerToken } = await loadText(path, {
    sequence: 8,
    tokenizer,
    validationShare: 0,
  });
  assert.ok(pieces.length > 1);
  assert.equal(pieces.join(""), text);
  assert.equal(String.fromCharCode(...train.subarray(0, 6)), "line 0");
  assert.equal(train.length, text.length);
  assert.ok(bytesPerToken > 1);
  const small = { ...tokenizer, vocabularySize: 100 };
  await assert.rejects(
    () => loadText(path, { sequence: 8, tokenizer: small }),
    /ids must be in 0 \.\. 99: current value is \d+/,
  );
});

Deno.test("a file that is missing, empty, too short or not text says so", async () => {
  const load = (path: string, sequence = 16, tokenizer?: Tokenizer) =>
    loadText(path, { sequence, tokenizer });
  await assert.rejects(() => load(`${folder}/absent.txt`), /Cannot read the text .*absent.txt/);
  await assert.rejects(() => load(folder), /Cannot read the text .* it is a folder/);
  await assert.rejects(
    () => load(file("empty.txt", "")),
    /must hold text: current value is 0 bytes/,
  );
  await assert.rejects(
    () => load(file("short.txt", "short")),
    /training part must have at least 17 tokens for sequences of 16: current value is 5/,
  );
  await assert.rejects(
    () => load(file("middling.txt", "x".repeat(60))),
    /validation part must have at least 17 tokens for sequences of 16: current value is 6/,
  );
  const latin = file("latin.txt", Uint8Array.from({ length: 400 }, () => 0xe9));
  assert.equal((await load(latin)).train.length, 360);
  await assert.rejects(() => load(latin, 16, { ...byteTokenizer }), /must be UTF-8/);
  await assert.rejects(() => load(latin, 0), /sequence must be a whole number >= 1/);
  await assert.rejects(
    () => loadText(latin, { sequence: 4, validationShare: 1 }),
    /share must be in 0 \.\. 1/,
  );
});

Deno.test("wrong sizes of batches throw", () => {
  const tokens = counting(100);
  assert.throws(() => new Batches(tokens, { sequence: 100, batch: 1, seed: 0 }), /at least 101/);
  assert.throws(() => new Batches(tokens, { sequence: 10, batch: 0, seed: 0 }), /batch must be/);
  assert.throws(() => new Batches(tokens, { sequence: 10, batch: 1, seed: 0.5 }), /seed must be/);
  const batches = new Batches(tokens, { sequence: 10, batch: 4, seed: 0 });
  assert.throws(() => batches.get(-1), /step must be/);
  assert.throws(() => batches.get(0, { rank: 2, size: 2 }), /rank must be .* in 0 \.\. 1/);
});

Deno.test("bigramLoss() knows a chain of pairs and a text without any", () => {
  const alternating = Int32Array.from({ length: 2000 }, (_, i) => i % 2);
  assert.ok(bigramLoss(alternating, alternating, 2) < 0.01);
  let state = 1;
  const noise = Uint8Array.from({ length: 200_000 }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state >>> 29;
  });
  const loss = bigramLoss(noise.subarray(0, 150_000), noise.subarray(150_000), 256);
  assert.ok(Math.abs(loss - Math.log(8)) < 0.01, String(loss));
  // Ids that the training text lacks have a finite loss.
  assert.ok(Number.isFinite(bigramLoss(alternating, Int32Array.of(5, 6, 7), 8)));
  assert.throws(() => bigramLoss(alternating, Int32Array.of(1), 2), /at least 2 tokens/);
});

Deno.test("bigramLoss() does not believe pairs that say nothing", () => {
  let state = 7;
  const noise = Uint8Array.from({ length: 6000 }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state >>> 26;
  });
  // Independent tokens of 64 kinds: most pairs are seen about once, which must not count for much.
  const loss = bigramLoss(noise.subarray(0, 4000), noise.subarray(4000), 64);
  assert.ok(loss > 4.1 && loss < Math.log(64) + 0.1, String(loss));
});

Deno.test("bigramLoss() is a probability: over all continuations it sums to one", () => {
  fc.assert(fc.property(
    fc.array(fc.nat(4), { minLength: 2, maxLength: 60 }),
    fc.nat(4),
    (text, a) => {
      const train = Int32Array.from(text);
      let sum = 0;
      for (let b = 0; b < 5; b++) sum += Math.exp(-bigramLoss(train, Int32Array.of(a, b), 5));
      assert.ok(Math.abs(sum - 1) < 1e-9, String(sum));
    },
  ));
});
