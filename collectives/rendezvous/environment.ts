// Which rank this process is: read from the environment that a launcher has set, ours or another. A pure function of the
// variables; nothing is connected here.

/** A backend that can be asked for; `auto` chooses. */
export type BackendChoice = "auto" | "shm" | "mpi" | "nccl";
/** Every backend that can be asked for. */
export const BACKEND_CHOICES: readonly BackendChoice[] = ["auto", "shm", "mpi", "nccl"];

/** A device that can be asked for; `auto` takes GPUs if every rank gets one of its own. */
export type DeviceChoice = "auto" | "cpu" | "cuda";
/** Every device that can be asked for. */
export const DEVICE_CHOICES: readonly DeviceChoice[] = ["auto", "cpu", "cuda"];

/** Environment variables. */
export type Variables = Readonly<Record<string, string | undefined>>;

/** What the environment says about this process's place in the job. */
export interface RankEnvironment {
  /** Whose variables gave rank and size; `none` is a world of one. */
  readonly source: "launcher" | "torchrun" | "Open MPI" | "MPICH" | "Slurm" | "none";
  /** This process's rank. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
  /** Rank among the processes of this host. */
  readonly localRank: number;
  /** Number of ranks on this host. */
  readonly localSize: number;
  /** Whether the variables say that all ranks run on this host. */
  readonly oneHost: boolean;
  /** Where the store is, and whether this process is the one to serve it; null when the variables name no place. */
  readonly store:
    | { readonly hostname: string; readonly port: number; readonly serve: boolean }
    | null;
  /** Secret of the job; may be empty on loopback. */
  readonly token: string;
  /** Backend asked for. */
  readonly backend: BackendChoice;
  /** Device asked for. */
  readonly device: DeviceChoice;
  /** Whether several ranks may use one GPU. */
  readonly shareGpu: boolean;
  /** GPUs of this host, as our launcher has counted them; null if nobody has. */
  readonly gpus: number | null;
  /** Whether mpirun or srun has started this process as an MPI rank. */
  readonly mpi: boolean;
  /** How many times the job was restarted. */
  readonly attempt: number;
}

/** Variables that give rank and size, by launcher, in the order in which they are looked for. */
const FAMILIES = [
  {
    source: "torchrun",
    rank: ["RANK"],
    size: ["WORLD_SIZE"],
    localRank: ["LOCAL_RANK"],
    localSize: ["LOCAL_WORLD_SIZE"],
  },
  {
    source: "Open MPI",
    rank: ["OMPI_COMM_WORLD_RANK"],
    size: ["OMPI_COMM_WORLD_SIZE"],
    localRank: ["OMPI_COMM_WORLD_LOCAL_RANK"],
    localSize: ["OMPI_COMM_WORLD_LOCAL_SIZE"],
  },
  {
    source: "MPICH",
    rank: ["PMI_RANK"],
    size: ["PMI_SIZE"],
    localRank: ["MPI_LOCALRANKID", "PMI_LOCAL_RANK"],
    localSize: ["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"],
  },
  {
    source: "Slurm",
    rank: ["SLURM_PROCID"],
    size: ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"],
    localRank: ["SLURM_LOCALID"],
    localSize: [],
  },
] as const;

/**
 * Reads this process's place in the job from the variables of our launcher, torchrun, Open MPI, MPICH (PMI) or Slurm.
 *
 * @param env The environment, `Deno.env.toObject()`.
 * @returns The place; a world of one when no launcher has set anything.
 * @throws {Error} If variables contradict each other or are malformed; the message names them.
 */
export function readEnvironment(env: Variables): RankEnvironment {
  const backend = (env.LINA_BACKEND ?? "auto") as BackendChoice;
  if (!BACKEND_CHOICES.includes(backend)) {
    throw new Error(
      `Cannot choose a backend as LINA_BACKEND must be one of ${
        BACKEND_CHOICES.join(", ")
      }: current value is ${backend}`,
    );
  }
  const device = (env.LINA_DEVICE ?? "auto") as DeviceChoice;
  if (!DEVICE_CHOICES.includes(device)) {
    throw new Error(
      `Cannot choose a device as LINA_DEVICE must be one of ${
        DEVICE_CHOICES.join(", ")
      }: current value is ${device}`,
    );
  }
  const shareGpu = env.LINA_SHARE_GPU === "1";
  const gpus = wholeNumber(env, ["LINA_GPUS"], "the number of GPUs") ?? null;
  const attempt = wholeNumber(env, ["LINA_RESTART"], "the restart") ?? 0;
  const token = env.LINA_TOKEN ?? "";
  const family = FAMILIES.find((f) => env[f.rank[0]] !== undefined && applies(f.source, env));
  if (!family) {
    return {
      source: "none",
      rank: 0,
      size: 1,
      localRank: 0,
      localSize: 1,
      oneHost: true,
      store: null,
      token,
      backend,
      device,
      shareGpu,
      gpus,
      mpi: false,
      attempt,
    };
  }
  const rank = wholeNumber(env, family.rank, "the rank")!;
  const size = wholeNumber(env, family.size, "the world size");
  if (size === undefined) {
    throw new Error(
      `Cannot join the job as ${family.size[0]} must be set beside ${
        family.rank[0]
      }: current value is unset`,
    );
  }
  if (rank >= size) {
    throw new Error(
      `Cannot join the job as ${
        family.rank[0]
      } must be less than the world size ${size}: current value is ${rank}`,
    );
  }
  const knownLocalSize = wholeNumber(env, family.localSize, "the local world size") ??
    slurmLocalSize(env);
  const localSize = knownLocalSize ?? size;
  const oneHost = knownLocalSize === size;
  const localRank = wholeNumber(env, family.localRank, "the local rank") ?? rank % localSize;
  return {
    source: env.LINA_STORE !== undefined ? "launcher" : family.source,
    rank,
    size,
    localRank,
    localSize,
    oneHost,
    store: storePlace(env, { source: family.source, rank, oneHost }),
    token: token || (oneHost ? jobName(env) : ""),
    backend,
    device,
    shareGpu,
    gpus,
    mpi: family.source === "Open MPI" || family.source === "MPICH",
    attempt,
  };
}

/** Slurm also sets SLURM_PROCID in a batch script, which is not a rank of anything until srun starts a step. */
function applies(source: string, env: Variables): boolean {
  if (source !== "Slurm") return true;
  const batch = env.SLURM_JOB_ID !== undefined && env.SLURM_STEP_ID === undefined &&
    env.SLURM_STEPID === undefined && env.SLURM_SCRIPT_CONTEXT !== undefined;
  return !batch;
}

function wholeNumber(
  env: Variables,
  names: readonly string[],
  what: string,
): number | undefined {
  const name = names.find((n) => env[n] !== undefined);
  if (name === undefined) return undefined;
  const text = env[name]!.trim();
  if (!/^\d{1,9}$/.test(text)) {
    throw new Error(
      `Cannot read ${what} as ${name} must be a whole number >= 0: current value is "${text}"`,
    );
  }
  return Number(text);
}

/** Ranks on this host from `SLURM_TASKS_PER_NODE`: `4`, or `4(x2),3` for hosts of 4, 4 and 3. */
function slurmLocalSize(env: Variables): number | undefined {
  const list = env.SLURM_STEP_TASKS_PER_NODE ?? env.SLURM_TASKS_PER_NODE;
  if (list === undefined || env.SLURM_PROCID === undefined) return undefined;
  const perNode: number[] = [];
  for (const part of list.split(",")) {
    const match = /^(\d+)(?:\(x(\d+)\))?$/.exec(part.trim());
    if (!match) return undefined;
    for (let i = 0; i < Number(match[2] ?? 1); i++) perNode.push(Number(match[1]));
  }
  return perNode[Number(env.SLURM_NODEID ?? 0)];
}

function storePlace(
  env: Variables,
  known: { readonly source: string; readonly rank: number; readonly oneHost: boolean },
): RankEnvironment["store"] {
  if (env.LINA_STORE !== undefined) {
    return { ...parseAddress(env.LINA_STORE, "LINA_STORE"), serve: false };
  }
  const { source, rank, oneHost } = known;
  const master = env.MASTER_ADDR ?? (source === "Slurm" ? firstSlurmHost(env) : undefined);
  if (master === undefined) return null;
  // MASTER_PORT itself belongs to whoever set it: torchrun's own store may listen there.
  const port = wholeNumber(env, ["MASTER_PORT"], "the port") ??
    28_000 + Number(env.SLURM_JOB_ID ?? 0) % 4_000;
  if (port < 1 || port > 65_534) {
    throw new Error(
      `Cannot place the rendezvous as MASTER_PORT must be in 1..65534: current value is ${port}`,
    );
  }
  return { hostname: oneHost ? "127.0.0.1" : master, port: port + 1, serve: rank === 0 };
}

/**
 * A name that other jobs of the machine do not share: what tells two jobs on one loopback port apart when no token was given. Anybody
 * can find it out, so it is no token for an address that other machines reach.
 */
function jobName(env: Variables): string {
  const id = env.TORCHELASTIC_RUN_ID ?? env.SLURM_JOB_ID;
  return id === undefined || id === "none" ? "" : `job ${id}`;
}

/** The first host of a Slurm list: `node[03-05,9],other` gives `node03`. */
function firstSlurmHost(env: Variables): string | undefined {
  const list = env.SLURM_STEP_NODELIST ?? env.SLURM_JOB_NODELIST ?? env.SLURM_NODELIST;
  const match = list && /^([^,[\]]+)(?:\[([^\],-]+)[^\]]*\]([^,[\]]*))?/.exec(list);
  return match ? `${match[1]}${match[2] ?? ""}${match[3] ?? ""}` : undefined;
}

/**
 * Reads `HOST:PORT`; an IPv6 address stands in brackets.
 *
 * @param text The address.
 * @param name Where it was given, for the error.
 * @returns Host and port.
 * @throws {Error} If it is malformed.
 */
export function parseAddress(text: string, name: string): { hostname: string; port: number } {
  const match = /^(?:\[([^\]]+)\]|([^:[\]]+)):(\d{1,5})$/.exec(text.trim());
  const port = Number(match?.[3]);
  if (!match || port < 1 || port > 65_535) {
    throw new Error(
      `Cannot find the rendezvous as ${name} must be HOST:PORT with a port in 1..65535: current value is "${text}"`,
    );
  }
  return { hostname: match[1] ?? match[2], port };
}
