// One rank of the scheduling tests: several trainings, one after another on the same ranks, so that many cases cost one start. Started by
// `runRanks`, or by a launcher (then the first argument is the trainings as JSON, the second a file in which rank 0 leaves the results).

import type { Communicator } from "../collectives/types.ts";
import { init } from "../collectives/world.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import type { Device } from "../tensor/device.ts";
import { rankMain } from "./_ranks.ts";
import { train, type TrainArgs, type TrainResult } from "./_train_ranks.ts";

async function trainAll(
  comm: Communicator,
  all: readonly TrainArgs[],
  device: Device,
): Promise<TrainResult[]> {
  const results: TrainResult[] = [];
  for (const args of all) results.push(await train(comm, args, device));
  return results;
}

if (Deno.env.has("LINA_TEST_RANK")) {
  await rankMain(({ comm, args, device }) => {
    return trainAll(comm, args as TrainArgs[], device ?? cpuDevice());
  });
} else {
  await using world = await init();
  const results = await trainAll(world, JSON.parse(Deno.args[0]), world.device);
  if (world.rank === 0) await Deno.writeTextFile(Deno.args[1], JSON.stringify(results));
}
