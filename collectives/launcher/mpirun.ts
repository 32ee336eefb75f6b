// `--backend mpi`: the ranks are started by mpirun, which also says which rank they are. Its output is taken apart again, so that
// prefixes, log files and the naming of the first rank to fail are the same as without it.

import type { LaunchOptions } from "./arguments.ts";
import type { Children, Exit } from "./children.ts";
import { jobEnvironment, type JobPlace } from "./environment.ts";
import type { JobOutput, StreamName } from "./output.ts";

/** Which MPI an mpirun belongs to. */
export type MpiKind = "Open MPI" | "MPICH";

const encoder = new TextEncoder();
const decoder = new TextDecoder();

/**
 * Which MPI the mpirun on PATH belongs to.
 *
 * @param program The program to ask. @default {"mpirun"}
 * @returns Its kind.
 * @throws {Error} If there is none, or it is of another kind.
 */
export async function detectMpi(program = "mpirun"): Promise<MpiKind> {
  let text: string;
  try {
    const { stdout, stderr } = await new Deno.Command(program, { args: ["--version"] }).output();
    text = decoder.decode(stdout) + decoder.decode(stderr);
  } catch (cause) {
    if (!(cause instanceof Deno.errors.NotFound)) throw cause;
    throw new Error(
      `Cannot use backend mpi as ${program} must be on PATH: current value is missing; install Open MPI or MPICH, or use --backend shm`,
      { cause },
    );
  }
  if (/Open MPI|OpenRTE|PRRTE|prterun/i.test(text)) return "Open MPI";
  if (/HYDRA|MPICH|Intel\(R\) MPI/i.test(text)) return "MPICH";
  throw new Error(
    `Cannot use backend mpi as ${program} must belong to Open MPI or MPICH: current value is ${
      text.split("\n")[0]
    }`,
  );
}

/**
 * The command line of mpirun.
 *
 * @param kind Which MPI.
 * @param options What was asked for.
 * @param root Whether this user is root.
 * @param names Variables that ranks on other hosts need too.
 * @returns Its arguments.
 */
export function mpirunArguments(
  kind: MpiKind,
  options: LaunchOptions,
  root: boolean,
  names: readonly string[],
): string[] {
  const rank = [Deno.execPath(), "run", "-A", options.script, ...options.args];
  const count = ["-n", String(options.ranks)];
  if (kind === "MPICH") return [...count, "-prepend-rank", ...rank];
  return [
    ...count,
    "--oversubscribe",
    ...(root ? ["--allow-run-as-root"] : []),
    "--tag-output",
    ...names.flatMap((name) => ["-x", name]),
    ...rank,
  ];
}

/** Sorts mpirun's output by the rank it came from. */
export class TagSplitter {
  #pattern: RegExp;
  #rest = "";
  #rank = -1;

  /** @param kind Which MPI writes the tags: `[1,2]<stdout>:text` or `[2] text`. */
  constructor(kind: MpiKind) {
    this.#pattern = kind === "MPICH" ? /^\[(\d+)\] /gm : /\[\d+,(\d+)\]<std(?:out|err|diag)>: ?/g;
  }

  /**
   * Takes text.
   *
   * @param text What mpirun wrote.
   * @returns Pieces and the ranks that wrote them; −1 is mpirun itself.
   */
  push(text: string): { rank: number; text: string }[] {
    const all = this.#rest + text;
    // A tag may be cut in two: what may be the beginning of one waits for more.
    const open = all.lastIndexOf("[");
    const cut = open >= 0 && /^\[\d*,?\d*\]?(<[a-z]*>?:?| )?$/.test(all.slice(open))
      ? open
      : all.length;
    this.#rest = all.slice(cut);
    return this.#split(all.slice(0, cut));
  }

  /** At the end of the stream: what waits. @returns As {@linkcode TagSplitter.push}. */
  flush(): { rank: number; text: string }[] {
    const rest = this.#rest;
    this.#rest = "";
    return this.#split(rest);
  }

  #split(text: string): { rank: number; text: string }[] {
    const pieces: { rank: number; text: string }[] = [];
    let at = 0;
    const give = (end: number) => {
      // An untagged line is mpirun's own, but the end of a tagged line may come in a piece of its own.
      let from = at;
      while (from < end) {
        const newline = text.indexOf("\n", from);
        const to = newline < 0 || newline >= end ? end : newline + 1;
        pieces.push({ rank: this.#rank, text: text.slice(from, to) });
        if (text[to - 1] === "\n") this.#rank = -1;
        from = to;
      }
    };
    for (const match of text.matchAll(this.#pattern)) {
      give(match.index);
      this.#rank = Number(match[1]);
      at = match.index + match[0].length;
    }
    give(text.length);
    return pieces;
  }
}

/**
 * The rank that mpirun names as the first to fail.
 *
 * @param text mpirun's own messages.
 * @returns The rank and the signal that ended it, if any; null if none is named.
 */
export function failedRank(text: string): { rank: number; signal: string | null } | null {
  const killed = /process rank (\d+) .*exited on signal (\d+) \(([^)]*)\)/s.exec(text);
  if (killed) return { rank: Number(killed[1]), signal: `signal ${killed[2]} (${killed[3]})` };
  const code = /Process name:\s*\[[^\]]*\],(\d+)\]/.exec(text);
  return code ? { rank: Number(code[1]), signal: null } : null;
}

/**
 * Starts the ranks by mpirun.
 *
 * @param options What was asked for.
 * @param place Where the job meets.
 * @param children The processes of the attempt; mpirun becomes one.
 * @param output Gets the ranks' output.
 * @returns How mpirun ends; the number is the rank that failed first, −1 when mpirun does not say.
 * @throws {Error} If there is no mpirun.
 */
export async function startMpi(
  options: LaunchOptions,
  place: JobPlace,
  children: Children,
  output: JobOutput,
): Promise<{ ended: Promise<Exit> }> {
  const kind = await detectMpi();
  const env = jobEnvironment(Deno.env.toObject(), options, place);
  if (place.columns !== null) env.LINA_COLUMNS = String(place.columns);
  const names = Object.keys(env).filter((name) =>
    /^(LINA_|MASTER_|OPENBLAS_NUM_THREADS$|OMP_NUM_THREADS$)/.test(name)
  );
  const splitters = { stdout: new TagSplitter(kind), stderr: new TagSplitter(kind) };
  const texts = { stdout: new TextDecoder(), stderr: new TextDecoder() };
  let own = ""; // mpirun's own messages
  const show = (stream: StreamName, pieces: { rank: number; text: string }[]) => {
    for (const { rank, text } of pieces) {
      if (rank < 0) own = (own + text).slice(-65_536);
      output.push(rank, stream, encoder.encode(text));
    }
  };
  const { ended } = await children.start(0, {
    program: "mpirun",
    args: mpirunArguments(kind, options, Deno.uid() === 0, names),
    env,
    stdin: !Deno.stdin.isTerminal(),
  }, (stream, chunk) => {
    const splitter = splitters[stream];
    if (chunk) show(stream, splitter.push(texts[stream].decode(chunk, { stream: true })));
    else {
      show(stream, splitter.flush());
      for (let rank = -1; rank < options.ranks; rank++) output.end(rank, stream);
    }
  });
  const named = ended.then((exit) => {
    const failed = failedRank(own);
    return { ...exit, number: failed?.rank ?? -1, signal: failed?.signal ?? exit.signal };
  });
  return { ended: named };
}
