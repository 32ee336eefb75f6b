// One rank of bench/collectives.ts: our side, through the public awaited API on f32 tensors. Rank 0 prints the same lines as
// mpi_collectives.c.

import { createCommunicator } from "../collectives/communicator.ts";
import { openMpi } from "../collectives/mpi/mod.ts";
import { openShm } from "../collectives/shm/mod.ts";
import type { Work } from "../collectives/types.ts";
import { cpuDevice, hostView } from "../tensor/cpu/device.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import { fileStore } from "../tests/_ranks.ts";

const [backend, folder, samplesText, ...sizes] = Deno.args;
const env = (names: string[]) => Number(names.map((name) => Deno.env.get(name)).find((v) => v));
const rank = env(["LINA_BENCH_RANK", "OMPI_COMM_WORLD_RANK"]);
const size = env(["LINA_BENCH_SIZE", "OMPI_COMM_WORLD_SIZE"]);
const device = cpuDevice();
const boot = { rank, size, localRank: rank, device, store: fileStore(folder) };
const transport = await (backend === "mpi" ? openMpi(boot) : openShm(boot));
const comm = createCommunicator(transport, { rank, size, name: "world" });
const samples = Number(samplesText);
const ROOM_FLOATS = 16 << 20;
const room = [empty(device, [ROOM_FLOATS]), empty(device, [ROOM_FLOATS])];
const host = room.map((tensor) => hostView(tensor) as Float32Array);
for (const array of host) array.fill(0);

type Operation = "allReduce" | "allToAllV" | "allGather";

const value = (r: number, i: number) => (r + 1) * (i % 1000 + 1);

function operation(name: Operation, count: number, x: Tensor, y: Tensor): () => Work {
  const counts = new Int32Array(size).fill(count / size);
  const options = { out: y };
  const part = x.rows(0, count / size);
  if (name === "allReduce") return () => comm.allReduce(x, options);
  if (name === "allToAllV") return () => comm.allToAllV(x, counts, y, counts);
  return () => comm.allGather(part, y);
}

async function right(name: Operation, count: number, run: () => Work): Promise<boolean> {
  const [x, y] = host;
  const block = count / size;
  for (let i = 0; i < count; i++) x[i] = value(rank, i), y[i] = -1;
  await run();
  let good = 1;
  for (let i = 0; i < count; i++) {
    const from = Math.floor(i / block);
    const want = name === "allReduce"
      ? value(size * (size + 1) / 2 - 1, i)
      : name === "allToAllV"
      ? value(from, rank * block + i % block)
      : value(from, i % block);
    if (y[i] !== want) good = 0;
  }
  const all = Int32Array.of(good);
  await comm.allReduce(all, { op: "min" });
  return all[0] === 1;
}

async function measure(
  name: Operation,
  bytes: number,
  iterations: number,
  report: boolean,
): Promise<void> {
  let count = Math.floor(bytes / 4);
  if (name !== "allReduce") count = Math.max(size, Math.floor(count / size) * size);
  const [x, y] = room.map((tensor) => tensor.rows(0, count));
  // allReduce may have fewer elements than ranks; only the others need blocks.
  const run = name === "allReduce"
    ? () => comm.allReduce(x, { out: y })
    : operation(name, count, x, y);
  let good = await right(name, count, run);
  for (let i = 0; i < iterations; i++) await run();
  const times: number[] = [];
  for (let s = 0; s < samples; s++) {
    await comm.barrier();
    const start = performance.now();
    for (let i = 0; i < iterations; i++) await run();
    const mine = Float64Array.of((performance.now() - start) / iterations * 1000);
    await comm.allReduce(mine, { op: "max" });
    times.push(mine[0]);
  }
  good = await right(name, count, run) && good;
  times.sort((a, b) => a - b);
  if (report && rank === 0) {
    console.log(`${name} ${count * 4} ${times[samples >> 1].toFixed(4)} ${good ? 1 : 0}`);
  }
}

// V8 compiles what runs often, and again when other types come along: a C program is compiled when it starts, so the comparison begins
// when that is over.
const names: Operation[] = ["allReduce", "allToAllV", "allGather"];
for (let i = 0; i < 3; i++) {
  for (const name of names) await measure(name, 64 * size, 4000, false);
}
for (const name of names) {
  for (const text of sizes) {
    const [bytes, iterations] = text.split(":").map(Number);
    await measure(name, bytes, iterations, true);
  }
}
await comm[Symbol.asyncDispose]();
