// The world as an object: a communicator of all ranks and what belongs to this process. How it comes about is in `world.ts`.

import type { Device } from "../tensor/device.ts";
import { createCommunicator } from "./communicator.ts";
import type { DeviceDecision } from "./device_choice.ts";
import type { RankEnvironment } from "./rendezvous/environment.ts";
import type { Store, Transport } from "./transport.ts";
import type {
  AllReduceOptions,
  Backend,
  Communicator,
  Counts,
  Data,
  ReduceOp,
  ReduceScatterOptions,
  Traffic,
  Work,
} from "./types.ts";
import type { World } from "./world.ts";

/** Ends this process with an error, at once; the launcher, mpirun or the rendezvous ends the others. */
function endProcess(rank: number, size: number, why: string): never {
  console.error(`error: Rank ${rank} of ${size} has aborted the job: ${why}`);
  Deno.exit(1);
}

/** A communicator and what belongs to this process; every operation is the communicator's. */
export class JobWorld implements World {
  readonly localRank: number;
  readonly localSize: number;
  readonly device: Device;
  readonly store: Store;
  readonly backendReason: string;
  readonly deviceReason: string;
  readonly attempt: number;
  #communicator: Communicator;

  /** @param parts What `init()` has brought together. */
  constructor(
    parts: {
      readonly env: RankEnvironment;
      readonly store: Store;
      readonly transport: Transport;
      readonly reason: string;
      readonly device: Device;
      readonly decision: DeviceDecision;
    },
  ) {
    const { env, device } = parts;
    this.localRank = env.localRank;
    this.localSize = env.localSize;
    this.device = device;
    this.store = parts.store;
    this.backendReason = parts.reason;
    this.deviceReason = parts.decision.reason;
    this.attempt = env.attempt;
    this.#communicator = createCommunicator(parts.transport, {
      rank: env.rank,
      size: env.size,
      name: "world",
      device,
      onAbort: (why) => endProcess(env.rank, env.size, why),
    });
  }

  get rank(): number {
    return this.#communicator.rank;
  }

  get size(): number {
    return this.#communicator.size;
  }

  get backend(): Backend {
    return this.#communicator.backend;
  }

  get name(): string {
    return this.#communicator.name;
  }

  get traffic(): Traffic {
    return this.#communicator.traffic;
  }

  allReduce(x: Data, options?: AllReduceOptions): Work {
    return this.#communicator.allReduce(x, options);
  }

  reduceScatter(x: Data, out: Data, options?: ReduceScatterOptions): Work {
    return this.#communicator.reduceScatter(x, out, options);
  }

  allGather(x: Data, out: Data): Work {
    return this.#communicator.allGather(x, out);
  }

  allGatherV(x: Data, out: Data, counts: Counts): Work {
    return this.#communicator.allGatherV(x, out, counts);
  }

  broadcast(x: Data, root?: number): Work {
    return this.#communicator.broadcast(x, root);
  }

  reduce(
    x: Data,
    options?: { readonly op?: ReduceOp; readonly root?: number; readonly out?: Data },
  ): Work {
    return this.#communicator.reduce(x, options);
  }

  gather(x: Data, out: Data | null, root?: number): Work {
    return this.#communicator.gather(x, out, root);
  }

  scatter(x: Data | null, out: Data, root?: number): Work {
    return this.#communicator.scatter(x, out, root);
  }

  allToAll(x: Data, out: Data): Work {
    return this.#communicator.allToAll(x, out);
  }

  allToAllV(...args: Parameters<Communicator["allToAllV"]>): Work {
    return this.#communicator.allToAllV(...args);
  }

  send(...args: Parameters<Communicator["send"]>): Work {
    return this.#communicator.send(...args);
  }

  recv(...args: Parameters<Communicator["recv"]>): Work {
    return this.#communicator.recv(...args);
  }

  barrier(): Work {
    return this.#communicator.barrier();
  }

  split(...args: Parameters<Communicator["split"]>): Promise<Communicator | null> {
    return this.#communicator.split(...args);
  }

  dup(): Promise<Communicator> {
    return this.#communicator.dup();
  }

  abort(why: string): never {
    return this.#communicator.abort(why);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // Data first, then the rendezvous: while the store is open, the others can tell a rank that leaves from one that is lost.
    await this.#communicator[Symbol.asyncDispose]();
    await this.store.close();
  }
}
