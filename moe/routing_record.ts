// Every token's experts, layer by layer and pass by pass: recorded from a run, kept in a compact file, and replayed in place of a gate's
// choice. A record holds the tokens of the global batch in order, so it replays on any number of ranks. Weights are not in it: they are the
// replaying gate's own scores of the recorded experts, so gradients flow as usual.
//
// The file, little-endian: "LINAROUT", then u32 version 1, experts E, choices K, blocks, CRC-32 of all that follows; then per block u32 pass,
// u32 layer, u32 tokens N and N·K experts as u16, 65535 for none, filled up with zeros to a multiple of 4 bytes.
//
// Shape letters: N tokens of a pass, E experts, K choices per token.

import { crc32 } from "./hash.ts";
import type { Communicator } from "../collectives/types.ts";
import type { RoutingTap } from "./moe_types.ts";
import type { ExpertChoices } from "./router_expert_choice.ts";

/** Experts of one pass of a layer. */
export interface RoutingBlock {
  /** Number of the pass, from 0, counted for each layer. */
  readonly pass: number;
  /** Layer. */
  readonly layer: number;
  /** Experts [N, K]; 65535 for none. */
  readonly experts_NK: Uint16Array;
}

/** Experts of many passes. */
export interface RoutingRecord {
  /** E. */
  readonly experts: number;
  /** K. */
  readonly choices: number;
  /** One block for each pass and layer, in the order in which they ran. */
  readonly blocks: readonly RoutingBlock[];
}

const MAGIC = "LINAROUT", VERSION = 1, HEADER_BYTES = 28, BLOCK_BYTES = 12;
const NONE = 65535;

/** Records the choices of this rank's tokens: set it as the `tap` of MoE layers. */
export class RoutingRecorder implements RoutingTap {
  readonly #blocks: { layer: number; choices: number; experts_NK: Uint16Array }[] = [];

  /**
   * Called by a MoE layer.
   *
   * @param layer Its number.
   * @param choice Its tokens' experts, before drops.
   */
  record(layer: number, choice: ExpertChoices): void {
    // As u16, −1 becomes 65535, which stands for none.
    const experts_NK = new Uint16Array(choice.experts_NK);
    this.#blocks.push({ layer, choices: choice.choices, experts_NK });
  }

  /**
   * The record of the global batch. All ranks call it together.
   *
   * @param comm All ranks.
   * @param experts E, at most 65,535.
   * @returns The same record on every rank.
   */
  async gather(comm: Communicator, experts: number): Promise<RoutingRecord> {
    checkExperts(experts);
    const blocks = this.#blocks;
    const own = new Int32Array(blocks.length + 1);
    own[0] = blocks.reduce((most, block) => Math.max(most, block.choices), 1);
    blocks.forEach((block, i) => own[i + 1] = block.experts_NK.length / block.choices);
    const all = new Int32Array(own.length * comm.size);
    await comm.allGather(own, all);
    const ranks = Array.from({ length: comm.size }, (_, r) => r * own.length);
    const choices = Math.max(...ranks.map((at) => all[at]));
    const passes = new Map<number, number>();
    const gathered: RoutingBlock[] = [];
    for (const [i, block] of blocks.entries()) {
      const counts = ranks.map((at) => all[at + i + 1] * choices * 2);
      const experts_NK = new Uint16Array(counts.reduce((a, b) => a + b, 0) / 2);
      const bytes = new Uint8Array(experts_NK.buffer);
      await comm.allGatherV(new Uint8Array(widen(block, choices).buffer), bytes, counts);
      const { layer } = block, pass = passes.get(layer) ?? 0;
      passes.set(layer, pass + 1);
      gathered.push({ pass, layer, experts_NK });
    }
    return { experts, choices, blocks: gathered };
  }
}

/** Replays a record in place of the routers' choices: set it as the `tap` of MoE layers, on every rank. */
export class RoutingReplay implements RoutingTap {
  readonly #record: RoutingRecord;
  readonly #blocks = new Map<string, RoutingBlock>();
  readonly #passes = new Map<number, number>();

  /**
   * Begins at the first pass of every layer.
   *
   * @param record What is replayed.
   */
  constructor(record: RoutingRecord) {
    this.#record = record;
    for (const block of record.blocks) this.#blocks.set(`${block.layer} ${block.pass}`, block);
  }

  /**
   * Called by a MoE layer; the next call for that layer gets its next pass.
   *
   * @param layer Its number.
   * @param firstToken First of its tokens in the global batch.
   * @param tokens How many.
   * @returns Their experts.
   * @throws {RangeError} If the record has no such pass or tokens.
   */
  replay(layer: number, firstToken: number, tokens: number): ExpertChoices {
    const pass = this.#passes.get(layer) ?? 0;
    this.#passes.set(layer, pass + 1);
    const { choices } = this.#record;
    const block = this.#blocks.get(`${layer} ${pass}`);
    const recorded = block ? block.experts_NK.length / choices : 0;
    if (!block || firstToken + tokens > recorded) {
      throw new RangeError(
        `Cannot replay pass ${pass} of layer ${layer} as the record must have ${
          firstToken + tokens
        } tokens of it: current value is ${block ? recorded : "no such pass"}`,
      );
    }
    const part = block.experts_NK.subarray(firstToken * choices, (firstToken + tokens) * choices);
    const experts_NK = Int32Array.from(part, (e) => e === NONE ? -1 : e);
    return { choices, experts_NK };
  }

  /** Begins again at the first pass of every layer. */
  rewind(): void {
    this.#passes.clear();
  }
}

/**
 * A record as a file's bytes.
 *
 * @param record The record.
 * @returns The bytes.
 *
 * @example
 * ```ts
 * import { decodeRoutingRecord, encodeRoutingRecord } from "./routing_record.ts";
 * import assert from "node:assert/strict";
 *
 * const blocks = [{ pass: 0, layer: 2, experts_NK: new Uint16Array([3, 1, 0, 2]) }];
 * const record = { experts: 4, choices: 2, blocks };
 * assert.deepEqual(decodeRoutingRecord(encodeRoutingRecord(record)), record);
 * ```
 */
export function encodeRoutingRecord(record: RoutingRecord): Uint8Array {
  const { blocks } = record;
  let size = HEADER_BYTES;
  for (const { experts_NK } of blocks) size += BLOCK_BYTES + padded(experts_NK.length * 2);
  const bytes = new Uint8Array(size), view = new DataView(bytes.buffer);
  let at = HEADER_BYTES;
  for (const { pass, layer, experts_NK } of blocks) {
    view.setUint32(at, pass, true);
    view.setUint32(at + 4, layer, true);
    view.setUint32(at + 8, experts_NK.length / record.choices, true);
    // Every platform that Deno runs on is little-endian.
    new Uint16Array(bytes.buffer, at + BLOCK_BYTES, experts_NK.length).set(experts_NK);
    at += BLOCK_BYTES + padded(experts_NK.length * 2);
  }
  for (let i = 0; i < MAGIC.length; i++) bytes[i] = MAGIC.charCodeAt(i);
  const header = [VERSION, record.experts, record.choices, blocks.length];
  header.forEach((value, i) => view.setUint32(8 + 4 * i, value, true));
  view.setUint32(24, crc32(bytes.subarray(HEADER_BYTES)), true);
  return bytes;
}

/**
 * Reads a record's file, trusting nothing in it.
 *
 * @param bytes The file's bytes.
 * @returns The record.
 * @throws {RangeError} If the bytes are not a whole, undamaged record.
 */
export function decodeRoutingRecord(bytes: Uint8Array): RoutingRecord {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const magic = String.fromCharCode(...bytes.subarray(0, MAGIC.length));
  must(bytes.length >= HEADER_BYTES && magic === MAGIC, `it must begin with ${MAGIC}`, magic);
  const [version, experts, choices, blockCount, checksum] = [8, 12, 16, 20, 24].map((at) =>
    view.getUint32(at, true)
  );
  must(version === VERSION, `its version must be ${VERSION}`, version);
  const sum = crc32(bytes.subarray(HEADER_BYTES));
  must(sum === checksum, `its checksum must be ${checksum}`, sum);
  checkExperts(experts);
  must(choices >= 1 && choices <= experts, `its choices must be in 1..${experts}`, choices);
  const blocks: RoutingBlock[] = [], seen = new Set<string>();
  const lastToken_E = new Float64Array(experts);
  let at = HEADER_BYTES, token = 0;
  for (let b = 0; b < blockCount; b++) {
    must(at + BLOCK_BYTES <= bytes.length, `it must hold ${blockCount} blocks`, b);
    const [pass, layer, tokens] = [at, at + 4, at + 8].map((i) => view.getUint32(i, true));
    const length = tokens * choices, end = at + BLOCK_BYTES + padded(length * 2);
    must(end <= bytes.length, `block ${b} must end within ${bytes.length} bytes`, end);
    must(!seen.has(`${layer} ${pass}`), "a pass of a layer must come once", `${layer}, ${pass}`);
    seen.add(`${layer} ${pass}`);
    const start = bytes.byteOffset + at + BLOCK_BYTES;
    const experts_NK = new Uint16Array(bytes.buffer.slice(start, start + length * 2));
    for (let i = 0; i < length; i++) {
      if (i % choices === 0) token++;
      const e = experts_NK[i];
      if (e === NONE) continue;
      must(e < experts, `an expert must be below ${experts}`, e);
      must(lastToken_E[e] !== token, "a token must have an expert once", `expert ${e} twice`);
      lastToken_E[e] = token;
    }
    blocks.push({ pass, layer, experts_NK });
    at = end;
  }
  must(at === bytes.length, `it must end after ${at} bytes`, bytes.length);
  return { experts, choices, blocks };
}

/** The same experts with `to` places per token; the places beyond are none. */
function widen(
  block: { readonly choices: number; readonly experts_NK: Uint16Array },
  to: number,
): Uint16Array<ArrayBuffer> {
  const { choices, experts_NK } = block;
  const wide_NK = new Uint16Array(experts_NK.length / choices * to).fill(NONE);
  for (let n = 0; n < experts_NK.length / choices; n++) {
    wide_NK.set(experts_NK.subarray(n * choices, (n + 1) * choices), n * to);
  }
  return wide_NK;
}

function padded(bytes: number): number {
  return Math.ceil(bytes / 4) * 4;
}

function checkExperts(experts: number): void {
  must(experts >= 1 && experts < NONE, `its experts must be in 1..${NONE - 1}`, experts);
}

function must(ok: boolean, what: string, value: unknown): asserts ok {
  if (!ok) {
    throw new RangeError(`Cannot use a routing record as ${what}: current value is ${value}`);
  }
}
