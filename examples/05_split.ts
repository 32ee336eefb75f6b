// Split communicators: the ranks stand in a grid of two rows, and rows and columns get communicators of their own. Expert
// parallelism lives on such a grid: tokens travel along a row, gradients of an expert's replicas are summed along a column.
//
//   deno run -A launch.ts -n 6 examples/05_split.ts
//
//   [0] row 0 (rank 0 of 3): sum 3, column 0 (rank 0 of 2): sum 3
//   [1] row 0 (rank 1 of 3): sum 3, column 1 (rank 0 of 2): sum 5
//   [2] row 0 (rank 2 of 3): sum 3, column 2 (rank 0 of 2): sum 7
//   [3] row 1 (rank 0 of 3): sum 12, column 0 (rank 1 of 2): sum 3
//   [4] row 1 (rank 1 of 3): sum 12, column 1 (rank 1 of 2): sum 5
//   [5] row 1 (rank 2 of 3): sum 12, column 2 (rank 1 of 2): sum 7

import { init } from "../mod.ts";

const ROWS = 2;

await using world = await init();
const columns = Math.ceil(world.size / ROWS);
const [row, column] = [Math.floor(world.rank / columns), world.rank % columns];

// Ranks that give the same color form a group, ordered by their rank in the world.
await using across = (await world.split(row))!;
await using down = (await world.split(column))!;

const sums = [across, down].map(() => Float32Array.of(world.rank));
const works = [across.allReduce(sums[0]), down.allReduce(sums[1])]; // both are on their way at once
for (const work of works) await work;

console.log(
  `row ${row} (rank ${across.rank} of ${across.size}): sum ${sums[0][0]}, ` +
    `column ${column} (rank ${down.rank} of ${down.size}): sum ${sums[1][0]}`,
);
