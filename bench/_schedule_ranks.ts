// The ranks of bench/schedule.ts as their parent sees them: brings up the testbed, starts them, asks all of them together. What they do is in
// _schedule_job.ts.

import { linesOf, writeLine } from "./_lines.ts";
import type { Replies, Request } from "./_schedule_messages.ts";

const pathOf = (name: string) => new URL(name, import.meta.url).pathname;
const CLUSTER = pathOf("testbed/cluster.sh");
/** How long ranks may take to leave before they are ended, in ms. */
const LEAVE_MS = 10_000;

/** How ranks are started. */
export interface RanksOptions {
  /** Where tensors live. */
  readonly device: "cpu" | "cuda";
  /** Number of ranks. */
  readonly ranks: number;
  /** Ranks of a host of the testbed. */
  readonly perHost: number;
  /** Whether they live on hosts of the testbed; else on this one, over shared memory. */
  readonly box: boolean;
  /** Variables of their environment. */
  readonly env: Readonly<Record<string, string>>;
}

/** Runs the testbed's script. @returns What it printed. @throws {Error} With that, if it fails. */
export async function testbed(...args: string[]): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(CLUSTER, { args }).output();
  const [text, errors] = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes));
  if (!success) throw new Error(`testbed/cluster.sh ${args.join(" ")}:\n${text}${errors}`);
  return text;
}

/** Ranks that wait for what they are asked. */
export class Ranks implements AsyncDisposable {
  /** What rank 0 runs on. */
  readonly about: string;
  readonly #child: Deno.ChildProcess;
  readonly #lines: readonly AsyncGenerator<string, undefined>[];
  readonly #writers: readonly WritableStreamDefaultWriter<Uint8Array>[];
  /** Rejects when the ranks end, with what they printed. */
  readonly #ended: Promise<never>;

  private constructor(
    child: Deno.ChildProcess,
    ended: Promise<never>,
    connections: readonly Connection[],
  ) {
    this.#child = child;
    this.#ended = ended;
    this.about = connections[0].about;
    this.#lines = connections.map(({ lines }) => lines);
    this.#writers = connections.map(({ writer }) => writer);
  }

  /**
   * Starts them.
   *
   * @param options How many, and where.
   * @returns Once all are connected.
   * @throws {Error} If they end before.
   */
  static async start(options: RanksOptions): Promise<Ranks> {
    const folder = await Deno.makeTempDir({ prefix: "lina-bench-" });
    const path = `${folder}/socket`;
    using listener = Deno.listen({ transport: "unix", path });
    const { command, args } = commandOf(options, path);
    const child = new Deno.Command(command, {
      args,
      env: { ...options.env },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    const ended = child.output().then(({ code, stdout, stderr }) => {
      const text = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes)).join("");
      if (Deno.env.has("NCCL_DEBUG")) console.error(text);
      throw new Error(`The ranks have ended with ${code}:\n${text.slice(-6000)}`);
    });
    ended.catch(() => {}); // whoever asks them gets it
    const connections: Connection[] = [];
    try {
      for (let left = options.ranks; left > 0; left--) {
        const connection = await Promise.race([listener.accept(), ended]);
        const lines = linesOf(connection.readable);
        const [rank, ...about] = (await lines.next()).value!.split(" ");
        const writer = connection.writable.getWriter();
        connections[Number(rank)] = { lines, writer, about: about.join(" ") };
      }
      return new Ranks(child, ended, connections);
    } catch (error) {
      end(child);
      throw error;
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  }

  /**
   * Asks all ranks.
   *
   * @param request What for.
   * @returns Their replies, by rank.
   * @throws {Error} If a rank ends.
   */
  async ask<K extends Request["kind"]>(request: Request & { kind: K }): Promise<Replies[K][]> {
    const text = JSON.stringify(request);
    const replies = Promise.all(this.#lines.map(async (lines, rank) => {
      await writeLine(this.#writers[rank], text);
      const { value } = await lines.next();
      return value === undefined ? await this.#ended : JSON.parse(value) as Replies[K];
    }));
    return await Promise.race([replies, this.#ended]);
  }

  /** Ends them at once. */
  end(): void {
    end(this.#child);
  }

  /** Lets them leave. */
  async [Symbol.asyncDispose](): Promise<void> {
    const timer = setTimeout(() => end(this.#child), LEAVE_MS);
    await Promise.allSettled(this.#writers.map((writer) => writer.close()));
    await this.#ended.catch(() => {});
    clearTimeout(timer);
  }
}

interface Connection {
  readonly lines: AsyncGenerator<string, undefined>;
  readonly writer: WritableStreamDefaultWriter<Uint8Array>;
  readonly about: string;
}

function commandOf({ device, ranks, box }: RanksOptions, socket: string) {
  const program = [pathOf("_schedule_rank.ts"), socket, device];
  if (!box) {
    const launcher = ["run", "-A", "--no-check", pathOf("../launch.ts"), "-n", String(ranks)];
    return { command: Deno.execPath(), args: [...launcher, ...program] };
  }
  const how = device === "cuda" ? "run" : "mpirun";
  const args = [how, Deno.execPath(), "run", "-A", "--no-check", ...program];
  return { command: CLUSTER, args };
}

function end(child: Deno.ChildProcess): void {
  try {
    child.kill("SIGTERM");
  } catch {
    // They have ended.
  }
}
