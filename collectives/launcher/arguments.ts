// The launcher's command line: what may be asked for, and the errors when something else is. Nothing is started here.

import {
  BACKEND_CHOICES,
  type BackendChoice,
  DEVICE_CHOICES,
  type DeviceChoice,
  parseAddress,
} from "../rendezvous/environment.ts";

/** What the launcher is asked to do. */
export interface LaunchOptions {
  /** Ranks to start on this node. */
  readonly ranks: number;
  /** Number of nodes. */
  readonly nodes: number;
  /** Number of this node, from 0. */
  readonly nodeRank: number;
  /** Where node 0 serves the rendezvous; null takes a free port on loopback. */
  readonly rendezvous: { readonly hostname: string; readonly port: number } | null;
  /** What carries the ranks' data. */
  readonly backend: BackendChoice;
  /** Where the ranks' tensors live. */
  readonly device: DeviceChoice;
  /** Whether several ranks may use one GPU. */
  readonly shareGpu: boolean;
  /** How often the job is started again after a failure. */
  readonly maxRestarts: number;
  /** Folder for one log file per rank; null writes none. */
  readonly logDir: string | null;
  /** Path or URL of the ranks' program. */
  readonly script: string;
  /** The program's arguments. */
  readonly args: readonly string[];
}

/** A command line that cannot be carried out; the launcher prints it with the usage and exits with 2. */
export class UsageError extends Error {
  /** @default {"UsageError"} */
  override readonly name: string = "UsageError";
}

/** How the launcher is called. */
export const USAGE: string = `Usage: deno run -A launch.ts -n N [options] script.ts [arguments]

Starts N processes of script.ts, the ranks of one job.

  -n N               ranks on this node, 1 to 1024
  --backend NAME     auto, shm, mpi or nccl; mpi starts the ranks by mpirun
  --device NAME      auto, cpu or cuda; auto takes GPUs if every rank gets one
  --share-gpu        let several ranks use one GPU; for testing
  --max-restarts K   start all ranks again after a failure, at most K times
  --log-dir DIR      also write the output of each rank to DIR/rank_R.log
  --nnodes M         number of nodes; call the launcher once on each
  --node-rank I      number of this node, 0 to M - 1
  --rdzv HOST:PORT   where node 0 serves the rendezvous; every node needs the
                     same LINA_TOKEN unless HOST is loopback
  -h, --help         show this text
`;

const MAX_RANKS = 1024;
/** Flags that have no value. */
const SWITCHES = ["--share-gpu"];
/** Flags that have one. */
const FLAGS = [
  "-n",
  "--nnodes",
  "--node-rank",
  "--rdzv",
  "--backend",
  "--device",
  "--max-restarts",
  "--log-dir",
];

/**
 * Reads the command line. Flags end at the script; everything after it belongs to the script.
 *
 * @param args The arguments, without the program's name.
 * @returns What is asked for, or null when that is the usage.
 * @throws {UsageError} If flags are unknown, values malformed, or the script is missing.
 */
export function parseArguments(args: readonly string[]): LaunchOptions | null {
  const given = new Map<string, string>();
  let i = 0;
  while (i < args.length && args[i].startsWith("-")) {
    const arg = args[i++];
    if (arg === "-h" || arg === "--help") return null;
    if (arg === "--") break;
    const equals = arg.startsWith("--") ? arg.indexOf("=") : -1;
    const flag = equals < 0 ? arg : arg.slice(0, equals);
    const single = SWITCHES.includes(flag);
    if (!single && !FLAGS.includes(flag)) {
      throw new UsageError(`Cannot launch as flags must be known: current value is ${flag}`);
    }
    if (given.has(flag)) {
      throw new UsageError(`Cannot launch as ${flag} must be given once: current value is twice`);
    }
    if (single) {
      if (equals >= 0) {
        throw new UsageError(
          `Cannot launch as ${flag} must have no value: current value is ${arg.slice(equals + 1)}`,
        );
      }
      given.set(flag, "");
      continue;
    }
    if (equals < 0 && i >= args.length) {
      throw new UsageError(`Cannot launch as ${flag} must have a value: current value is missing`);
    }
    given.set(flag, equals < 0 ? args[i++] : arg.slice(equals + 1));
  }
  if (!given.has("-n")) {
    throw new UsageError(
      "Cannot launch as -n N, the number of ranks, must be given: current value is missing",
    );
  }
  const ranks = numberOf(given, "-n", 1, MAX_RANKS, 1);
  const nodes = numberOf(given, "--nnodes", 1, MAX_RANKS, 1);
  const nodeRank = numberOf(given, "--node-rank", 0, nodes - 1, 0);
  if (nodes > 1 && !(given.has("--node-rank") && given.has("--rdzv"))) {
    throw new UsageError(
      "Cannot launch on several nodes as --node-rank I and --rdzv HOST:PORT must be given: current value is missing",
    );
  }
  const script = args[i];
  if (script === undefined || script === "") {
    throw new UsageError("Cannot launch as a script must be named: current value is missing");
  }
  requireScript(script);
  return {
    ranks,
    nodes,
    nodeRank,
    rendezvous: addressOf(given.get("--rdzv")),
    backend: backendOf(given, nodes),
    device: deviceOf(given),
    shareGpu: given.has("--share-gpu"),
    maxRestarts: numberOf(given, "--max-restarts", 0, 1_000_000, 0),
    logDir: given.get("--log-dir") ?? null,
    script,
    args: args.slice(i + 1),
  };
}

function numberOf(
  given: ReadonlyMap<string, string>,
  flag: string,
  least: number,
  most: number,
  otherwise: number,
): number {
  const text = given.get(flag);
  if (text === undefined) return otherwise;
  const value = /^\d{1,9}$/.test(text) ? Number(text) : NaN;
  if (!(least <= value && value <= most)) {
    throw new UsageError(
      `Cannot launch as ${flag} must be a whole number in ${least}..${most}: current value is ${text}`,
    );
  }
  return value;
}

function addressOf(text: string | undefined): LaunchOptions["rendezvous"] {
  if (text === undefined) return null;
  try {
    return parseAddress(text, "--rdzv");
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
}

function backendOf(given: ReadonlyMap<string, string>, nodes: number): BackendChoice {
  const backend = (given.get("--backend") ?? "auto") as BackendChoice;
  if (!BACKEND_CHOICES.includes(backend)) {
    throw new UsageError(
      `Cannot launch as --backend must be one of ${
        BACKEND_CHOICES.join(", ")
      }: current value is ${backend}`,
    );
  }
  if (backend === "mpi" && nodes > 1) {
    throw new UsageError(
      "Cannot launch on several nodes as --backend mpi must leave them to mpirun: call `mpirun --hostfile FILE -n N deno run -A SCRIPT` instead",
    );
  }
  return backend;
}

function deviceOf(given: ReadonlyMap<string, string>): DeviceChoice {
  const device = (given.get("--device") ?? "auto") as DeviceChoice;
  if (DEVICE_CHOICES.includes(device)) return device;
  throw new UsageError(
    `Cannot launch as --device must be one of ${
      DEVICE_CHOICES.join(", ")
    }: current value is ${device}`,
  );
}

/** A path must be a file; a URL is left to Deno. */
function requireScript(script: string): void {
  if (/^[a-z][a-z0-9+.-]+:/i.test(script)) return;
  let what = "a folder";
  try {
    if (!Deno.statSync(script).isDirectory) return;
  } catch (error) {
    what = error instanceof Deno.errors.NotFound ? "missing" : String((error as Error).message);
  }
  throw new UsageError(
    `Cannot launch as the script ${script} must be a file: current value is ${what}`,
  );
}
