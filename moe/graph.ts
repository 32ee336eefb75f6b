// The step graph of a model: what one forward and backward pass computes, exchanges and reduces, in program order. Made from a
// plain outline, so that a simulator can make one without a model. Gradient accumulation is not in it: only the last pass of a
// step reduces gradients.

import type {
  AllToAllNode,
  ComputeNode,
  GradientNode,
  MicroOp,
  NodeId,
  StepGraph,
  StepNode,
} from "./hooks.ts";

/** A gradient, as an outline has it. */
export interface GradientOutline {
  /** The parameter's name. */
  readonly name: string;
  /** Elements. */
  readonly elements: number;
  /** Bytes of one element. */
  readonly elementBytes: number;
  /** Over which ranks it is reduced. */
  readonly group: "world" | "replicas";
}

/** A layer, as an outline has it; gradients are listed in the order in which they become ready. */
export interface LayerOutline {
  /** Experts, if the feed-forward part is a mixture. */
  readonly moe?: {
    /** Bytes that a rank sends to others in one all-to-all when load is balanced. */
    readonly allToAllBytes: number;
    /** Gradients of the seats where they are reduced among replicas, ready before the dispatch's backward all-to-all. */
    readonly experts: readonly GradientOutline[];
  };
  /** Gradients of the rest of the feed-forward part: gate, shared experts, dense network. */
  readonly feedForward: readonly GradientOutline[];
  /** Gradients of attention and norms. */
  readonly attention: readonly GradientOutline[];
}

/** A model, as far as its communication goes. */
export interface StepOutline {
  /** Layers from the first. */
  readonly layers: readonly LayerOutline[];
  /** Gradients that are ready before the last layer's backward pass: head, last norm. */
  readonly head: readonly GradientOutline[];
  /** Gradients that are ready last: the embedding. */
  readonly embedding: readonly GradientOutline[];
}

/**
 * The graph of one forward and backward pass.
 *
 * @param outline The model's layers and gradients.
 * @returns The graph; the same outline gives the same graph.
 */
export function buildStepGraph(outline: StepOutline): StepGraph {
  const nodes: StepNode[] = [];
  let last: readonly NodeId[] = [];
  const compute = (layer: number, phase: ComputeNode["phase"], name: string) => {
    nodes.push({ kind: "compute", id: nodes.length, layer, phase, name, after: last });
    last = [nodes.length - 1];
  };
  const allToAll = (
    layer: number,
    phase: AllToAllNode["phase"],
    role: AllToAllNode["role"],
    bytes: number,
  ) => {
    nodes.push({ kind: "allToAll", id: nodes.length, layer, phase, role, bytes, after: last });
    last = [nodes.length - 1];
  };
  const gradients = (list: readonly GradientOutline[]) => {
    for (const { name, elements, elementBytes, group } of list) {
      const bytes = elements * elementBytes;
      nodes.push({ kind: "gradient", id: nodes.length, name, elements, bytes, group, after: last });
    }
  };

  compute(-1, "forward", "embedding");
  outline.layers.forEach(({ moe }, layer) => {
    compute(layer, "forward", "attention");
    if (!moe) return compute(layer, "forward", "feedForward");
    compute(layer, "forward", "gate");
    allToAll(layer, "forward", "dispatch", moe.allToAllBytes);
    compute(layer, "forward", "experts");
    allToAll(layer, "forward", "combine", moe.allToAllBytes);
    compute(layer, "forward", "combine");
  });
  compute(-1, "forward", "head");
  compute(-1, "backward", "head");
  gradients(outline.head);
  for (let layer = outline.layers.length - 1; layer >= 0; layer--) {
    const { moe, feedForward, attention } = outline.layers[layer];
    if (moe) {
      compute(layer, "backward", "combine");
      allToAll(layer, "backward", "combine", moe.allToAllBytes);
      compute(layer, "backward", "experts");
      gradients(moe.experts);
      allToAll(layer, "backward", "dispatch", moe.allToAllBytes);
      compute(layer, "backward", "gate");
    } else compute(layer, "backward", "feedForward");
    gradients(feedForward);
    compute(layer, "backward", "attention");
    gradients(attention);
  }
  compute(-1, "backward", "embedding");
  gradients(outline.embedding);
  return { nodes };
}

/**
 * The gradients that are reduced, over the world or among replicas, in the order in which they become ready.
 *
 * @param graph The graph.
 * @returns Its gradient nodes.
 */
export function reducedGradients(graph: StepGraph): GradientNode[] {
  return graph.nodes.filter((node) => node.kind === "gradient");
}

/**
 * Name of the gradient of a seat: the flat block [up | down] of whichever expert sits there. Ranks that hold the same experts have the same
 * seats.
 *
 * @param layer The layer.
 * @param seat The seat, from 0.
 * @returns The name of its node.
 */
export function seatGradientName(layer: number, seat: number): string {
  return `model.layers.${layer}.block_sparse_moe.seats.${seat}`;
}

/**
 * Over which ranks a micro-op is reduced.
 *
 * @param graph The step.
 * @param microOp Of a schedule that fits the step.
 * @returns The group of its gradients.
 */
export function groupOf(graph: StepGraph, { parts }: MicroOp): GradientNode["group"] {
  const node = graph.nodes[parts[0].gradient];
  return node.kind === "gradient" ? node.group : "world";
}

/**
 * Name of a micro-op for readers.
 *
 * @param graph The step.
 * @param microOp Of a schedule for it.
 * @returns The gradient's name, with the elements if it is a part, or the first gradient's and how many follow.
 * @throws {RangeError} If a part is of something else than a gradient of the step.
 */
export function microOpName(graph: StepGraph, { parts }: MicroOp): string {
  const { gradient, start, end } = parts[0];
  const node = graph.nodes[gradient];
  if (node?.kind !== "gradient") {
    throw new RangeError(
      `Cannot name a micro-op as its parts must be gradients: current value is node ${gradient}`,
    );
  }
  const whole = start === 0 && end === node.elements;
  const first = whole ? node.name : `${node.name} ${start}..${end}`;
  return parts.length === 1 ? first : `${first} and ${parts.length - 1} more`;
}
