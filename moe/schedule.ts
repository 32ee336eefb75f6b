// Runs a schedule over the boundaries of a step: keeps what is ready, asks the scheduler, and says which micro-ops go now. Pure
// bookkeeping on plain data: the training engine and a simulator drive the very same object. No communication here.

import { reducedGradients } from "./graph.ts";
import type {
  Boundary,
  CollectiveScheduler,
  MicroOp,
  NodeId,
  Schedule,
  StepGraph,
} from "./hooks.ts";

/**
 * Checks that a schedule reduces every element of every gradient exactly once, and asks for nothing that cannot be done.
 *
 * @param graph The step.
 * @param schedule What a scheduler planned for it.
 * @param pace Pace of the scheduler.
 * @throws {RangeError} If an element is missing, doubled or outside its gradient (names the gradient), if a micro-op mixes groups of ranks,
 * if a layer's number of chunks is impossible, or if a schedule of pace `device` is exclusive or packs gradients together.
 */
export function checkSchedule(
  graph: StepGraph,
  schedule: Schedule,
  pace: CollectiveScheduler["pace"] = "program",
): void {
  const layers = new Set<number>();
  for (const node of graph.nodes) if (node.kind === "allToAll") layers.add(node.layer);
  for (const [layer, chunks] of schedule.chunks) {
    if (!layers.has(layer)) {
      throw new RangeError(
        `Cannot run a layer in chunks as it must have all-to-alls: current value is layer ${layer}`,
      );
    }
    if (!(Number.isSafeInteger(chunks) && chunks >= 1)) {
      throw new RangeError(
        `Cannot run layer ${layer} in chunks as their number must be a whole number >= 1: current value is ${chunks}`,
      );
    }
  }
  if (pace === "device" && schedule.exclusive) {
    throw new RangeError(
      `Cannot run an exclusive schedule as its pace must be program: current value is ${pace}`,
    );
  }
  const gradients = reducedGradients(graph);
  const ranges = new Map<NodeId, [number, number][]>(gradients.map(({ id }) => [id, []]));
  const groups = new Map(gradients.map(({ id, group }) => [id, group]));
  schedule.microOps.forEach((microOp, i) => {
    if (microOp.parts.length === 0) {
      throw new RangeError(`Cannot run micro-op ${i} as it must have parts`);
    }
    if (pace === "device" && microOp.parts.length > 1) {
      throw new RangeError(
        `Cannot run micro-op ${i} with pace device as it must have one part: current value is ${microOp.parts.length}`,
      );
    }
    for (const { gradient, start, end } of microOp.parts) {
      const list = ranges.get(gradient);
      if (!list) {
        throw new RangeError(
          `Cannot run micro-op ${i} as its parts must be of gradients: current value is node ${gradient}`,
        );
      }
      if (groups.get(gradient) !== groups.get(microOp.parts[0].gradient)) {
        throw new RangeError(
          `Cannot run micro-op ${i} as its gradients must be reduced over the same ranks: current value is world and replicas`,
        );
      }
      list.push([start, end]);
    }
  });
  for (const { id, name, elements } of gradients) {
    let covered = 0;
    for (const [start, end] of ranges.get(id)!.sort((a, b) => a[0] - b[0])) {
      if (start !== covered || end <= start) {
        throw new RangeError(
          `Cannot reduce ${name} as its parts must follow one another from ${covered}: current value is ${start}..${end}`,
        );
      }
      covered = end;
    }
    if (covered !== elements) {
      throw new RangeError(
        `Cannot reduce ${name} as its parts must cover ${elements} elements: current value is ${covered}`,
      );
    }
  }
}

/** One step under a schedule. */
export class ScheduleRun {
  /** What the scheduler planned. */
  readonly schedule: Schedule;
  readonly #scheduler: CollectiveScheduler;
  /** Gradients of each micro-op that are not ready yet. */
  readonly #missing: number[];
  /** Micro-ops that wait for a gradient. */
  readonly #waiting = new Map<NodeId, number[]>();
  #next = 0;
  #ready = 0;
  #running = 0;
  #allToAlls = 0;
  #imminent = false;
  /** The last chunk of the all-to-all that is imminent. */
  #lastChunk = 0;
  #insideMoe = false;

  /**
   * Begins a step.
   *
   * @param scheduler Decides when to launch.
   * @param schedule What it planned.
   */
  constructor(scheduler: CollectiveScheduler, schedule: Schedule) {
    this.#scheduler = scheduler;
    this.schedule = schedule;
    this.#missing = schedule.microOps.map((microOp, i) => {
      const gradients = new Set(microOp.parts.map((part) => part.gradient));
      for (const gradient of gradients) {
        const list = this.#waiting.get(gradient);
        if (list) list.push(i);
        else this.#waiting.set(gradient, [i]);
      }
      return gradients.size;
    });
  }

  /** Micro-ops that have not been launched. */
  get left(): number {
    return this.schedule.microOps.length - this.#next;
  }

  /** Gradients that have not become ready, by node. */
  get unready(): readonly NodeId[] {
    return [...this.#waiting.keys()];
  }

  /**
   * Something has happened. With pace `program` the scheduler hears nothing of what is running now.
   *
   * @param boundary What.
   * @returns The micro-ops to launch now, in this order.
   * @throws {RangeError} If the scheduler asks for more than is ready, or keeps something back at the step's end.
   */
  on(boundary: Boundary): readonly MicroOp[] {
    const paced = this.#scheduler.pace === "device";
    switch (boundary.kind) {
      case "gradientReady":
        for (const i of this.#waiting.get(boundary.gradient) ?? []) this.#missing[i]--;
        this.#waiting.delete(boundary.gradient);
        while (this.#missing[this.#next + this.#ready] === 0) this.#ready++;
        break;
      case "allToAllStarts":
        this.#allToAlls++;
        if (boundary.chunk >= this.#lastChunk) this.#imminent = false;
        break;
      case "allToAllEnds":
        this.#allToAlls--;
        break;
      case "combineBackwardStarts":
        this.#imminent = true;
        this.#lastChunk = (this.schedule.chunks.get(boundary.layer) ?? 1) - 1;
        this.#insideMoe = true;
        break;
      case "layerBackwardEnds":
        this.#imminent = false;
        this.#insideMoe = false;
        break;
      case "microOpEnds":
        this.#running--;
        if (!paced) return [];
        break;
    }
    const count = this.#scheduler.launch(boundary, {
      schedule: this.schedule,
      next: this.#next,
      ready: this.#ready,
      running: paced ? this.#running : 0,
      allToAlls: paced ? this.#allToAlls : 0,
      imminent: this.#imminent,
      insideMoe: this.#insideMoe,
    });
    const least = boundary.kind === "stepEnds" ? this.left : 0;
    if (!(Number.isInteger(count) && count >= 0 && count <= this.#ready) || count < least) {
      throw new RangeError(
        `Cannot launch micro-ops of "${this.#scheduler.name}" at ${boundary.kind} as their number must lie in ${least}..${this.#ready}: current value is ${count}`,
      );
    }
    const launched = this.schedule.microOps.slice(this.#next, this.#next + count);
    this.#next += count;
    this.#ready -= count;
    this.#running += count;
    return launched;
  }
}
