// One rank of bench/nccl.ts: our side. It connects to a Unix socket, says who it is, and then does what it is told, as peers/nccl.py does:
// `op bytes iterations` is answered by `time_us host_us`, both for one operation. Between its turns it sleeps.
// Arguments: the socket, a name for this side, bytes of the largest operation.

import { init } from "../collectives/world.ts";
import { nccl } from "../ffi/nccl.ts";
import type { Communicator } from "../collectives/types.ts";
import type { CudaDevice } from "../tensor/cuda/device.ts";
import { empty } from "../tensor/tensor.ts";
import { linesOf, writeLine } from "./_lines.ts";

/** Bytes of the operations that warm up a turn, at most. */
const WARM_BYTES = 1 << 20;

const [path, side, most] = Deno.args;
await using world = await init({ device: "cuda" });
const { rank, size } = world;
const device = world.device as CudaDevice;
const { stream } = device;
using x = empty(device, [Number(most) / 4]), y = empty(device, [Number(most) / 4]);
using token = empty(device, [1]);
device.kernels.fill(x, 1);
device.kernels.fill(token, 1);
const next = (rank + 1) % size, previous = (rank + size - 1) % size;

/** Uneven shares, as routing gives them: a rank sends 1, 2 or 3 units to another. */
const units = (s: number, r: number) => 1 + (s + r) % 3;

type Run = () => void;
type Operation = (comm: Communicator, n: number) => Run;

const OPERATIONS: Record<string, Operation> = {
  allReduce: (comm, n) => {
    const a = x.rows(0, n);
    return () => void comm.allReduce(a).wait(stream);
  },
  reduceScatter: (comm, n) => {
    const [a, out] = [x.rows(0, n), y.rows(0, n / size)];
    return () => void comm.reduceScatter(a, out).wait(stream);
  },
  allGather: (comm, n) => {
    const [a, out] = [x.rows(0, n / size), y.rows(0, n)];
    return () => void comm.allGather(a, out).wait(stream);
  },
  broadcast: (comm, n) => {
    const a = x.rows(0, n);
    return () => void comm.broadcast(a, 0).wait(stream);
  },
  reduce: (comm, n) => {
    const a = x.rows(0, n);
    return () => void comm.reduce(a, { root: 0 }).wait(stream);
  },
  gather: (comm, n) => {
    const [a, out] = [x.rows(0, n / size), rank === 0 ? y.rows(0, n) : null];
    return () => void comm.gather(a, out).wait(stream);
  },
  scatter: (comm, n) => {
    const [a, out] = [rank === 0 ? x.rows(0, n) : null, y.rows(0, n / size)];
    return () => void comm.scatter(a, out).wait(stream);
  },
  allToAll: (comm, n) => {
    const [a, out] = [x.rows(0, n), y.rows(0, n)];
    return () => void comm.allToAll(a, out).wait(stream);
  },
  allToAllV: (comm, n) => {
    const unit = Math.floor(n / (3 * size));
    const counts = Array.from({ length: size }, (_, r) => unit * units(rank, r));
    const [a, out] = [x.rows(0, n), y.rows(0, n)];
    return () => void comm.allToAllV(a, counts, out, counts).wait(stream);
  },
  sendRecv: (comm, n) => {
    const [a, out] = [x.rows(0, n), y.rows(0, n)];
    return () => {
      const sent = comm.send(a, next);
      void comm.recv(out, previous).wait(stream);
      void sent.wait(stream);
    };
  },
};

/** One turn: everything is enqueued at once, and the host sleeps until it is done. */
async function measure(
  operation: Operation,
  bytes: number,
  iterations: number,
): Promise<[time_us: number, host_us: number]> {
  const warm = operation(world, Math.min(bytes, WARM_BYTES) / 4);
  const run = operation(world, bytes / 4);
  device.anchor();
  for (let i = 0; i < Math.max(2, iterations >> 1); i++) warm();
  world.allReduce(token).wait(stream); // the devices begin together
  const begin = stream.recordTimed();
  const start_ms = performance.now();
  for (let i = 0; i < iterations; i++) run();
  const host_us = (performance.now() - start_ms) * 1000;
  const end = stream.recordTimed();
  while (!end.done()) await new Promise((resolve) => setTimeout(resolve, 1));
  return [(end.time() - begin.time()) / iterations, host_us / iterations];
}

using connection = await Deno.connect({ transport: "unix", path });
const writer = connection.writable.getWriter();
const { version, path: library } = nccl();
await writeLine(
  writer,
  `${side} ${rank} Deno ${Deno.version.deno}, NCCL ${version}, ${library.replace(/.*\//, "")}`,
);
for await (const line of linesOf(connection.readable)) {
  const [name, bytes, iterations] = line.split(" ");
  const [time_us, host_us] = await measure(OPERATIONS[name], Number(bytes), Number(iterations));
  await writeLine(writer, `${time_us.toFixed(2)} ${host_us.toFixed(3)}`);
}
