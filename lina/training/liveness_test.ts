// What holds for every scheduler whatever the ranks' delays: nothing waits forever, every micro-op goes once, and none goes that the
// scheduler's rule forbids. Ranks are modelled by the `ScheduleRun` that the engine has; what they do next is chosen at random, or in every
// possible order. An all-to-all ends once all ranks have started it, a micro-op once all have launched it. Times are not modelled.

import assert from "node:assert/strict";
import fc from "fast-check";
import {
  buildStepGraph,
  type GradientOutline,
  groupOf,
  type StepOutline,
} from "../../moe/graph.ts";
import type {
  Boundary,
  CollectiveScheduler,
  NodeId,
  Schedule,
  StepGraph,
  StepNode,
} from "../../moe/hooks.ts";
import { checkSchedule, ScheduleRun } from "../../moe/schedule.ts";
import { createScheduler, SCHEDULER_NAMES, type SchedulerOptions } from "./schedulers.ts";

/** What the program of every rank does in a step, in order. All-to-alls are numbered as they start. */
type Item =
  | { readonly kind: "tell"; readonly boundary: Boundary }
  | { readonly kind: "start" | "wait"; readonly number: number; readonly boundary: Boundary };

/** The program; a layer's all-to-alls go in chunks as `moe_layer.ts` sends them: the first ones of all chunks, then chunk by chunk. */
function programOf({ nodes }: StepGraph, { chunks }: Schedule): Item[] {
  const items: Item[] = [];
  let number = 0;
  let moe = -1; // the MoE layer whose backward pass runs
  const numbers = new Map<string, number>();
  const start = (node: NodeId, chunk: number) => {
    numbers.set(`${node} ${chunk}`, number);
    items.push({ kind: "start", number, boundary: { kind: "allToAllStarts", node, chunk } });
    number++;
  };
  const wait = (node: NodeId, chunk: number) => {
    const number = numbers.get(`${node} ${chunk}`)!;
    items.push({ kind: "wait", number, boundary: { kind: "allToAllEnds", node, chunk } });
  };
  const tell = (boundary: Boundary) => items.push({ kind: "tell", boundary });
  /** Said once the second all-to-all is under way: what the graph has between the two. */
  let between: (() => void)[] = [];
  let first: NodeId | null = null;
  for (const node of nodes) {
    if (node.kind === "allToAll") {
      const count = chunks.get(node.layer) ?? 1;
      const all = Array.from({ length: count }, (_, chunk) => chunk);
      if (first === null) {
        for (const chunk of all) start(node.id, chunk);
        first = node.id;
        continue;
      }
      for (const chunk of all) {
        wait(first, chunk);
        if (chunk === count - 1) { for (const say of between) say(); }
        start(node.id, chunk);
        if (chunk > 0) wait(node.id, chunk - 1);
      }
      wait(node.id, count - 1);
      first = null;
      between = [];
      continue;
    }
    let boundary: Boundary | null = null;
    if (node.kind === "gradient") boundary = { kind: "gradientReady", gradient: node.id };
    else if (node.phase === "backward" && node.name === "combine") {
      boundary = { kind: "combineBackwardStarts", layer: moe = node.layer };
    } else if (node.phase === "backward" && node.layer === moe && node.name === "attention") {
      boundary = { kind: "layerBackwardEnds", layer: moe };
    }
    if (boundary) first === null ? tell(boundary) : between.push(() => tell(boundary));
  }
  tell({ kind: "stepEnds" });
  return items;
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

/** The rule of a policy, pipelined or not. */
const ruleOf = (name: string): Rule => RULES[name.replace("+pipeline", "")] ?? {};

/**
 * Who tells a rank's scheduler what. `host`: the program itself, as it comes there; it waits where it must. `pump`: the program is a device's,
 * which the host has given all of it, and what it passes is told later, by the rules of `moe/pump.ts`.
 */
type Telling = "host" | "pump";

/** What all ranks of a step have in common. */
interface Common {
  readonly schedule: Schedule;
  readonly program: readonly Item[];
  readonly scheduler: CollectiveScheduler;
  readonly rule: Rule;
  readonly telling: Telling;
  /** Micro-ops that go over all ranks, and over those with the same experts. */
  readonly groups: Readonly<Record<"world" | "replicas", readonly number[]>>;
  /** Place of each micro-op among those of its group. */
  readonly places: readonly number[];
  /** Ranks that have the same experts: rank r's are those that leave the same rest. */
  readonly perGroup: number;
}

/** One rank: its place in the program and its micro-ops. */
class Rank {
  /** The next item of the program. */
  at = 0;
  /** All-to-alls started. */
  started = 0;
  launched = 0;
  /** Micro-ops that the scheduler was told the end of. */
  ended = 0;
  /** Items that the pump has told, and ends of all-to-alls. */
  toldItems = 0;
  toldEnds = 0;
  /** By all-to-all of an exclusive schedule: micro-ops launched before it. */
  readonly gates: number[] = [];
  /** By micro-op: all-to-alls started before it. */
  readonly behind: number[] = [];
  readonly #common: Common;
  readonly #run: ScheduleRun;
  /** Items of the program that start each all-to-all. */
  readonly #starts: readonly number[];
  #inAllToAlls = 0;
  #imminent = false;
  #inside = false;

  constructor(common: Common) {
    this.#common = common;
    this.#run = new ScheduleRun(common.scheduler, common.schedule);
    const { program } = common;
    this.#starts = program.flatMap(({ kind }, i) => kind === "start" ? [i] : []);
    if (common.telling === "host") return;
    // Nothing can be launched before a gradient is ready: until then the host tells as it goes.
    const first = program.findIndex(({ boundary }) => boundary.kind === "gradientReady");
    for (const item of program.slice(0, Math.max(first, 0))) this.tell(item.boundary);
    this.toldItems = Math.max(first, 0);
    this.toldEnds =
      program.slice(0, Math.max(first, 0)).filter(({ kind }) => kind === "wait").length;
  }

  get ends(): boolean {
    return this.at === this.#common.program.length;
  }

  get key(): string {
    const { at, started, launched, ended, toldItems, toldEnds, gates, behind } = this;
    const order = this.#common.schedule.exclusive ? `${gates} ${behind}` : "";
    return `${at} ${started} ${launched} ${ended} ${toldItems} ${toldEnds} ${order}`;
  }

  /** The next item of the program happens. */
  goOn(): void {
    const item = this.#common.program[this.at];
    if (this.#common.telling === "host") this.tell(item.boundary);
    if (item.kind === "start") {
      this.gates.push(this.launched);
      this.started++;
    }
    this.at++;
  }

  /** The pump tells of the next item that the device has passed; of ends of all-to-alls in their own turn. */
  tellItem(): void {
    const { program } = this.#common;
    const item = program[this.toldItems];
    // The device is behind the all-to-alls that it has waited for.
    for (const before of program.slice(0, this.toldItems + 1)) {
      if (before.kind === "wait") { while (this.toldEnds <= before.number) this.tellEnd(); }
    }
    this.toldItems++;
    if (item.kind !== "wait") this.tell(item.boundary);
  }

  /** The pump tells of the end of an all-to-all, after its start. */
  tellEnd(): void {
    while (this.toldItems <= this.#starts[this.toldEnds]) this.tellItem();
    const number = this.toldEnds++;
    this.tell(
      this.#common.program.find((item) => item.kind === "wait" && item.number === number)!.boundary,
    );
  }

  tell(boundary: Boundary): void {
    const { kind } = boundary;
    const { schedule, rule } = this.#common;
    if (kind === "combineBackwardStarts") this.#imminent = this.#inside = true;
    if (kind === "layerBackwardEnds") this.#inside = false;
    if (kind === "allToAllStarts") {
      this.#inAllToAlls++;
      // Told of the last chunk of a layer's first all-to-all at the latest.
      const { program } = this.#common;
      const more = program.some(({ kind, boundary: b }) =>
        kind === "start" && b.kind === "allToAllStarts" && b.node === boundary.node &&
        b.chunk > boundary.chunk
      );
      if (!more) this.#imminent = false;
    }
    if (kind === "allToAllEnds") this.#inAllToAlls--;
    if (kind === "microOpEnds") this.ended++;
    for (const microOp of this.#run.on(boundary)) {
      this.behind.push(this.started);
      assert.equal(microOp, schedule.microOps[this.launched++]);
      const { alone, foresees, outside } = rule;
      if (alone && kind !== "stepEnds") {
        assert.ok(this.launched - this.ended <= 1, "two micro-ops run");
        assert.equal(this.#inAllToAlls, 0, "a micro-op goes beside an all-to-all");
      }
      if (foresees) assert.ok(!this.#imminent, "a micro-op goes before an imminent all-to-all");
      if (outside) assert.ok(!this.#inside, "a micro-op goes inside a MoE layer");
    }
  }
}

/** Several ranks that run one step. */
class Ranks {
  readonly ranks: readonly Rank[];
  readonly #common: Common;
  /** All-to-alls that are complete. */
  #allToAlls = 0;
  /** By rank: complete micro-ops of each group, and how many are complete from the first one without a gap. */
  readonly #complete: { world: number; replicas: number; all: number }[];

  constructor(size: number, common: Common) {
    this.#common = common;
    this.ranks = Array.from({ length: size }, () => new Rank(common));
    this.#complete = this.ranks.map(() => ({ world: 0, replicas: 0, all: 0 }));
    this.#move();
  }

  /** Everything that is the same to the schedulers has the same key: they keep nothing between launches. */
  get key(): string {
    return this.ranks.map(({ key }) => key).join();
  }

  get done(): boolean {
    const { schedule: { microOps } } = this.#common;
    return this.ranks.every((rank, r) => rank.ends && this.#complete[r].all === microOps.length);
  }

  /**
   * What happens by itself: collectives are complete as soon as all of their ranks have come and the device's order allows it. A device under
   * a pump goes on as far as it can: whatever the scheduler could be told of a slower one, it can be told of this one.
   */
  #move(): void {
    const { telling } = this.#common;
    for (let moved = true; moved;) {
      moved = this.#moveAllToAlls();
      for (const group of ["world", "replicas"] as const) {
        for (const r of this.ranks.keys()) moved = this.#moveMicroOp(r, group) || moved;
      }
      if (telling === "host") continue;
      for (const rank of this.ranks) {
        for (; this.#goesOn(rank); moved = true) rank.goOn();
      }
    }
  }

  #moveAllToAlls(): boolean {
    const { exclusive } = this.#common.schedule, number = this.#allToAlls;
    const starts = this.ranks.every((rank, r) =>
      rank.started > number && (!exclusive || this.#complete[r].all >= rank.gates[number])
    );
    if (starts) this.#allToAlls++;
    return starts;
  }

  #moveMicroOp(r: number, group: "world" | "replicas"): boolean {
    const { schedule: { exclusive }, groups, perGroup } = this.#common;
    const complete = this.#complete[r], i = groups[group][complete[group]];
    if (i === undefined) return false;
    const starts = this.ranks.every((rank, q) =>
      (group === "replicas" && q % perGroup !== r % perGroup) ||
      (rank.launched > i && (!exclusive || this.#allToAlls >= rank.behind[i]))
    );
    if (!starts) return false;
    complete[group]++;
    const isComplete = (i: number) => {
      const group = groups.world[this.#placeOf(i)] === i ? "world" : "replicas";
      return this.#placeOf(i) < complete[group];
    };
    while (complete.all < this.#common.places.length && isComplete(complete.all)) complete.all++;
    return true;
  }

  /** Place of a micro-op among those of its group. */
  #placeOf(i: number): number {
    return this.#common.places[i];
  }

  #goesOn(rank: Rank): boolean {
    const item = this.#common.program[rank.at];
    return !rank.ends && (item.kind !== "wait" || this.#allToAlls > item.number);
  }

  /** What can happen next, 4 r and more for rank r: it goes on, is told of what it has passed, of the end of an all-to-all, of a micro-op. */
  actions(): number[] {
    const paced = this.#common.telling === "pump";
    return this.ranks.flatMap((rank, r) => {
      const goesOn = this.#goesOn(rank);
      const tells = paced && rank.toldItems < rank.at;
      const tellsEnd = paced && rank.toldEnds < Math.min(this.#allToAlls, rank.started);
      const sees = rank.ended < this.#complete[r].all;
      return [goesOn, tells, tellsEnd, sees].flatMap((can, i) => can ? [4 * r + i] : []);
    });
  }

  act(action: number): void {
    const rank = this.ranks[action >> 2];
    if (action % 4 === 0) rank.goOn();
    else if (action % 4 === 1) rank.tellItem();
    else if (action % 4 === 2) rank.tellEnd();
    else rank.tell({ kind: "microOpEnds" });
    this.#move();
  }

  assertDone(): void {
    assert.ok(this.done, `deadlock: ${this.key}`);
    for (const { launched } of this.ranks) {
      assert.equal(launched, this.#common.schedule.microOps.length);
    }
  }
}

/** Ranks that run a step. */
function ranksOf(
  size: number,
  graph: StepGraph,
  scheduler: CollectiveScheduler,
  options: { readonly rule: Rule; readonly telling: Telling; readonly perGroup?: number },
): Ranks {
  const schedule = scheduler.plan(graph);
  const groups = { world: [] as number[], replicas: [] as number[] };
  const places = schedule.microOps.map((microOp, i) => groups[groupOf(graph, microOp)].push(i) - 1);
  return new Ranks(size, {
    schedule,
    program: programOf(graph, schedule),
    scheduler,
    groups,
    places,
    perGroup: size,
    ...options,
  });
}

/** With the all-to-alls of every layer in chunks. */
function chunked(inner: CollectiveScheduler, chunks: number): CollectiveScheduler {
  return {
    name: inner.name,
    pace: inner.pace,
    plan(graph) {
      const layers = graph.nodes.flatMap((node) => node.kind === "allToAll" ? [node.layer] : []);
      return { ...inner.plan(graph), chunks: new Map(layers.map((layer) => [layer, chunks])) };
    },
    launch: (boundary, state) => inner.launch(boundary, state),
  };
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
  microOpBytes: fc.integer({ min: 160, max: 20_000 }),
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
  telling: Telling,
): void {
  // How seldom each rank goes on, and is told of what happened.
  const delay = fc.integer({ min: 1, max: 1000 });
  const delays = fc.record({
    size: fc.integer({ min: 2, max: 4 }),
    all: fc.array(delay, { minLength: 16, maxLength: 16 }),
    seed: fc.nat(),
  });
  const cuts = fc.record({ chunks: fc.integer({ min: 1, max: 3 }), grouped: fc.boolean() });
  fc.assert(fc.property(outline, sizes, delays, cuts, (outline, sizes, delays, cuts) => {
    const graph = buildStepGraph(outline);
    const scheduler = chunked(schedulerOf(sizes), cuts.chunks);
    // Replicas of experts: on every second rank, or on all of them.
    const perGroup = cuts.grouped && delays.size % 2 === 0 ? 2 : 1;
    const ranks = ranksOf(delays.size, graph, scheduler, { rule, telling, perGroup });
    let state = delays.seed;
    for (let actions = ranks.actions(); actions.length > 0; actions = ranks.actions()) {
      state = Math.imul(state, 1664525) + 1013904223 >>> 0;
      const weights = actions.map((action) => 1 / delays.all[action]);
      let at = state / 2 ** 32 * weights.reduce((a, b) => a + b, 0);
      const chosen = weights.findIndex((weight) => (at -= weight) < 0);
      ranks.act(actions.at(chosen)!);
    }
    ranks.assertDone();
  }));
}

/** Who tells schedulers of a pace: a CPU's host for both, a GPU's pump for pace `device`. */
const tellingsOf = ({ pace }: CollectiveScheduler): Telling[] =>
  pace === "device" ? ["host", "pump"] : ["host"];

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
  for (const telling of tellingsOf(createScheduler(name))) {
    Deno.test(`schedulers: ranks of random delays end their step, each micro-op in its place (${name}, ${telling})`, () => {
      randomDelays((sizes) => createScheduler(name, sizes), ruleOf(name), telling);
    });
  }
}

Deno.test("schedulers: random delays find what an exclusive schedule with local clocks does", () => {
  for (const name of ["priority", "lina"] as const) {
    assert.throws(
      () => randomDelays((sizes) => exclusive(createScheduler(name, sizes)), RULES[name], "host"),
      ({ cause }: Error) => /deadlock/.test((cause as Error).message),
    );
  }
});

/** A step whose backward half has two all-to-alls and three micro-ops of 80 bytes: two before, one between, which replicas reduce. */
function smallStep(group: "world" | "replicas" = "world"): StepGraph {
  const gradient = (name: string, elements: number, group: "world" | "replicas") => {
    return { name, elements, elementBytes: 4, group };
  };
  const { nodes } = buildStepGraph({
    layers: [{
      moe: { allToAllBytes: 1, experts: [gradient("experts", 20, group)] },
      feedForward: [],
      attention: [],
    }],
    head: [gradient("head", 40, "world")],
    embedding: [],
  });
  // No gradient is ready in the forward pass: its all-to-alls are left out.
  return {
    nodes: nodes.map((node): StepNode =>
      node.kind === "allToAll" && node.phase === "forward"
        ? { ...node, kind: "compute", name: "nothing" }
        : node
    ),
  };
}

/** How a small step is run. */
interface SmallOptions {
  readonly rule: Rule;
  readonly telling: Telling;
  readonly group?: "world" | "replicas";
  readonly perGroup?: number;
}

/** Tries every order of what ranks can do. Returns the number of states. @throws {AssertionError} At a deadlock or a broken rule. */
function everyOrder(size: number, scheduler: CollectiveScheduler, options: SmallOptions): number {
  const graph = smallStep(options.group);
  const seen = new Set<string>();
  const pending: number[][] = [[]];
  for (let path = pending.pop(); path; path = pending.pop()) {
    const ranks = ranksOf(size, graph, scheduler, options);
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
  for (const telling of tellingsOf(createScheduler(name, SMALL))) {
    Deno.test(`schedulers: no order of events of a small step breaks the rule or deadlocks (${name}, ${telling})`, () => {
      const scheduler = createScheduler(name, SMALL), rule = ruleOf(name);
      assert.ok(everyOrder(2, scheduler, { rule, telling }) > 50);
      assert.ok(everyOrder(2, scheduler, { rule, telling, group: "replicas", perGroup: 2 }) > 50);
      assert.ok(everyOrder(2, scheduler, { rule, telling, group: "replicas", perGroup: 1 }) > 50);
      assert.ok(everyOrder(2, chunked(scheduler, 2), { rule, telling }) > 50);
      if (telling === "host") assert.ok(everyOrder(3, scheduler, { rule, telling }) > 500);
    });
  }
}

Deno.test("schedulers: the check of every order finds broken ones", () => {
  const graph = smallStep();
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
  // Exclusive by local clocks: one rank holds its all-to-all back for a micro-op that the other launches only after it.
  for (const name of ["priority", "lina"] as const) {
    const scheduler = exclusive(createScheduler(name, SMALL)), rule = RULES[name];
    assert.throws(() => everyOrder(2, scheduler, { rule, telling: "host" }), /deadlock/);
  }
  for (const telling of ["host", "pump"] as const) {
    const check = (change: Partial<CollectiveScheduler>) => () =>
      everyOrder(2, broken(change), { rule: RULES.lina, telling });
    check({})();
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
  }
});
