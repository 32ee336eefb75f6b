// Where the ranks' output goes: whole lines, prefixed by rank, to the launcher's own stdout and stderr, and unprefixed to log
// files. On a terminal rank 0's progress line stays the last line of the screen while other lines scroll above it.

import { LineAssembler } from "./lines.ts";

/** Standard output or standard error. */
export type StreamName = "stdout" | "stderr";

const TAIL_LINES = 40;
const NEWLINE = Uint8Array.of(10);
const encoder = new TextEncoder();
const decoder = new TextDecoder();
const CLEAR_LINE = encoder.encode("\r\x1b[K");

/** The terminal or pipe that the launcher writes to. */
export interface Sink {
  /** Writes all bytes before it returns. */
  write(stream: StreamName, bytes: Uint8Array): void;
  /** Whether a person looks at the stream. */
  isTerminal(stream: StreamName): boolean;
}

/** The launcher's own stdout and stderr. */
export const processSink: Sink = {
  write(stream, bytes) {
    let sent = 0;
    while (sent < bytes.length) sent += Deno[stream].writeSync(bytes.subarray(sent));
  },
  isTerminal(stream) {
    return Deno[stream].isTerminal();
  },
};

/** The output of all ranks of a job. */
export class JobOutput {
  #sink: Sink;
  #assemblers = new Map<string, LineAssembler>();
  #tails = new Map<number, string[]>();
  #logs = new Map<number, Deno.FsFile>();
  #live: { stream: StreamName; text: Uint8Array } | null = null;

  /**
   * Output of ranks.
   *
   * @param options Folder of the log files, whether they are continued, and where lines go.
   */
  constructor(
    options: {
      readonly ranks: readonly number[];
      readonly logDir?: string | null;
      readonly append?: boolean;
      readonly sink?: Sink;
    },
  ) {
    this.#sink = options.sink ?? processSink;
    if (!options.logDir) return;
    Deno.mkdirSync(options.logDir, { recursive: true });
    const how = options.append
      ? { append: true, create: true }
      : { write: true, create: true, truncate: true };
    for (const rank of options.ranks) {
      this.#logs.set(rank, Deno.openSync(`${options.logDir}/rank_${rank}.log`, how));
    }
  }

  /**
   * Takes what a rank has written.
   *
   * @param rank The rank.
   * @param stream Where it wrote.
   * @param chunk The bytes.
   */
  push(rank: number, stream: StreamName, chunk: Uint8Array): void {
    const log = this.#logs.get(rank);
    if (log) {
      for (let sent = 0; sent < chunk.length;) {
        sent += log.writeSync(chunk.subarray(sent));
      }
    }
    const assembler = this.#assembler(rank, stream);
    this.#show(rank, stream, assembler.push(chunk));
    if (rank !== 0 || !this.#sink.isTerminal(stream)) return;
    const live = assembler.live;
    if (live) this.#setLive(stream, joinBytes([encoder.encode("[0] "), live]));
  }

  /**
   * At the end of a rank's stream: shows a line that had no end.
   *
   * @param rank The rank.
   * @param stream Which stream has ended.
   */
  end(rank: number, stream: StreamName): void {
    const rest = this.#assembler(rank, stream).flush();
    if (rest) this.#show(rank, stream, [rest]);
  }

  /**
   * Shows a message of the launcher itself, on stderr.
   *
   * @param text The message, one or more lines.
   */
  say(text: string): void {
    this.#write("stderr", encoder.encode(`launch: ${text}\n`));
  }

  /**
   * What a rank wrote to stderr last.
   *
   * @param rank The rank.
   * @returns Up to 40 lines.
   */
  tail(rank: number): readonly string[] {
    return this.#tails.get(rank) ?? [];
  }

  /** Ends the progress line and closes the log files. */
  close(): void {
    if (this.#live) this.#sink.write(this.#live.stream, NEWLINE);
    this.#live = null;
    for (const log of this.#logs.values()) log.close();
    this.#logs.clear();
  }

  #assembler(rank: number, stream: StreamName): LineAssembler {
    const key = `${rank}/${stream}`;
    let assembler = this.#assemblers.get(key);
    if (!assembler) this.#assemblers.set(key, assembler = new LineAssembler());
    return assembler;
  }

  #show(rank: number, stream: StreamName, lines: readonly Uint8Array[]): void {
    if (lines.length === 0) return;
    const prefix = encoder.encode(rank < 0 ? "[mpirun] " : `[${rank}] `);
    const parts: Uint8Array[] = [];
    for (const line of lines) parts.push(prefix, line, NEWLINE);
    if (stream === "stderr") this.#remember(rank, lines);
    if (rank === 0 && this.#live?.stream === stream) this.#dropLive();
    this.#write(stream, joinBytes(parts));
  }

  #remember(rank: number, lines: readonly Uint8Array[]): void {
    const tail = this.#tails.get(rank) ?? [];
    for (const line of lines) tail.push(decoder.decode(line.subarray(0, 4096)));
    this.#tails.set(rank, tail.slice(-TAIL_LINES));
  }

  /** Writes above the progress line. */
  #write(stream: StreamName, bytes: Uint8Array): void {
    const live = this.#live;
    if (live) this.#sink.write(live.stream, CLEAR_LINE);
    this.#sink.write(stream, bytes);
    if (live) this.#sink.write(live.stream, live.text);
  }

  #setLive(stream: StreamName, text: Uint8Array): void {
    this.#sink.write(stream, joinBytes([CLEAR_LINE, text]));
    this.#live = { stream, text };
  }

  /** The progress line has ended: what is written next takes its place. */
  #dropLive(): void {
    this.#sink.write(this.#live!.stream, CLEAR_LINE);
    this.#live = null;
  }
}

function joinBytes(parts: readonly Uint8Array[]): Uint8Array {
  let bytes = 0;
  for (const part of parts) bytes += part.length;
  const all = new Uint8Array(bytes);
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

/**
 * Whether a failure is only the consequence of another rank's: an operation that could not be completed with the others. The rank
 * that has caused it may be seen to end a moment later.
 *
 * @param headline What {@linkcode headlineOf} gave.
 * @returns Whether another failure, if there is one, says more.
 */
export function isConsequence(headline: string): boolean {
  return /Cannot (complete \w+ .*on rank \d+|connect as .* must join)/.test(headline);
}

/**
 * The line of a rank's stderr that says what went wrong, for the launcher's summary.
 *
 * @param tail The last lines of its stderr.
 * @returns The message of the uncaught error if there is one, else the last lines, else "".
 */
export function headlineOf(tail: readonly string[]): string {
  // deno-lint-ignore no-control-regex -- errors are coloured on a terminal
  const plain = tail.map((line) => line.replace(/\x1b\[[0-9;]*m/g, ""));
  const found = plain.findLast((line) => line.startsWith("error: "));
  if (found) return found.replace(/^error: (Uncaught )?(\(in promise\) )?/, "");
  return plain.filter((line) => line.trim() !== "").slice(-3).join(" | ");
}
