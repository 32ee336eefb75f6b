// A whole training run around a trainer: one line of `metrics.jsonl` per step, validation, checkpoints, going on after a crash. What
// is shown to people (progress, curves, tables) is the application's.

import { recorder } from "../trace/mod.ts";
import type { Communicator } from "../collectives/types.ts";
import type { StepMetrics, Trainer } from "./trainer.ts";

/** A line of `metrics.jsonl`. */
export interface MetricsRow extends StepMetrics {
  /** Loss on validation batches after the step, where it was measured; nats per token. */
  readonly val_loss?: number;
  /** Part of the device's peak that the step's arithmetic has reached, where the application knows it. */
  readonly mfu?: number;
  /** How the step's collectives were scheduled, where the application tells. */
  readonly schedule?: Readonly<Record<string, string | number>>;
}

/** How a run goes. */
export interface RunOptions {
  /** All ranks. */
  readonly world: Communicator;
  /** Where `metrics.jsonl` and `checkpoint/` are written; must exist. */
  readonly directory: string;
  /** Number of the last step; asked again after every step, and must be alike on all ranks. */
  readonly steps: () => number;
  /** Steps between validations; 0 for none. */
  readonly validateEvery: number;
  /** Global batches of a validation. */
  readonly validationBatches: number;
  /** Steps between checkpoints; 0 for none but that of the last step. */
  readonly checkpointEvery: number;
  /** Complete checkpoints that stay; with 0 none is saved at all. @default {2} */
  readonly keep?: number;
  /** More to put into each checkpoint, besides the step. */
  readonly state?: () => object;
  /** Steps whose spans are recorded: the first and the one after the last; asked again before every step. @default {none} */
  readonly trace?: () => readonly [number, number];
  /** Is told of the begin and the end of each of these steps: gives the recorder a GPU's own times. @default {none} */
  readonly deviceTrace?: { begin(): void; end(): Promise<void> };
  /** Model FLOPs of a step / FLOPs per second that all devices of the job can do at most: gives `mfu`. @default {not known} */
  readonly idealStep_s?: number;
  /** Says how the next step's collectives will be scheduled; asked before every step. @default {not told} */
  readonly schedule?: () => Readonly<Record<string, string | number>>;
  /** Called after every step, on every rank, and awaited before the next. */
  readonly onStep?: (row: MetricsRow) => void | Promise<void>;
}

/** Name of the folder of checkpoints in a run's directory. */
export const CHECKPOINTS = "checkpoint";

/**
 * Trains to the last step. All ranks call it together.
 *
 * @param trainer The trainer, at the step to go on from.
 * @param options How the run goes.
 * @returns The lines of `metrics.jsonl` of the whole run, on rank 0; of what this process did, elsewhere.
 */
export async function run(trainer: Trainer, options: RunOptions): Promise<readonly MetricsRow[]> {
  const { world, directory, validateEvery, checkpointEvery, deviceTrace } = options;
  const root = world.rank === 0;
  const metrics = `${directory}/metrics.jsonl`;
  const rows = root ? keepRows(metrics, trainer.steps) : [];
  using file = root ? await Deno.open(metrics, { append: true, create: true }) : null;
  while (trainer.steps < options.steps()) {
    const number = trainer.steps + 1;
    const [from, to] = options.trace?.() ?? [Infinity, Infinity];
    recorder.capturing = number >= from && number < to;
    if (recorder.capturing) deviceTrace?.begin();
    const schedule = options.schedule?.();
    const shown = await trainer.step();
    if (recorder.capturing) await deviceTrace?.end();
    recorder.capturing = false;
    const last = number >= options.steps();
    const validates = validateEvery > 0 && (last || number % validateEvery === 0);
    const { idealStep_s } = options;
    const row: MetricsRow = {
      ...shown,
      ...(idealStep_s !== undefined && { mfu: idealStep_s * 1000 / shown.step_ms }),
      ...(schedule && { schedule }),
      ...(validates && { val_loss: await trainer.validate(options.validationBatches) }),
    };
    rows.push(row);
    if (file) writeAll(file, metrics, JSON.stringify(row) + "\n");
    await options.onStep?.(row);
    // The number of steps may have been settled in onStep.
    const ends = trainer.steps >= options.steps();
    const due = ends || (checkpointEvery > 0 && number % checkpointEvery === 0);
    if (due && options.keep !== 0) {
      const state = options.state?.() ?? {};
      await trainer.save(`${directory}/${CHECKPOINTS}`, { keep: options.keep, state });
    }
  }
  return rows;
}

/** Drops lines of steps that a crash undid, and returns the others. */
function keepRows(path: string, steps: number): MetricsRow[] {
  let text = "";
  try {
    text = Deno.readTextFileSync(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
  const rows: MetricsRow[] = [];
  for (const line of text.split("\n")) {
    try {
      const row = JSON.parse(line) as MetricsRow;
      if (row.step <= steps) rows.push(row);
    } catch {
      // The crash cut the last line short.
    }
  }
  const temporary = `${path}.tmp`;
  Deno.writeTextFileSync(temporary, rows.map((row) => JSON.stringify(row) + "\n").join(""));
  Deno.renameSync(temporary, path);
  return rows;
}

function writeAll(file: Deno.FsFile, path: string, text: string): void {
  const bytes = new TextEncoder().encode(text);
  try {
    for (let at = 0; at < bytes.length;) at += file.writeSync(bytes.subarray(at));
  } catch (cause) {
    throw new Error(`Cannot write ${path}: ${(cause as Error).message}`, { cause });
  }
}
