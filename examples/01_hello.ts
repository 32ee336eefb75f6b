// Hello: every rank is one process and says who it is. `init()` finds the other ranks; the world is left at the end of the script.
//
//   deno run -A launch.ts -n 4 examples/01_hello.ts
//
//   [0] hello from rank 0 of 4
//   [1] hello from rank 1 of 4
//   [2] hello from rank 2 of 4
//   [3] hello from rank 3 of 4
//   [0] data goes by shm: all ranks share this host

import { init } from "../mod.ts";

await using world = await init();
console.log(`hello from rank ${world.rank} of ${world.size}`);

await world.barrier();
if (world.rank === 0) console.log(`data goes by ${world.backend}: ${world.backendReason}`);
