import assert from "node:assert/strict";
import { createCommunicator } from "../../collectives/communicator.ts";
import { openSelf } from "../../collectives/self.ts";
import { cpuDevice } from "../../tensor/cpu/device.ts";
import { StepBudget } from "./step_budget.ts";

const device = cpuDevice();
const world = createCommunicator(openSelf(), { rank: 0, size: 1, name: "alone", device });

Deno.test("step budget: a number that no clock has settled is not kept for a restart", async () => {
  const untimed = new StepBudget(world, { steps: 100, seconds: null, from: 0 });
  const timed = new StepBudget(world, { steps: 1e9, seconds: 3600, from: 0 });
  for (let step = 1; step <= 15; step++) {
    assert.deepEqual(timed.settled, {});
    await untimed.onStep({ step });
    assert.equal(await timed.onStep({ step }), step === 15);
  }
  assert.deepEqual(untimed.settled, {});
  assert.deepEqual(timed.settled, { steps: timed.steps });
  assert.ok(timed.steps < 1e9);

  const { settled } = timed;
  const restarted = new StepBudget(world, { steps: 1e9, seconds: 3600, settled, from: 15 });
  assert.equal(restarted.steps, timed.steps);
  assert.deepEqual(restarted.settled, settled);
  const other = new StepBudget(world, { steps: 1e9, seconds: 3600, settled: {}, from: 10 });
  assert.equal(other.steps, 1e9);
});
