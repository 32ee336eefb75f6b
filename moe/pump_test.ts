// The pump against a device that passes events when the test says so.

import assert from "node:assert/strict";
import fc from "fast-check";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { Device, StreamEvent } from "../tensor/device.ts";
import { type Place, Pump, type Queue } from "./pump.ts";

/** An event that passes when it is told to. */
class ManualEvent implements StreamEvent {
  readonly #passing = Promise.withResolvers<void>();
  #passed = false;

  constructor() {
    this.#passing.promise.catch(() => {});
  }

  pass(): void {
    this.#passed = true;
    this.#passing.resolve();
  }

  fail(error: Error): void {
    this.#passing.reject(error);
  }

  done(): boolean {
    return this.#passed;
  }

  time(): number {
    return 0;
  }

  get passing(): Promise<void> {
    return this.#passing.promise;
  }
}

const device: Device = {
  ...cpuDevice(),
  passing: (event) => (event as ManualEvent).passing,
};
const noCheck = () => {};

/** Lets everything that is resolved go on. */
const settle = () => new Promise<void>((resolve) => setTimeout(resolve, 0));

Deno.test("pump: within a queue in order, of two queues the cause before the effect, and nothing early", async () => {
  // Each operation: which queue it is of, and whether it is behind the latest end of an all-to-all.
  const operation = fc.record({ queue: fc.nat(2), behind: fc.boolean() });
  const plan = fc.record({
    operations: fc.array(operation, { minLength: 1, maxLength: 30 }),
    order: fc.infiniteStream(fc.nat(1000)),
    pushedAtOnce: fc.boolean(),
  });
  await fc.assert(
    fc.asyncProperty(plan, async ({ operations, order, pushedAtOnce }) => {
      using pump = new Pump(device, noCheck);
      const queues = [pump.compute, pump.allToAlls, pump.reductions];
      const events: ManualEvent[] = [], told: number[] = [];
      const causes: number[][] = []; // what passes before, by the device's own order
      const last: (number | undefined)[] = [];
      const push = (i: number) => {
        const { queue, behind } = operations[i];
        const event = new ManualEvent(), place: Place[] = [], before: number[] = [];
        if (last[queue] !== undefined) before.push(last[queue]);
        const depend = (other: Queue, index: number | undefined) => {
          if (index === undefined) return;
          before.push(index);
          place.push(other.end);
        };
        // An all-to-all is behind the computation that it was started at; computation may be behind the latest all-to-all.
        if (queue === 1) depend(pump.compute, last[0]);
        if (queue === 0 && behind) depend(pump.allToAlls, last[1]);
        last[queue] = i;
        causes[i] = before;
        events[i] = event;
        pump.push(queues[queue], event, () => {
          assert.ok(event.done(), "told before it has passed");
          told.push(i);
        }, place);
      };
      const passable = () =>
        events.map((_, i) => i).filter((i) =>
          !events[i].done() && causes[i].every((c) => events[c].done())
        );
      let pushed = 0;
      if (pushedAtOnce) { while (pushed < operations.length) push(pushed++); }
      while (pushed < operations.length || passable().length > 0) {
        if (pushed < operations.length && order.next().value! % 2 === 0) push(pushed++);
        // Several pass before anybody looks.
        for (let n = order.next().value! % 4; n > 0; n--) {
          const choice = passable();
          if (choice.length > 0) events[choice[order.next().value! % choice.length]].pass();
        }
        if (order.next().value! % 2 === 0) await settle();
        for (const i of told) {
          for (const c of causes[i]) {
            assert.ok(told.indexOf(c) >= 0 && told.indexOf(c) < told.indexOf(i), `${c} after ${i}`);
          }
        }
      }
      await settle();
      assert.deepEqual(told.toSorted((a, b) => a - b), operations.map((_, i) => i), "all are told");
    }),
    { numRuns: 60 },
  );
});

Deno.test("pump: what passes is told without waiting for what has not", async () => {
  using pump = new Pump(device, noCheck);
  const slow = new ManualEvent(), quick = new ManualEvent(), told: string[] = [];
  pump.push(pump.compute, slow, () => told.push("slow"));
  pump.push(pump.reductions, quick, () => {
    told.push("quick");
    // Telling may push, and what needs no event is told in its turn.
    pump.push(pump.reductions, null, () => told.push("at once"));
  });
  await settle();
  assert.deepEqual(told, []);
  quick.pass();
  await settle();
  assert.deepEqual(told, ["quick", "at once"]);
  slow.pass();
  await settle();
  assert.deepEqual(told, ["quick", "at once", "slow"]);
});

Deno.test("pump: finish resolves once the end has been told, and nothing is told after it", async () => {
  const pump = new Pump(device, noCheck), told: string[] = [];
  const end = new ManualEvent(), late = new ManualEvent();
  pump.push(pump.reductions, late, () => told.push("late"));
  let finished = false;
  const finish = pump.finish(end, () => told.push("end"), []).then(() => finished = true);
  await settle();
  assert.equal(finished, false);
  end.pass();
  await finish;
  late.pass();
  await settle();
  pump.push(pump.compute, null, () => told.push("later"));
  await settle();
  assert.deepEqual(told, ["end"]);
});

Deno.test("pump: what goes wrong ends it, and whoever finishes or pushes next hears of it", async () => {
  const broken = new Error("the device has failed");
  const ways: ((pump: Pump, event: ManualEvent) => void)[] = [
    (_pump, event) => event.fail(broken),
    (pump, event) => {
      pump.push(pump.reductions, null, () => {
        throw broken;
      });
      void event;
    },
  ];
  for (const breakIt of ways) {
    for (const finishing of [false, true]) {
      const pump = new Pump(device, noCheck), event = new ManualEvent(), told: string[] = [];
      pump.push(pump.compute, event, () => told.push("computed"));
      const end = new ManualEvent();
      const finish = finishing ? pump.finish(end, () => told.push("end"), []) : null;
      finish?.catch(() => {});
      breakIt(pump, event);
      await settle();
      await settle();
      if (finish) await assert.rejects(finish, broken);
      assert.throws(() => pump.push(pump.compute, null, () => {}), broken);
      await assert.rejects(pump.finish(end, () => {}, []), broken);
      event.pass();
      end.pass();
      await settle();
      assert.deepEqual(told, []);
    }
  }
});

Deno.test("pump: the check that runs while the end is waited for can end it", async () => {
  let checks = 0;
  const pump = new Pump(device, () => {
    if (++checks === 2) throw new Error("a rank has gone");
  });
  await assert.rejects(pump.finish(new ManualEvent(), () => {}, []), /a rank has gone/);
  assert.equal(checks, 2);
});

Deno.test("pump: a disposed one tells nothing, and a step that is not finished rejects nowhere", async () => {
  const event = new ManualEvent(), told: string[] = [];
  {
    using pump = new Pump(device, noCheck);
    pump.push(pump.compute, event, () => told.push("computed"));
  }
  event.fail(new Error("nobody asks for this any more"));
  await settle();
  assert.deepEqual(told, []);
});
