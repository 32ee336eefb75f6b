// What a person sees while a model trains: one bar that is redrawn in place on a terminal, a plain line every few seconds
// elsewhere (a pipe, a log file). Rank 0 shows it; on other ranks every method does nothing.

/** What is shown of one step. All but the step may be absent. */
export interface ProgressValues {
  /** Steps done so far. */
  readonly step: number;
  /** Number of the last step, when it has changed. */
  readonly total?: number;
  /** Training loss in nats per token. */
  readonly loss?: number;
  /** Latest validation loss in nats per token; shown until the next one. */
  readonly val_loss?: number;
  /** Tokens per second over all ranks. */
  readonly tokens_per_s?: number;
  /** Time of the step in ms. */
  readonly step_ms?: number;
  /** Part of the device's peak that the step's arithmetic has reached, 0 to 1. */
  readonly mfu?: number;
  /** Most memory in use, in bytes; shown for GPUs. */
  readonly peak_bytes?: number;
  /** All-to-all time / step time, 0 to 1. */
  readonly a2a_share?: number;
  /** Most loaded expert / mean load; 1 is perfect balance. */
  readonly load_imbalance?: number;
  /** How collectives are scheduled, in a word or two; left out first where there is little room. */
  readonly schedule?: string;
}

/** Options of {@linkcode Progress}. */
export interface ProgressOptions {
  /** Rank of this process; only rank 0 prints. @default {0} */
  readonly rank?: number;
  /** Step before the first, for a resumed run. @default {0} */
  readonly start?: number;
  /** Width of the terminal in columns; 0 prints plain lines. @default {the terminal's, else LINA_COLUMNS, else 0} */
  readonly columns?: number;
  /** Least milliseconds between plain lines. @default {5000} */
  readonly interval_ms?: number;
  /** Where the text goes. @default {standard output} */
  readonly write?: (text: string) => void;
  /** Clock in milliseconds. @default {performance.now} */
  readonly clock?: () => number;
}

/** Least milliseconds between two drawings of the bar: faster than the eye needs, slower than the terminal minds. */
const REDRAW_MS = 80;

/** A progress bar with loss, throughput, all-to-all share and load balance. */
export class Progress implements Disposable {
  #total: number;
  readonly #start: number;
  readonly #silent: boolean;
  readonly #columns: () => number;
  readonly #interval_ms: number;
  readonly #write: (text: string) => void;
  readonly #clock: () => number;
  readonly #begun: number;
  #values: ProgressValues;
  #printed = -Infinity; // time of the last drawing or line
  #shown = -1; // step of the last drawing or line
  #drawn = false; // whether a bar stands on the terminal's last line

  /**
   * Begins a run; the clock starts now.
   *
   * @param total Number of the last step.
   * @param options Rank, terminal and output.
   */
  constructor(total: number, options: ProgressOptions = {}) {
    this.#total = Math.max(total, 1);
    this.#start = options.start ?? 0;
    this.#silent = (options.rank ?? 0) !== 0;
    const columns = options.columns;
    this.#columns = columns === undefined ? terminalColumns : () => columns;
    this.#interval_ms = options.interval_ms ?? 5000;
    this.#write = options.write ?? writeOut;
    this.#clock = options.clock ?? (() => performance.now());
    this.#begun = this.#clock();
    this.#values = { step: this.#start };
  }

  /**
   * Takes the values of a step and shows them if it is time. Values that are absent keep their last state.
   *
   * @param values The step and what is known of it.
   */
  update(values: ProgressValues): void {
    if (this.#silent) return;
    const validated = values.val_loss !== undefined;
    this.#total = Math.max(values.total ?? this.#total, 1);
    this.#values = { ...this.#values, ...dropAbsent(values) };
    const columns = this.#columns();
    const wait = columns > 0 ? REDRAW_MS : this.#interval_ms;
    const last = values.step >= this.#total;
    if (this.#clock() - this.#printed < wait && !last && !(validated && columns === 0)) return;
    this.#show(columns);
  }

  /**
   * Prints a line above the bar.
   *
   * @param text The line, without a newline.
   */
  message(text: string): void {
    if (this.#silent) return;
    const bar = this.#drawn;
    this.#clear();
    this.#write(text + "\n");
    if (bar) this.#show(this.#columns());
  }

  /** Shows the last values, if they are not shown yet, and leaves the bar behind. */
  finish(): void {
    if (this.#silent) return;
    if (this.#shown !== this.#values.step) this.#show(this.#columns());
    if (this.#drawn) this.#write("\n");
    this.#drawn = false;
  }

  /** The same as {@linkcode Progress.finish}. */
  [Symbol.dispose](): void {
    this.finish();
  }

  #show(columns: number): void {
    this.#printed = this.#clock();
    this.#shown = this.#values.step;
    if (columns > 0) {
      // One write: what a terminal gets in one piece it does not show half.
      this.#write(`\r${this.#bar(columns)}\x1b[K`);
      this.#drawn = true;
    } else {
      this.#write(this.#line() + "\n");
    }
  }

  #clear(): void {
    if (this.#drawn) this.#write("\r\x1b[K");
    this.#drawn = false;
  }

  #fraction(): number {
    return Math.min(1, Math.max(0, this.#values.step / this.#total));
  }

  /** Seconds to the end at the mean pace since the start of this run, or elapsed seconds at the end. */
  #time(): string {
    const elapsed = (this.#clock() - this.#begun) / 1000;
    const done = this.#values.step - this.#start;
    const left = this.#total - this.#values.step;
    if (left <= 0) return `${clockTime(elapsed)} total`;
    return done > 0 ? `${clockTime(elapsed / done * left)} left` : "";
  }

  /** The values as words, the most important first, and the time at the end. */
  #words(): string[] {
    const v = this.#values;
    const words: string[] = [];
    if (v.loss !== undefined) words.push(`loss ${v.loss.toFixed(3)}`);
    if (v.val_loss !== undefined) words.push(`val ${v.val_loss.toFixed(3)}`);
    if (v.tokens_per_s !== undefined) words.push(`${compact(v.tokens_per_s)} tokens/s`);
    if (v.step_ms !== undefined) words.push(`${v.step_ms.toFixed(v.step_ms < 10 ? 1 : 0)} ms`);
    if (v.mfu !== undefined) words.push(`MFU ${(v.mfu * 100).toFixed(1)}%`);
    if (v.peak_bytes !== undefined) words.push(`${(v.peak_bytes / 2 ** 30).toFixed(1)} GiB`);
    if (v.a2a_share !== undefined) words.push(`all-to-all ${(v.a2a_share * 100).toFixed(0)}%`);
    if (v.load_imbalance !== undefined) words.push(`max/mean load ${v.load_imbalance.toFixed(2)}`);
    if (v.schedule !== undefined) words.push(v.schedule);
    const time = this.#time();
    if (time) words.push(time);
    return words;
  }

  #line(): string {
    const width = String(this.#total).length;
    const percent = String(Math.floor(this.#fraction() * 100)).padStart(3);
    return [
      `${percent}%  step ${String(this.#values.step).padStart(width)}/${this.#total}`,
      ...this.#words(),
    ].join("  ");
  }

  #bar(columns: number): string {
    const width = String(this.#total).length;
    const percent = `${String(Math.floor(this.#fraction() * 100)).padStart(3)}%`;
    const words = [`${String(this.#values.step).padStart(width)}/${this.#total}`, ...this.#words()];
    // The terminal's last column stays empty, so that no terminal wraps. Words that find no room are left out: first those
    // before the last one, which is the time.
    const room = columns - 1;
    while (words.length > 0 && room - widthOf([percent, "", ...words]) < 8) {
      words.splice(words.length > 3 ? -2 : -1, 1);
    }
    const cells = Math.min(30, room - widthOf([percent, "", ...words]));
    if (cells < 4) return [percent, ...words].join("  ").slice(0, Math.max(0, room));
    return [percent, drawBar(this.#fraction(), cells), ...words].join("  ");
  }
}

/** `cells` characters: whole cells, one of eight part cells, and a faint rest. */
function drawBar(fraction: number, cells: number): string {
  const eighths = Math.round(fraction * cells * 8);
  const whole = Math.floor(eighths / 8);
  const part = eighths % 8 === 0 ? "" : " ▏▎▍▌▋▊▉"[eighths % 8];
  const rest = cells - whole - part.length;
  return `\x1b[36m${"█".repeat(whole)}${part}\x1b[0m\x1b[2m${"·".repeat(rest)}\x1b[0m`;
}

function widthOf(words: readonly string[]): number {
  return words.reduce((sum, word) => sum + word.length, 0) + 2 * (words.length - 1);
}

function compact(value: number): string {
  if (value >= 1e6) return `${(value / 1e6).toFixed(2)}M`;
  return value >= 1e4 ? `${(value / 1e3).toFixed(1)}k` : value.toFixed(0);
}

function clockTime(seconds: number): string {
  const s = Math.max(0, Math.round(seconds));
  const two = (n: number) => String(n).padStart(2, "0");
  const minutes = Math.floor(s / 60);
  if (minutes < 60) return `${minutes}:${two(s % 60)}`;
  return `${Math.floor(minutes / 60)}:${two(minutes % 60)}:${two(s % 60)}`;
}

function dropAbsent(values: ProgressValues): ProgressValues {
  return Object.fromEntries(
    Object.entries(values).filter(([, value]) => value !== undefined),
  ) as unknown as ProgressValues;
}

/** Width of the terminal; under a launcher that shows progress lines, what it says of its own. */
function terminalColumns(): number {
  if (!Deno.stdout.isTerminal()) return Math.max(0, Number(Deno.env.get("LINA_COLUMNS")) || 0);
  try {
    return Deno.consoleSize().columns;
  } catch {
    return 0; // a terminal that will not tell its size
  }
}

const encoder = new TextEncoder();

function writeOut(text: string): void {
  let bytes = encoder.encode(text);
  while (bytes.length > 0) bytes = bytes.subarray(Deno.stdout.writeSync(bytes));
}
