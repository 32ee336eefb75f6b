// Trains a Mixture-of-Experts language model on text, on all ranks together: the demo's program.
//   deno run -A launch.ts -n 4 examples/train.ts --demo
//   deno run -A launch.ts -n 4 examples/train.ts --help

import { existsSync } from "node:fs";
import { join } from "node:path";
import { init, type World } from "../collectives/world.ts";
import { groupOf } from "../moe/agree.ts";
import { countParameters } from "../moe/config.ts";
import { bigramLoss, loadText, type TokenData } from "../moe/data.ts";
import { generate } from "../moe/generate.ts";
import type { RoutingTap } from "../moe/moe_types.ts";
import { TrainingController } from "../lina/training/controller.ts";
import { Transformer } from "../moe/transformer.ts";
import { replicatedPlacement } from "../moe/placement.ts";
import {
  decodeRoutingRecord,
  encodeRoutingRecord,
  RoutingRecorder,
  RoutingReplay,
} from "../moe/routing_record.ts";
import { CHECKPOINTS, type MetricsRow, run } from "../moe/run.ts";
import { byteTokenizer, type Tokenizer } from "../moe/tokenizer.ts";
import { Trainer } from "../moe/trainer.ts";
import { trainingData } from "../moe/training_data.ts";
import { writeTrace } from "../trace/perfetto.ts";
import { peakTflops, stepFlops } from "./lib/flops.ts";
import { runProgram } from "./lib/program.ts";
import { tokenizerOf } from "./lib/tokenizer.ts";
import { StepBudget } from "./lib/step_budget.ts";
import { openExchange } from "./lib/exchange.ts";
import { parseTrainOptions, trainHelp, type TrainOptions } from "./lib/train_options.ts";
import { lossSvg } from "./report/loss_svg.ts";
import { Progress } from "./report/progress.ts";
import { formatTable } from "./report/table.ts";

const START = new Date().toISOString();

async function main(options: TrainOptions, begun: () => void): Promise<void> {
  const started = performance.now();
  const { text, number, has } = options;
  const tokenizerFile = text("tokenizer");
  const tokenizer = tokenizerFile ? await tokenizerOf(tokenizerFile) : byteTokenizer;
  options.model(tokenizer.vocabularySize); // impossible sizes are refused before ranks meet
  if (number("sample") > 0 && tokenizer.encode(text("prompt")!).length === 0) {
    throw new Error(
      "Cannot train as --prompt must hold a token for the sample: current value is none",
    );
  }
  await using world = await init({ device: options.device });
  if (has("shard-optimizer") && world.size === 1) {
    throw new Error(
      "Cannot train as --shard-optimizer must have several ranks to spread over (launch.ts -n): current value is 1",
    );
  }
  const { packing } = options;
  if (packing !== "auto" && world.size % packing !== 0) {
    throw new Error(
      `Cannot train as --${
        number("replicas") > 1 ? "replicas" : "pack"
      } must divide the number of ranks, which is ${world.size}: current value is ${packing}`,
    );
  }
  const gpu = world.device.kind === "cuda";
  const config = options.model(tokenizer.vocabularySize, gpu ? "bf16" : "f32");
  const file = text("data") ?? bundledText();
  const data = await loadText(file, {
    sequence: number("seq"),
    tokenizer,
    validationShare: number("val-fraction"),
  });
  const directory = await runDirectory(world, options);
  const replayed = text("replay-routing");
  const replay = replayed ? readReplay(replayed, config.experts) : null;

  await using exchange = await openExchange(options.exchange, world, (line) => {
    if (world.rank === 0) console.log(line);
  });
  using model = new Transformer({
    device: world.device,
    comm: world,
    config,
    exchange,
    seed: number("seed"),
    placement: replicatedPlacement(packing === "auto" ? 1 : packing),
    recompute: options.recompute,
  });
  await using trainer = await Trainer.create({
    world,
    device: world.device,
    model,
    data: trainingData(data, {
      sequence: number("seq"),
      batch: number("batch"),
      accumulate: number("accumulate"),
      seed: number("seed"),
      rank: world.rank,
      size: world.size,
    }),
    learningRate: course(options, number("steps")),
    adamW: { weightDecay: number("weight-decay") },
    accumulate: number("accumulate"),
    clip: number("clip"),
    shardOptimizer: has("shard-optimizer"),
    offloadExperts: options.offload === "auto" ? 0 : options.offload,
    scheduler: options.scheduler,
  });
  const keeps = has("resume") || await continues(world, directory);
  const checkpoint = keeps ? await trainer.resume(join(directory, CHECKPOINTS)) : null;
  if (has("resume") && world.attempt === 0 && !checkpoint) {
    throw new Error(`Cannot resume as ${directory} must have a checkpoint: current value has none`);
  }
  const recording = text("record-routing");
  await beginRun(world, directory, { keeps, recording, overwrite: has("overwrite") });
  begun();
  const budget = new StepBudget(world, {
    steps: number("steps"),
    seconds: text("time-budget") === undefined ? null : number("time-budget"),
    settled: checkpoint?.state as { steps?: number } | undefined,
    from: trainer.steps,
  });
  trainer.learningRate = course(options, budget.steps);

  const { total, active } = countParameters(config);
  const bigram = data.validation.length > 1
    ? bigramLoss(data.train, data.validation, data.vocabularySize)
    : NaN;
  using progress = new Progress(budget.steps, { rank: world.rank, start: trainer.steps });
  const measures = options.packing === "auto" || options.schedule.name.startsWith("planned");
  const { name: policy, ...sizes } = options.schedule;
  const controller = measures
    ? await TrainingController.create({
      ...sizes,
      trainer,
      world,
      device: world.device,
      policy,
      packing: packing === "auto" ? packing : undefined,
      leastRanks: number("expert-ranks"),
      offloadExperts: options.offload === "auto" ? options.offload : undefined,
      log: (line) => world.rank === 0 && progress.message(line),
    })
    : null;
  progress.message(
    `${world.size} ranks (${world.backend}${
      gpu ? `, ${world.device.name}, ${config.dtype}` : ""
    }), ${config.layers} layers, ${config.experts > 0 ? `${config.experts} experts, ` : ""}${
      millions(total)
    } parameters, ${millions(active)} per token; ${
      (data.train.length / 1e6).toFixed(2)
    } M training tokens${checkpoint ? `; from step ${checkpoint.step}` : ""}`,
  );
  const first = trainer.steps + 1, traceSteps = number("trace-steps");
  // Twenty steps warm up, if there are as many.
  const traced = (): [number, number] => {
    const from = first + Math.max(0, Math.min(20, budget.steps + 1 - first - traceSteps));
    return [from, from + traceSteps];
  };
  const peak = config.dtype === "bf16" ? peakTflops(world.device.name) : undefined;
  const flops = stepFlops(config, number("batch"), number("seq"));
  const rows = await run(trainer, {
    world,
    directory,
    steps: () => budget.steps,
    validateEvery: data.validation.length > 0 ? number("val-every") : 0,
    validationBatches: number("val-batches"),
    checkpointEvery: number("checkpoint-every"),
    keep: number("keep"),
    state: () => ({ ...budget.settled, tokenizer: tokenizer.name }),
    schedule: () => ({
      ...(controller?.state ?? {
        policy,
        experts_per_device: model.moeLayers[0]?.store.seats[world.rank].length ?? 0,
        chunks: Math.max(1, ...trainer.schedule.chunks.values()),
        micro_op_bytes: Math.max(0, ...trainer.schedule.microOps.map(({ bytes }) => bytes)),
      }),
      all_to_all: options.exchange,
    }),
    idealStep_s: peak && flops / (peak * 1e12 * world.size),
    trace: traced,
    deviceTrace: traceSteps > 0 ? await deviceTraceOf(world) : undefined,
    onStep: async (row) => {
      if (await budget.onStep(row)) {
        trainer.learningRate = course(options, budget.steps);
      }
      const peak_bytes = gpu ? row.peak_bytes : undefined;
      await controller?.afterStep(row);
      progress.update({
        ...row,
        schedule: scheduleShown(row, options),
        peak_bytes,
        total: budget.steps,
      });
    },
  });
  const val_loss = data.validation.length > 0 ? await trainer.validate() : NaN;
  progress.finish();

  if (traceSteps > 0) await writeTrace(join(directory, "trace.json"), { ranks: world });
  const sample = await sampleOf(model, world, tokenizer, options);
  if (world.rank === 0) {
    Deno.writeTextFileSync(
      join(directory, "loss.svg"),
      lossSvg(rows, {
        title: "Loss",
        subtitle: `${millions(total)} parameters, ${
          millions(active)
        } per token, ${world.size} ranks`,
        unit: tokenizer === byteTokenizer ? "nats per byte" : "nats per token",
        baseline: Number.isFinite(bigram) ? { label: "bigram", loss: bigram } : undefined,
      }),
    );
    console.log(`\n${summary({ data, rows, options, total, active, val_loss, bigram, started })}`);
    if (sample) console.log(`\nA sample:\n${sample}`);
    console.log(
      `\nFiles in ${directory}: metrics.jsonl, loss.svg${
        number("keep") > 0 ? `, ${CHECKPOINTS}/` : ""
      }${traceSteps > 0 ? ", trace.json (open it at ui.perfetto.dev)" : ""}`,
    );
  }
  if (recording) await recordRouting(recording, { world, model, trainer });
  if (replay) {
    const parts = { model, trainer };
    const own = await validateWith(null, parts), given = await validateWith(replay, parts);
    if (world.rank === 0) {
      console.log(`\nreplayed routing: loss ${given.toFixed(6)}, of its own ${own.toFixed(6)}`);
    }
  }
}

/** How a step's collectives were scheduled, for the progress line; nothing where all is plain. */
function scheduleShown({ schedule }: MetricsRow, { packing }: TrainOptions): string | undefined {
  if (!schedule || (schedule.policy === "fifo" && packing === 1)) return undefined;
  const slices = Number(schedule.chunks) > 1 ? ` ${schedule.chunks} slices` : "";
  const held = packing === 1 ? "" : `, ${schedule.experts_per_device} experts a rank`;
  return `${schedule.policy}${slices}${held}`;
}

/** Device times for the trace, on a GPU. */
async function deviceTraceOf({ device }: World) {
  if (device.kind !== "cuda") return undefined;
  const { DeviceTrace } = await import("../tensor/cuda/trace.ts");
  return new DeviceTrace(device as ConstructorParameters<typeof DeviceTrace>[0]);
}

function course(options: TrainOptions, steps: number) {
  const { number } = options;
  return { peak: number("lr"), warmup: number("warmup"), steps, floor: number("min-lr") };
}

/** The run's folder. Without `--run` it is named after the time at which the job was launched, also after a restart. */
async function runDirectory(world: World, { text }: TrainOptions): Promise<string> {
  const started = new TextEncoder().encode(launched());
  await world.broadcast(started);
  const name = new TextDecoder().decode(started).slice(0, 19).replaceAll(":", "-");
  return join(text("out")!, text("run") ?? name);
}

/** When the job was launched. */
function launched(): string {
  return Deno.env.get("LINA_STARTED") ?? START;
}

/** Whether this job has begun the run in a folder, and was restarted since; rank 0 decides. */
async function continues(world: World, directory: string): Promise<boolean> {
  const answer = new Uint8Array(1);
  if (world.rank === 0 && world.attempt > 0) {
    try {
      const text = Deno.readTextFileSync(join(directory, "run.json"));
      answer[0] = Number(JSON.parse(text).started === launched());
    } catch {
      // The job had not come so far.
    }
  }
  await world.broadcast(answer);
  return answer[0] === 1;
}

/** Whether a checkpoint was saved there; one that is being saved, or was when its job died, has a name that begins with a dot. */
function hasCheckpoint(folder: string): boolean {
  return existsSync(folder) &&
    Array.from(Deno.readDirSync(folder)).some(({ name }) => name[0] !== ".");
}

/** Makes the run's folder. An old run of that name goes only if the user said so, and not before all else that he gave was found to be usable. */
function beginRun(
  world: World,
  directory: string,
  { keeps, recording, overwrite }: {
    keeps: boolean;
    recording: string | undefined;
    overwrite: boolean;
  },
): Promise<void> {
  return groupOf(world).onRoot(`Cannot write the run to ${directory}`, () => {
    if (!keeps && !overwrite && hasCheckpoint(join(directory, CHECKPOINTS))) {
      throw new Error(
        "the run's name must be new: current value is that of an earlier run with checkpoints; give another --run, --resume to go on, or --overwrite",
      );
    }
    Deno.mkdirSync(directory, { recursive: true });
    // Written after training: whether it can be is found out now.
    if (recording) Deno.openSync(recording, { write: true, create: true }).close();
    if (keeps) return;
    for (const old of ["run.json", "metrics.jsonl", "loss.svg", "trace.json", CHECKPOINTS]) {
      try {
        Deno.removeSync(join(directory, old), { recursive: true });
      } catch (error) {
        if (!(error instanceof Deno.errors.NotFound)) throw error;
      }
    }
    const description = { started: launched(), ranks: world.size, arguments: Deno.args };
    Deno.writeTextFileSync(join(directory, "run.json"), JSON.stringify(description) + "\n");
  });
}

async function sampleOf(
  model: Transformer,
  world: World,
  tokenizer: Tokenizer,
  { text, number }: TrainOptions,
): Promise<string> {
  const prompt = tokenizer.encode(text("prompt")!);
  const out = Array.from(prompt);
  if (number("sample") === 0) return "";
  const tokens = generate(model, world.device, prompt, {
    tokens: number("sample"),
    context: number("seq"),
    temperature: 0.8,
    topP: 0.95,
    seed: number("seed"),
  });
  for await (const token of tokens) out.push(token);
  return tokenizer.decode(out);
}

/** Reads a routing record of as many experts. */
function readReplay(path: string, experts: number): RoutingReplay {
  try {
    const record = decodeRoutingRecord(Deno.readFileSync(path));
    if (record.experts === experts) return new RoutingReplay(record);
    throw new Error(`it must be of ${experts} experts: current value is ${record.experts}`);
  } catch (cause) {
    throw new Error(`Cannot replay ${path}: ${(cause as Error).message}`, { cause });
  }
}

/** Loss of a batch of validation text while a tap records or replays the routing. */
async function validateWith(
  tap: RoutingTap | null,
  { model, trainer }: { model: Transformer; trainer: Trainer },
): Promise<number> {
  for (const layer of model.moeLayers) layer.tap = tap;
  const loss = await trainer.validate(1);
  for (const layer of model.moeLayers) layer.tap = null;
  return loss;
}

/** The text that lies beside this program. */
function bundledText(): string {
  if (import.meta.dirname !== undefined) return join(import.meta.dirname, "data", "austen.txt");
  throw new Error(
    "Cannot train as --data FILE must be given where the program is loaded from a URL: current value is unset",
  );
}

/** Writes the experts of every token of a batch of validation text. */
async function recordRouting(
  path: string,
  { world, model, trainer }: { world: World; model: Transformer; trainer: Trainer },
): Promise<void> {
  const recorder = new RoutingRecorder();
  await validateWith(recorder, { model, trainer });
  const record = await recorder.gather(world, model.config.experts);
  if (world.rank === 0) Deno.writeFileSync(path, encodeRoutingRecord(record));
}

function summary(shown: {
  data: TokenData;
  rows: readonly MetricsRow[];
  options: TrainOptions;
  total: number;
  active: number;
  val_loss: number;
  bigram: number;
  started: number;
}): string {
  const { rows, options: { number }, data } = shown;
  const tokens = rows.length * number("batch") * number("seq");
  const median = (key: "tokens_per_s" | "step_ms" | "mfu" | "a2a_share" | "load_imbalance") => {
    const values = rows.map((row) => row[key] ?? NaN).sort((a, b) => a - b);
    return values[Math.floor(values.length / 2)] ?? NaN;
  };
  const perByte = (loss: number) =>
    Number.isFinite(loss) ? `${(loss / data.bytesPerToken).toFixed(3)} nats/byte` : "none";
  const entries: [string, string][] = [
    ["parameters", `${millions(shown.total)}, ${millions(shown.active)} per token`],
    ["tokens", `${millions(tokens)} in ${rows.length} steps`],
    ["validation loss", perByte(shown.val_loss)],
    ["bigram baseline", perByte(shown.bigram)],
    ["tokens/s", median("tokens_per_s").toFixed(0)],
    ["step", `${median("step_ms").toFixed(1)} ms`],
    ...(Number.isFinite(median("mfu"))
      ? [["MFU", `${(100 * median("mfu")).toFixed(1)} %`] as [string, string]]
      : []),
    ["peak memory", `${((rows.at(-1)?.peak_bytes ?? NaN) / 2 ** 30).toFixed(2)} GiB`],
    ["all-to-all share", `${(100 * median("a2a_share")).toFixed(1)} %`],
    ["load imbalance", median("load_imbalance").toFixed(2)],
    ["time", `${((performance.now() - shown.started) / 1000).toFixed(1)} s`],
  ];
  return formatTable(entries.map(([what, value]) => ({ what, value })), {
    columns: ["what", { key: "value", align: "right" }],
  });
}

function millions(n: number): string {
  return n < 1e6 ? `${(n / 1e3).toFixed(0)} k` : `${(n / 1e6).toFixed(2)} M`;
}

await runProgram({
  help: trainHelp,
  parse: parseTrainOptions,
  main,
  lessMemory:
    "Less memory: more passes (--accumulate) or a smaller --batch, --recompute block, a shorter --seq, more ranks (and --shard-optimizer), or a smaller model.",
});
