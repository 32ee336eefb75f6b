import assert from "node:assert/strict";
import { readEnvironment } from "../rendezvous/environment.ts";
import { parseArguments } from "./arguments.ts";
import { jobEnvironment, type JobPlace, rankEnvironment } from "./environment.ts";

const place: JobPlace = {
  hostname: "127.0.0.1",
  port: 4000,
  token: "secret",
  attempt: 1,
  started: "2026-01-02T03:04:05.678Z",
  cores: 8,
  gpus: 0,
  columns: null,
};
const script = "https://example.org/s.ts";
const options = parseArguments(["-n", "3", "--backend", "shm", script])!;

function environment(inherited: Record<string, string>, localRank: number, changes = {}) {
  const here = { ...place, ...changes };
  return rankEnvironment(jobEnvironment(inherited, options, here), options, here, localRank);
}

Deno.test("a rank reads what the launcher wrote", () => {
  assert.deepEqual(readEnvironment(environment({}, 2)), {
    source: "launcher",
    rank: 2,
    size: 3,
    localRank: 2,
    localSize: 3,
    oneHost: true,
    store: { hostname: "127.0.0.1", port: 4000, serve: false },
    token: "secret",
    backend: "shm",
    device: "auto",
    shareGpu: false,
    gpus: 0,
    mpi: false,
    attempt: 1,
  });
  const nodes = "-n 3 --nnodes 2 --node-rank 1 --rdzv [fd00::1]:4000".split(" ");
  const second = parseArguments([...nodes, script])!;
  const there = { ...place, hostname: "fd00::1" };
  const read = readEnvironment(
    rankEnvironment(jobEnvironment({}, second, there), second, there, 2),
  );
  assert.deepEqual([read.rank, read.size, read.localRank], [5, 6, 2]);
  assert.deepEqual(read.store, { hostname: "fd00::1", port: 4000, serve: false });
});

Deno.test("variables of an outer job do not reach the ranks", () => {
  const outer = {
    RANK: "7",
    WORLD_SIZE: "9",
    OMPI_COMM_WORLD_RANK: "7",
    PMI_RANK: "1",
    HOME: "/h",
  };
  const env = environment(outer, 0);
  assert.deepEqual([env.RANK, env.WORLD_SIZE, env.HOME], ["0", "3", "/h"]);
  assert.ok(!("OMPI_COMM_WORLD_RANK" in env) && !("PMI_RANK" in env));
});

Deno.test("cores are shared out unless the user did", () => {
  const env = environment({}, 0);
  assert.deepEqual([env.OPENBLAS_NUM_THREADS, env.OMP_NUM_THREADS], ["2", "2"]);
  const set = environment({ OMP_NUM_THREADS: "5" }, 0);
  assert.deepEqual([set.OPENBLAS_NUM_THREADS, set.OMP_NUM_THREADS], ["5", "5"]);
  assert.equal(environment({ OPENBLAS_NUM_THREADS: "7" }, 0).OPENBLAS_NUM_THREADS, "7");
  assert.equal(environment({}, 0, { cores: 2 }).OPENBLAS_NUM_THREADS, "1");
});

Deno.test("each rank sees a GPU of its own where there are enough", () => {
  assert.equal(environment({}, 2, { gpus: 4 }).CUDA_VISIBLE_DEVICES, "2");
  assert.equal(environment({}, 2, { gpus: 2 }).CUDA_VISIBLE_DEVICES, undefined);
  assert.equal(environment({ CUDA_VISIBLE_DEVICES: "4,5,GPU-a" }, 2).CUDA_VISIBLE_DEVICES, "GPU-a");
  assert.equal(environment({ CUDA_VISIBLE_DEVICES: "4" }, 2).CUDA_VISIBLE_DEVICES, "4");
  assert.equal(environment({}, 1, { gpus: 4 }).LINA_GPUS, "4");
});

Deno.test("rank 0 knows of the terminal", () => {
  assert.equal(environment({}, 0, { columns: 70 }).LINA_COLUMNS, "70");
  assert.equal(environment({ LINA_COLUMNS: "9" }, 1, { columns: 70 }).LINA_COLUMNS, undefined);
});
