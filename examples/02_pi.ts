// π by allReduce: the integral of 4 / (1 + x²) from 0 to 1. Each rank sums the slices that are its own, one allReduce adds the
// parts, and every rank has the result.
//
//   deno run -A launch.ts -n 4 examples/02_pi.ts
//
//   [0] my part is 0.785398238397
//   [1] my part is 0.785398188397
//   [2] my part is 0.785398138397
//   [3] my part is 0.785398088397
//   [0] pi is about 3.141592653590, off by 1.1e-13

import { init } from "../mod.ts";

const SLICES = 10_000_000;

await using world = await init();
const { rank, size } = world;

let sum = 0;
for (let i = rank; i < SLICES; i += size) {
  const x = (i + 0.5) / SLICES;
  sum += 4 / (1 + x * x);
}
const part = sum / SLICES;

const pi = Float64Array.of(part);
await world.allReduce(pi); // in place: the sum over all ranks

console.log(`my part is ${part.toFixed(12)}`);
await world.barrier();
if (rank === 0) {
  console.log(
    `pi is about ${pi[0].toFixed(12)}, off by ${Math.abs(pi[0] - Math.PI).toExponential(1)}`,
  );
}
