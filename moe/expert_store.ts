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
import { bytesOf, type DType } from "../tensor/dtype.ts";
import * as ops from "../tensor/ops.ts";
import { OutOfMemoryError } from "../tensor/memory_error.ts";
import { type Tensor, TensorScope, zeros } from "../tensor/tensor.ts";
import { ExpertMemory, type ExpertMemoryOptions, momentLayout } from "./expert_memory.ts";
import { StateExchange } from "./expert_moves.ts";
import { type ExpertLists, type ExpertMatrices, listsOf } from "./experts.ts";
import type { PlacementPlan } from "./hooks.ts";
import { normalKey } from "./init.ts";
import { gradientDtype, type Parameter } from "./parameter.ts";
import { holdersOf } from "./placement.ts";
import { ReplicaGroups } from "./replica_groups.ts";
import { Seating } from "./seating.ts";

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

/** An expert that sits on this rank. */
interface SeatedExpert {
  readonly id: number;
  readonly memory: ExpertMemory;
  /** The matrices of the weights. */
  readonly matrices: ExpertMatrices;
  /** The matrices of the gradient, which this makes. */
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
  /** How many seats, the last ones, have their moments in host memory. */
  #offloaded = 0;
  readonly #memory: ExpertMemoryOptions;
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
    const summed = gradientDtype(dtype, options.gradientDtype);
    this.#memory = { device, size, dtype, gradientDtype: summed };
    this.#options = options;
    this.#seats = seats;
    this.#holders = holdersOf(seats, experts);
    using scope = new TensorScope();
    this.#seated = seats[comm.rank].map((id) => {
      const expert = this.#seat(id, new ExpertMemory(this.#memory));
      this.#initialise(expert);
      return expert;
    });
    scope.keep(this);
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
    return this.#seatGradients ??= this.#seated.map(({ memory }) => memory.gradient);
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
    for (const { id, memory } of this.#byId()) {
      const holders = this.#holders[id];
      if (holders.length > 1) {
        works.push(groups.get(holders)!.allReduce(memory.gradient));
      }
    }
    for (const work of works) await work.wait(this.#options.device.stream);
  }

  /** Bytes of an expert of this layer: weights, gradient, and moments, if a trainer wants them. */
  get expertBytes(): {
    /** Of the weights. */
    readonly weights: number;
    /** Of the gradient. */
    readonly gradient: number;
    /** Of AdamW's moments and what the weights lack of their masters. */
    readonly moments: number;
  } {
    const { size, dtype, gradientDtype } = this.#memory;
    return {
      weights: size * bytesOf(dtype),
      gradient: size * bytesOf(gradientDtype),
      moments: momentLayout(size, dtype).bytes,
    };
  }

  /** How many experts of this rank have their moments in host memory: those of the last seats. */
  get offloaded(): number {
    return this.#holdsMoments ? Math.min(this.#offloaded, this.#seated.length) : 0;
  }

  /**
   * Seats the experts anew, as {@linkcode ExpertStore.moveAll} does.
   *
   * @param seats Experts of each rank from now on.
   * @throws {RangeError} If the seats are not valid; nothing has moved then.
   */
  async moveTo(seats: PlacementPlan["seats"]): Promise<void> {
    await ExpertStore.moveAll([{ store: this, seats }]);
  }

  /**
   * Seats the experts of some layers anew: weights and moments of an expert that a rank did not hold come from one that did, all by one
   * all-to-all, and gradients there begin at zero. All ranks call it together, between steps. Experts that stay keep their memory, those that leave give
   * theirs back; `parameters` changes.
   *
   * All or nothing: every rank takes the memory that it needs before anything travels, and if one lacks it, all throw. What is there
   * goes only when all has arrived; a collective that fails half-way leaves every expert where it was.
   *
   * @param moves The stores of layers on the same ranks; their new seats; and how many experts of this rank, those of the last seats, have their
   * moments in host memory from then on (as before, if that is not given).
   * @param options `staging_bytes`: size of each of the exchange's two buffers. @default {{staging_bytes: 32 MiB}}
   * @returns Bytes that this rank has sent.
   * @throws {RangeError} If seats are not valid.
   * @throws {OutOfMemoryError} On all ranks, if the memory of one does not suffice.
   */
  static async moveAll(
    moves: readonly {
      readonly store: ExpertStore;
      readonly seats: PlacementPlan["seats"];
      readonly offload?: number;
    }[],
    options: { readonly staging_bytes?: number } = {},
  ): Promise<number> {
    if (moves.length === 0) return 0;
    const { comm, device } = moves[0].store.#options;
    const seatings = moves.map(({ store, seats, offload }) => store.#plan(seats, offload));
    using taken = new DisposableStack();
    using failed = zeros(device, [1], "f64"); // taken before memory may be short
    let failure: unknown = null, exchange: StateExchange | null = null;
    try {
      for (const seating of seatings) seating.takeMemory(taken);
      const transfers = seatings.flatMap((seating) => seating.transfers());
      exchange = new StateExchange(comm, device, transfers, options.staging_bytes);
    } catch (error) {
      failure = error;
    }
    using exchanges = exchange;
    await agree(comm, failure, failed);
    await exchanges!.run();
    for (const seating of seatings) await seating.convert();
    taken.move(); // what was taken is the experts' from here on
    moves.forEach(({ store, seats, offload }, i) => store.#settle(seatings[i], seats, offload));
    return exchanges!.bytes;
  }

  #plan(seats: PlacementPlan["seats"], offload: number = this.#offloaded): Seating {
    const { comm, experts } = this.#options;
    checkSeats(seats, comm.size);
    return new Seating({
      rank: comm.rank,
      memory: this.#memory,
      held: new Map(this.#seated.map(({ id, memory }) => [id, memory])),
      before: this.#holders,
      after: holdersOf(seats, experts),
      seats,
      holdsMoments: this.#holdsMoments,
      offload: checkOffload(offload),
    });
  }

  #settle(
    seating: Seating,
    seats: PlacementPlan["seats"],
    offload: number = this.#offloaded,
  ): void {
    this.#seats = seats;
    this.#holders = holdersOf(seats, this.#options.experts);
    this.#offloaded = offload;
    this.#sit([...seating.finish()].map(([id, memory]) => this.#seat(id, memory)));
  }

  /**
   * Makes the experts hold AdamW's moments, from zero, and take them along when they move; or frees them. All ranks call it together.
   *
   * @param hold Whether they shall. `parameters` changes.
   * @param options `offload`: how many experts of this rank, those of the last seats, have them in host memory. @default {{offload: 0}}
   */
  holdMoments(hold: boolean, options: { readonly offload?: number } = {}): void {
    const offloaded = checkOffload(options.offload ?? 0);
    using undo = new DisposableStack();
    const made = this.#seated.map(({ memory }, seat) => {
      if (!hold) return null;
      const onHost = seat >= this.#seated.length - offloaded;
      const moments = undo.use(memory.takeMoments(onHost ? "host" : "device"));
      moments.clear();
      return moments;
    });
    undo.move();
    this.#seated.forEach(({ memory }, seat) => {
      memory.moments?.[Symbol.dispose]();
      memory.moments = made[seat];
    });
    this.#holdsMoments = hold;
    this.#offloaded = offloaded;
    this.#sit(this.#seated.map(({ id, memory }) => this.#seat(id, memory)));
  }

  /** Resolves once no copy to or from host memory is under way: before moments there are freed. */
  async settle(): Promise<void> {
    for (const { memory: { moments } } of this.#seated) {
      if (moments?.place === "host") await moments.settle();
    }
  }

  /** Frees what the experts hold. Communicators of replicas end with the world. */
  [Symbol.dispose](): void {
    for (const { memory } of this.#seated) memory[Symbol.dispose]();
    this.#sit([]);
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

  #seat(id: number, memory: ExpertMemory): SeatedExpert {
    const { layer, width, hidden, activation } = this.#options;
    const { weights, moments } = memory;
    const rows = activation === "swiglu" ? 2 * hidden : hidden;
    const middle = rows * width;
    const matricesOf = (flat: Tensor): ExpertMatrices => ({
      up: flat.rows(0, middle).reshape(rows, width),
      down: flat.rows(middle, flat.size).reshape(width, hidden),
    });
    const matrices = matricesOf(weights);
    const resident = moments?.place === "device" ? moments.tensors : null;
    const first = resident && matricesOf(resident.moment1);
    const second = resident && matricesOf(resident.moment2);
    const residual = resident?.residual && matricesOf(resident.residual);
    const parameter = (part: string, matrix: "up" | "down", start: number, end: number) => {
      const columns = matrix === "up" ? width : hidden, before = matrix === "up" ? 0 : middle;
      return {
        name: `model.layers.${layer}.block_sparse_moe.experts.${id}.${part}.weight`,
        value: matrices[matrix].rows(start, end),
        get grad() {
          return matricesOf(memory.gradient)[matrix].rows(start, end);
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
        offloaded: moments?.place === "host"
          ? { memory, start: before + start * columns, end: before + end * columns }
          : undefined,
      };
    };
    const parameters = [parameter("w2", "down", 0, width), parameter("w1", "up", 0, hidden)];
    if (activation === "swiglu") parameters.push(parameter("w3", "up", hidden, 2 * hidden));
    return {
      id,
      memory,
      matrices,
      get gradients() {
        return matricesOf(memory.gradient);
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

function checkOffload(experts: number): number {
  if (Number.isSafeInteger(experts) && experts >= 0) return experts;
  throw new RangeError(
    `Cannot keep moments in host memory as the number of experts must be a whole number >= 0: current value is ${experts}`,
  );
}

/** All ranks go on, or all throw; `failed` is where they meet, f64 [1]. */
async function agree(comm: Communicator, failure: unknown, failed: Tensor): Promise<void> {
  if (comm.size > 1) {
    ops.fill(failed, failure === null ? 0 : 1);
    await comm.allReduce(failed).wait(failed.device.stream);
  }
  if (failure !== null) throw failure;
  const [count] = await failed.toArray();
  if (Number(count) > 0) {
    throw new OutOfMemoryError(
      `Cannot move experts as every rank must have memory for those that come: current value is ${count} without; nothing has moved`,
    );
  }
}
