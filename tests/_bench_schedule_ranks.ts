// A rank of bench/schedule.ts without its parent: does what the test lists.

import type { Request } from "../bench/_schedule_messages.ts";
import { Job } from "../bench/_schedule_job.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { rankMain } from "./_ranks.ts";

await rankMain(async ({ comm, args, device }) => {
  await using job = await Job.create(comm, device ?? cpuDevice());
  const replies: unknown[] = [];
  for (const request of args as readonly Request[]) replies.push(await job.answer(request));
  return replies;
});
