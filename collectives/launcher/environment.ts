// The environment that a rank gets from the launcher. The reading side is `rendezvous/environment.ts`.

import { gpuOf } from "../device_choice.ts";
import type { Variables } from "../rendezvous/environment.ts";
import type { LaunchOptions } from "./arguments.ts";

/** What all ranks of an attempt have in common. */
export interface JobPlace {
  /** Address of the store. */
  readonly hostname: string;
  /** Port of the store. */
  readonly port: number;
  /** Secret of the job. */
  readonly token: string;
  /** How many times the job was restarted. */
  readonly attempt: number;
  /** When the launcher started, as ISO 8601 writes it; the same after a restart. */
  readonly started: string;
  /** Processor cores of this node. */
  readonly cores: number;
  /** GPUs of this node. */
  readonly gpus: number;
  /** Columns of the terminal that rank 0's progress line may use; null without a terminal. */
  readonly columns: number | null;
}

/** Variables of other launchers that would contradict ours. */
const FOREIGN =
  /^(OMPI_COMM_WORLD_|PMI_|PMIX_|MPI_LOCAL|SLURM_PROCID$|SLURM_LOCALID$|TORCHELASTIC_)/;

/**
 * The variables that every rank of a node gets.
 *
 * @param inherited The launcher's own environment.
 * @param options What was asked for.
 * @param place Where the job meets.
 * @returns The environment; rank and size are not in it.
 */
export function jobEnvironment(
  inherited: Variables,
  options: LaunchOptions,
  place: JobPlace,
): Record<string, string> {
  const env: Record<string, string> = {};
  for (const [name, value] of Object.entries(inherited)) {
    if (value !== undefined && !FOREIGN.test(name)) env[name] = value;
  }
  for (const name of ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LINA_COLUMNS"]) {
    delete env[name];
  }
  env.LINA_STORE = place.hostname.includes(":")
    ? `[${place.hostname}]:${place.port}`
    : `${place.hostname}:${place.port}`;
  env.LINA_TOKEN = place.token;
  env.LINA_BACKEND = options.backend;
  env.LINA_DEVICE = options.device;
  env.LINA_SHARE_GPU = options.shareGpu ? "1" : "0";
  env.LINA_GPUS = String(place.gpus);
  // Ranks that share a GPU by MPS have few hardware queues each, and streams on one queue wait for each other falsely.
  if (options.shareGpu) env.CUDA_DEVICE_MAX_CONNECTIONS ??= "8";
  env.LINA_RESTART = String(place.attempt);
  env.LINA_STARTED = place.started;
  env.MASTER_ADDR = place.hostname;
  env.MASTER_PORT = String(place.port);
  // Ranks that each start a thread per core would fight for the cores.
  const threads = String(Math.max(1, Math.floor(place.cores / options.ranks)));
  env.OPENBLAS_NUM_THREADS ??= inherited.OMP_NUM_THREADS ?? threads;
  env.OMP_NUM_THREADS ??= threads;
  return env;
}

/**
 * The whole environment of one rank.
 *
 * @param job What {@linkcode jobEnvironment} gave.
 * @param options What was asked for.
 * @param place Where the job meets.
 * @param localRank The rank's number on this node.
 * @returns The environment.
 */
export function rankEnvironment(
  job: Readonly<Record<string, string>>,
  options: LaunchOptions,
  place: JobPlace,
  localRank: number,
): Record<string, string> {
  const rank = options.nodeRank * options.ranks + localRank;
  const env: Record<string, string> = {
    ...job,
    RANK: String(rank),
    WORLD_SIZE: String(options.nodes * options.ranks),
    LOCAL_RANK: String(localRank),
    LOCAL_WORLD_SIZE: String(options.ranks),
  };
  if (options.device !== "cpu") {
    const { gpus } = place, { ranks, shareGpu } = options;
    const gpu = gpuOf(job.CUDA_VISIBLE_DEVICES, gpus, ranks, localRank, shareGpu);
    if (gpu !== null) env.CUDA_VISIBLE_DEVICES = gpu;
  }
  // The rank writes to a pipe; this tells it that a person looks at a terminal, and how wide that is.
  if (rank === 0 && place.columns !== null) env.LINA_COLUMNS = String(place.columns);
  return env;
}
