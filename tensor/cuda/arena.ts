// The memory pool of a GPU: best-fit over blocks that are split and joined again, in plain typed arrays. Allocating and freeing
// touch no driver; only growth does, through a `MemorySource`. Everything is in the order of one stream, so nothing waits.

import { OutOfMemoryError } from "../memory_error.ts";

/** Bytes of one unit; every block is a whole number of them, and every address a multiple (CUDA asks for 256 at most). */
const UNIT = 512;
/** Smallest growth, so that small tensors share it. */
const STEP = 64 * 2 ** 20;
/** Largest growth beyond what a request needs. */
const LARGEST_STEP = 2 ** 30;
/** Bins of free blocks: exact below 8 units, then eight per power of two. */
const BINS = 232;

const FREE = 0, USED = 1;

/** The bin of a size: those of higher bins are larger than all of this one. */
function binOf(units: number): number {
  if (units < 8) return units;
  const exponent = 31 - Math.clz32(units);
  return (exponent - 2) * 8 + ((units >> (exponent - 3)) & 7);
}

/**
 * Blocks of one contiguous range, in units from 0: which are free, which are used. Best fit, lowest cost: a free block is found
 * through a bitmap of bins whose lists are sorted by size.
 */
export class Blocks {
  #capacity = 1024;
  #start = new Int32Array(this.#capacity);
  #units = new Int32Array(this.#capacity);
  #state = new Uint8Array(this.#capacity);
  /** Neighbours in the range. */
  #before = new Int32Array(this.#capacity);
  #after = new Int32Array(this.#capacity);
  /** Neighbours in the list of a bin; `#larger` also links the spare entries. */
  #smaller = new Int32Array(this.#capacity);
  #larger = new Int32Array(this.#capacity);
  #heads = new Int32Array(BINS).fill(-1);
  #filled = new Int32Array(Math.ceil(BINS / 32));
  #spare = -1;
  #count = 0;
  #last = -1;
  #extent = 0;
  /** Entry of a used block by its first unit. */
  #used = new Map<number, number>();

  /** Units of the range. */
  get extent(): number {
    return this.#extent;
  }

  /** Units of the free block at the end of the range. */
  get freeAtEnd(): number {
    return this.#last >= 0 && this.#state[this.#last] === FREE ? this.#units[this.#last] : 0;
  }

  /** Used blocks and their sizes: pairs of first unit and units, in no order. */
  *used(): Generator<readonly [start: number, units: number]> {
    for (const [start, entry] of this.#used) yield [start, this.#units[entry]];
  }

  /** Sizes of the free blocks from first to last; for tests and reports. */
  free(): number[] {
    const sizes: number[] = [];
    for (let entry = this.#last; entry >= 0; entry = this.#before[entry]) {
      if (this.#state[entry] === FREE) sizes.push(this.#units[entry]);
    }
    return sizes.reverse();
  }

  /**
   * Extends the range by free units at its end.
   *
   * @param units How many.
   */
  grow(units: number): void {
    const last = this.#last;
    if (last >= 0 && this.#state[last] === FREE) {
      this.#unlist(last);
      this.#units[last] += units;
      this.#list(last);
    } else {
      const entry = this.#entry(this.#extent, units);
      this.#before[entry] = last;
      this.#after[entry] = -1;
      if (last >= 0) this.#after[last] = entry;
      this.#last = entry;
      this.#list(entry);
    }
    this.#extent += units;
  }

  /**
   * Takes a block.
   *
   * @param units Its size, 1 at least.
   * @returns Its first unit, or -1 if no free block is large enough.
   */
  take(units: number): number {
    const entry = this.#find(units);
    if (entry < 0) return -1;
    this.#unlist(entry);
    const rest = this.#units[entry] - units;
    if (rest > 0) {
      const tail = this.#entry(this.#start[entry] + units, rest);
      const after = this.#after[entry];
      this.#units[entry] = units;
      this.#before[tail] = entry;
      this.#after[tail] = after;
      this.#after[entry] = tail;
      if (after >= 0) this.#before[after] = tail;
      else this.#last = tail;
      this.#list(tail);
    }
    this.#state[entry] = USED;
    this.#used.set(this.#start[entry], entry);
    return this.#start[entry];
  }

  /**
   * Gives a block back and joins it with free neighbours.
   *
   * @param start Its first unit.
   * @returns Its size, or 0 if no block is in use there.
   */
  give(start: number): number {
    let entry = this.#used.get(start);
    if (entry === undefined) return 0;
    this.#used.delete(start);
    const units = this.#units[entry];
    const before = this.#before[entry], after = this.#after[entry];
    if (after >= 0 && this.#state[after] === FREE) {
      this.#unlist(after);
      this.#absorb(entry, after);
    }
    if (before >= 0 && this.#state[before] === FREE) {
      this.#unlist(before);
      this.#absorb(before, entry);
      entry = before;
    }
    this.#state[entry] = FREE;
    this.#list(entry);
    return units;
  }

  /** Joins an entry with the one after it. */
  #absorb(entry: number, next: number): void {
    const after = this.#after[next];
    this.#units[entry] += this.#units[next];
    this.#after[entry] = after;
    if (after >= 0) this.#before[after] = entry;
    else this.#last = entry;
    this.#larger[next] = this.#spare;
    this.#spare = next;
  }

  /** The smallest free block of at least that size. */
  #find(units: number): number {
    const bin = binOf(units);
    for (let entry = this.#heads[bin]; entry >= 0; entry = this.#larger[entry]) {
      if (this.#units[entry] >= units) return entry;
    }
    let word = (bin + 1) >> 5;
    let bits = this.#filled[word] & (-1 << ((bin + 1) & 31));
    while (bits === 0) {
      if (++word >= this.#filled.length) return -1;
      bits = this.#filled[word];
    }
    return this.#heads[word * 32 + 31 - Math.clz32(bits & -bits)];
  }

  #list(entry: number): void {
    const units = this.#units[entry], bin = binOf(units);
    let smaller = -1, larger = this.#heads[bin];
    while (larger >= 0 && this.#units[larger] < units) {
      smaller = larger;
      larger = this.#larger[larger];
    }
    this.#smaller[entry] = smaller;
    this.#larger[entry] = larger;
    if (larger >= 0) this.#smaller[larger] = entry;
    if (smaller >= 0) this.#larger[smaller] = entry;
    else this.#heads[bin] = entry;
    this.#filled[bin >> 5] |= 1 << (bin & 31);
  }

  #unlist(entry: number): void {
    const smaller = this.#smaller[entry], larger = this.#larger[entry];
    if (larger >= 0) this.#smaller[larger] = smaller;
    if (smaller >= 0) {
      this.#larger[smaller] = larger;
      return;
    }
    const bin = binOf(this.#units[entry]);
    this.#heads[bin] = larger;
    if (larger < 0) this.#filled[bin >> 5] &= ~(1 << (bin & 31));
  }

  /** A new free entry. */
  #entry(start: number, units: number): number {
    let entry = this.#spare;
    if (entry >= 0) this.#spare = this.#larger[entry];
    else {
      if (this.#count === this.#capacity) this.#enlarge();
      entry = this.#count++;
    }
    this.#start[entry] = start;
    this.#units[entry] = units;
    this.#state[entry] = FREE;
    return entry;
  }

  #enlarge(): void {
    this.#capacity *= 2;
    const longer = (old: Int32Array): Int32Array<ArrayBuffer> => {
      const array = new Int32Array(this.#capacity);
      array.set(old);
      return array;
    };
    this.#start = longer(this.#start);
    this.#units = longer(this.#units);
    this.#before = longer(this.#before);
    this.#after = longer(this.#after);
    this.#smaller = longer(this.#smaller);
    this.#larger = longer(this.#larger);
    const state = new Uint8Array(this.#capacity);
    state.set(this.#state);
    this.#state = state;
  }
}

/** Where an arena's memory comes from. */
export interface MemorySource {
  /** Whether each growth continues the one before, so that one range results. */
  readonly contiguous: boolean;
  /** Growths are multiples of it, in bytes. */
  readonly granularity_bytes: number;
  /**
   * Takes memory from the system.
   *
   * @param bytes How much, a multiple of the granularity.
   * @returns Its address, a multiple of 512; null if there is not as much.
   */
  grow(bytes: number): number | null;
  /** Bytes that the GPU has free, for the error when there is not enough. */
  free_bytes(): number;
}

interface Region {
  readonly base: number;
  readonly blocks: Blocks;
}

function mebibytes(bytes: number): string {
  return `${(bytes / 2 ** 20).toFixed(bytes < 2 ** 20 ? 3 : 1)} MiB`;
}

/** The memory pool of a GPU. */
export class Arena {
  readonly #source: MemorySource;
  readonly #regions: Region[] = [];
  #used = 0;
  #reserved = 0;
  #peak = 0;

  /** @param source Where memory comes from. */
  constructor(source: MemorySource) {
    this.#source = source;
  }

  /** Bytes of live allocations, each a whole number of 512. */
  get used_bytes(): number {
    return this.#used;
  }

  /** Bytes taken from the system; they are kept. */
  get reserved_bytes(): number {
    return this.#reserved;
  }

  /** Highest `used_bytes` since the start or {@linkcode resetPeak}. */
  get peak_bytes(): number {
    return this.#peak;
  }

  /** Bytes that can still be allocated: free ones of the arena, and those of the system. */
  get free_bytes(): number {
    return this.#reserved - this.#used + this.#source.free_bytes();
  }

  /** Makes the present use the peak. */
  resetPeak(): void {
    this.#peak = this.#used;
  }

  /**
   * Takes memory.
   *
   * @param bytes How much; 0 gives an address of its own, too.
   * @returns Its address, a multiple of 512.
   * @throws {OutOfMemoryError} If there is not as much.
   */
  allocate(bytes: number): number {
    if (!Number.isSafeInteger(bytes) || bytes < 0) {
      throw new RangeError(
        `Cannot allocate as the size must be a whole number of bytes >= 0: current value is ${bytes}`,
      );
    }
    const units = Math.max(1, Math.ceil(bytes / UNIT));
    let address = this.#take(units);
    if (address < 0) {
      this.#grow(units, bytes);
      address = this.#take(units);
    }
    this.#used += units * UNIT;
    if (this.#used > this.#peak) this.#peak = this.#used;
    return address;
  }

  /**
   * Gives memory back.
   *
   * @param address What {@linkcode allocate} returned.
   * @throws {RangeError} If nothing is allocated there, as when it is freed twice.
   */
  free(address: number): void {
    for (let i = 0; i < this.#regions.length; i++) {
      const { base, blocks } = this.#regions[i];
      const start = (address - base) / UNIT;
      if (start < 0 || start >= blocks.extent) continue;
      const units = blocks.give(start);
      if (units === 0) break;
      this.#used -= units * UNIT;
      return;
    }
    throw new RangeError(
      `Cannot free as the address must be that of a live allocation: current value is ${address}`,
    );
  }

  /**
   * The largest live allocations.
   *
   * @param count How many at most.
   * @returns Their sizes in bytes, largest first.
   */
  largest(count: number): number[] {
    const sizes = this.#regions.flatMap(({ blocks }) => [...blocks.used()].map(([, n]) => n));
    return sizes.sort((a, b) => b - a).slice(0, count).map((units) => units * UNIT);
  }

  #take(units: number): number {
    for (let i = 0; i < this.#regions.length; i++) {
      const { base, blocks } = this.#regions[i];
      const start = blocks.take(units);
      if (start >= 0) return base + start * UNIT;
    }
    return -1;
  }

  /** Takes enough from the system for one more block of that size: more than that if there is more. */
  #grow(units: number, bytes: number): void {
    const source = this.#source;
    const last = source.contiguous ? this.#regions.at(-1) : undefined;
    const needed = (units - (last?.blocks.freeAtEnd ?? 0)) * UNIT;
    const whole = (size: number) =>
      Math.ceil(size / source.granularity_bytes) * source.granularity_bytes;
    const step = Math.max(STEP, Math.min(this.#reserved / 8, LARGEST_STEP));
    for (const size of [Math.max(whole(step), whole(needed)), whole(needed)]) {
      const address = source.grow(size);
      if (address === null) continue;
      this.#reserved += size;
      if (last) last.blocks.grow(size / UNIT);
      else {
        const blocks = new Blocks();
        blocks.grow(size / UNIT);
        this.#regions.push({ base: address, blocks });
      }
      return;
    }
    const largest = this.largest(5).map(mebibytes).join(", ") || "none";
    throw new OutOfMemoryError(
      `Cannot allocate ${mebibytes(bytes)} as the GPU's memory must suffice: ${
        mebibytes(this.#used)
      } are in use of ${mebibytes(this.#reserved)} reserved, the GPU has ${
        mebibytes(source.free_bytes())
      } free; largest allocations: ${largest}; a smaller batch, more ranks or recomputed activations take less`,
    );
  }
}
