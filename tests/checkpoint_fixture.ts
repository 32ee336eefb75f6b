// A small model as plain arrays, in the shape that checkpoints see: replicated tensors on every rank, experts on one rank each.

import type { CheckpointContents, CheckpointTensor } from "../moe/checkpoint.ts";
import { type DType, newArray, type TypedArray } from "../tensor/dtype.ts";

/** Experts of the model. */
export const EXPERTS = 8;

/** What the model is. */
export const CONFIG = { layers: 2, width: 4, experts: EXPERTS, router: { kind: "softmax", k: 2 } };

/** The part of the model that one rank holds. */
export class Part {
  /** Its tensors by name. */
  readonly arrays = new Map<string, TypedArray>();
  readonly #tensors: CheckpointTensor[] = [];
  readonly #moments: CheckpointTensor[] = [];

  /** Zeros, or numbers that depend on the name and a seed only. */
  constructor(rank: number, size: number, seed?: number) {
    const add = (list: CheckpointTensor[], name: string, dtype: DType, owner: number) => {
      const array = newArray(dtype, 12);
      if (seed !== undefined) fill(array, `${name}#${seed}`);
      this.arrays.set(name, array);
      list.push({
        name,
        dtype,
        shape: [3, 4],
        owner,
        read: () => array,
        write: (from) => (array as Uint8Array).set(from as Uint8Array),
      });
    };
    const addBoth = (name: string, dtype: DType, owner: number) => {
      add(this.#tensors, name, dtype, owner);
      for (const m of ["moment1", "moment2"]) add(this.#moments, `${m}.${name}`, "f32", owner);
    };
    addBoth("model.embed_tokens.weight", "f32", 0);
    for (let layer = 0; layer < CONFIG.layers; layer++) {
      const block = `model.layers.${layer}.block_sparse_moe`;
      addBoth(`${block}.gate.weight`, "bf16", 0);
      for (let expert = 0; expert < EXPERTS; expert++) {
        const owner = Math.floor(expert * size / EXPERTS);
        if (owner === rank) addBoth(`${block}.experts.${expert}.w1.weight`, "f32", owner);
      }
    }
  }

  /** What is saved of it. */
  contents(step: number): CheckpointContents {
    return {
      step,
      config: CONFIG,
      model: this.#tensors,
      optimizer: this.#moments,
      state: { seed: 7, position: step * 32 },
      transformersConfig: { model_type: "mixtral" },
    };
  }
}

function fill(array: TypedArray, name: string): void {
  let state = 17;
  for (let i = 0; i < name.length; i++) state = Math.imul(state ^ name.charCodeAt(i), 0x01000193);
  for (let i = 0; i < array.length; i++) {
    state = Math.imul(state ^ (state >>> 15), 0x85ebca6b) + i;
    array[i] = (state >>> 8) % 60000;
  }
}
