// The ranks' program of `launch.ts`: the least that a job does before its own work.

import { init } from "../mod.ts";

await using world = await init();
await world.barrier();
console.log(`passed ${(performance.timeOrigin + performance.now()).toFixed(3)}`);
