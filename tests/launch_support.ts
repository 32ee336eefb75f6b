// What the tests of the launcher share: running it on a small script, bounded in time, and looking for what it leaves behind.

import assert from "node:assert/strict";

/** The launcher. */
export const LAUNCHER: string = new URL("../launch.ts", import.meta.url).href;
/** The library. */
export const LIBRARY: string = new URL("../mod.ts", import.meta.url).href;

const TIME_LIMIT_MS = 40_000;

/** A folder for the length of a test. */
export class Folder implements Disposable {
  /** Where it is. */
  readonly path: string = Deno.makeTempDirSync({ prefix: "lina-launch-" });

  /** Writes a script into it. @param code TypeScript; `init` is imported. @param name Its name. @returns Its path. */
  script(code: string, name = "script.ts"): string {
    const path = `${this.path}/${name}`;
    Deno.writeTextFileSync(path, `import { init } from ${JSON.stringify(LIBRARY)};\n${code}\n`);
    return path;
  }

  [Symbol.dispose](): void {
    Deno.removeSync(this.path, { recursive: true });
  }
}

/** How a program has ended. */
export interface Result {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** A running program. */
export class Running {
  readonly child: Deno.ChildProcess;
  stdout = "";
  stderr = "";
  readonly #ended: Promise<Result>;

  constructor(program: string, args: readonly string[], env: Record<string, string> = {}) {
    this.child = new Deno.Command(program, {
      args: [...args],
      env: { NO_COLOR: "1", ...env },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    const limit = setTimeout(() => this.kill("SIGKILL"), TIME_LIMIT_MS);
    const drain = async (name: "stdout" | "stderr") => {
      const decoder = new TextDecoder();
      for await (const chunk of this.child[name]) {
        this[name] += decoder.decode(chunk, { stream: true });
      }
    };
    this.#ended = Promise.all([this.child.status, drain("stdout"), drain("stderr")])
      .then(([status]) => {
        clearTimeout(limit);
        return { code: status.code, stdout: this.stdout, stderr: this.stderr };
      });
  }

  /** Sends a signal to this process only. */
  kill(signal: Deno.Signal): void {
    try {
      this.child.kill(signal);
    } catch {
      // it has ended
    }
  }

  ended(): Promise<Result> {
    return this.#ended;
  }

  /** Waits until the output matches. */
  async says(pattern: RegExp): Promise<RegExpMatchArray> {
    const end = performance.now() + TIME_LIMIT_MS;
    for (;;) {
      const match = (this.stdout + this.stderr).match(pattern);
      if (match) return match;
      if (performance.now() > end) {
        this.kill("SIGKILL");
        assert.fail(`${pattern} did not come; the output is:\n${this.stdout}${this.stderr}`);
      }
      await pause(5);
    }
  }
}

/** Starts the launcher. @param args Its arguments. @param env More variables. @returns The process. */
export function startLauncher(args: readonly string[], env: Record<string, string> = {}): Running {
  return new Running(Deno.execPath(), ["run", "-A", LAUNCHER, ...args], env);
}

/** Runs the launcher to its end. @param args Its arguments. @param env More variables. @returns How it ended. */
export function launch(args: readonly string[], env: Record<string, string> = {}): Promise<Result> {
  return startLauncher(args, env).ended();
}

/** Waits. @param ms How long. */
export function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Whether a process runs; a zombie does not. */
export function runs(pid: number): boolean {
  try {
    if (Deno.build.os !== "linux") return Deno.kill(pid, 0 as unknown as Deno.Signal) === undefined;
    const stat = Deno.readTextFileSync(`/proc/${pid}/stat`);
    return !"ZX".includes(stat.slice(stat.lastIndexOf(")") + 2)[0]);
  } catch {
    return false;
  }
}

/** Fails unless all processes end soon. @param pids The processes. @param within_ms Longest wait. */
export async function allEnd(pids: readonly number[], within_ms = 8000): Promise<void> {
  const end = performance.now() + within_ms;
  while (pids.some(runs)) {
    assert.ok(performance.now() < end, `still running: ${pids.filter(runs)} of ${pids}`);
    await pause(10);
  }
}

/** Process numbers that ranks have written as `pid N`. */
export function pidsOf(output: string): number[] {
  return [...output.matchAll(/pid (\d+)/g)].map((match) => Number(match[1]));
}
