// AdamW's moments of the replicated parameters, spread over the ranks (ZeRO, stage 1): each rank keeps those of its part of every micro-op,
// is given the sums of these gradients only, updates these weights only, and gets the others' back. Weights and gradients stay whole on
// every rank, and so does everything in a checkpoint. Not here: experts, which each rank has others of anyhow.

import type { Communicator } from "../collectives/types.ts";
import { type DType, newArray, type TypedArray } from "../tensor/dtype.ts";
import type { Device } from "../tensor/device.ts";
import * as ops from "../tensor/ops.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import type { CheckpointTensor } from "./checkpoint.ts";
import { groupOf } from "./graph.ts";
import type { MicroOp, MicroOpPart, Schedule, StepGraph } from "./hooks.ts";
import type { Moments, Parameter } from "./parameter.ts";

/**
 * Elements of a micro-op that each rank gets of a reduce-scatter: the same for all, so that the last ranks may get less, or none.
 *
 * @param microOp The micro-op.
 * @param ranks Number of ranks.
 * @returns The elements of one rank.
 */
export function pieceElements(microOp: MicroOp, ranks: number): number {
  return Math.ceil(elementsOf(microOp.parts) / ranks);
}

/**
 * The parts of a micro-op that a rank gets.
 *
 * @param microOp The micro-op.
 * @param rank The rank.
 * @param ranks Number of ranks.
 * @returns Parts of its parts, in order.
 */
export function pieceOf(microOp: MicroOp, rank: number, ranks: number): MicroOpPart[] {
  const piece = pieceElements(microOp, ranks), from = rank * piece, to = from + piece;
  const parts: MicroOpPart[] = [];
  let at = 0;
  for (const { gradient, start, end } of microOp.parts) {
    const first = start + Math.max(0, from - at), last = start + Math.min(end - start, to - at);
    if (first < last) parts.push({ gradient, start: first, end: last });
    at += end - start;
  }
  return parts;
}

/** What {@linkcode OptimizerShards} work with. */
export interface OptimizerShardsOptions {
  /** The step, alike on all ranks. */
  readonly graph: StepGraph;
  /** How its gradients are reduced. */
  readonly schedule: Schedule;
  /** All ranks. */
  readonly comm: Communicator;
  /** Where the weights are. */
  readonly device: Device;
  /** The model's parameters; those of group `world` are sharded. */
  readonly parameters: readonly Parameter[];
}

/** A part of a parameter that this rank updates, as a parameter of its own. */
interface Shard extends Parameter {
  /** The parameter. */
  readonly of: Parameter;
  /** First element. */
  readonly start: number;
  /** Element after the last. */
  readonly end: number;
}

/** Which of AdamW's tensors. */
const KINDS = ["moment1", "moment2", "residual"] as const;
type Kind = (typeof KINDS)[number];

/** The parts of the replicated parameters that this rank updates. */
export class OptimizerShards {
  /** The parts, as parameters for an optimizer: flat views into the weights and gradients. */
  readonly parameters: readonly Parameter[];
  readonly #options: OptimizerShardsOptions;
  /** The parameters by the node of their gradient. */
  readonly #byNode = new Map<number, Parameter>();
  /** The micro-ops of these parameters. */
  readonly #microOps: readonly MicroOp[];
  readonly #shards: readonly Shard[];

  /**
   * Cuts the parameters up.
   *
   * @param options The step's schedule, the ranks and the parameters.
   */
  constructor(options: OptimizerShardsOptions) {
    const { graph, schedule, comm, parameters } = options;
    this.#options = options;
    const named = new Map(parameters.map((parameter) => [parameter.name, parameter]));
    for (const node of graph.nodes) {
      if (node.kind === "gradient" && node.group === "world") {
        this.#byNode.set(node.id, named.get(node.name)!);
      }
    }
    this.#microOps = schedule.microOps.filter((op) => groupOf(graph, op) === "world");
    this.#shards = this.#microOps.flatMap((microOp) =>
      pieceOf(microOp, comm.rank, comm.size).map((part) => this.#shard(part))
    );
    this.parameters = this.#shards;
  }

  #shard({ gradient, start, end }: MicroOpPart): Shard {
    const of = this.#byNode.get(gradient)!;
    const { name, overwrites, group, decay } = of;
    const value = flat(of.value).rows(start, end), grad = flat(of.grad).rows(start, end);
    return {
      name: `${name}[${start}:${end}]`,
      value,
      grad,
      overwrites,
      group,
      decay,
      of,
      start,
      end,
    };
  }

  /**
   * After the update: gives every rank the weights that others have updated, and sets to zero the gradients that a backward pass adds to. All
   * ranks call it together.
   */
  async gatherWeights(): Promise<void> {
    const { comm, device } = this.#options;
    const values = ({ gradient, start, end }: MicroOpPart) =>
      flat(this.#parameterOf(gradient).value).rows(start, end);
    for (const parameter of this.#byNode.values()) {
      if (!parameter.overwrites) ops.fill(parameter.grad, 0);
    }
    for (const microOp of this.#microOps) {
      if (microOp.parts.length > 1) {
        await this.#gather(microOp, ({ value }) => value.dtype, values, (part, tensor) => {
          ops.copy(tensor, values(part));
        });
        continue;
      }
      const [part] = microOp.parts, whole = values(part);
      const counts = this.#pieces(microOp).map((parts) => elementsOf(parts));
      const [own] = pieceOf(microOp, comm.rank, comm.size);
      const mine = own ? values(own) : whole.rows(whole.size, whole.size);
      await comm.allGatherV(mine, whole, counts).wait(device.stream);
    }
  }

  /**
   * The optimizer's tensors for loading: each rank takes its parts of what a file has whole.
   *
   * @param momentsOf The moments of a part.
   * @returns One tensor per parameter and kind; they cannot be read.
   */
  forLoading(momentsOf: (shard: Parameter) => Moments): CheckpointTensor[] {
    return this.#tensors((kind, parameter) => ({
      read: () => Promise.reject(new Error(`Cannot read ${parameter.name} as it is in parts`)),
      write: (array) => {
        for (const shard of this.#shards) {
          if (shard.of !== parameter) continue;
          const tensor = momentsOf(shard)[kind]!;
          tensor.device.write(array.slice(shard.start, shard.end) as TypedArray, tensor);
        }
      },
    }));
  }

  /**
   * The optimizer's tensors for saving: gathered, each whole on the host of one rank. All ranks call it together.
   *
   * @param momentsOf The moments of a part.
   * @returns One tensor per parameter and kind.
   */
  async forSaving(momentsOf: (shard: Parameter) => Moments): Promise<CheckpointTensor[]> {
    const { comm } = this.#options;
    const own = new Map(this.#shards.map((shard) => [`${shard.of.name} ${shard.start}`, shard]));
    const arrays = new Map<string, TypedArray>();
    for (const parameter of this.#byNode.values()) {
      if (this.#ownerOf(parameter) !== comm.rank) continue;
      for (const kind of KINDS) {
        const dtype = dtypeOf(kind, parameter);
        if (dtype) arrays.set(`${parameter.name}.${kind}`, newArray(dtype, parameter.value.size));
      }
    }
    for (const kind of KINDS) {
      const mine = ({ gradient, start }: MicroOpPart) =>
        momentsOf(own.get(`${this.#parameterOf(gradient).name} ${start}`)!)[kind]!;
      for (const microOp of this.#microOps) {
        const dtype = (parameter: Parameter) => dtypeOf(kind, parameter);
        await this.#gather(microOp, dtype, mine, async ({ gradient, start }, tensor) => {
          const array = arrays.get(`${this.#parameterOf(gradient).name}.${kind}`);
          (array as Float32Array | undefined)?.set(await tensor.toArray() as Float32Array, start);
        });
      }
    }
    return this.#tensors((kind, { name }) => ({
      read: () => Promise.resolve(arrays.get(`${name}.${kind}`)!),
      write: () => Promise.reject(new Error(`Cannot write ${name} as it was gathered to be read`)),
    }));
  }

  /** Brings one tensor of every part of a micro-op to all ranks, one dtype after the other; parts without a dtype are left out. */
  async #gather(
    microOp: MicroOp,
    dtype: (parameter: Parameter) => DType | null,
    own: (part: MicroOpPart) => Tensor,
    take: (part: MicroOpPart, tensor: Tensor) => void | Promise<void>,
  ): Promise<void> {
    const { comm, device } = this.#options;
    const typeOf = ({ gradient }: MicroOpPart) => dtype(this.#parameterOf(gradient));
    for (const type of new Set(microOp.parts.map(typeOf))) {
      if (type === null) continue;
      const pieces = this.#pieces(microOp).map((parts) => parts.filter((p) => typeOf(p) === type));
      const counts = pieces.map(elementsOf);
      using all = empty(device, [counts.reduce((a, b) => a + b, 0)], type);
      using mine = empty(device, [counts[comm.rank]], type);
      let at = 0;
      for (const part of pieces[comm.rank]) {
        ops.copy(own(part), mine.rows(at, at += part.end - part.start));
      }
      await comm.allGatherV(mine, all, counts).wait(device.stream);
      at = 0;
      for (const part of pieces.flat()) await take(part, all.rows(at, at += part.end - part.start));
    }
  }

  #tensors(
    access: (kind: Kind, parameter: Parameter) => Pick<CheckpointTensor, "read" | "write">,
  ): CheckpointTensor[] {
    return [...this.#byNode.values()].flatMap((parameter) =>
      KINDS.flatMap((kind) => {
        const dtype = dtypeOf(kind, parameter), { name, value: { shape } } = parameter;
        if (!dtype) return [];
        const owner = this.#ownerOf(parameter);
        return [{ name: `${name}.${kind}`, owner, dtype, shape, ...access(kind, parameter) }];
      })
    );
  }

  /** The rank that writes a parameter's moments: all take turns, as each must hold what it writes in memory. */
  #ownerOf(parameter: Parameter): number {
    return [...this.#byNode.values()].indexOf(parameter) % this.#options.comm.size;
  }

  #pieces(microOp: MicroOp): MicroOpPart[][] {
    const { size } = this.#options.comm;
    return Array.from({ length: size }, (_, rank) => pieceOf(microOp, rank, size));
  }

  #parameterOf(node: number): Parameter {
    return this.#byNode.get(node)!;
  }
}

function dtypeOf(kind: Kind, { value: { dtype } }: Parameter): DType | null {
  if (kind !== "residual") return dtype === "f64" ? "f64" : "f32";
  return dtype === "bf16" ? "i16" : null;
}

/**
 * Elements of some parts.
 *
 * @param parts The parts.
 * @returns Their sum.
 */
export function elementsOf(parts: readonly MicroOpPart[]): number {
  return parts.reduce((sum, { start, end }) => sum + end - start, 0);
}

function flat(x: Tensor): Tensor {
  return x.reshape(x.size);
}
