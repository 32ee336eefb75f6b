// What holds for every scheduler whatever the ranks' delays: nothing waits forever, every micro-op goes once, and none goes that the
// scheduler's rule forbids. Ranks are modelled by the `ScheduleRun` that the engine has; what they do next is chosen at random, or in every
// possible order. An all-to-all ends once all ranks have started it, a micro-op once all have launched it. Times are not modelled.

import assert from "node:assert/strict";
import fc from "fast-check";
import { buildStepGraph, type GradientOutline, type StepOutline } from "../../moe/graph.ts";
import type {
  Boundary,
  CollectiveScheduler,
  NodeId,
  Schedule,
  StepGraph,
} from "../../moe/hooks.ts";
import { checkSchedule, ScheduleRun } from "../../moe/schedule.ts";
import { createScheduler, SCHEDULER_NAMES, type SchedulerOptions } from "./schedulers.ts";

type Item =
  | Exclude<Boundary, { kind: "allToAllStarts" | "allToAllEnds" | "microOpEnds" }>
  | { readonly kind: "allToAll"; readonly node: NodeId };

/** What the host of every rank does in a step, in order. */
function programOf({ nodes }: StepGraph): Item[] {
  const items: Item[] = [];
  let moe = -1; // the MoE layer whose backward pass runs
  for (const node of nodes) {
    if (node.kind === "allToAll") items.push({ kind: "allToAll", node: node.id });
    else if (node.kind === "gradient") {
      items.push({ kind: "gradientReady", gradient: node.id });
    } else if (node.phase === "backward" && node.name === "combine") {
      items.push({ kind: "combineBackwardStarts", layer: moe = node.layer });
    } else if (node.phase === "backward" && node.layer === moe && node.name === "attention") {
      items.push({ kind: "layerBackwardEnds", layer: moe });
    }
  }
  return [...items, { kind: "stepEnds" }];
}

/** What a scheduler must not do, seen where a micro-op has been launched. */
interface Rule {
  /** One at a time, and none while an all-to-all runs. */
  readonly alone?: boolean;
  /** None while an all-to-all is imminent. */
  readonly foresees?: boolean;
  /** None inside a MoE layer. */
  readonly outside?: boolean;
}

const RULES: Readonly<Record<string, Rule>> = {
  fifo: {},
  outside: { outside: true },
  priority: { alone: true },
  lina: { alone: true, foresees: true },
};

/** One rank: its place in the program and its micro-ops. */
class Rank {
  at = 0;
  /** What it waits for before it goes on. */
  waits: "nothing" | "microOps" | "allToAll" | "end" | "done" = "nothing";
  allToAlls = 0;
  launched = 0;
  ended = 0;
  readonly #run: ScheduleRun;
  #inAllToAll = false;
  #imminent = false;
  #inside = false;

  constructor(
    scheduler: CollectiveScheduler,
    readonly schedule: Schedule,
    readonly rule: Rule,
  ) {
    this.#run = new ScheduleRun(scheduler, schedule);
  }

  tell(boundary: Boundary): void {
    const { kind } = boundary;
    if (kind === "combineBackwardStarts") this.#imminent = this.#inside = true;
    if (kind === "layerBackwardEnds") this.#inside = false;
    if (kind === "allToAllStarts") this.#imminent = false;
    if (kind === "allToAllStarts" || kind === "allToAllEnds") {
      this.#inAllToAll = kind === "allToAllStarts";
    }
    if (kind === "microOpEnds") this.ended++;
    for (const microOp of this.#run.on(boundary)) {
      assert.equal(microOp, this.schedule.microOps[this.launched++]);
      const { alone, foresees, outside } = this.rule;
      if (alone && kind !== "stepEnds") {
        assert.ok(this.launched - this.ended <= 1, "two micro-ops run");
        assert.ok(!this.#inAllToAll, "a micro-op goes beside an all-to-all");
      }
      if (foresees) assert.ok(!this.#imminent, "a micro-op goes before an imminent all-to-all");
      if (outside) assert.ok(!this.#inside, "a micro-op goes inside a MoE layer");
    }
  }
}

/** Several ranks that run one step. */
class Ranks {
  readonly ranks: readonly Rank[];
  readonly #program: readonly Item[];

  constructor(
    size: number,
    readonly schedule: Schedule,
    program: readonly Item[],
    scheduler: CollectiveScheduler,
    rule: Rule,
  ) {
    this.#program = program;
    this.ranks = Array.from({ length: size }, () => new Rank(scheduler, schedule, rule));
  }

  /** Everything that is the same to the schedulers has the same key: they keep nothing between launches. */
  get key(): string {
    return this.ranks.map(({ at, waits, allToAlls, launched, ended }) =>
      `${at} ${waits} ${allToAlls} ${launched} ${ended}`
    ).join();
  }

  get done(): boolean {
    return this.ranks.every(({ waits }) => waits === "done");
  }

  /** Micro-ops that every rank has launched; they end in their order. */
  get #complete(): number {
    return Math.min(...this.ranks.map(({ launched }) => launched));
  }

  /** What can happen next: 2 r if rank r goes on, 2 r + 1 if it sees a micro-op to have ended. */
  actions(): number[] {
    const complete = this.#complete;
    return this.ranks.flatMap(({ waits, launched, ended, allToAlls }, rank) => {
      const goesOn = waits === "nothing" ||
        (waits === "allToAll"
          ? this.ranks.every((other) => other.allToAlls >= allToAlls)
          : waits !== "done" && complete >= launched);
      const sees = (waits === "nothing" || waits === "allToAll") &&
        ended < Math.min(launched, complete);
      return [...(goesOn ? [2 * rank] : []), ...(sees ? [2 * rank + 1] : [])];
    });
  }

  act(action: number): void {
    const rank = this.ranks[action >> 1];
    if (action % 2 === 1) return rank.tell({ kind: "microOpEnds" });
    const item = this.#program[rank.at];
    if (rank.waits === "end") rank.waits = "done";
    else if (item.kind !== "allToAll") {
      rank.tell(item);
      rank.at++;
      if (item.kind === "stepEnds") rank.waits = "end";
    } else if (rank.waits === "allToAll") {
      rank.tell({ kind: "allToAllEnds", node: item.node, chunk: 0 });
      rank.waits = "nothing";
      rank.at++;
    } else {
      // An exclusive schedule has the all-to-all wait for the rank's own micro-ops.
      if (rank.waits === "nothing") {
        rank.tell({ kind: "allToAllStarts", node: item.node, chunk: 0 });
      }
      const waits = this.schedule.exclusive && rank.waits === "nothing" &&
        rank.launched > rank.ended;
      rank.waits = waits ? "microOps" : "allToAll";
      if (!waits) rank.allToAlls++;
    }
  }

  assertDone(): void {
    assert.ok(this.done, `deadlock: ${this.key}`);
    for (const { launched } of this.ranks) assert.equal(launched, this.schedule.microOps.length);
  }
}

const gradients = fc.array(
  fc.record({
    elements: fc.integer({ min: 0, max: 3000 }),
    elementBytes: fc.constantFrom(2, 4),
    group: fc.constantFrom("world" as const, "replicas" as const),
  }),
  { maxLength: 4 },
).map((list) => list.map((g, i): GradientOutline => ({ ...g, name: `g${i}` })));

const outline: fc.Arbitrary<StepOutline> = fc.record({
  layers: fc.array(
    fc.record({
      moe: fc.option(fc.record({ allToAllBytes: fc.nat(1e6), experts: gradients }), {
        nil: undefined,
      }),
      feedForward: gradients,
      attention: gradients,
    }),
    { maxLength: 4 },
  ),
  head: gradients,
  embedding: gradients,
});

const sizes = fc.record({
  bucketBytes: fc.integer({ min: 1, max: 20_000 }),
  microOpBytes: fc.integer({ min: 16, max: 20_000 }),
});

Deno.test("schedulers: every plan reduces every element once, and is the same on every rank", () => {
  fc.assert(fc.property(outline, sizes, (outline, sizes) => {
    for (const name of SCHEDULER_NAMES) {
      const graph = buildStepGraph(outline), scheduler = createScheduler(name, sizes);
      const schedule = scheduler.plan(graph);
      checkSchedule(graph, schedule, scheduler.pace);
      assert.deepEqual(createScheduler(name, sizes).plan(buildStepGraph(outline)), schedule);
    }
  }));
});

/** Ranks of random delays run random steps; throws if one breaks the rule or deadlocks. */
function randomDelays(
  schedulerOf: (sizes: SchedulerOptions) => CollectiveScheduler,
  rule: Rule,
): void {
  // A rank's two delays: how seldom it goes on, and how seldom it looks.
  const delays = fc.array(fc.integer({ min: 1, max: 1000 }), { minLength: 4, maxLength: 8 });
  fc.assert(fc.property(outline, sizes, delays, fc.nat(), (outline, sizes, delays, seed) => {
    const graph = buildStepGraph(outline), scheduler = schedulerOf(sizes);
    const schedule = scheduler.plan(graph);
    const ranks = new Ranks(delays.length >> 1, schedule, programOf(graph), scheduler, rule);
    let state = seed;
    for (let actions = ranks.actions(); actions.length > 0; actions = ranks.actions()) {
      state = Math.imul(state, 1664525) + 1013904223 >>> 0;
      const weights = actions.map((action) => 1 / delays[action]);
      let at = state / 2 ** 32 * weights.reduce((a, b) => a + b, 0);
      const chosen = weights.findIndex((weight) => (at -= weight) < 0);
      ranks.act(actions.at(chosen)!);
    }
    ranks.assertDone();
  }));
}

/** A scheduler that launches by local clocks while all-to-alls wait for the micro-ops of their rank. */
function exclusive(inner: CollectiveScheduler): CollectiveScheduler {
  return {
    name: "broken",
    pace: inner.pace,
    plan: (graph) => ({ ...inner.plan(graph), exclusive: true }),
    launch: (boundary, state) => inner.launch(boundary, state),
  };
}

for (const name of SCHEDULER_NAMES) {
  Deno.test(`schedulers: ranks of random delays end their step, each micro-op in its place (${name})`, () => {
    randomDelays((sizes) => createScheduler(name, sizes), RULES[name]);
  });
}

Deno.test("schedulers: random delays find what an exclusive schedule with local clocks does", () => {
  for (const name of ["priority", "lina"] as const) {
    assert.throws(
      () => randomDelays((sizes) => exclusive(createScheduler(name, sizes)), RULES[name]),
      ({ cause }: Error) => /deadlock/.test((cause as Error).message),
    );
  }
});

/** A step of two backward all-to-alls and three micro-ops of 80 bytes: two before, one between. */
function smallStep(): { graph: StepGraph; program: Item[] } {
  const gradient = (name: string, elements: number) => {
    return { name, elements, elementBytes: 4, group: "world" as const };
  };
  const graph = buildStepGraph({
    layers: [{
      moe: { allToAllBytes: 1, experts: [gradient("experts", 20)] },
      feedForward: [],
      attention: [],
    }],
    head: [gradient("head", 40)],
    embedding: [],
  });
  // No gradient is ready in the forward pass.
  const program = programOf(graph).filter((item) => {
    const node = item.kind === "allToAll" ? graph.nodes[item.node] : null;
    return node?.kind !== "allToAll" || node.phase === "backward";
  });
  return { graph, program };
}

/** Tries every order of what ranks can do. Returns the number of states. @throws {AssertionError} At a deadlock or a broken rule. */
function everyOrder(size: number, scheduler: CollectiveScheduler, rule: Rule): number {
  const { graph, program } = smallStep();
  const schedule = scheduler.plan(graph);
  const seen = new Set<string>();
  const pending: number[][] = [[]];
  for (let path = pending.pop(); path; path = pending.pop()) {
    const ranks = new Ranks(size, schedule, program, scheduler, rule);
    for (const action of path) ranks.act(action);
    if (seen.has(ranks.key)) continue;
    seen.add(ranks.key);
    const actions = ranks.actions();
    if (actions.length === 0) ranks.assertDone();
    for (const action of actions) pending.push([...path, action]);
  }
  return seen.size;
}

const SMALL = { microOpBytes: 80, bucketBytes: 80 };

for (const name of SCHEDULER_NAMES) {
  Deno.test(`schedulers: no order of events of a small step breaks the rule or deadlocks (${name})`, () => {
    const scheduler = createScheduler(name, SMALL);
    assert.ok(everyOrder(2, scheduler, RULES[name]) > 50);
    assert.ok(everyOrder(3, scheduler, RULES[name]) > 500);
  });
}

Deno.test("schedulers: the check of every order finds broken ones", () => {
  const { graph } = smallStep();
  const lina = createScheduler("lina", SMALL);
  assert.equal(lina.plan(graph).microOps.length, 3);
  /** Lina with another rule of launching. */
  const broken = (change: Partial<CollectiveScheduler>): CollectiveScheduler => ({
    name: "broken",
    pace: lina.pace,
    plan: (graph) => lina.plan(graph),
    launch: (boundary, state) => lina.launch(boundary, state),
    ...change,
  });
  const check = (change: Partial<CollectiveScheduler>) => () =>
    everyOrder(2, broken(change), RULES.lina);
  check({})();
  // Exclusive by local clocks: one rank holds its all-to-all back for a micro-op that the other launches only after it.
  for (const name of ["priority", "lina"] as const) {
    const scheduler = exclusive(createScheduler(name, SMALL));
    assert.throws(() => everyOrder(2, scheduler, RULES[name]), /deadlock/);
  }
  assert.throws(
    check({ launch: (boundary, state) => lina.launch(boundary, { ...state, imminent: false }) }),
    /before an imminent all-to-all/,
  );
  assert.throws(
    check({ launch: (boundary, state) => lina.launch(boundary, { ...state, allToAlls: 0 }) }),
    /beside an all-to-all/,
  );
  assert.throws(
    check({ launch: (boundary, state) => lina.launch(boundary, { ...state, running: 0 }) }),
    /two micro-ops run/,
  );
  const late: CollectiveScheduler["launch"] = (boundary, state) =>
    boundary.kind === "stepEnds" ? 0 : lina.launch(boundary, state);
  assert.throws(check({ launch: late }), /their number must lie in/);
});
