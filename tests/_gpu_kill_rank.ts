// A rank of the kill test in gpu_ranks_test.ts: trains on nothing until a rank is killed. With `host` it awaits every operation, with
// `stream` only the device waits for them, as in a training step.

import { init } from "../collectives/world.ts";
import { zeros } from "../tensor/tensor.ts";

await using world = await init({ device: "cuda" });
using x = zeros(world.device, [1 << 18]);
using loss = zeros(world.device, [1]);
for (let step = 0;; step++) {
  for (let i = 0; i < 8; i++) {
    const work = world.allReduce(x);
    if (Deno.args[0] === "host") await work;
    else await work.wait(world.device.stream);
  }
  await loss.toArray();
  if (step === 3) console.log(`rank ${world.rank} runs`);
}
