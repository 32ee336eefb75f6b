// Processes of one attempt of a job: started each in a process group of its own, their output taken, their ends told in the
// order in which they are seen, and ended together when one fails. What runs in them (a rank, or mpirun) is not known here.

import type { Guard } from "./guard.ts";
import type { StreamName } from "./output.ts";

/** Time between SIGTERM and SIGKILL, in milliseconds. */
export const GRACE_MS = 3_000;
/** Time that output may still come after a process has ended (from processes that it has left behind), in milliseconds. */
const DRAIN_MS = 1_000;

/** How a process has ended. */
export interface Exit {
  /** Number of the process within the job: its rank. */
  readonly number: number;
  /** Exit code; 128 + the signal's number when a signal has ended it. */
  readonly code: number;
  /** The signal that has ended it, or null. */
  readonly signal: string | null;
}

/** Gets what a process writes; null at the end of a stream. */
export type Take = (stream: StreamName, chunk: Uint8Array | null) => void;

/** What to start. */
export interface ChildOptions {
  /** The program. */
  readonly program: string;
  /** Its arguments. */
  readonly args: readonly string[];
  /** Its whole environment. */
  readonly env: Readonly<Record<string, string>>;
  /** Whether it reads the launcher's standard input. */
  readonly stdin: boolean;
}

/** The processes of one attempt. */
export class Children {
  #guard: Guard;
  #live = new Map<number, Deno.ChildProcess>();
  #all: Promise<Exit>[] = [];
  #killTimer: ReturnType<typeof setTimeout> | undefined;

  /**
   * No processes yet.
   *
   * @param guard Ends them if this process is killed.
   */
  constructor(guard: Guard) {
    this.#guard = guard;
  }

  /**
   * Starts a process.
   *
   * @param number Its number.
   * @param options What to start.
   * @param take Gets what it writes.
   * @returns How it ends, once its output has been taken.
   */
  async start(
    number: number,
    options: ChildOptions,
    take: Take,
  ): Promise<{ ended: Promise<Exit> }> {
    const child = new Deno.Command(options.program, {
      args: [...options.args],
      env: options.env,
      clearEnv: true,
      stdin: options.stdin ? "inherit" : "null",
      stdout: "piped",
      stderr: "piped",
      detached: true, // a process group of its own: signals of the terminal reach the launcher only
    }).spawn();
    this.#live.set(number, child);
    const ended = this.#follow(number, child, take);
    this.#all.push(ended);
    await this.#guard.add(child.pid);
    return { ended };
  }

  /** Sends SIGTERM to all that run, and SIGKILL {@linkcode GRACE_MS} later. Calling it again sends SIGKILL at once. */
  end(): void {
    if (this.#killTimer !== undefined) return this.#signal("SIGKILL");
    this.#signal("SIGTERM");
    this.#killTimer = setTimeout(() => this.#signal("SIGKILL"), GRACE_MS);
  }

  /** Resolves when every process has ended and its output has been taken. */
  async settled(): Promise<void> {
    await Promise.all(this.#all);
    clearTimeout(this.#killTimer);
  }

  #signal(signal: Deno.Signal): void {
    for (const child of this.#live.values()) killGroup(child.pid, signal);
  }

  async #follow(number: number, child: Deno.ChildProcess, take: Take): Promise<Exit> {
    const drained = Promise.all([
      drain(child.stdout, (chunk) => take("stdout", chunk)),
      drain(child.stderr, (chunk) => take("stderr", chunk)),
    ]);
    const status = await child.status;
    this.#live.delete(number);
    killGroup(child.pid, "SIGKILL"); // what it has started and left behind
    void this.#guard.remove(child.pid);
    const late = Promise.withResolvers<void>();
    const timer = setTimeout(late.resolve, DRAIN_MS);
    await Promise.race([drained, late.promise]);
    clearTimeout(timer);
    return { number, code: status.code, signal: status.signal };
  }
}

async function drain(
  stream: ReadableStream<Uint8Array>,
  take: (chunk: Uint8Array | null) => void,
): Promise<void> {
  for await (const chunk of stream) take(chunk);
  take(null);
}

function killGroup(group: number, signal: Deno.Signal): void {
  try {
    Deno.kill(-group, signal);
  } catch {
    // nothing of it is left
  }
}
