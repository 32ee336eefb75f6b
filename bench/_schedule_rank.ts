// One rank of bench/schedule.ts: connects to a Unix socket, says who it is, and then does what it is told; a request is a JSON line, and so is
// the reply. Arguments: the socket, `cpu` or `cuda`.

import { init } from "../collectives/world.ts";
import type { CudaDevice } from "../tensor/cuda/device.ts";
import { linesOf, writeLine } from "./_lines.ts";
import { Job } from "./_schedule_job.ts";

const [path, kind] = Deno.args;
await using world = await init({ device: kind === "cuda" ? "cuda" : "cpu" });
await using job = await Job.create(world, world.device);
using connection = await Deno.connect({ transport: "unix", path });
const writer = connection.writable.getWriter();
const { device, backend } = world;
const part = device.kind === "cuda"
  ? `, ${(device as CudaDevice).context.properties.multiprocessors} multiprocessors`
  : "";
await writeLine(
  writer,
  `${world.rank} ${device.name}${part}, ${backend}, Deno ${Deno.version.deno}`,
);
for await (const line of linesOf(connection.readable)) {
  await writeLine(writer, JSON.stringify(await job.answer(JSON.parse(line))));
}
