import assert from "node:assert/strict";
import fc from "fast-check";
import {
  loadCheckpoint,
  newestCheckpoint,
  saveCheckpoint,
  type SaveOptions,
} from "../moe/checkpoint.ts";
import { formatManifest, readManifest } from "../moe/manifest.ts";
import { createFile, SafetensorsFile } from "../moe/safetensors.ts";
import { CONFIG, EXPERTS, Part } from "./checkpoint_fixture.ts";
import { asRanks, settleRanks } from "./io_ranks.ts";

const root = Deno.makeTempDirSync({ prefix: "lina-checkpoint-" });
Deno.test.afterAll(() => Deno.removeSync(root, { recursive: true }));
let folders = 0;

function fresh(): string {
  return `${root}/${folders++}`;
}

function save(directory: string, ranks: number, step: number, options: SaveOptions = {}) {
  return asRanks(
    ranks,
    (comm) =>
      saveCheckpoint(directory, new Part(comm.rank, comm.size, step).contents(step), {
        ...options,
        comm,
      }),
  );
}

/** Loads on `ranks` ranks and compares every tensor that any of them holds. */
async function loadAndCompare(directory: string, ranks: number, step: number): Promise<void> {
  await asRanks(ranks, async (comm) => {
    const newest = await newestCheckpoint(directory, { comm, warn: fail });
    assert.equal(newest?.step, step);
    const part = new Part(comm.rank, comm.size);
    const { model, optimizer } = part.contents(step);
    const loaded = await loadCheckpoint(newest, { model, optimizer, config: CONFIG, comm });
    assert.deepEqual(loaded.state, { seed: 7, position: step * 32 });
    assert.deepEqual(part.arrays, new Part(comm.rank, comm.size, step).arrays);
  });
}

function fail(message: string): never {
  throw new Error(message);
}

function names(directory: string): string[] {
  return [...Deno.readDirSync(directory)].map((entry) => entry.name).sort();
}

Deno.test("what any number of ranks saves, any other number loads", async () => {
  await fc.assert(
    fc.asyncProperty(fc.constantFrom(1, 2, 3, 4), fc.constantFrom(1, 2, 4, 8), async (a, b) => {
      const directory = fresh();
      await save(directory, a, 5);
      await loadAndCompare(directory, b, 5);
    }),
    { numRuns: 16 },
  );
});

Deno.test("a process without a communicator saves and loads", async () => {
  const directory = fresh();
  await saveCheckpoint(directory, new Part(0, 1, 3).contents(3));
  const part = new Part(0, 1);
  const { model } = part.contents(3);
  const { step } = await loadCheckpoint(`${directory}/step-00000003`, { model, config: CONFIG });
  assert.equal(step, 3);
  assert.deepEqual(
    part.arrays.get("model.embed_tokens.weight"),
    new Part(0, 1, 3).arrays.get("model.embed_tokens.weight"),
  );
});

Deno.test("the files are laid out as Hugging Face's loaders want them", async () => {
  const directory = fresh();
  await save(directory, 4, 12);
  const folder = `${directory}/step-00000012`;
  assert.deepEqual(JSON.parse(Deno.readTextFileSync(`${folder}/config.json`)), {
    model_type: "mixtral",
  });
  const index = JSON.parse(Deno.readTextFileSync(`${folder}/model.safetensors.index.json`));
  const weights = Object.entries<string>(index.weight_map);
  assert.equal(weights.length, 1 + CONFIG.layers * (1 + EXPERTS));
  for (const [name, file] of weights) {
    using opened = new SafetensorsFile(`${folder}/${file}`);
    assert.ok(opened.tensors.has(name));
    assert.equal(opened.metadata.format, "pt");
  }
  const expert = "model.layers.1.block_sparse_moe.experts.7.w1.weight";
  assert.equal(index.weight_map[expert], "model-00004-of-00004.safetensors");
});

Deno.test("the newest ones stay, the others go", async () => {
  const directory = fresh();
  for (const step of [1, 2, 3, 4]) await save(directory, 2, step, { keep: 2 });
  assert.deepEqual(names(directory), ["step-00000003", "step-00000004"]);
  // A save removes older ones only: those of later steps were passed over as damaged, or are somebody's.
  await save(directory, 2, 2, { keep: 1 });
  assert.deepEqual(names(directory), ["step-00000002", "step-00000003", "step-00000004"]);
  await save(directory, 2, 5, { keep: 1 });
  assert.deepEqual(names(directory), ["step-00000005"]);
});

Deno.test("a step can be saved again", async () => {
  const directory = fresh();
  await save(directory, 2, 8);
  await asRanks(3, (comm) => {
    const contents = { ...new Part(comm.rank, comm.size, 99).contents(8), state: { again: true } };
    return saveCheckpoint(directory, contents, { comm });
  });
  assert.deepEqual(names(directory), ["step-00000008"]);
  assert.deepEqual((await newestCheckpoint(directory))?.state, { again: true });
});

Deno.test("a crash between the renames of a repeated step loses nothing", async () => {
  const directory = fresh();
  await save(directory, 1, 8);
  Deno.renameSync(`${directory}/step-00000008`, `${directory}/step-00000008-replaced`);
  await loadAndCompare(directory, 2, 8);
  await save(directory, 1, 8);
  assert.deepEqual(names(directory), ["step-00000008"]);
});

Deno.test("what a crash while saving leaves is passed over and cleared", async () => {
  const directory = fresh();
  await save(directory, 2, 1);
  // As after kill -9: the folder of the next step under its temporary name, with half a file.
  const half = `${directory}/.checkpoint-saving-step-00000002`;
  Deno.mkdirSync(half);
  Deno.writeTextFileSync(`${half}/model-00001-of-00002.safetensors`, "half");
  await loadAndCompare(directory, 4, 1);
  await save(directory, 2, 2);
  assert.deepEqual(names(directory), ["step-00000001", "step-00000002"]);
});

Deno.test("a disk that is full at any byte fails the save on all ranks and leaves the older checkpoint", async () => {
  const directory = fresh();
  await save(directory, 2, 1);
  const total = readManifest(`${directory}/step-00000001`).files
    .reduce((sum, file) => sum + file.bytes, 0);
  await fc.assert(
    fc.asyncProperty(fc.nat(total - 1), fc.boolean(), async (room, atSync) => {
      const settled = await settleRanks(
        2,
        (comm) =>
          saveCheckpoint(directory, new Part(comm.rank, comm.size, 2).contents(2), {
            comm,
            createFile(path) {
              const file = createFile(path);
              const refuse = () => {
                throw new Error("No space left on device (os error 28)");
              };
              return {
                ...file,
                write(bytes) {
                  room -= bytes.length;
                  if (!atSync && room < 0) refuse();
                  file.write(bytes);
                },
                sync: () => room < 0 ? refuse() : file.sync(),
              };
            },
          }),
      );
      for (const result of settled) {
        assert.equal(result.status, "rejected");
        assert.match(
          result.reason.message,
          /^Cannot save the checkpoint .*step-00000002: rank [01]: No space left on device/,
        );
      }
      assert.deepEqual(names(directory), ["step-00000001"]);
    }),
    { numRuns: 40 },
  );
  await loadAndCompare(directory, 2, 1);
});

Deno.test("a disk that is really full is an error and leaves the older checkpoint", async () => {
  const directory = fresh();
  Deno.mkdirSync(directory);
  const mounted = await new Deno.Command("mount", {
    args: ["-t", "tmpfs", "-o", "size=256k", "tmpfs", directory],
    stderr: "null",
  }).output().then((result) => result.success, () => false);
  if (!mounted) {
    console.log("skipped: mounting a small disk takes root and Linux");
    return;
  }
  try {
    await save(directory, 1, 1);
    const big = new Float32Array(100_000);
    const contents = new Part(0, 1, 2).contents(2);
    const tensor = { ...contents.model[0], name: "big", shape: [100_000], read: () => big };
    await assert.rejects(
      () => saveCheckpoint(directory, { ...contents, model: [tensor] }),
      /Cannot save the checkpoint .*: No space left on device/,
    );
    assert.deepEqual(names(directory), ["step-00000001"]);
    await loadAndCompare(directory, 1, 1);
  } finally {
    await new Deno.Command("umount", { args: [directory] }).output();
  }
});

Deno.test("a tensor that two ranks own, or none, is an error", async () => {
  const directory = fresh();
  const wrong = (owners: (rank: number) => number) =>
    asRanks(2, (comm) => {
      const contents = new Part(comm.rank, comm.size, 1).contents(1);
      const model = contents.model.map((t, i) => i === 0 ? { ...t, owner: owners(comm.rank) } : t);
      return saveCheckpoint(directory, { ...contents, model }, { comm });
    });
  await assert.rejects(
    () => wrong((rank) => rank),
    /embed_tokens.weight must be owned by one rank/,
  );
  await assert.rejects(
    () => wrong(() => 5),
    /embed_tokens.weight must be held by the rank that owns/,
  );
});

Deno.test("a checkpoint of another model names the field that differs", async () => {
  const directory = fresh();
  await save(directory, 1, 1);
  const { model } = new Part(0, 1).contents(1);
  const load = (config: object) => loadCheckpoint(`${directory}/step-00000001`, { model, config });
  await assert.rejects(
    () => load({ ...CONFIG, experts: 16 }),
    /into this model as config\.experts must be 16: current value is 8/,
  );
  await assert.rejects(
    () => load({ ...CONFIG, router: { kind: "sigmoid", k: 2 } }),
    /config\.router\.kind must be "sigmoid": current value is "softmax"/,
  );
  await assert.rejects(() => load({ ...CONFIG, new: 1 }), /config\.new must be 1: .* absent/);
  await assert.rejects(
    () => loadCheckpoint(`${directory}/step-00000001`, { model: [{ ...model[0], name: "x" }] }),
    /must have the tensor x/,
  );
  await assert.rejects(
    () => loadCheckpoint(`${directory}/step-00000001`, { model: [{ ...model[0], shape: [12] }] }),
    /shape must be \[12\]: current value is \[3,4\]/,
  );
});

Deno.test("a checkpoint from the future is refused, not passed over", async () => {
  const directory = fresh();
  await save(directory, 1, 1);
  await save(directory, 1, 2);
  const folder = `${directory}/step-00000002`;
  const future = formatManifest({ ...readManifest(folder), format: 1000 });
  Deno.writeTextFileSync(`${folder}/manifest.json`, future);
  const message = /its format must be at most 1, .*: current value is 1000/;
  await assert.rejects(() => newestCheckpoint(directory), message);
  await assert.rejects(() => loadCheckpoint(folder, { model: [] }), message);
});

Deno.test("an absent or empty directory has no checkpoint", async () => {
  assert.equal(await newestCheckpoint(fresh()), null);
  assert.deepEqual(await asRanks(2, (comm) => newestCheckpoint(root, { comm })), [null, null]);
});
