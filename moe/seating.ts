// A change of seats on its way: what a store's experts are to become, the memory for it, and what travels. It is thrown away if a rank
// cannot take part, and then nothing has changed. The store is expert_store.ts, the exchange expert_moves.ts.

import { bytesOf } from "../tensor/dtype.ts";
import {
  ExpertMemory,
  type ExpertMemoryOptions,
  type ExpertMoments,
  type HostedMoments,
  momentLayout,
  type ResidentMoments,
} from "./expert_memory.ts";
import { movesOf, type StatePiece, type StateTransfer } from "./expert_moves.ts";
import type { PlacementPlan } from "./hooks.ts";

/** How the experts sit now and shall sit. */
export interface SeatingOptions {
  /** This rank. */
  readonly rank: number;
  /** Where the memory is, and how much an expert needs. */
  readonly memory: ExpertMemoryOptions;
  /** The experts that sit here now. */
  readonly held: ReadonlyMap<number, ExpertMemory>;
  /** The ranks that hold each expert now. */
  readonly before: readonly (readonly number[])[];
  /** The ranks that are to hold each expert. */
  readonly after: readonly (readonly number[])[];
  /** The new seats. */
  readonly seats: PlacementPlan["seats"];
  /** Whether experts have moments. */
  readonly holdsMoments: boolean;
  /** How many experts of this rank, those of the last seats, are to have their moments in host memory. */
  readonly offload: number;
}

/** A change of seats of one layer. */
export class Seating {
  readonly #options: SeatingOptions;
  /** Experts that come. */
  readonly #fresh = new Map<number, ExpertMemory>();
  /** New places of the moments of experts that stay. */
  readonly #converted = new Map<number, ExpertMoments>();

  /** @param options How the experts sit now and shall sit. */
  constructor(options: SeatingOptions) {
    this.#options = options;
  }

  /**
   * Takes all the memory that will be needed.
   *
   * @param taken Frees it, unless told otherwise.
   * @throws {OutOfMemoryError} If it does not suffice.
   */
  takeMemory(taken: DisposableStack): void {
    const { rank, seats, memory, held, holdsMoments, offload } = this.#options;
    const first = seats[rank].length - offload;
    seats[rank].forEach((id, seat) => {
      const place = seat >= first ? "host" : "device";
      const old = held.get(id);
      if (!old) {
        const expert = taken.use(new ExpertMemory(memory));
        if (holdsMoments) expert.moments = expert.takeMoments(place);
        this.#fresh.set(id, expert);
      } else if (old.moments && old.moments.place !== place) {
        this.#converted.set(id, taken.use(old.takeMoments(place)));
      }
    });
  }

  /** What travels, in one order on all ranks. */
  transfers(): StateTransfer[] {
    const { before, after, memory: { size, dtype }, holdsMoments, held, rank } = this.#options;
    const weights = size * bytesOf(dtype);
    const bytes = weights + (holdsMoments ? momentLayout(size, dtype).bytes : 0);
    return movesOf(before, after).map(({ expert, from, to }) => {
      const own = rank === from ? held.get(expert)! : rank === to ? this.#fresh.get(expert)! : null;
      return { from, to, bytes, pieces: own ? piecesOf(own) : [] };
    });
  }

  /**
   * After the exchange: copies the moments that go to or come from host memory while their expert stays. Where there is host memory, it
   * resolves only once no copy is under way, as that can only then be given back or looked at.
   */
  async convert(): Promise<void> {
    const { held } = this.#options;
    for (const [id, to] of this.#converted) copyMoments(held.get(id)!.moments!, to);
    const moments = [...held.values(), ...this.#fresh.values()].map((memory) => memory.moments);
    for (const each of [...moments, ...this.#converted.values()]) {
      if (each?.place === "host") await each.settle();
    }
  }

  /**
   * Gives the experts their new memory and frees that of those that leave; no copy may be under way.
   *
   * @returns The memory of each seat of this rank.
   */
  finish(): Map<number, ExpertMemory> {
    const { rank, seats, held } = this.#options;
    for (const [id, memory] of held) {
      if (!seats[rank].includes(id)) memory[Symbol.dispose]();
    }
    for (const [id, moments] of this.#converted) {
      const memory = held.get(id)!;
      memory.moments![Symbol.dispose]();
      memory.moments = moments;
    }
    return new Map(seats[rank].map((id) => [id, held.get(id) ?? this.#fresh.get(id)!]));
  }
}

function piecesOf({ weights, moments }: ExpertMemory): StatePiece[] {
  if (!moments) return [weights];
  return [weights, moments.place === "host" ? moments : moments.block];
}

/** They are in different places. */
function copyMoments(from: ExpertMoments, to: ExpertMoments): void {
  if (from.place === "host") from.load(0, (to as ResidentMoments).block);
  else (to as HostedMoments).store(from.block, 0);
}
