// `init()`: finds out which rank this process is, meets the other ranks, chooses a backend and gives the world, the communicator
// of all ranks. Start-up time is part of the contract, so backends and the device are loaded only where they are used.

import type { Device } from "../tensor/device.ts";
import { createCommunicator } from "./communicator.ts";
import { chooseDevice, type DeviceDecision, noteOf } from "./device_choice.ts";
import {
  BACKEND_CHOICES,
  type BackendChoice,
  DEVICE_CHOICES,
  type DeviceChoice,
  type RankEnvironment,
  readEnvironment,
} from "./rendezvous/environment.ts";
import { JobWorld } from "./job_world.ts";
import { DeferredStore } from "./rendezvous/deferred_store.ts";
import { hostIdentity, outwardAddress } from "./rendezvous/host.ts";
import { LocalStore } from "./rendezvous/local_store.ts";
import { rangesOf } from "./rendezvous/ranges.ts";
import {
  type ConnectOptions,
  connectStore,
  DEFAULT_TIMEOUT_MS,
} from "./rendezvous/store_client.ts";
import { StoreServer } from "./rendezvous/store_server.ts";
import type { BootContext, Store, Transport } from "./transport.ts";
import { timeoutOf } from "./watchdog.ts";
import type { Communicator } from "./types.ts";

/** Options of {@linkcode init}. */
export interface InitOptions {
  /** What carries the data. @default {the launcher's --backend, or "auto"} */
  readonly backend?: BackendChoice;
  /** Where tensors live; `auto` takes GPUs if every rank gets one of its own. @default {the launcher's --device, or "auto"} */
  readonly device?: DeviceChoice;
  /** Longest time to wait until all ranks have joined, in milliseconds. @default {60000} */
  readonly timeout_ms?: number;
}

/** All ranks of the job: a communicator, and what belongs to this process. */
export interface World extends Communicator {
  /** Rank among the processes of this host. */
  readonly localRank: number;
  /** Number of ranks on this host. */
  readonly localSize: number;
  /** Where this rank's tensors live. */
  readonly device: Device;
  /** Where ranks can leave each other small messages. */
  readonly store: Store;
  /** Why this backend carries the data, in words. */
  readonly backendReason: string;
  /** Why tensors live there, in words. */
  readonly deviceReason: string;
  /** How many times the job was restarted after a failure; 0 the first time. */
  readonly attempt: number;
}

let initialised = false;

/**
 * Joins the job that this process belongs to. All ranks call it once; the world is left when it is disposed of.
 *
 * @param options Backend and time-out.
 * @returns The world.
 * @throws {Error} If the environment is malformed, ranks do not arrive in time, or the backend asked for is impossible.
 *
 * @example
 * ```ts ignore
 * import { init } from "./world.ts";
 *
 * await using world = await init();
 * const x = Float32Array.of(world.rank);
 * await world.allReduce(x);
 * console.log(`rank ${world.rank} of ${world.size}: the sum of all ranks is ${x[0]}`);
 * ```
 */
export async function init(options: InitOptions = {}): Promise<World> {
  const env = readEnvironment(Deno.env.toObject());
  const asked = options.backend ?? env.backend;
  const wish = { backend: asked, device: options.device ?? env.device };
  beOneOf("backend", asked, BACKEND_CHOICES);
  beOneOf("device", wish.device, DEVICE_CHOICES);
  if (initialised && env.size > 1) {
    throw new Error("Cannot join the job as init() must be called once: current value is again");
  }
  initialised = true;
  const cpu = import("../tensor/cpu/device.ts"); // loads while the ranks meet
  cpu.catch(() => {}); // the await below reports it, unless something else fails first
  const departed = new Map<number, string>();
  const timeout_ms = timeoutOf(options.timeout_ms ?? DEFAULT_TIMEOUT_MS);
  const store = await meet(env, timeout_ms, departed);
  try {
    const here = { store, departed, timeout_ms };
    const decision = await chooseDevice(env, wish, here);
    const note = env.rank === 0 ? noteOf(decision, wish) : null;
    if (note !== null) console.warn(note);
    const device = decision.kind === "cpu" ? (await cpu).cpuDevice() : await openCuda();
    const context: BootContext = {
      ...here,
      rank: env.rank,
      size: env.size,
      localRank: env.localRank,
      ...(decision.kind === "cuda" && { device }),
    };
    const backend = decision.kind === "cuda" && env.size > 1 ? "nccl" : asked;
    const { transport, reason } = await connect(backend, decision, env, context);
    if (store instanceof DeferredStore) {
      await meetOver(transport, env, store, departed);
    }
    return new JobWorld({ env, transport, reason, device, decision, store });
  } catch (error) {
    await store.close();
    throw error;
  }
}

function beOneOf(what: string, value: string, choices: readonly string[]): void {
  if (choices.includes(value)) return;
  throw new TypeError(
    `Cannot choose a ${what} as it must be one of ${choices.join(", ")}: current value is ${value}`,
  );
}

async function openCuda(): Promise<Device> {
  const { cudaDevice } = await import("../tensor/cuda/device.ts");
  return await cudaDevice();
}

async function meet(
  env: RankEnvironment,
  timeout_ms: number,
  departed: Map<number, string>,
): Promise<Store> {
  if (env.store === null) {
    if (env.size > 1 && !env.mpi) {
      throw new Error(
        `Cannot join the job of ${env.size} ranks as MASTER_ADDR must say where rank 0 is: current value is unset`,
      );
    }
    return env.size > 1 ? new DeferredStore() : new LocalStore();
  }
  const { hostname, port, serve } = env.store;
  if (serve) {
    // A rank that serves the store goes on with that until the others have left, then its process ends by itself.
    StoreServer.listen({ hostname, port, token: env.token }).unref();
  }
  return await join(env, { hostname, port, token: env.token, timeout_ms }, departed);
}

/** Connects to the store as a rank, and keeps the list of those that have left. */
function join(
  env: RankEnvironment,
  place: Pick<ConnectOptions, "hostname" | "port" | "token" | "timeout_ms">,
  departed: Map<number, string>,
): Promise<Store> {
  return connectStore({
    ...place,
    hello: { kind: "rank", number: env.rank, size: env.size, attempt: env.attempt },
    onLeft: (rank, how) => departed.set(rank, how),
    onLost: () => {
      if (env.source !== "launcher") departed.set(0, "has ended, and the rendezvous with it");
    },
  });
}

/** Where no variable names a rendezvous, rank 0 makes one and tells the others through the backend that has connected them. */
async function meetOver(
  transport: Transport,
  env: RankEnvironment,
  store: DeferredStore,
  departed: Map<number, string>,
): Promise<void> {
  const { rank, size } = env;
  const communicator = createCommunicator(transport, { rank, size, name: "rendezvous" });
  const message = new Uint8Array(512);
  if (rank === 0) {
    const hostname = env.oneHost ? "127.0.0.1" : outwardAddress();
    const token = crypto.randomUUID();
    const server = StoreServer.listen({ hostname, token });
    server.unref();
    const place = JSON.stringify({ hostname, port: server.port, token });
    new TextEncoder().encodeInto(place, message);
  }
  await communicator.broadcast(message);
  const text = new TextDecoder().decode(message.subarray(0, message.indexOf(0)));
  store.give(await join(env, JSON.parse(text), departed));
}

async function connect(
  asked: BackendChoice,
  decision: DeviceDecision,
  env: RankEnvironment,
  context: BootContext,
): Promise<{ transport: Transport; reason: string }> {
  if (env.size === 1 && (asked === "auto" || asked === "nccl")) {
    return await openSelf("there is one rank");
  }
  if (asked === "nccl") {
    const { openNccl } = await import("./nccl/mod.ts");
    return { transport: await openNccl(context), reason: decision.reason };
  }
  if (asked === "mpi") return await openMpi(context, "it was asked for");
  if (env.store === null) {
    if (asked === "auto") return await openMpi(context, `${env.source} has started the ranks`);
    if (env.size > 1) {
      throw new Error(
        `Cannot use backend shm as ${env.source} must have named a rendezvous: current value is none; set MASTER_ADDR, or start by launch.ts`,
      );
    }
  }
  const elsewhere = await ranksElsewhere(env, context);
  if (elsewhere.length === 0) {
    return await openShm(
      context,
      asked === "shm" ? "it was asked for" : "all ranks share this host",
    );
  }
  const who = `rank ${
    rangesOf(elsewhere)
  } is on another host or in another namespace than rank ${env.rank}`;
  if (asked === "auto" && env.mpi) return await openMpi(context, who);
  throw new Error(
    `Cannot use backend shm as all ranks must share one host and its namespaces: current value is: ${who}; use --backend mpi`,
  );
}

/** Ranks that are not on this rank's host; every rank calls it. Our launcher's own children need not ask. */
async function ranksElsewhere(
  env: RankEnvironment,
  { store, timeout_ms }: BootContext,
): Promise<number[]> {
  if (env.source === "launcher" && env.oneHost && !env.mpi) return [];
  const mine = hostIdentity();
  await store.set(`host/${env.rank}`, new TextEncoder().encode(mine));
  const all = await Promise.all(
    Array.from({ length: env.size }, (_, rank) => store.get(`host/${rank}`, timeout_ms)),
  );
  const decoder = new TextDecoder();
  return all.flatMap((value, rank) => decoder.decode(value) === mine ? [] : [rank]);
}

async function openSelf(reason: string): Promise<{ transport: Transport; reason: string }> {
  const { openSelf } = await import("./self.ts");
  return { transport: openSelf(), reason };
}

async function openShm(
  context: BootContext,
  reason: string,
): Promise<{ transport: Transport; reason: string }> {
  const { openShm } = await import("./shm/mod.ts");
  return { transport: await openShm(context), reason };
}

async function openMpi(
  context: BootContext,
  reason: string,
): Promise<{ transport: Transport; reason: string }> {
  const { openMpi } = await import("./mpi/mod.ts");
  return { transport: await openMpi(context), reason };
}
