// Saves and loads the state of a training run. A checkpoint is a folder of safetensors files with one tensor per name (one per
// layer and expert), so where experts sit is not in it and the number of ranks may change from save to load. Every rank
// writes the tensors that it owns into a folder of a temporary name; when all are on the disk, rank 0 writes the manifest
// and renames the folder. So a crash at any time leaves the older checkpoints as they were. All ranks must see one folder.

import type { Communicator } from "../collectives/types.ts";
import { type Group, groupOf } from "./agree.ts";
import {
  CheckpointError,
  firstDifference,
  FORMAT_VERSION,
  formatManifest,
  type Json,
  type Manifest,
  MANIFEST_NAME,
  type ManifestFile,
  readManifest,
  verifyFile,
} from "./manifest.ts";
import {
  prune,
  removeLeftovers,
  removeQuietly,
  replaceFolder,
  syncFolder,
  TEMPORARY_PREFIX,
  writeSynced,
  writeText,
} from "./checkpoint_files.ts";
import { createFile, type OutputFile, writeSafetensors } from "./safetensors.ts";
import { type NamedTensor, readTensors, TensorFiles, WEIGHTS_INDEX_NAME } from "./weights.ts";

/** A tensor of a checkpoint as one rank sees it. Every rank lists the tensors that it holds. */
export interface CheckpointTensor extends NamedTensor {
  /** The rank that writes it. The ranks that hold the tensor must agree; replicated tensors are rank 0's. */
  readonly owner: number;
}

/** What a checkpoint is made of. */
export interface CheckpointContents {
  /** Steps done. */
  readonly step: number;
  /** Of which model; plain data, compared field by field on load. */
  readonly config: object;
  /** The weights. */
  readonly model: readonly CheckpointTensor[];
  /** The optimizer's moments; names of their own. @default {[]} */
  readonly optimizer?: readonly CheckpointTensor[];
  /** What else the program needs to go on: data position, seeds, …; plain data, alike on all ranks. @default {{}} */
  readonly state?: object;
  /** Contents of `config.json`, for Hugging Face's loaders; see `mixtralConfig()`. */
  readonly transformersConfig?: object;
}

/** Options of {@linkcode saveCheckpoint}. */
export interface SaveOptions {
  /** The ranks that save together. @default {this process alone} */
  readonly comm?: Communicator;
  /** How many complete checkpoints stay, the new one among them. @default {2} */
  readonly keep?: number;
  /** Makes a file for writing; for tests. @default {createFile} */
  readonly createFile?: (path: string) => OutputFile;
}

/** A complete checkpoint on the disk. */
export interface Checkpoint {
  /** Its folder. */
  readonly path: string;
  /** Steps done. */
  readonly step: number;
  /** Of which model. */
  readonly config: { readonly [key: string]: Json };
  /** What the program saved beside the tensors. */
  readonly state: { readonly [key: string]: Json };
  /** Its files. */
  readonly files: readonly ManifestFile[];
}

/** Options of {@linkcode newestCheckpoint}. */
export interface NewestOptions {
  /** The ranks that look together; each reads a share of the files. @default {this process alone} */
  readonly comm?: Communicator;
  /** Gets a line for every checkpoint that is passed over; called on rank 0. @default {console.warn} */
  readonly warn?: (message: string) => void;
}

/** Options of {@linkcode loadCheckpoint}. */
export interface LoadOptions {
  /** The weights that this rank wants, whoever owns them. */
  readonly model: readonly NamedTensor[];
  /** The optimizer's tensors that this rank wants. @default {none} */
  readonly optimizer?: readonly NamedTensor[];
  /** What the checkpoint must be of. @default {not compared} */
  readonly config?: object;
  /** The ranks that load together; need not be as many as saved. @default {this process alone} */
  readonly comm?: Communicator;
}

/** Checkpoints whose files were read and compared by this process. */
const verified = new WeakSet<Checkpoint>();

/**
 * Saves a checkpoint; every rank calls it at the same point. Older checkpoints beyond `keep` are removed once it is complete.
 *
 * @param directory Where checkpoints lie; made if absent. The checkpoint is a folder `step-<number>` in it.
 * @param contents What to save.
 * @param options Ranks and number of checkpoints to keep.
 * @returns The checkpoint.
 * @throws {Error} On every rank, if any rank fails (a full disk, say): the error names that rank, what was written is removed and
 * the older checkpoints are as they were.
 */
export async function saveCheckpoint(
  directory: string,
  contents: CheckpointContents,
  options: SaveOptions = {},
): Promise<Checkpoint> {
  const group = groupOf(options.comm);
  const create = options.createFile ?? createFile;
  const { step } = contents;
  if (!Number.isSafeInteger(step) || step < 0) {
    throw new RangeError(
      `Cannot save a checkpoint as its step must be a whole number >= 0: current value is ${step}`,
    );
  }
  const keep = options.keep ?? 2;
  if (!Number.isSafeInteger(keep) || keep < 1) {
    throw new RangeError(
      `Cannot save a checkpoint as keep must be a whole number >= 1: current value is ${keep}`,
    );
  }
  const name = `step-${String(step).padStart(8, "0")}`;
  const folder = `${directory}/${name}`;
  const temporary = `${directory}/${TEMPORARY_PREFIX}saving-${name}`;
  const task = `Cannot save the checkpoint ${folder}`;

  await group.onRoot(task, () => {
    Deno.mkdirSync(directory, { recursive: true });
    removeLeftovers(directory);
    Deno.mkdirSync(temporary);
  });
  let checkpoint: Checkpoint;
  try {
    const shards = await group.agree(task, () => writeShards(temporary, contents, group, create));
    checkpoint = await group.onRoot(task, () => {
      const files = writeDescriptions(temporary, contents, shards, create);
      const manifest: Manifest = {
        format: FORMAT_VERSION,
        step,
        config: contents.config as Manifest["config"],
        state: (contents.state ?? {}) as Manifest["state"],
        files,
      };
      writeText(`${temporary}/${MANIFEST_NAME}`, formatManifest(manifest), create);
      syncFolder(temporary);
      replaceFolder(temporary, folder);
      syncFolder(directory);
      return openCheckpoint(folder);
    });
  } catch (cause) {
    // Nobody writes any more: the failure was agreed on. If ranks are lost instead, the next save clears the folder.
    if (group.rank === 0) removeQuietly(temporary);
    throw cause;
  }
  if (group.rank === 0) {
    // Those of later steps were found damaged when this run went on from an older one: they take nobody's place.
    prune(listCheckpoints(directory).found.filter((other) => other.step < step), keep - 1);
  }
  verified.add(checkpoint);
  return checkpoint;
}

/**
 * Finds the checkpoint with the highest step that is complete and undamaged. Every file of the candidate is read once.
 *
 * @param directory Where checkpoints lie.
 * @param options Ranks and warnings.
 * @returns The same on every rank; null if there is none.
 * @throws {CheckpointError} If one was written by a newer version of this code: to go on from an older one would
 * lose work, so it is not passed over.
 */
export async function newestCheckpoint(
  directory: string,
  options: NewestOptions = {},
): Promise<Checkpoint | null> {
  const group = groupOf(options.comm);
  const warn = options.warn ?? ((message: string) => console.warn(message));
  const candidates = await group.onRoot("Cannot look for checkpoints", () => {
    const { found, broken } = listCheckpoints(directory);
    for (const error of broken) {
      if (error.newer) throw error;
      warn(`Passed over: ${error.message}`);
    }
    return found.map((checkpoint) => checkpoint.path);
  });
  for (const path of candidates) {
    try {
      return await openVerified(path, group);
    } catch (error) {
      if (!(error instanceof CheckpointError)) throw error;
      if (group.rank === 0) warn(`Passed over: ${error.message}`);
    }
  }
  return null;
}

/**
 * Loads a checkpoint; every rank calls it at the same point and gets the tensors that it lists, however many ranks saved it.
 *
 * @param checkpoint What {@linkcode newestCheckpoint} gave, or a checkpoint's folder, whose files are then verified first.
 * @param options The tensors wanted, and what model they must be of.
 * @returns The checkpoint, with step and state to go on from.
 * @throws {CheckpointError} If it is damaged, newer than this code, of another model (the error names the field that differs), or
 * lacks a tensor; on every rank alike.
 */
export async function loadCheckpoint(
  checkpoint: Checkpoint | string,
  options: LoadOptions,
): Promise<Checkpoint> {
  const group = groupOf(options.comm);
  const open = typeof checkpoint === "string" || !verified.has(checkpoint)
    ? await openVerified(typeof checkpoint === "string" ? checkpoint : checkpoint.path, group)
    : checkpoint;
  const different = options.config &&
    firstDifference(JSON.parse(JSON.stringify(options.config)), open.config);
  if (different) {
    throw new CheckpointError(
      `Cannot load ${open.path} into this model as config.${different.path} must be ${
        show(different.expected)
      }: current value is ${show(different.actual)}`,
    );
  }
  await group.agree("", async () => {
    for (const part of ["model", "optimizer"] as const) {
      const wanted = options[part] ?? [];
      if (wanted.length === 0) continue;
      const names = open.files.map((file) => file.name)
        .filter((name) => name.startsWith(`${part}-`) && name.endsWith(".safetensors"));
      using files = new TensorFiles(open.path, names);
      await readTensors(files, wanted);
    }
  });
  return open;
}

function show(value: Json | undefined): string {
  return JSON.stringify(value) ?? "absent";
}

/** Reads the manifest on every rank and compares the files, each rank a share of them. */
async function openVerified(path: string, group: Group): Promise<Checkpoint> {
  const [checkpoint] = await group.agree("", async () => {
    const checkpoint = openCheckpoint(path);
    for (let i = group.rank; i < checkpoint.files.length; i += group.size) {
      await verifyFile(path, checkpoint.files[i]);
    }
    return checkpoint;
  });
  verified.add(checkpoint);
  return checkpoint;
}

function openCheckpoint(path: string): Checkpoint {
  const { step, config, state, files } = readManifest(path);
  return { path, step, config, state, files };
}

/** Complete checkpoints, the newest first, and what is wrong with the rest. */
function listCheckpoints(directory: string): { found: Checkpoint[]; broken: CheckpointError[] } {
  const found: Checkpoint[] = [], broken: CheckpointError[] = [];
  let entries: Deno.DirEntry[] = [];
  try {
    entries = [...Deno.readDirSync(directory)];
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
  for (const { name, isDirectory } of entries) {
    if (!isDirectory || !name.startsWith("step-")) continue;
    try {
      found.push(openCheckpoint(`${directory}/${name}`));
    } catch (error) {
      if (!(error instanceof CheckpointError)) throw error;
      broken.push(error);
    }
  }
  found.sort((a, b) => b.step - a.step || (a.path < b.path ? -1 : 1));
  return { found, broken };
}

/** What a rank tells rank 0 of its part. */
interface Shard {
  /** Names of all tensors that the rank holds, and of those it wrote, by file. */
  readonly held: readonly string[];
  readonly written: readonly { readonly file: ManifestFile; readonly names: readonly string[] }[];
}

async function writeShards(
  folder: string,
  contents: CheckpointContents,
  group: Group,
  create: (path: string) => OutputFile,
): Promise<Shard> {
  const number = (n: number) => String(n).padStart(5, "0");
  const written: { file: ManifestFile; names: string[] }[] = [];
  for (const part of ["model", "optimizer"] as const) {
    const own = (contents[part] ?? []).filter((tensor) => tensor.owner === group.rank);
    if (own.length === 0) continue;
    const name = `${part}-${number(group.rank + 1)}-of-${number(group.size)}.safetensors`;
    const result = await writeSynced(`${folder}/${name}`, create, (f) => writeSafetensors(f, own));
    written.push({ file: { name, ...result }, names: own.map((tensor) => tensor.name) });
  }
  const held = [...contents.model, ...contents.optimizer ?? []].map((tensor) => tensor.name);
  return { held, written };
}

/** Checks that the parts make a whole and writes the files that describe it. Returns all files of the checkpoint. */
function writeDescriptions(
  folder: string,
  contents: CheckpointContents,
  shards: readonly Shard[],
  create: (path: string) => OutputFile,
): ManifestFile[] {
  const files: ManifestFile[] = [];
  const fileOf = new Map<string, string>();
  for (const { file, names } of shards.flatMap((shard) => shard.written)) {
    const { size } = Deno.statSync(`${folder}/${file.name}`); // fails if ranks do not share the folder
    if (size !== file.bytes) {
      throw new Error(`${file.name} must have ${file.bytes} bytes: current value is ${size}`);
    }
    files.push(file);
    for (const name of names) {
      if (fileOf.has(name)) {
        throw new Error(`${name} must be owned by one rank: current value is two`);
      }
      fileOf.set(name, file.name);
    }
  }
  const lost = shards.flatMap((shard) => shard.held).find((name) => !fileOf.has(name));
  if (lost !== undefined) {
    throw new Error(`${lost} must be held by the rank that owns it: current value is none`);
  }
  const weights = [...fileOf].filter(([, file]) => file.startsWith("model-"));
  const index = {
    metadata: {
      total_size: files.filter((f) => f.name.startsWith("model-"))
        .reduce((sum, f) => sum + f.bytes, 0),
    },
    weight_map: Object.fromEntries(weights.sort(([a], [b]) => a < b ? -1 : 1)),
  };
  const describe = (name: string, value: object) => {
    const text = JSON.stringify(value, null, 2) + "\n";
    files.push({ name, ...writeText(`${folder}/${name}`, text, create) });
  };
  describe(WEIGHTS_INDEX_NAME, index);
  if (contents.transformersConfig) describe("config.json", contents.transformersConfig);
  return files;
}
