// What `train.ts` and `generate.ts` have in common: `--help`, and how an error is shown. Where the code was when it found a file
// damaged, the disk full or another rank gone says nothing to a user, and every rank would say it: such errors are one line.

import { OutOfMemoryError } from "../../tensor/memory_error.ts";

/** A program of the command line. */
export interface Program<Options> {
  /** The text of `--help`. */
  readonly help: () => string;
  /** What a user can do where memory does not suffice: a sentence. */
  readonly lessMemory: string;
  /** Reads the command line. @throws {TypeError} If it is wrong. */
  readonly parse: (args: readonly string[]) => Options;
  /** Does the work; calls `begun` when everything that the user gave has been found to be usable. */
  readonly main: (options: Options, begun: () => void) => Promise<void>;
}

/**
 * Runs a program with the arguments of this process. The process ends with exit code 2 if they are wrong, and with 1 after an
 * error. `LINA_DEBUG=1` shows the stack of every error.
 *
 * @param program What to run.
 */
export async function runProgram<Options>(program: Program<Options>): Promise<void> {
  if (Deno.args.includes("--help")) {
    if ((Deno.env.get("RANK") ?? "0") === "0") console.log(program.help());
    return;
  }
  let options: Options;
  try {
    options = program.parse(Deno.args);
  } catch (error) {
    console.error(`error: ${(error as Error).message}\nSee --help.`);
    Deno.exit(2);
  }
  let begun = false;
  try {
    await program.main(options, () => void (begun = true));
  } catch (error) {
    if (!saysItAll(error, begun) || Deno.env.get("LINA_DEBUG") === "1") throw error;
    console.error(`error: ${(error as Error).message}`);
    if (error instanceof OutOfMemoryError) console.error(program.lessMemory);
    Deno.exit(1);
  }
}

/** Whether an error is about the state of the world, memory among it, or, until the work has begun, about what the user gave; else it is a bug. */
function saysItAll(error: unknown, begun: boolean): boolean {
  if (!(error instanceof Error) || !error.message.startsWith("Cannot ")) return false;
  if (error instanceof OutOfMemoryError) return true;
  const ofCaller = error instanceof RangeError && begun;
  return !(ofCaller || error instanceof TypeError || error instanceof ReferenceError);
}
