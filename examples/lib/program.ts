// What `train.ts` and `generate.ts` have in common: `--help`, and how an error is shown. Until a program has begun its work, an
// error is about what the user gave, and its message says it all: no stack is shown then.

/** A program of the command line. */
export interface Program<Options> {
  /** The text of `--help`. */
  readonly help: () => string;
  /** Reads the command line. @throws {TypeError} If it is wrong. */
  readonly parse: (args: readonly string[]) => Options;
  /** Does the work; calls `begun` when everything that the user gave has been found to be usable. */
  readonly main: (options: Options, begun: () => void) => Promise<void>;
}

/**
 * Runs a program with the arguments of this process. The process ends with exit code 2 if they are wrong, and with 1 if a file is
 * wrong or sizes do not fit; `LINA_DEBUG=1` shows the stack of such an error, too.
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
    if (begun || !(error instanceof Error) || Deno.env.get("LINA_DEBUG") === "1") throw error;
    console.error(`error: ${error.message}`);
    Deno.exit(1);
  }
}
