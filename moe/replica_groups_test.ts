import assert from "node:assert/strict";
import type { Communicator } from "../collectives/types.ts";
import { ReplicaGroups } from "./replica_groups.ts";

/** A communicator that only splits, and writes down by which color. */
function splitting(rank: number): { comm: Communicator; colors: (number | null)[] } {
  const colors: (number | null)[] = [];
  const split = async (color: number | null) => {
    colors.push(color);
    await new Promise((resolve) => setTimeout(resolve, 1));
    return color === null ? null : { name: `split${colors.length}.${color}` };
  };
  return { comm: { rank, size: 4, split } as unknown as Communicator, colors };
}

Deno.test("layers with the same replicas share their groups, also if they ask at once", async () => {
  const { comm, colors } = splitting(1);
  const sets = [[0, 1], [2], [2, 3], [0, 1]];
  const groups = ReplicaGroups.of(comm);
  assert.equal(ReplicaGroups.of(comm), groups);
  await Promise.all([groups.open(sets), ReplicaGroups.of(comm).open(sets)]);
  assert.deepEqual(colors, [0]);
  assert.equal(groups.get([0, 1])!.name, "split1.0");
  assert.equal(groups.get([2, 3]), null);
  assert.throws(() => groups.get([1, 2]), /must have opened it: current value is 1,2/);
  await groups.open([[1, 2], [0, 1]]);
  assert.deepEqual(colors, [0, 0]);
  const other = splitting(1);
  await ReplicaGroups.of(other.comm).open(sets);
  assert.deepEqual(other.colors, [0], "of another communicator");
});

Deno.test("all ranks make the same splits, sets that meet one after another", async () => {
  const splits = await Promise.all([0, 1, 2, 3].map(async (rank) => {
    const { comm, colors } = splitting(rank);
    await ReplicaGroups.of(comm).open([[1, 2], [0, 1], [2, 3], [0, 1, 2, 3]]);
    return colors;
  }));
  assert.deepEqual(splits, [[0, 0, null], [0, 0, 0], [1, 0, 0], [1, 0, null]]);
});

Deno.test("a split that fails is told to the layer that has asked, and can be asked for again", async () => {
  let fail = true;
  const comm = {
    rank: 0,
    split: () => fail ? Promise.reject(new Error("lost")) : Promise.resolve({ name: "group" }),
  } as unknown as Communicator;
  const groups = ReplicaGroups.of(comm);
  await assert.rejects(groups.open([[0, 1]]), /lost/);
  fail = false;
  await groups.open([[0, 1]]);
  assert.equal(groups.get([0, 1])!.name, "group");
});
