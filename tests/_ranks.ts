// Starts the ranks of a multi-rank test as processes of their own, without the launcher, and bounds their time. A test's rank program
// is a file that calls `rankMain`; what its function returns comes back to the test as JSON.
//
// In the test:          const ranks = await runRanks(new URL("./_my_ranks.ts", import.meta.url), 4, { args: { seed: 1 } });
// In `_my_ranks.ts`:    await rankMain(async ({ comm, args }) => { …; return { ok: true }; });

import { createCommunicator } from "../collectives/communicator.ts";
import { openSelf } from "../collectives/self.ts";
import { openShm } from "../collectives/shm/mod.ts";
import type { BootContext, Store } from "../collectives/transport.ts";
import type { Communicator } from "../collectives/types.ts";
import type { Device } from "../tensor/device.ts";
import { cpuDevice } from "../tensor/cpu/device.ts";

/** How a rank ended. */
export interface RankResult<T> {
  readonly rank: number;
  /** Exit code; 128 + number for a signal. */
  readonly code: number;
  /** What the rank's function returned; undefined if it did not get that far. */
  readonly result: T | undefined;
  /** Both outputs. */
  readonly output: string;
  /** When it ended, in ms after the start. */
  readonly end_ms: number;
}

/** Options of {@linkcode runRanks}. */
export interface RunOptions {
  /** Given to the ranks as JSON. */
  readonly args?: unknown;
  /** Environment variables beside the present ones. */
  readonly env?: Record<string, string>;
  /** Ranks that have not ended by then are killed. @default {60000} */
  readonly timeout_ms?: number;
  /** Whether a rank that fails makes the run fail. @default {true} */
  readonly check?: boolean;
  /** Called with the processes once they run, to kill one of them for instance. */
  readonly started?: (processes: readonly Deno.ChildProcess[]) => void;
  /** Command before `deno`, for instance `["nice", "-n", "-10"]`. */
  readonly prefix?: readonly string[];
}

/** What a rank's function gets. */
export interface RankContext extends BootContext {
  /** The communicator of all ranks. */
  readonly comm: Communicator;
  /** What the test passed. */
  readonly args: unknown;
}

/**
 * Runs a program on several ranks.
 *
 * @param program The rank program.
 * @param size Number of ranks.
 * @param options See {@linkcode RunOptions}.
 * @returns One result per rank.
 * @throws {Error} If a rank fails, unless `check` is false; the message has its output.
 */
export async function runRanks<T>(
  program: URL,
  size: number,
  options: RunOptions = {},
): Promise<RankResult<T>[]> {
  const folder = await Deno.makeTempDir({ prefix: "lina-test-" });
  const start = performance.now();
  const [command, ...first] = [...(options.prefix ?? []), Deno.execPath()];
  const processes = Array.from({ length: size }, (_, rank) =>
    new Deno.Command(command, {
      args: [...first, "run", "-A", "--no-check", program.href],
      env: {
        ...options.env,
        LINA_TEST_RANK: `${rank}`,
        LINA_TEST_SIZE: `${size}`,
        LINA_TEST_STORE: folder,
        LINA_TEST_ARGS: JSON.stringify(options.args ?? null),
      },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn());
  const timer = setTimeout(() => {
    for (const process of processes) kill(process);
  }, options.timeout_ms ?? 60_000);
  try {
    options.started?.(processes);
    const results = await Promise.all(processes.map(async (process, rank) => {
      const { code, stdout, stderr } = await process.output();
      const end_ms = performance.now() - start;
      const decoder = new TextDecoder();
      const output = decoder.decode(stdout) + decoder.decode(stderr);
      let result: T | undefined;
      try {
        result = JSON.parse(await Deno.readTextFile(`${folder}/result.${rank}`)) as T;
      } catch { /* it did not get that far */ }
      return { rank, code, result, output, end_ms };
    }));
    const failed = results.filter((r) => r.code !== 0);
    if (failed.length > 0 && (options.check ?? true)) {
      throw new Error(
        failed.map((r) => `rank ${r.rank} of ${size} ended with ${r.code}:\n${r.output}`).join(
          "\n",
        ),
      );
    }
    return results;
  } finally {
    clearTimeout(timer);
    await Deno.remove(folder, { recursive: true });
  }
}

function kill(process: Deno.ChildProcess): void {
  try {
    process.kill("SIGKILL");
  } catch { /* it has ended */ }
}

/**
 * Runs a function as this process's rank. The communicator is closed and the process ends when the function has returned.
 *
 * @param main The rank's program.
 * @param options Time-out of the communicator's operations.
 */
export async function rankMain(
  main: (context: RankContext) => Promise<unknown>,
  options: { readonly timeout_ms?: number } = {},
): Promise<void> {
  const env = (name: string) => Deno.env.get(`LINA_TEST_${name}`)!;
  const rank = Number(env("RANK")), size = Number(env("SIZE"));
  const store = fileStore(env("STORE"));
  const nccl = Deno.env.get("LINA_TEST_BACKEND") === "nccl";
  const device = nccl ? await ncclDevice(rank) : cpuDevice();
  const boot: BootContext = { rank, size, localRank: rank, device, store };
  const transport = size === 1
    ? openSelf()
    : nccl
    ? await (await import("../collectives/nccl/mod.ts")).openNccl(boot)
    : await openShm(boot);
  const given = nccl ? { ...options, device } : options;
  const comm = createCommunicator(transport, { rank, size, name: "world", ...given });
  const result = await main({ ...boot, comm, args: JSON.parse(env("ARGS")) });
  await Deno.writeTextFile(`${env("STORE")}/result.${rank}`, JSON.stringify(result ?? null));
  await comm[Symbol.asyncDispose]();
}

/** The GPU that all ranks share, or its emulator: NCCL takes each rank for a host of its own. */
async function ncclDevice(rank: number): Promise<Device> {
  Deno.env.set("NCCL_HOSTID", `rank${rank}`);
  const { testDevice } = await import("./emulator/device.ts");
  return (await testDevice())!;
}

/**
 * A store in a folder, for ranks on one machine.
 *
 * @param folder An empty folder that all ranks see.
 * @returns The store.
 */
export function fileStore(folder: string): Store {
  const pathOf = (key: string) => `${folder}/${encodeURIComponent(key)}`;
  const pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));
  return {
    async set(key, value) {
      const draft = `${folder}/draft.${Deno.pid}.${crypto.randomUUID()}`;
      await Deno.writeFile(draft, value);
      await Deno.rename(draft, pathOf(key));
    },
    async get(key, timeout_ms = 30_000) {
      const end = performance.now() + timeout_ms;
      while (true) {
        try {
          return await Deno.readFile(pathOf(key));
        } catch (cause) {
          if (!(cause instanceof Deno.errors.NotFound)) throw cause;
          if (performance.now() > end) {
            throw new Error(`Cannot get ${key} as it must be set within ${timeout_ms} ms`, {
              cause,
            });
          }
        }
        await pause(2);
      }
    },
    async add(key, delta) {
      const lock = `${pathOf(key)}.lock`;
      while (true) {
        try {
          Deno.mkdirSync(lock);
          break;
        } catch {
          await pause(1);
        }
      }
      let value = delta;
      try {
        value += Number(Deno.readTextFileSync(pathOf(key)));
      } catch { /* the first to add */ }
      Deno.writeTextFileSync(pathOf(key), `${value}`);
      Deno.removeSync(lock);
      return value;
    },
    close: () => Promise.resolve(),
  };
}
