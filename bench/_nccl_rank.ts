// One rank of bench/nccl.ts: our side. Rank 0 prints, as peers/nccl.py does, `op bytes time_us host_us`: the slowest rank's time per
// operation by events of the compute stream, when each operation is ordered after that stream and before it again, and the host's time per
// call. Arguments: samples, when nothing new begins any more (ms of the day's clock, or inf), bytes:iterations, ….

import { init } from "../collectives/world.ts";
import { nccl } from "../ffi/nccl.ts";
import type { Communicator } from "../collectives/types.ts";
import type { CudaDevice } from "../tensor/cuda/device.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";

const [samplesText, untilText, ...sizes] = Deno.args;
const samples = Number(samplesText);
const until_ms = untilText === "inf" ? Infinity : Number(untilText);

await using world = await init({ device: "cuda" });
const { rank, size } = world;
const device = world.device as CudaDevice;
const { stream } = device;
const most = Math.max(...sizes.map((text) => Number(text.split(":")[0])));
const x = empty(device, [most / 4]), y = empty(device, [most / 4]);
device.kernels.fill(x, 1);
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

async function measure(run: Run, iterations: number): Promise<[time_us: number, host_us: number]> {
  for (let i = 0; i < Math.max(1, iterations >> 1); i++) run();
  await stream.synchronize();
  const times: number[] = [], hosts: number[] = [];
  for (let s = 0; s < (iterations < 4 ? 2 : samples); s++) {
    await world.barrier();
    await stream.synchronize();
    const begin = stream.recordTimed();
    const start = performance.now();
    for (let i = 0; i < iterations; i++) run();
    const host_us = (performance.now() - start) * 1000;
    const end = stream.recordTimed();
    await stream.synchronize();
    const both = Float64Array.of(end.time() - begin.time(), host_us);
    await world.allReduce(both, { op: "max" });
    times.push(both[0] / iterations);
    hosts.push(both[1] / iterations);
  }
  const median = (xs: number[]) => xs.sort((a, b) => a - b)[xs.length >> 1];
  return [median(times), median(hosts)];
}

/** Whether there is time to begin something; all ranks agree. */
async function goesOn(): Promise<boolean> {
  const late = Float64Array.of(Date.now() >= until_ms ? 1 : 0);
  await world.allReduce(late, { op: "max" });
  return late[0] === 0;
}

function floats(bytes: number): number {
  return Math.floor(bytes / 4);
}

const [smallest] = sizes.map((text) => Number(text.split(":")[0]));
// V8 compiles what has run often: the comparison is one of running programs.
for (let round = 0; round < 5 && await goesOn(); round++) {
  for (const operation of Object.values(OPERATIONS)) {
    await measure(operation(world, floats(smallest)), 40);
  }
}
measuring: for (const text of sizes) {
  const [bytes, iterations] = text.split(":").map(Number);
  for (const [name, operation] of Object.entries(OPERATIONS)) {
    if (!await goesOn()) break measuring;
    device.anchor();
    const [time_us, host_us] = await measure(operation(world, floats(bytes)), iterations);
    if (rank === 0) console.log(`${name} ${bytes} ${time_us.toFixed(2)} ${host_us.toFixed(3)}`);
  }
}
for (const tensor of [x, y] as Tensor[]) tensor[Symbol.dispose]();
if (rank === 0) console.error(`# Deno ${Deno.version.deno}, NCCL ${nccl().version}`);
