import assert from "node:assert/strict";
import { parseAddress, readEnvironment, type Variables } from "./environment.ts";

function place(env: Variables) {
  const { source, rank, size, localRank, localSize, store } = readEnvironment(env);
  const at = store && `${store.hostname}:${store.port}${store.serve ? " serve" : ""}`;
  return `${source} ${rank}/${size} local ${localRank}/${localSize} ${at}`;
}

Deno.test.each([
  ["nothing", {}, "none 0/1 local 0/1 null"],
  [
    "our launcher",
    {
      RANK: "3",
      WORLD_SIZE: "4",
      LOCAL_RANK: "1",
      LOCAL_WORLD_SIZE: "2",
      LINA_STORE: "10.0.0.1:4000",
      MASTER_ADDR: "10.0.0.1",
      MASTER_PORT: "4000",
    },
    "launcher 3/4 local 1/2 10.0.0.1:4000",
  ],
  [
    "torchrun on one host",
    {
      RANK: "0",
      WORLD_SIZE: "2",
      LOCAL_RANK: "0",
      LOCAL_WORLD_SIZE: "2",
      MASTER_ADDR: "some-host",
      MASTER_PORT: "29500",
    },
    "torchrun 0/2 local 0/2 127.0.0.1:29501 serve",
  ],
  [
    "torchrun on two hosts",
    {
      RANK: "2",
      WORLD_SIZE: "4",
      LOCAL_RANK: "0",
      LOCAL_WORLD_SIZE: "2",
      MASTER_ADDR: "node7",
      MASTER_PORT: "29500",
    },
    "torchrun 2/4 local 0/2 node7:29501",
  ],
  [
    "Open MPI",
    {
      OMPI_COMM_WORLD_RANK: "1",
      OMPI_COMM_WORLD_SIZE: "4",
      OMPI_COMM_WORLD_LOCAL_RANK: "1",
      OMPI_COMM_WORLD_LOCAL_SIZE: "4",
    },
    "Open MPI 1/4 local 1/4 null",
  ],
  [
    "our launcher over Open MPI",
    { OMPI_COMM_WORLD_RANK: "1", OMPI_COMM_WORLD_SIZE: "4", LINA_STORE: "127.0.0.1:5" },
    "launcher 1/4 local 1/4 127.0.0.1:5",
  ],
  [
    "MPICH",
    { PMI_RANK: "5", PMI_SIZE: "8", MPI_LOCALRANKID: "1", MPI_LOCALNRANKS: "4" },
    "MPICH 5/8 local 1/4 null",
  ],
  [
    "Slurm",
    {
      SLURM_PROCID: "5",
      SLURM_NTASKS: "8",
      SLURM_LOCALID: "1",
      SLURM_NODEID: "1",
      SLURM_TASKS_PER_NODE: "4(x2)",
      SLURM_STEP_NODELIST: "gpu[03-04]",
      SLURM_JOB_ID: "12345",
    },
    "Slurm 5/8 local 1/4 gpu03:28346",
  ],
  [
    "Slurm's batch script",
    {
      SLURM_PROCID: "0",
      SLURM_NTASKS: "8",
      SLURM_JOB_ID: "1",
      SLURM_SCRIPT_CONTEXT: "prolog_task",
    },
    "none 0/1 local 0/1 null",
  ],
] as [string, Variables, string][])("readEnvironment() reads %s", (_name, env, expected) => {
  assert.equal(place(env), expected);
});

Deno.test("readEnvironment() takes Slurm's first host from any list", () => {
  const first = (list: string) =>
    readEnvironment({
      SLURM_PROCID: "0",
      SLURM_NTASKS: "9",
      SLURM_TASKS_PER_NODE: "3(x3)",
      SLURM_JOB_NODELIST: list,
    }).store?.hostname;
  assert.equal(first("node1"), "node1");
  assert.equal(first("node1,node2"), "node1");
  assert.equal(first("node[001-003,7]"), "node001");
  assert.equal(first("rack[1,3]n-ib,other"), "rack1n-ib");
});

Deno.test("readEnvironment() keeps tokens and jobs apart", () => {
  const base = { RANK: "0", WORLD_SIZE: "2", MASTER_ADDR: "a" };
  assert.equal(readEnvironment(base).token, "");
  assert.equal(readEnvironment({ ...base, LINA_TOKEN: "secret" }).token, "secret");
  const local = { ...base, LOCAL_WORLD_SIZE: "2" };
  assert.equal(readEnvironment({ ...local, TORCHELASTIC_RUN_ID: "7" }).token, "job 7");
  // What anybody can find out is no secret where other machines can connect.
  assert.equal(readEnvironment({ ...base, TORCHELASTIC_RUN_ID: "7" }).token, "");
  assert.equal(readEnvironment({ ...base, SLURM_JOB_ID: "7" }).token, "");
  assert.equal(readEnvironment({ ...base, LINA_RESTART: "2" }).attempt, 2);
});

Deno.test.each([
  [{ RANK: "0" }, /WORLD_SIZE must be set beside RANK/],
  [{ RANK: "two", WORLD_SIZE: "2" }, /RANK must be a whole number >= 0: current value is "two"/],
  [{ RANK: "-1", WORLD_SIZE: "2" }, /RANK must be a whole number/],
  [{ RANK: "2", WORLD_SIZE: "2" }, /RANK must be less than the world size 2: current value is 2/],
  [{ RANK: "0", WORLD_SIZE: "0" }, /must be less than the world size 0/],
  [{ PMI_RANK: "0", PMI_SIZE: "x" }, /PMI_SIZE must be a whole number/],
  [
    { LINA_BACKEND: "tcp" },
    /LINA_BACKEND must be one of auto, shm, mpi, nccl: current value is tcp/,
  ],
  [
    { RANK: "0", WORLD_SIZE: "2", MASTER_ADDR: "a", MASTER_PORT: "65535" },
    /MASTER_PORT must be in 1..65534/,
  ],
  [{ RANK: "0", WORLD_SIZE: "2", LINA_STORE: "nowhere" }, /LINA_STORE must be HOST:PORT/],
] as [Variables, RegExp][])("readEnvironment() refuses %j", (env, message) => {
  assert.throws(() => readEnvironment(env), message);
});

Deno.test("parseAddress() reads names, IPv4 and IPv6", () => {
  assert.deepEqual(parseAddress("node:1", "x"), { hostname: "node", port: 1 });
  assert.deepEqual(parseAddress("[::1]:65535", "x"), { hostname: "::1", port: 65535 });
  for (const bad of ["", "node", "node:", ":5", "node:0", "node:65536", "::1:5", "a:b:5"]) {
    assert.throws(() => parseAddress(bad, "--rdzv"), /--rdzv must be HOST:PORT/);
  }
});
