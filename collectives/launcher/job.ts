// A job from start to end: the rendezvous, one attempt after another, who failed first and why, signals, and the exit code.

import { StoreServer } from "../rendezvous/store_server.ts";
import type { LaunchOptions } from "./arguments.ts";
import { Children, type Exit } from "./children.ts";
import { countGpus } from "../device_choice.ts";
import { jobEnvironment, type JobPlace, rankEnvironment } from "./environment.ts";
import { Guard } from "./guard.ts";
import { startMpi } from "./mpirun.ts";
import { Nodes } from "./nodes.ts";
import { headlineOf, isConsequence, JobOutput, processSink } from "./output.ts";

const SIGNALS: Readonly<Partial<Record<Deno.Signal, number>>> = {
  SIGHUP: 1,
  SIGINT: 2,
  SIGTERM: 15,
};

/** How long the launcher waits for the cause when a rank has failed for lack of another, in milliseconds. */
const CAUSE_MS = 2_000;

/** Where a job meets. */
type Address = Pick<JobPlace, "hostname" | "port" | "token">;

/** How an attempt has ended. */
interface Outcome {
  /** Exit code of the rank that failed first, else 0. */
  readonly code: number;
  /** What failed, for people; "" when nothing has. */
  readonly why: string;
}

/**
 * Runs a job.
 *
 * @param options What was asked for.
 * @returns The launcher's exit code: 0, or that of the first rank to fail.
 * @throws {Error} If the rendezvous cannot be served; nothing has been started then.
 */
export async function runJob(options: LaunchOptions): Promise<number> {
  const token = options.rendezvous === null
    ? crypto.randomUUID()
    : Deno.env.get("LINA_TOKEN") || (options.nodes === 1 ? crypto.randomUUID() : "");
  const server = options.nodeRank > 0 ? null : StoreServer.listen({
    hostname: options.rendezvous?.hostname,
    port: options.rendezvous?.port,
    token,
  });
  const place = {
    hostname: options.rendezvous?.hostname ?? "127.0.0.1",
    port: options.rendezvous?.port ?? server!.port,
    token,
  };
  const job = new Job(options, place);
  try {
    return await job.run();
  } finally {
    server?.close();
  }
}

class Job {
  #options: LaunchOptions;
  #address: Address;
  #guard = new Guard();
  #started = new Date().toISOString();
  #children: Children | undefined;
  #output: JobOutput | undefined;
  #signal: Deno.Signal | undefined;

  constructor(options: LaunchOptions, address: Address) {
    this.#options = options;
    this.#address = address;
  }

  async run(): Promise<number> {
    const ignored = hangUpIgnored() ? "SIGHUP" : null;
    const listeners = Object.keys(SIGNALS).map((name) => {
      const signal = name as Deno.Signal;
      // Deno takes SIGHUP over with the first listener for any signal, so ignoring it takes a listener, too.
      const listener = signal === ignored ? () => {} : () => this.#interrupt(signal);
      Deno.addSignalListener(signal, listener);
      return () => Deno.removeSignalListener(signal, listener);
    });
    const nodes = await Nodes.join(this.#options, this.#address);
    try {
      for (let attempt = 0;; attempt++) {
        const outcome = await this.#attempt(attempt, nodes);
        if (this.#signal) return 128 + SIGNALS[this.#signal]!;
        if (outcome.code === 0 || attempt >= this.#options.maxRestarts) return outcome.code;
        processSay(`restart ${attempt + 1} of ${this.#options.maxRestarts}`);
      }
    } finally {
      await nodes?.close(this.#signal === undefined);
      for (const remove of listeners) remove();
      await this.#guard.close();
    }
  }

  #interrupt(signal: Deno.Signal): void {
    if (!this.#signal) this.#output?.say(`${signal}: ending all ranks`);
    this.#signal ??= signal;
    this.#children?.end();
  }

  async #attempt(attempt: number, nodes: Nodes | null): Promise<Outcome> {
    const options = this.#options;
    const first = options.nodeRank * options.ranks;
    const output = this.#output = new JobOutput({
      ranks: Array.from({ length: options.ranks }, (_, i) => first + i),
      logDir: options.logDir,
      append: attempt > 0,
    });
    const children = this.#children = new Children(this.#guard);
    const decided = Promise.withResolvers<Outcome>();
    const place: JobPlace = {
      ...this.#address,
      attempt,
      started: this.#started,
      cores: navigator.hardwareConcurrency,
      gpus: countGpus(),
      columns: terminalColumns(),
    };
    void nodes?.failure(attempt).then(decided.resolve);
    const ends = options.backend === "mpi"
      ? [(await startMpi(options, place, children, output)).ended]
      : await this.#startRanks(place, children, output);
    if (this.#signal) children.end();
    let consequence: Outcome | undefined;
    for (const end of ends) {
      void end.then((exit) => {
        if (exit.code === 0 || this.#signal) return;
        const outcome = this.#judge(exit, output);
        if (!isConsequence(outcome.why)) return decided.resolve(outcome);
        consequence ??= outcome;
        setTimeout(decided.resolve, CAUSE_MS, consequence);
      });
    }
    void Promise.all(ends).then(async (exits) => {
      if (consequence) return decided.resolve(consequence);
      if (!this.#signal) {
        if (exits.some((exit) => exit.code !== 0)) return;
        if (nodes && !await nodes.finish(attempt)) return;
      }
      decided.resolve({ code: 0, why: "" });
    });
    const outcome = await decided.promise;
    if (outcome.code !== 0) {
      children.end();
      void nodes?.tell(attempt, outcome);
    } else if (this.#signal) {
      const why = `node ${options.nodeRank} was ended by ${this.#signal}`;
      await nodes?.tell(attempt, { code: 128 + SIGNALS[this.#signal]!, why });
    }
    await children.settled();
    if (outcome.code !== 0 && !this.#signal) output.say(outcome.why);
    output.close();
    if (outcome.code !== 0 && !this.#signal) await nodes?.settle(attempt);
    return outcome;
  }

  async #startRanks(
    place: JobPlace,
    children: Children,
    output: JobOutput,
  ): Promise<Promise<Exit>[]> {
    const options = this.#options;
    const common = jobEnvironment(Deno.env.toObject(), options, place);
    const ends: Promise<Exit>[] = [];
    for (let local = 0; local < options.ranks && !this.#signal; local++) {
      const rank = options.nodeRank * options.ranks + local;
      const { ended } = await children.start(rank, {
        program: Deno.execPath(),
        args: ["run", "-A", options.script, ...options.args],
        env: rankEnvironment(common, options, place, local),
        stdin: rank === 0 && !Deno.stdin.isTerminal(),
      }, (stream, chunk) => {
        if (chunk) output.push(rank, stream, chunk);
        else output.end(rank, stream);
      });
      ends.push(ended);
    }
    return ends;
  }

  /** What a failed rank means for people and for the exit code. */
  #judge(exit: Exit, output: JobOutput): Outcome {
    const who = exit.number < 0
      ? "mpirun"
      : `rank ${exit.number} of ${this.#options.nodes * this.#options.ranks}`;
    const how = exit.signal ? `was ended by ${exit.signal}` : `failed with exit code ${exit.code}`;
    const headline = headlineOf(output.tail(exit.number));
    return { code: exit.code, why: `${who} ${how}${headline === "" ? "" : `: ${headline}`}` };
  }
}

/** Whether this process was started to outlive its terminal, as by nohup. To be asked before there are listeners. */
function hangUpIgnored(): boolean {
  try {
    const status = Deno.readTextFileSync("/proc/self/status");
    const mask = /^SigIgn:\s*([0-9a-f]+)$/m.exec(status)?.[1] ?? "0";
    return (BigInt(`0x${mask}`) & 1n) === 1n;
  } catch {
    return false; // no such file but on Linux
  }
}

function processSay(text: string): void {
  processSink.write("stderr", new TextEncoder().encode(`launch: ${text}\n`));
}

function terminalColumns(): number | null {
  if (!Deno.stdout.isTerminal() && !Deno.stderr.isTerminal()) return null;
  try {
    return Math.max(20, Deno.consoleSize().columns - "[0] ".length);
  } catch {
    return 76;
  }
}
