// The NCCL backend: connects the ranks of a job, each with its GPU, and gives the transport of all of them (transport.ts).

import { nccl, splitComm } from "../../ffi/nccl.ts";
import type { CudaDevice } from "../../tensor/cuda/device.ts";
import { now } from "../../trace/mod.ts";
import type { BootContext, Transport } from "../transport.ts";
import { meet, prepareEnvironment, together } from "./connect.ts";
import { NcclTransport, WORLD } from "./transport.ts";

/**
 * Connects the ranks of a job through NCCL.
 *
 * @param context This rank and its GPU; each rank needs one of its own, or NCCL_HOSTID must differ between those that share one.
 * @returns The transport of all ranks.
 * @throws {LibraryNotFoundError} If there is no NCCL.
 * @throws {CudaError} If it cannot connect the ranks.
 */
export async function openNccl(context: BootContext): Promise<Transport> {
  const { device, rank, size } = context;
  if (device?.kind !== "cuda") {
    throw new TypeError(
      `Cannot connect through NCCL as the rank must have a GPU: current value is ${
        device?.name ?? "none"
      }`,
    );
  }
  prepareEnvironment();
  const cuda = device as CudaDevice;
  cuda.anchor(); // while it is idle: if it were too busy later, times of operations could not be told at all
  const job = {
    nccl: nccl(),
    device: cuda,
    context,
    open: new Set<NcclTransport>(),
    anchored_us: now(),
  };
  const members = Array.from({ length: size }, (_, r) => r);
  const trunk = await together(meet(context), WORLD, context);
  const comm = await together(splitComm(trunk, 0, rank), WORLD, context);
  // The world carries what the model waits for, dispatch and combine: its kernels go first.
  return await NcclTransport.open(
    job,
    { trunk, comm: comm! },
    { members, id: WORLD, rank },
    true,
  );
}
