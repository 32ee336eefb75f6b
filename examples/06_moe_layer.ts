// A Mixture-of-Experts layer alone: 8 experts on the ranks, 2 experts per token. One forward and backward pass, and where the tokens
// went. Run it on 1, 2 or 4 ranks: the output's norm and the gradient's norm stay the same.
//
//   deno run -A launch.ts -n 4 examples/06_moe_layer.ts
//
//   [0] holds experts 0, 1 and computes 251 rows
//   [1] holds experts 2, 3 and computes 256 rows
//   [2] holds experts 4, 5 and computes 256 rows
//   [3] holds experts 6, 7 and computes 229 rows
//   [0] choices per expert  124 127 139 134 130 141 104 125, 32 dropped
//   [0] busiest rank / mean 1.032
//   [0] balance loss        0.01000
//   [0] norm of the output  0.376125
//   [0] norms of gradients  0.00230414 (input), 0.108043 (experts)

import { init, readShown } from "../mod.ts";
import { normal, random } from "../moe/init.ts";
import { MoeLayer } from "../moe/moe_layer.ts";
import { plainStep } from "../moe/step.ts";
import { fromArray, type Tensor } from "../tensor/tensor.ts";

const TOKENS = 512, WIDTH = 64;

await using world = await init();
const { device, rank, size } = world;

using layer = new MoeLayer({
  device,
  comm: world,
  layer: 0,
  width: WIDTH,
  hidden: 128,
  experts: 8,
  router: { kind: "softmax", topK: 2, auxLoss: 0.01, capacityFactor: 1 },
  seed: 1,
});

// The global batch is the same whatever the number of ranks; each rank takes its rows.
const batch = normal(random(1, "batch"), TOKENS * WIDTH);
const first = Math.floor(rank * TOKENS / size), end = Math.floor((rank + 1) * TOKENS / size);
const rows = batch.subarray(first * WIDTH, end * WIDTH);
using x = fromArray(device, rows, [end - first, WIDTH]);

const step = plainStep(device, { training: true });
const { out_ND, saved, shown } = await layer.forward(x, step);
const [{ auxLoss, stats }] = await readShown([shown]);
using out = out_ND;
using dX = await layer.backward(out, saved, step); // the loss is ½ Σ out²

/** Euclidean norm over all ranks. */
async function norm(...tensors: Tensor[]): Promise<string> {
  const sum = new Float64Array(1);
  for (const tensor of tensors) {
    for (const value of await tensor.toArray() as Float32Array) sum[0] += value ** 2;
  }
  await world.allReduce(sum);
  return Math.sqrt(sum[0]).toPrecision(6);
}

const held = layer.store.seats[rank].join(", ");
const [outNorm, dXNorm] = [await norm(out), await norm(dX)];
const expertNorm = await norm(...layer.store.parameters.map(({ grad }) => grad));

console.log(`holds experts ${held} and computes ${stats.rowsPerRank[rank]} rows`);
await world.barrier();
if (rank === 0) {
  console.log(`choices per expert  ${stats.counts.join(" ")}, ${stats.dropped} dropped`);
  console.log(`busiest rank / mean ${stats.imbalance.toFixed(3)}`);
  console.log(`balance loss        ${auxLoss.toFixed(5)}`);
  console.log(`norm of the output  ${outNorm}`);
  console.log(`norms of gradients  ${dXNorm} (input), ${expertNorm} (experts)`);
}
