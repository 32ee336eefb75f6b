// A ring of send and recv: each rank passes what it has to the right and takes what comes from the left, until everybody has
// seen everything. This is how a ring allGather works inside.
//
//   deno run -A launch.ts -n 4 examples/03_ring.ts
//
//   [0] from 3, to 1: 100 103 102 101
//   [1] from 0, to 2: 101 100 103 102
//   [2] from 1, to 3: 102 101 100 103
//   [3] from 2, to 0: 103 102 101 100

import { init } from "../mod.ts";

await using world = await init();
const { rank, size } = world;
const right = (rank + 1) % size;
const left = (rank + size - 1) % size;

let token = Int32Array.of(100 + rank);
const seen = [token[0]];
for (let hop = 1; hop < size; hop++) {
  const next = new Int32Array(1);
  // Both are started before either is awaited: a send may have to wait for its recv.
  const sent = world.send(token, right);
  const received = world.recv(next, left);
  await sent;
  await received;
  token = next;
  seen.push(token[0]);
}
console.log(`from ${left}, to ${right}: ${seen.join(" ")}`);
