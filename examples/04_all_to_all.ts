// All-to-all: every rank has something for every other one. This is the operation that carries tokens to their experts: the counts
// differ and only the sender knows them, so they are exchanged first, then the data.
//
//   deno run -A launch.ts -n 3 examples/04_all_to_all.ts
//
//   [0] sends 0, 2, 1 numbers and receives 0, 1, 2: 10 20 20
//   [1] sends 1, 0, 2 numbers and receives 2, 0, 1: 1 1 21
//   [2] sends 2, 1, 0 numbers and receives 1, 2, 0: 2 12 12

import { init } from "../mod.ts";

await using world = await init();
const { rank, size } = world;

// Some numbers for each rank; they say where they come from and where they go.
const sendCounts = Int32Array.from({ length: size }, (_, to) => (rank + 2 * to) % size);
const send = new Float32Array(sendCounts.reduce((a, b) => a + b, 0));
let at = 0;
for (let to = 0; to < size; to++) {
  send.fill(10 * rank + to, at, at += sendCounts[to]);
}

const recvCounts = new Int32Array(size);
await world.allToAll(sendCounts, recvCounts); // one count for each rank

const recv = new Float32Array(recvCounts.reduce((a, b) => a + b, 0));
await world.allToAllV(send, sendCounts, recv, recvCounts);

console.log(
  `sends ${sendCounts.join(", ")} numbers and receives ${recvCounts.join(", ")}: ${recv.join(" ")}`,
);
