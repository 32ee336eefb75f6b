// Reads and writes safetensors files, the format of public model weights: 8 bytes with the length of a JSON header, the header,
// the tensors' bytes. A file is untrusted input: nothing is believed before it is checked, and only the tensors that are
// asked for are read. Not here: what belongs to a model or to a checkpoint (`checkpoint.ts`).

import { nextTurn, sha256 } from "./hash.ts";
import { bytesOf, type DType, dtypeOf, newArray, type TypedArray } from "../tensor/dtype.ts";
import { type Shape, sizeOf } from "../tensor/tensor.ts";

/** Most bytes of a header that a file may have: enough for about 100,000 tensors. */
export const MAX_HEADER_BYTES: number = 16 * 1024 * 1024;

/** Bytes that are read or written at once, so that other work of this thread goes on in between. */
const CHUNK_BYTES = 8 * 1024 * 1024;

const CODES: Readonly<Record<DType, string>> = {
  f64: "F64",
  f32: "F32",
  f16: "F16",
  bf16: "BF16",
  i64: "I64",
  i32: "I32",
  u8: "U8",
  i16: "I16",
};
const DTYPE_OF_CODE = new Map(Object.entries(CODES).map(([dtype, code]) => [code, dtype as DType]));

/** A tensor in a file. */
export interface TensorInfo {
  /** Its name. */
  readonly name: string;
  /** Element type. */
  readonly dtype: DType;
  /** Sizes of the dimensions. */
  readonly shape: Shape;
  /** Number of elements. */
  readonly size: number;
  /** Where its bytes begin in the file. */
  readonly offset: number;
}

/** A tensor that is to be written. */
export interface TensorSource {
  /** Its name, unique in the file. */
  readonly name: string;
  /** Element type. */
  readonly dtype: DType;
  /** Sizes of the dimensions. */
  readonly shape: Shape;
  /** The elements, row-major; called when they are written, one tensor at a time. */
  read(): TypedArray | Promise<TypedArray>;
}

/** A file being written; {@linkcode createFile} makes one on disk. */
export interface OutputFile {
  /** Appends all the bytes, or throws. */
  write(bytes: Uint8Array): void;
  /** Waits until the disk has them. */
  sync(): void;
  /** Ends writing. */
  close(): void;
}

/** What was written. */
export interface WrittenFile {
  /** Size of the file. */
  readonly bytes: number;
  /** SHA-256 of the file, in hexadecimal. */
  readonly sha256: string;
}

/** A safetensors file that is open for reading. */
export class SafetensorsFile implements Disposable {
  /** Where the file is. */
  readonly path: string;
  /** The tensors by name, in the order of their bytes. */
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /** What `__metadata__` of the header holds. */
  readonly metadata: Readonly<Record<string, string>>;
  #file: Deno.FsFile;

  /**
   * Opens a file and checks its header.
   *
   * @param path The file.
   * @throws {Error} If it cannot be opened or is not a whole, well-formed safetensors file.
   */
  constructor(path: string) {
    this.path = path;
    this.#file = openForReading(path);
    try {
      const bytes = this.#file.statSync().size;
      const header = parseHeader(path, bytes, (offset, target) => this.#readAt(offset, target));
      this.tensors = header.tensors;
      this.metadata = header.metadata;
    } catch (cause) {
      this.#file.close();
      throw cause;
    }
  }

  /**
   * Reads a tensor or a range of its elements.
   *
   * @param name The tensor.
   * @param range First element and the one after the last. @default {all}
   * @returns The elements, in the type of the file.
   * @throws {Error} If there is no such tensor, the range lies outside it, or the file has shrunk.
   */
  async read(
    name: string,
    range?: { readonly start: number; readonly end: number },
  ): Promise<TypedArray> {
    const info = this.tensors.get(name);
    if (!info) {
      throw new Error(
        `Cannot read a tensor of ${this.path} as its name must be one of the ${this.tensors.size} in the file: current value is ${
          JSON.stringify(name)
        }`,
      );
    }
    const start = range?.start ?? 0, end = range?.end ?? info.size;
    const whole = Number.isInteger(start) && Number.isInteger(end);
    if (!whole || start < 0 || end < start || end > info.size) {
      throw new RangeError(
        `Cannot read ${name} as the range must lie in 0..${info.size}: current value is ${start}..${end}`,
      );
    }
    const array = newArray(info.dtype, end - start);
    const bytes = bytesUnder(array);
    const from = info.offset + start * bytesOf(info.dtype);
    for (let at = 0; at < bytes.length; at += CHUNK_BYTES) {
      if (at > 0) await nextTurn();
      this.#readAt(from + at, bytes.subarray(at, at + CHUNK_BYTES));
    }
    return array;
  }

  /** Closes the file. */
  [Symbol.dispose](): void {
    this.#file.close();
  }

  #readAt(offset: number, target: Uint8Array): void {
    this.#file.seekSync(offset, Deno.SeekMode.Start);
    let done = 0;
    while (done < target.length) {
      const n = this.#file.readSync(target.subarray(done));
      if (n === null || n === 0) {
        throw new Error(
          `Cannot read ${this.path} as it must have ${
            offset + target.length
          } bytes: current value is ${offset + done}`,
        );
      }
      done += n;
    }
  }
}

/**
 * Writes a safetensors file. Tensors of wide elements come first, so that all are aligned.
 *
 * @param file Where to; not closed, not synced.
 * @param tensors The tensors.
 * @param metadata Strings for `__metadata__`. @default {{ format: "pt" }, which Hugging Face's loaders ask for}
 * @returns Size and hash of what was written.
 * @throws {TypeError} If two tensors have one name, or `read()` gives another type or size than announced.
 */
export async function writeSafetensors(
  file: OutputFile,
  tensors: readonly TensorSource[],
  metadata: Readonly<Record<string, string>> = { format: "pt" },
): Promise<WrittenFile> {
  requireLittleEndian();
  const sorted = tensors.toSorted((a, b) => bytesOf(b.dtype) - bytesOf(a.dtype));
  const header: [string, unknown][] = [["__metadata__", metadata]];
  const names = new Set(["__metadata__"]);
  let offset = 0;
  for (const { name, dtype, shape } of sorted) {
    if (names.has(name)) {
      throw new TypeError(
        `Cannot write tensors as every name must be unique: current value is ${
          JSON.stringify(name)
        }`,
      );
    }
    names.add(name);
    const end = offset + sizeOf(shape) * bytesOf(dtype);
    header.push([name, { dtype: CODES[dtype], shape, data_offsets: [offset, end] }]);
    offset = end;
  }
  const json = new TextEncoder().encode(JSON.stringify(Object.fromEntries(header)));
  const padded = new Uint8Array(8 + Math.ceil(json.length / 8) * 8).fill(0x20);
  if (padded.length - 8 > MAX_HEADER_BYTES) {
    throw new RangeError(
      `Cannot write ${tensors.length} tensors to one file as its header must be at most ${MAX_HEADER_BYTES} bytes: current value is ${
        padded.length - 8
      }`,
    );
  }
  new DataView(padded.buffer).setBigUint64(0, BigInt(padded.length - 8), true);
  padded.set(json, 8);

  const hash = sha256();
  const append = (bytes: Uint8Array) => {
    hash.update(bytes);
    file.write(bytes);
  };
  append(padded);
  for (const tensor of sorted) {
    const array = await tensor.read();
    if (array.length !== sizeOf(tensor.shape) || dtypeOf(array) !== tensor.dtype) {
      throw new TypeError(
        `Cannot write ${tensor.name} as its elements must be ${tensor.dtype} [${tensor.shape}]: current value is ${
          dtypeOf(array)
        } [${array.length}]`,
      );
    }
    const bytes = bytesUnder(array);
    for (let at = 0; at < bytes.length; at += CHUNK_BYTES) {
      if (at > 0) await nextTurn();
      append(bytes.subarray(at, at + CHUNK_BYTES));
    }
  }
  return { bytes: padded.length + offset, sha256: hash.digest("hex") };
}

/**
 * Makes an empty file for {@linkcode writeSafetensors}.
 *
 * @param path Where; must not exist.
 * @returns The open file.
 */
export function createFile(path: string): OutputFile {
  const file = Deno.openSync(path, { write: true, createNew: true });
  return {
    write(bytes: Uint8Array): void {
      for (let at = 0; at < bytes.length;) {
        const n = file.writeSync(bytes.subarray(at));
        // A full disk may show as a write of nothing before it shows as an error.
        if (n === 0) throw new Error(`Cannot write ${path} as the disk took no more bytes`);
        at += n;
      }
    },
    sync: () => file.syncSync(),
    close: () => file.close(),
  };
}

interface Header {
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: Readonly<Record<string, string>>;
}

function parseHeader(
  path: string,
  fileBytes: number,
  readAt: (offset: number, target: Uint8Array) => void,
): Header {
  requireLittleEndian();
  const fail = (must: string, current: unknown): never => {
    throw new Error(`Cannot open ${path} as ${must}: current value is ${shorten(current)}`);
  };
  if (fileBytes < 10) fail("a safetensors file must have at least 10 bytes", fileBytes);
  const prefix = new Uint8Array(8);
  readAt(0, prefix);
  const length = new DataView(prefix.buffer).getBigUint64(0, true);
  const most = Math.min(MAX_HEADER_BYTES, fileBytes - 8);
  if (length < 2n || length > BigInt(most)) {
    fail(`the header's length must be 2 to ${most} bytes`, length);
  }
  const raw = new Uint8Array(Number(length));
  readAt(8, raw);
  if (raw[0] !== 0x7b) fail("the header must begin with {", `byte ${raw[0]}`);
  // Depth is checked first: a parser that meets millions of brackets takes gigabytes.
  if (nesting(raw) > 3) fail("the header must nest at most 3 deep", "more");
  let parsed: Record<string, unknown>;
  try {
    parsed = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(raw));
  } catch (cause) {
    throw new Error(`Cannot open ${path} as its header must be JSON in UTF-8`, { cause });
  }
  const dataStart = 8 + raw.length;
  const dataBytes = fileBytes - dataStart;
  const metadata: Record<string, string> = {};
  const found: { info: TensorInfo; begin: number; end: number }[] = [];
  for (const [name, value] of Object.entries(parsed)) {
    if (name === "__metadata__") {
      for (const [key, text] of Object.entries((value ?? {}) as Record<string, unknown>)) {
        if (typeof text !== "string") fail("__metadata__ must hold strings only", text);
        metadata[key] = text as string;
      }
      continue;
    }
    const entry = (value ?? {}) as Record<string, unknown>;
    const dtype = DTYPE_OF_CODE.get(entry.dtype as string);
    if (!dtype) {
      return fail(`${name}'s dtype must be one of ${[...DTYPE_OF_CODE.keys()]}`, entry.dtype);
    }
    const shape = entry.shape;
    if (!Array.isArray(shape) || !shape.every(isCount)) {
      return fail(`${name}'s shape must be a list of whole numbers >= 0`, shape);
    }
    const offsets = entry.data_offsets;
    if (
      !Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isCount) ||
      offsets[0] > offsets[1] || offsets[1] > dataBytes
    ) {
      return fail(`${name}'s data_offsets must lie in 0..${dataBytes}`, offsets);
    }
    const [begin, end] = offsets as [number, number];
    const size = sizeOf(shape);
    if (!Number.isSafeInteger(size) || size * bytesOf(dtype) !== end - begin) {
      fail(`${name}, ${dtype} [${shape}], must have ${size * bytesOf(dtype)} bytes`, end - begin);
    }
    found.push({ info: { name, dtype, shape, size, offset: dataStart + begin }, begin, end });
  }
  // As the format asks: no holes, no overlaps, nothing behind the last tensor.
  found.sort((a, b) => a.begin - b.begin || a.end - b.end);
  let at = 0;
  for (const { info, begin, end } of found) {
    if (begin !== at) fail(`${info.name} must begin at byte ${at} of the data`, begin);
    at = end;
  }
  if (at !== dataBytes) fail(`the tensors must fill the file's ${dataBytes} bytes of data`, at);
  return { tensors: new Map(found.map(({ info }) => [info.name, info])), metadata };
}

/** Depth of brackets outside strings; an upper bound when the text is not JSON. */
function nesting(json: Uint8Array): number {
  let depth = 0, deepest = 0, inString = false;
  for (let i = 0; i < json.length; i++) {
    const c = json[i];
    if (inString) {
      if (c === 0x5c) i++; // a backslash hides the next byte
      else if (c === 0x22) inString = false;
    } else if (c === 0x22) inString = true;
    else if (c === 0x7b || c === 0x5b) deepest = Math.max(deepest, ++depth);
    else if (c === 0x7d || c === 0x5d) depth--;
  }
  return deepest;
}

function openForReading(path: string): Deno.FsFile {
  try {
    return Deno.openSync(path, { read: true });
  } catch (cause) {
    throw new Error(`Cannot open ${path}: ${(cause as Error).message}`, { cause });
  }
}

/** The bytes of an array's elements; they share memory. */
function bytesUnder(array: TypedArray): Uint8Array<ArrayBuffer> {
  return new Uint8Array(array.buffer as ArrayBuffer, array.byteOffset, array.byteLength);
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

function shorten(value: unknown): string {
  const text = typeof value === "bigint" ? String(value) : JSON.stringify(value) ?? String(value);
  return text.length > 100 ? `${text.slice(0, 100)}…` : text;
}

function requireLittleEndian(): void {
  if (new Uint8Array(new Uint16Array([1]).buffer)[0] !== 1) {
    throw new Error("Cannot use safetensors as the processor must be little-endian");
  }
}
