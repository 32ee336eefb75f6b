// Tensors by name in the safetensors files of a folder, and how they get in and out of a model. Reads checkpoints of this
// project and public ones in Hugging Face's layout alike. Not here: the file format (`safetensors.ts`), and completeness and
// resume (`checkpoint.ts`).

import { type DType, dtypeOf, newArray, type TypedArray } from "../tensor/dtype.ts";
import type { Shape, Tensor } from "../tensor/tensor.ts";
import { CheckpointError, isPlainName } from "./manifest.ts";
import type { Parameter } from "./parameter.ts";
import { SafetensorsFile, type TensorInfo, type TensorSource } from "./safetensors.ts";

/** Name of the file that says in which file each weight is. */
export const WEIGHTS_INDEX_NAME = "model.safetensors.index.json";

const MAX_INDEX_BYTES = 64 * 1024 * 1024;

/** A tensor that can be read from a model and written back to it. */
export interface NamedTensor extends TensorSource {
  /** Puts elements of the tensor's dtype and size into the model. */
  write(array: TypedArray): void | Promise<void>;
  /** Whether a file may lack it: then nothing is written. @default {false} */
  readonly optional?: boolean;
}

/** Several safetensors files as one. */
export class TensorFiles implements Disposable {
  /** Where the files are, for errors. */
  readonly folder: string;
  readonly #open: SafetensorsFile[] = [];
  readonly #fileOf = new Map<string, SafetensorsFile>();

  /**
   * Opens files and checks their headers.
   *
   * @param folder Where they are.
   * @param names Their names.
   * @throws {CheckpointError} If one cannot be read, or a tensor is in two.
   */
  constructor(folder: string, names: readonly string[]) {
    this.folder = folder;
    try {
      for (const name of names) {
        const file = new SafetensorsFile(`${folder}/${name}`);
        this.#open.push(file);
        for (const tensor of file.tensors.keys()) {
          const other = this.#fileOf.get(tensor);
          if (other) {
            throw new Error(
              `Cannot open ${file.path} as ${tensor} must be in one file: current value is also ${other.path}`,
            );
          }
          this.#fileOf.set(tensor, file);
        }
      }
    } catch (cause) {
      this[Symbol.dispose]();
      throw new CheckpointError((cause as Error).message, { cause });
    }
  }

  /** Names of all tensors. */
  get names(): IterableIterator<string> {
    return this.#fileOf.keys();
  }

  /**
   * What is known of a tensor.
   *
   * @param name Its name.
   * @returns Type and shape, or undefined if no file has it.
   */
  info(name: string): TensorInfo | undefined {
    return this.#fileOf.get(name)?.tensors.get(name);
  }

  /**
   * Reads a tensor.
   *
   * @param name Its name.
   * @returns The elements in the type of the file.
   * @throws {CheckpointError} If no file has it.
   */
  read(name: string): Promise<TypedArray> {
    const file = this.#fileOf.get(name);
    if (!file) throw new CheckpointError(`Cannot read ${name} as it must be in ${this.folder}`);
    return file.read(name);
  }

  /** Closes the files. */
  [Symbol.dispose](): void {
    for (const file of this.#open.splice(0)) file[Symbol.dispose]();
  }
}

/**
 * Reads tensors into a model; floating types are converted if they differ. Nothing is written unless every tensor that is not optional is there, and
 * all have their shape.
 *
 * @param files Where they are.
 * @param wanted The tensors.
 * @returns Once all are written.
 * @throws {CheckpointError} If one is absent, or has another shape or a type that cannot be converted.
 */
export async function readTensors(
  files: TensorFiles,
  wanted: readonly NamedTensor[],
): Promise<void> {
  for (const { name, shape, dtype, optional } of wanted) {
    const info = files.info(name);
    if (!info) {
      if (optional) continue;
      throw new CheckpointError(
        `Cannot load ${files.folder} as it must have the tensor ${name}: current value is ${
          [...files.names].length
        } tensors without it`,
      );
    }
    if (info.shape.length !== shape.length || info.shape.some((n, i) => n !== shape[i])) {
      throw new CheckpointError(
        `Cannot load ${name} from ${files.folder} as its shape must be [${shape}]: current value is [${info.shape}]`,
      );
    }
    if (info.dtype !== dtype && !(isFloat(info.dtype) && isFloat(dtype))) {
      throw new CheckpointError(
        `Cannot load ${name} from ${files.folder} as its type must be ${dtype}: current value is ${info.dtype}`,
      );
    }
  }
  for (const tensor of wanted) {
    if (!files.info(tensor.name)) continue;
    await tensor.write(convertFloats(await files.read(tensor.name), tensor.dtype));
  }
}

/**
 * Loads the weights of a public checkpoint: a folder with `model.safetensors`, or with several files and an index, as Hugging
 * Face lays them out. There are no hashes in that layout; sizes and shapes are checked.
 *
 * @param folder The folder.
 * @param wanted The tensors that this rank wants.
 * @returns Once all are written.
 * @throws {CheckpointError} If a file is damaged, or a tensor is absent or of another shape.
 */
export async function loadWeights(folder: string, wanted: readonly NamedTensor[]): Promise<void> {
  using files = new TensorFiles(folder, weightFiles(folder, wanted.map((tensor) => tensor.name)));
  await readTensors(files, wanted);
}

/**
 * The tensors of parameters, for checkpoints.
 *
 * @param parameters What this rank holds.
 * @param ownerOf The rank that writes a parameter. @default {rank 0, which is right for replicated ones}
 * @returns One entry per parameter, in order.
 */
export function parameterTensors(
  parameters: readonly Parameter[],
  ownerOf: (parameter: Parameter) => number = () => 0,
): (NamedTensor & { readonly owner: number })[] {
  return parameters.map((parameter) =>
    namedTensor(parameter.name, parameter.value, ownerOf(parameter))
  );
}

/**
 * A tensor of a device as an entry of a checkpoint.
 *
 * @param name Its name there.
 * @param tensor The tensor.
 * @param owner The rank that writes it. @default {0}
 * @returns The entry.
 */
export function namedTensor(
  name: string,
  tensor: Tensor,
  owner: number = 0,
): NamedTensor & { readonly owner: number } {
  return {
    name,
    owner,
    dtype: tensor.dtype,
    shape: tensor.shape as Shape,
    read: () => tensor.toArray(),
    write: (array) => tensor.device.write(array, tensor),
  };
}

/**
 * Converts floating numbers, rounding to nearest, ties to even.
 *
 * @param array The numbers; a `Uint16Array` is bf16.
 * @param dtype The type wanted.
 * @returns The same array if it has the type already.
 */
export function convertFloats(array: TypedArray, dtype: DType): TypedArray {
  const from = dtypeOf(array);
  if (from === dtype) return array;
  if (!isFloat(from) || !isFloat(dtype)) {
    throw new TypeError(
      `Cannot convert ${from} as both types must be floating: current value is ${dtype}`,
    );
  }
  const numbers = from === "bf16" ? fromBf16(array as Uint16Array) : array as Float32Array;
  if (dtype === "bf16") return toBf16(numbers);
  const out = newArray(dtype, array.length) as Float32Array;
  out.set(numbers);
  return out;
}

function isFloat(dtype: DType): boolean {
  return dtype === "f32" || dtype === "f64" || dtype === "f16" || dtype === "bf16";
}

function fromBf16(bits: Uint16Array): Float32Array {
  const words = new Uint32Array(bits.length);
  for (let i = 0; i < bits.length; i++) words[i] = bits[i] << 16;
  return new Float32Array(words.buffer);
}

function toBf16(numbers: Float32Array): Uint16Array {
  const words = new Uint32Array(Float32Array.from(numbers).buffer);
  const bits = new Uint16Array(words.length);
  for (let i = 0; i < words.length; i++) {
    const w = words[i];
    const nan = (w & 0x7fffffff) > 0x7f800000;
    bits[i] = nan ? (w >>> 16) | 0x40 : (w + 0x7fff + ((w >>> 16) & 1)) >>> 16;
  }
  return bits;
}

/** The files that hold some weights. */
function weightFiles(folder: string, names: readonly string[]): string[] {
  const path = `${folder}/${WEIGHTS_INDEX_NAME}`;
  let text: string;
  try {
    const { size } = Deno.statSync(path);
    if (size > MAX_INDEX_BYTES) throw new RangeError(`it has ${size} bytes`);
    text = Deno.readTextFileSync(path);
  } catch (cause) {
    if (cause instanceof Deno.errors.NotFound) return ["model.safetensors"];
    throw new CheckpointError(`Cannot read ${path}: ${(cause as Error).message}`, { cause });
  }
  let map: Record<string, unknown> | undefined;
  try {
    map = JSON.parse(text).weight_map;
  } catch (cause) {
    throw new CheckpointError(`Cannot read ${path} as it must be JSON`, { cause });
  }
  const files = new Set<string>();
  for (const name of names) {
    const file = map && Object.hasOwn(map, name) ? map[name] : undefined;
    if (file === undefined) {
      throw new CheckpointError(`Cannot load ${folder} as its index must name the tensor ${name}`);
    }
    // The index is untrusted: it must not lead out of the folder.
    if (!isPlainName(file)) {
      throw new CheckpointError(
        `Cannot load ${folder} as its index must name files in it: current value is ${
          JSON.stringify(file)
        }`,
      );
    }
    files.add(file);
  }
  return [...files];
}
