// The launcher's program: reads the command line, runs the job, exits as the first failed rank did. The work is in
// `collectives/launcher/`.

import { parseArguments, USAGE, UsageError } from "./collectives/launcher/arguments.ts";
import { runJob } from "./collectives/launcher/job.ts";

/**
 * Starts the ranks of a job and waits for them.
 *
 * @param args The command line without the program: `-n 4 script.ts --steps 10`.
 * @returns The exit code: 0, that of the first rank to fail, 128 + n after signal n, 2 for a wrong command line.
 */
export async function launch(args: readonly string[]): Promise<number> {
  try {
    const options = parseArguments(args);
    if (options) return await runJob(options);
    console.log(USAGE);
    return 0;
  } catch (error) {
    if (error instanceof UsageError) {
      console.error(`launch: ${error.message}\n\n${USAGE}`);
      return 2;
    }
    console.error(`launch: ${error instanceof Error ? error.message : error}`);
    return 1;
  }
}

if (import.meta.main) Deno.exit(await launch(Deno.args));
