// The one owner of the experts of a layer on this rank: weights, gradients and, while a trainer works, AdamW's moments, by expert id. A rank has *seats* that experts sit in; a
// replica is an expert that sits on several ranks, whose gradients are reduced among these ranks alone. Every expert is one flat
// block of memory, [up | down], so that reducing or moving an expert is one message.
//
// Names of an expert's parts are Mixtral's: `w1` is the gate's matrix of SwiGLU (or the only one into the hidden width), `w3` the one that
// it gates, `w2` the one back: `model.layers.{layer}.block_sparse_moe.experts.{id}.w1.weight`.
//
// Shape letters: D model width, F hidden width, H = 2F for SwiGLU, else F, E experts.

import type { Communicator, Work } from "../collectives/types.ts";
import type { Activation, Device } from "../tensor/device.ts";
import type { DType } from "../tensor/dtype.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor, TensorScope } from "../tensor/tensor.ts";
import { type ExpertLists, type ExpertMatrices, listsOf } from "./experts.ts";
import type { PlacementPlan } from "./hooks.ts";
import { normalKey } from "./init.ts";
import {
  createMoments,
  freeMoments,
  gradientDtype,
  type Moments,
  type Parameter,
} from "./parameter.ts";
import { holdersOf } from "./placement.ts";
import { ReplicaGroups } from "./replica_groups.ts";

/** How an {@linkcode ExpertStore} is made; all but the device is alike on all ranks. */
export interface ExpertStoreOptions {
  /** Where the weights live. */
  readonly device: Device;
  /** The ranks that experts sit on. */
  readonly comm: Communicator;
  /** Layer. */
  readonly layer: number;
  /** E. */
  readonly experts: number;
  /** D. */
  readonly width: number;
  /** F. */
  readonly hidden: number;
  /** Between the two layers of an expert. */
  readonly activation: Activation;
  /** Element type. */
  readonly dtype: DType;
  /** Element type of the gradients: see `gradientDtype` of parameter.ts. @default {that of the weights; f32 where it has 16 bits} */
  readonly gradientDtype?: DType;
  /** Experts of each rank. */
  readonly seats: PlacementPlan["seats"];
  /** The run's seed; an expert's first weights depend on it and on the names of the weights only. */
  readonly seed: number;
  /** Standard deviation of the first weights. */
  readonly initStd: number;
  /** Standard deviation of the first weights back to the model width. */
  readonly downStd: number;
}

/** The memory of an expert, each tensor flat: [up | down]. */
interface ExpertMemory {
  readonly weights: Block;
  readonly gradient: Gradient;
  readonly moments: Moments | null;
}

/** A block of memory of a pool. */
interface Block extends Disposable {
  readonly flat: Tensor;
}

/**
 * Blocks of equal size. The first ones lie side by side in one allocation, at a constant stride, which grouped GEMMs like; a block that comes later
 * takes the place of one that has gone, or memory of its own.
 */
class BlockPool implements Disposable {
  readonly #device: Device;
  readonly #size: number;
  readonly #dtype: DType;
  #together: Tensor | null = null;
  #free: number[] = [];

  constructor(device: Device, size: number, dtype: DType) {
    this.#device = device;
    this.#size = size;
    this.#dtype = dtype;
  }

  /** A block; if it is the first, `count` of them are made at once. Its contents are undefined. */
  take(count: number): Block {
    if (!this.#together) {
      this.#together = empty(this.#device, [count, this.#size], this.#dtype);
      this.#free = Array.from({ length: count }, (_, i) => count - 1 - i);
    }
    const place = this.#free.pop();
    if (place === undefined) {
      const flat = empty(this.#device, [this.#size], this.#dtype);
      return { flat, [Symbol.dispose]: () => flat[Symbol.dispose]() };
    }
    return {
      flat: this.#together.rows(place, place + 1).reshape(this.#size),
      [Symbol.dispose]: () => void this.#free.push(place),
    };
  }

  [Symbol.dispose](): void {
    this.#together?.[Symbol.dispose]();
  }
}

/** A gradient that takes memory once it is asked for: an expert in inference has none. */
class Gradient implements Disposable {
  readonly #take: () => Block;
  #block: Block | null = null;

  constructor(take: () => Block) {
    this.#take = take;
  }

  get flat(): Tensor {
    if (!this.#block) {
      this.#block = this.#take();
      ops.fill(this.#block.flat, 0);
    }
    return this.#block.flat;
  }

  [Symbol.dispose](): void {
    this.#block?.[Symbol.dispose]();
  }
}

/** An expert that sits on this rank. */
interface SeatedExpert extends ExpertMemory {
  readonly id: number;
  /** The matrices of `weights`. */
  readonly matrices: ExpertMatrices;
  /** The matrices of `gradient`, which this makes. */
  readonly gradients: ExpertMatrices;
  /** The named parts: w2, w1 and, for SwiGLU, w3. */
  readonly parameters: readonly Parameter[];
}

/** Owns the experts of one layer that sit on this rank. */
export class ExpertStore implements Disposable {
  readonly #options: ExpertStoreOptions;
  #seats: PlacementPlan["seats"];
  #holders: readonly (readonly number[])[];
  #seated: readonly SeatedExpert[] = [];
  #parameters: readonly Parameter[] | null = null;
  #holdsMoments = false;
  readonly #weightPool: BlockPool;
  readonly #gradientPool: BlockPool;
  /** The lists of matrices, made once for the experts that sit now. */
  #matrices: ExpertLists | null = null;
  #gradients: ExpertLists | null = null;
  #seatGradients: readonly Tensor[] | null = null;

  /**
   * Seats the experts of this rank and draws their first weights.
   *
   * @param options Sizes, seats and seed.
   * @throws {RangeError} If the seats are not valid.
   */
  constructor(options: ExpertStoreOptions) {
    const { seats, experts, comm, device, width, hidden, activation, dtype } = options;
    checkSeats(seats, comm.size);
    const size = (activation === "swiglu" ? 3 : 2) * hidden * width;
    this.#weightPool = new BlockPool(device, size, dtype);
    const summed = gradientDtype(dtype, options.gradientDtype);
    this.#gradientPool = new BlockPool(device, size, summed);
    this.#options = options;
    this.#seats = seats;
    this.#holders = holdersOf(seats, experts);
    this.#seated = seats[comm.rank].map((id) => {
      const expert = this.#seat(id, this.#allocate());
      this.#initialise(expert);
      return expert;
    });
  }

  /** Experts of each rank, in the order of the seats. */
  get seats(): PlacementPlan["seats"] {
    return this.#seats;
  }

  /**
   * Parameters of the experts that sit here, in the order in which their gradients become ready; the same object until experts move.
   */
  get parameters(): readonly Parameter[] {
    return this.#parameters ??= this.#seated.flatMap(({ parameters }) => parameters);
  }

  /** Weights of the experts that sit here, by seat; the same object until experts move. */
  get matrices(): ExpertLists {
    return this.#matrices ??= listsOf(this.#seated.map(({ matrices }) => matrices));
  }

  /** Gradients of the experts that sit here, by seat; the same object until experts move. */
  get gradients(): ExpertLists {
    return this.#gradients ??= listsOf(this.#seated.map(({ gradients }) => gradients));
  }

  /** The whole gradient of each expert that sits here, flat [up | down], by seat; the same object until experts move. */
  get seatGradients(): readonly Tensor[] {
    return this.#seatGradients ??= this.#seated.map(({ gradient }) => gradient.flat);
  }

  /**
   * The ranks that hold an expert.
   *
   * @param expert Its id.
   * @returns The ranks, ascending; the first one speaks for the expert where only one may (norms, checkpoints).
   */
  holders(expert: number): readonly number[] {
    return this.#holders[expert];
  }

  /**
   * Sums the gradients of replicas over the ranks that hold them. All ranks call it together, once per step, after the backward
   * pass. Without replicas it does nothing.
   */
  async reduceReplicas(): Promise<void> {
    if (this.#options.comm.size === 1) return;
    const groups = ReplicaGroups.of(this.#options.comm);
    await groups.open(this.#holders);
    const works: Work[] = [];
    for (const { id, gradient } of this.#byId()) {
      const holders = this.#holders[id];
      if (holders.length > 1) {
        works.push(groups.get(holders)!.allReduce(gradient.flat));
      }
    }
    for (const work of works) await work.wait(this.#options.device.stream);
  }

  /**
   * Seats the experts anew: weights and moments of an expert that a rank did not hold come from one that did, gradients there begin at
   * zero. All ranks call it together, between steps. Experts that stay keep their memory; `parameters` changes.
   *
   * @param seats Experts of each rank from now on.
   * @throws {RangeError} If the seats are not valid; nothing has moved then.
   */
  async moveTo(seats: PlacementPlan["seats"]): Promise<void> {
    const { comm, experts, device } = this.#options;
    checkSeats(seats, comm.size);
    const holders = holdersOf(seats, experts);
    const held = new Map(this.#seated.map((expert) => [expert.id, expert]));
    const works: Work[] = [];
    // One order on all ranks: by expert, then by new holder; old holders take turns as the source.
    for (let e = 0; e < experts; e++) {
      const old = this.#holders[e];
      holders[e].filter((rank) => !old.includes(rank)).forEach((rank, i) => {
        const source = old[i % old.length];
        if (comm.rank === source) {
          for (const tensor of stateOf(held.get(e)!)) {
            works.push(comm.send(tensor, rank, { tag: e }));
          }
        } else if (comm.rank === rank) {
          const expert = this.#seat(e, this.#allocate());
          held.set(e, expert);
          for (const tensor of stateOf(expert)) works.push(comm.recv(tensor, source, { tag: e }));
        }
      });
    }
    for (const work of works) await work.wait(device.stream);
    for (const expert of held.values()) {
      if (!seats[comm.rank].includes(expert.id)) freeSeat(expert);
    }
    this.#seats = seats;
    this.#holders = holders;
    this.#sit(seats[comm.rank].map((id) => held.get(id)!));
  }

  /**
   * Makes the experts hold AdamW's moments, from zero, and take them along when they move; or frees them. All ranks call it together.
   *
   * @param hold Whether they shall. `parameters` changes.
   */
  holdMoments(hold: boolean): void {
    using scope = new TensorScope();
    const seated = this.#seated.map(({ id, weights, gradient }) => {
      const moments = hold ? createMoments(weights.flat) : null;
      return this.#seat(id, { weights, gradient, moments });
    });
    for (const { moments } of this.#seated) if (moments) freeMoments(moments);
    this.#holdsMoments = hold;
    this.#sit(scope.keep(seated));
  }

  /** Frees what the experts hold. Communicators of replicas end with the world. */
  [Symbol.dispose](): void {
    this.#seated.forEach(freeSeat);
    this.#sit([]);
    this.#weightPool[Symbol.dispose]();
    this.#gradientPool[Symbol.dispose]();
  }

  #sit(seated: readonly SeatedExpert[]): void {
    this.#seated = seated;
    this.#parameters =
      this.#matrices =
      this.#gradients =
      this.#seatGradients =
        null;
  }

  /** The experts that sit here by ascending id: an order that ranks agree on whatever the order of their seats. */
  #byId(): SeatedExpert[] {
    return [...this.#seated].sort((a, b) => a.id - b.id);
  }

  #allocate(): ExpertMemory {
    const { comm } = this.#options;
    const count = () => this.#seats[comm.rank].length;
    const weights = this.#weightPool.take(count());
    const moments = this.#holdsMoments ? createMoments(weights.flat) : null;
    const gradient = new Gradient(() => this.#gradientPool.take(count()));
    return { weights, gradient, moments };
  }

  #seat(id: number, memory: ExpertMemory): SeatedExpert {
    const { layer, width, hidden, activation } = this.#options;
    const { weights, gradient, moments } = memory;
    const rows = activation === "swiglu" ? 2 * hidden : hidden;
    const matricesOf = (flat: Tensor): ExpertMatrices => ({
      up: flat.rows(0, rows * width).reshape(rows, width),
      down: flat.rows(rows * width, flat.size).reshape(width, hidden),
    });
    const matrices = matricesOf(weights.flat);
    const first = moments && matricesOf(moments.moment1);
    const second = moments && matricesOf(moments.moment2);
    const residual = moments?.residual && matricesOf(moments.residual);
    const parameter = (part: string, matrix: "up" | "down", start: number, end: number) => ({
      name: `model.layers.${layer}.block_sparse_moe.experts.${id}.${part}.weight`,
      value: matrices[matrix].rows(start, end),
      get grad() {
        return matricesOf(gradient.flat)[matrix].rows(start, end);
      },
      overwrites: true,
      group: "replicas" as const,
      expert: { layer, id },
      decay: true,
      moments: first && second
        ? {
          moment1: first[matrix].rows(start, end),
          moment2: second[matrix].rows(start, end),
          residual: residual ? residual[matrix].rows(start, end) : null,
        }
        : undefined,
    });
    const parameters = [parameter("w2", "down", 0, width), parameter("w1", "up", 0, hidden)];
    if (activation === "swiglu") parameters.push(parameter("w3", "up", hidden, 2 * hidden));
    return {
      id,
      ...memory,
      matrices,
      get gradients() {
        return matricesOf(gradient.flat);
      },
      parameters,
    };
  }

  #initialise(expert: SeatedExpert): void {
    const { device, seed, initStd, downStd } = this.#options;
    const down = expert.parameters[0];
    for (const parameter of expert.parameters) {
      const { name, value } = parameter;
      const std = parameter === down ? downStd : initStd;
      device.kernels.normal(value, normalKey(seed, name), std);
    }
  }
}

function checkSeats(seats: PlacementPlan["seats"], ranks: number): void {
  if (seats.length !== ranks) {
    throw new RangeError(
      `Cannot seat experts as the placement must have ${ranks} ranks: current value is ${seats.length}`,
    );
  }
}

/** What moves with an expert. */
function stateOf({ weights, moments }: ExpertMemory): Tensor[] {
  if (!moments) return [weights.flat];
  const { moment1, moment2, residual } = moments;
  return [weights.flat, moment1, moment2, ...(residual ? [residual] : [])];
}

function freeSeat({ weights, gradient, moments }: ExpertMemory): void {
  weights[Symbol.dispose]();
  gradient[Symbol.dispose]();
  if (moments) freeMoments(moments);
}
