// A rank of the failure tests in nccl_test.ts: rank 0's library is told to fail, the others only see what that does to them. With the
// emulator, what a lost peer leaves open ends (on a GPU it would stand still until the watch aborts it), and the next call tells.

import type { Communicator, Work } from "../collectives/types.ts";
import type { Store } from "../collectives/transport.ts";
import type { Device } from "../tensor/device.ts";
import { zeros } from "../tensor/tensor.ts";
import { rankMain } from "./_ranks.ts";

interface Args {
  readonly program: "messages" | "collective" | "microtasks";
}

/** How an operation ended. */
export interface End {
  readonly message: string;
  readonly ms: number;
}

async function ending(run: () => unknown): Promise<End> {
  const start = performance.now();
  let message = "";
  try {
    await run();
  } catch (error) {
    message = (error as Error).message;
  }
  return { message, ms: performance.now() - start };
}

/** Two messages of one group; the send fails. The second one is asked for only then, by a stream and by the host. */
async function messages(comm: Communicator, device: Device): Promise<End[]> {
  const tensors = [0, 1].map(() => zeros(device, [4]));
  await comm.barrier();
  if (comm.rank === 0) Deno.env.set("LINA_EMULATOR_NCCL_FAIL", "ncclSend");
  const start = (x: typeof tensors[0]): Work => comm.rank === 0 ? comm.send(x, 1) : comm.recv(x, 0);
  const works = tensors.map(start);
  const ends = [await ending(() => works[0])];
  ends.push(await ending(() => works[1].wait(device.stream)));
  ends.push(await ending(() => works[1]));
  ends.push(await ending(() => comm.barrier()));
  return ends;
}

/** Rank 0 stays until its peer knows: it must hear of the failure, not of the end. */
async function collective(comm: Communicator, device: Device, store: Store): Promise<End[]> {
  const x = zeros(device, [4]);
  await comm.barrier();
  if (comm.rank === 0) Deno.env.set("LINA_EMULATOR_NCCL_FAIL", "ncclAllReduce");
  const ends = [await ending(() => comm.allReduce(x)), await ending(() => comm.barrier())];
  if (comm.rank === 0) await store.get("known", 10_000);
  else await store.set("known", new Uint8Array(1));
  return ends;
}

/** Many messages of one group. @returns Microtasks that were queued for them. */
async function microtasks(comm: Communicator, device: Device): Promise<number> {
  const other = 1 - comm.rank;
  const xs = Array.from({ length: 16 }, () => zeros(device, [4]));
  await comm.barrier();
  const queue = globalThis.queueMicrotask;
  let queued = 0;
  globalThis.queueMicrotask = (task) => {
    queued++;
    queue(task);
  };
  // The world's own collectives have been begun, these are another communicator's.
  const twin = await comm.dup();
  queued = 0;
  const works = xs.map((x, i) => (i + comm.rank) % 2 ? twin.send(x, other) : twin.recv(x, other));
  const during = queued;
  globalThis.queueMicrotask = queue;
  for (const work of works) await work;
  return during;
}

await rankMain(({ comm, args, device, store }) =>
  ({ messages, collective, microtasks })[(args as Args).program](comm, device!, store)
);
