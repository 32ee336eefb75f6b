import assert from "node:assert/strict";
import fc from "fast-check";
import { loadCheckpoint, newestCheckpoint, saveCheckpoint } from "../moe/checkpoint.ts";
import { CheckpointError, firstDifference, formatManifest, readManifest } from "../moe/manifest.ts";
import { CONFIG, Part } from "./checkpoint_fixture.ts";
import { asRanks, settleRanks } from "./io_ranks.ts";

const root = Deno.makeTempDirSync({ prefix: "lina-corruption-" });
Deno.test.afterAll(() => Deno.removeSync(root, { recursive: true }));

async function twoCheckpoints(name: string): Promise<string> {
  const directory = `${root}/${name}`;
  for (const step of [1, 2]) {
    await asRanks(
      2,
      (comm) =>
        saveCheckpoint(directory, new Part(comm.rank, comm.size, step).contents(step), { comm }),
    );
  }
  return directory;
}

/** Every file of a checkpoint. */
function filesOf(folder: string): string[] {
  return [...Deno.readDirSync(folder)].map((entry) => `${folder}/${entry.name}`).sort();
}

Deno.test("a flipped bit anywhere in any file is found, and the older checkpoint is used", async () => {
  const directory = await twoCheckpoints("flip");
  const folder = `${directory}/step-00000002`;
  const files = filesOf(folder);
  assert.equal(files.length, 7);
  let same = 0;
  await fc.assert(
    fc.asyncProperty(
      fc.constantFrom(...files),
      fc.nat(9999),
      fc.nat(7),
      fc.constantFrom(1, 2),
      async (path, where, bit, ranks) => {
        const good = Deno.readFileSync(path);
        const bad = good.slice();
        const at = Math.floor(where * good.length / 10_000);
        bad[at] ^= 1 << bit;
        Deno.writeFileSync(path, bad);
        try {
          const warnings: string[] = [];
          const [newest] = await asRanks(
            ranks,
            (comm) =>
              newestCheckpoint(directory, { comm, warn: (message) => void warnings.push(message) }),
          );
          if (path.endsWith("manifest.json") && sameJson(good, bad)) {
            same++; // a space became another space
            assert.equal(newest?.step, 2);
            return;
          }
          assert.equal(newest?.step, 1, `${path} byte ${at}`);
          assert.equal(warnings.length, 1);
          assert.match(warnings[0], /^Passed over: Cannot (use|read) .*step-00000002/);
          const results = await settleRanks(
            ranks,
            (comm) => loadCheckpoint(folder, { model: [], config: CONFIG, comm }),
          );
          for (const result of results) {
            assert.equal(result.status, "rejected");
            assert.ok(result.reason instanceof CheckpointError, String(result.reason));
          }
        } finally {
          Deno.writeFileSync(path, good);
        }
      },
    ),
    { numRuns: 250 },
  );
  assert.ok(same < 50);
});

function sameJson(a: Uint8Array, b: Uint8Array): boolean {
  const decoder = new TextDecoder();
  try {
    return JSON.stringify(JSON.parse(decoder.decode(a))) ===
      JSON.stringify(JSON.parse(decoder.decode(b)));
  } catch {
    return false;
  }
}

Deno.test("a changed value in the manifest is found, though every file is as it says", async () => {
  const directory = await twoCheckpoints("value");
  const path = `${directory}/step-00000002/manifest.json`;
  const text = Deno.readTextFileSync(path);
  for (const [from, to] of [['"seed": 7', '"seed": 6'], ['"step": 2', '"step": 9']]) {
    assert.ok(text.includes(from));
    Deno.writeTextFileSync(path, text.replace(from, to));
    const newest = await newestCheckpoint(directory, { warn: () => {} });
    assert.equal(newest?.step, 1);
  }
});

Deno.test("a truncated, absent or longer file is found", async () => {
  const directory = await twoCheckpoints("truncate");
  const folder = `${directory}/step-00000002`;
  for (const path of filesOf(folder)) {
    const good = Deno.readFileSync(path);
    for (const damage of ["cut", "empty", "longer", "absent"]) {
      if (damage === "cut") Deno.truncateSync(path, good.length >> 1);
      else if (damage === "empty") Deno.truncateSync(path, 0);
      else if (damage === "longer") Deno.writeTextFileSync(path, "x", { append: true });
      else Deno.removeSync(path);
      const newest = await newestCheckpoint(directory, { warn: () => {} });
      assert.equal(newest?.step, 1, `${path} ${damage}`);
      Deno.writeFileSync(path, good);
    }
  }
  assert.equal((await newestCheckpoint(directory))?.step, 2);
});

Deno.test("when every checkpoint is damaged there is none", async () => {
  const directory = await twoCheckpoints("all");
  Deno.truncateSync(`${directory}/step-00000001/optimizer-00001-of-00002.safetensors`, 9);
  Deno.removeSync(`${directory}/step-00000002/manifest.json`);
  const warnings: string[] = [];
  const warn = (message: string) => void warnings.push(message);
  assert.equal(await newestCheckpoint(directory, { warn }), null);
  assert.equal(warnings.length, 2);
});

Deno.test("a manifest that lies is refused, whatever its checksum says", async () => {
  const directory = await twoCheckpoints("lies");
  const folder = `${directory}/step-00000002`;
  const good = readManifest(folder);
  const file = good.files[0];
  const lies: [object, RegExp][] = [
    [{ files: [{ ...file, name: "../step-00000001/config.json" }] }, /name of each file/],
    [{ files: [{ ...file, name: "/etc/passwd" }] }, /name of each file/],
    [{ files: [{ ...file, name: ".." }] }, /name of each file/],
    [{ files: [file, file] }, /name of each file/],
    [{ files: [null] }, /name of each file/],
    [{ files: [{ ...file, bytes: -1 }] }, /size of/],
    [{ files: [{ ...file, sha256: "0" }] }, /hash of/],
    [{ files: {} }, /files must be a list/],
    [{ step: -1 }, /step must be/],
    [{ step: "2" }, /step must be/],
    [{ config: [] }, /config must be an object/],
    [{ state: null }, /state must be an object/],
    [{ format: 0 }, /format must be/],
  ];
  for (const [lie, message] of lies) {
    // deno-lint-ignore no-explicit-any -- not a manifest, on purpose
    Deno.writeTextFileSync(`${folder}/manifest.json`, formatManifest({ ...good, ...lie } as any));
    assert.throws(() => readManifest(folder), message);
    assert.throws(() => readManifest(folder), CheckpointError);
  }
  for (const text of ["", "null", "[]", "7", '{"files":', "[".repeat(1e6), "\ud800"]) {
    Deno.writeTextFileSync(`${folder}/manifest.json`, text);
    assert.throws(() => readManifest(folder), CheckpointError);
  }
  Deno.truncateSync(`${folder}/manifest.json`, 2 ** 33);
  assert.throws(() => readManifest(folder), /must be at most/);
});

Deno.test("firstDifference() finds a changed field and only then", () => {
  fc.assert(fc.property(fc.jsonValue(), fc.jsonValue(), (a, b) => {
    // deno-lint-ignore no-explicit-any -- fast-check has a type of its own for JSON
    const [x, y] = [{ a: { b: a } }, { a: { b } }] as any[];
    assert.equal(firstDifference(x, structuredClone(x)), null);
    const found = firstDifference(x, y);
    if (found) assert.match(found.path, /^a\.b/);
    else assert.deepEqual(normal(x), normal(y));
  }));
});

function normal(value: unknown): unknown {
  return JSON.parse(JSON.stringify(value));
}
