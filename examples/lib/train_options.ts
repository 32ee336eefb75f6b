// The flags of `train.ts`: names, defaults and help in one table, read strictly. Nothing runs here.

import { parseArgs } from "node:util";
import type { Recompute } from "../../moe/block.ts";
import {
  createScheduler,
  SCHEDULER_NAMES,
  type SchedulerName,
  type SchedulerOptions,
} from "../../lina/training/schedulers.ts";
import { EXCHANGES } from "./exchange.ts";
import { type ModelConfig, modelConfig } from "../../moe/config.ts";
import type { CollectiveScheduler } from "../../moe/hooks.ts";
import type { RouterOptions } from "../../moe/router.ts";

type Flag = readonly [name: string, value: string, standard: string | undefined, help: string];

/** Flags with a value: name, what the value is, default, help. */
const FLAGS: readonly Flag[] = [
  [
    "preset",
    "NAME",
    undefined,
    "large: 12 layers, width 1024, 16 experts, 32,000 ids, for a GPU (flags beside it win)",
  ],
  [
    "device",
    "NAME",
    undefined,
    "auto, cpu or cuda (default: the launcher's --device, or auto: a GPU if each rank gets one)",
  ],
  ["dtype", "NAME", undefined, "f32 or bf16 (default: bf16 on a GPU, else f32)"],
  [
    "gradient-dtype",
    "NAME",
    "f32",
    "f32 or, for bf16 weights, bf16: half the bytes, rounded once a pass and per reduction",
  ],
  [
    "recompute",
    "WHAT",
    "none",
    "what is computed again in the backward pass to save memory: none, activation or block",
  ],
  ["layers", "N", "4", "layers"],
  ["width", "N", "128", "model width"],
  ["heads", "N", "4", "query heads; divides the width"],
  ["kv-heads", "N", undefined, "key/value heads; divides the heads (default: heads)"],
  ["hidden", "N", undefined, "hidden width of an expert (default: 4 x width)"],
  ["experts", "N", "8", "experts of each MoE layer; 0 for a dense model"],
  ["top-k", "N", "2", "experts per token"],
  ["router", "NAME", "softmax", "softmax, switch, gshard, sigmoid or expert-choice"],
  ["shared-experts", "N", "0", "experts that every token passes"],
  ["dense-layers", "N", "0", "first layers that are dense"],
  ["activation", "NAME", "swiglu", "swiglu, gelu or relu"],
  [
    "capacity-factor",
    "X",
    undefined,
    "rows an expert takes at most in training, as a multiple of its fair share (default: all)",
  ],
  ["drop", "RULE", "position", "what goes beyond the capacity: position or probability"],
  ["aux-loss", "X", "0.01", "coefficient of the balance loss"],
  ["z-loss", "X", "0.001", "coefficient of the router's z loss"],
  ["jitter", "X", "0", "half width of the noise that multiplies the router's logits"],
  ["replicas", "N", "1", "copies of each expert; divides the number of ranks"],
  [
    "schedule",
    "NAME",
    "fifo",
    "when gradients are reduced: fifo, outside (of MoE layers), priority (of all-to-alls), lina, planned; lina+pipeline, planned+pipeline",
  ],
  [
    "chunks",
    "N",
    undefined,
    "slices of the tokens of a MoE layer, for a schedule with +pipeline (default: 2)",
  ],
  [
    "micro-op-mb",
    "X",
    undefined,
    "largest micro-op of --schedule lina in MB (default: 2.4 ms of the link, or 3)",
  ],
  [
    "link-mbit",
    "X",
    undefined,
    "rate of a rank's link each way in Mbit/s, of which --schedule lina takes 2.4 ms for a micro-op",
  ],
  [
    "pack",
    "K",
    "1",
    "K times as many experts on each rank, so that K groups of ranks hold all of them: 1, 2, 4, … or auto",
  ],
  [
    "expert-ranks",
    "N",
    "2",
    "ranks that --pack auto leaves at least in a group that holds all experts",
  ],
  [
    "offload-experts",
    "K",
    "0",
    "experts of a layer and rank whose AdamW moments lie in the host's memory; auto: as many as --pack auto needs",
  ],
  [
    "all-to-all",
    "NAME",
    "direct",
    "how tokens go to other ranks: direct, two-level (inside hosts, then between them) or auto",
  ],
  ["vocab", "N", undefined, "ids of the model, if more than the tokenizer has"],
  ["data", "FILE", undefined, "text to learn (default: the bundled one)"],
  ["tokenizer", "FILE", undefined, "a tokenizer.json (default: bytes)"],
  ["val-fraction", "X", "0.1", "part of the text, from its end, that is only measured"],
  ["seq", "N", "128", "tokens of a sequence"],
  ["batch", "N", "32", "sequences of a step, over all ranks"],
  ["accumulate", "N", "1", "passes that a batch is cut into"],
  ["steps", "N", "1000", "steps"],
  ["lr", "X", "0.003", "highest learning rate"],
  ["min-lr", "X", "0.1", "learning rate at the end, as a part of the highest"],
  ["warmup", "N", "50", "steps until the highest learning rate"],
  ["weight-decay", "X", "0.1", "decoupled weight decay of matrices"],
  ["clip", "X", "1", "largest norm of the gradient; 0 for no limit"],
  ["seed", "N", "1", "seed of weights, data order and noise"],
  ["val-every", "N", "100", "steps between validations; 0 for none"],
  [
    "val-batches",
    "N",
    "8",
    "batches of a validation; the last one takes the whole validation text",
  ],
  ["checkpoint-every", "N", "0", "steps between checkpoints; the last step is saved in any case"],
  ["keep", "N", "2", "checkpoints that stay; 0 saves none at all"],
  ["run", "NAME", undefined, "name of the run (default: date and time)"],
  ["out", "DIR", "runs", "where runs lie"],
  ["trace-steps", "N", "3", "steps recorded in trace.json; 0 for none"],
  [
    "record-routing",
    "FILE",
    undefined,
    "writes every token's experts of a last pass over validation text",
  ],
  [
    "replay-routing",
    "FILE",
    undefined,
    "runs that pass with the experts of such a file in place of the gates', and prints both losses",
  ],
  [
    "time-budget",
    "S",
    undefined,
    "seconds of training: fewer steps than --steps if they would take longer",
  ],
  ["prompt", "TEXT", "It was ", "beginning of the sample"],
  ["sample", "N", "400", "tokens of the sample; 0 for none"],
];

const SWITCHES: readonly (readonly [name: string, help: string])[] = [
  [
    "shard-optimizer",
    "each rank keeps the optimizer's state of a part of the weights that all ranks have (ZeRO-1)",
  ],
  ["demo", "the demo: sizes and a time budget that suit a small CPU"],
  ["tied", "the head shares the embedding's weights"],
  [
    "resume",
    "goes on from the newest checkpoint of --run; a restart by the launcher does so by itself",
  ],
  ["overwrite", "begins anew over an earlier run of that name; --demo does so with its own"],
  ["help", "this text"],
];

const ROUTERS = ["softmax", "switch", "gshard", "sigmoid", "expert-choice"] as const;
const DROPS = ["position", "probability"] as const;

/** What `--demo` changes; flags given beside it win. */
const DEMO: Readonly<Record<string, string>> = {
  "run": "demo",
  "hidden": "256",
  "batch": "16",
  "steps": "800",
  "warmup": "60",
  "val-every": "50",
  "val-batches": "4",
  "val-fraction": "0.03",
  "time-budget": "80",
};

/** What each `--preset` changes; flags given beside it win. */
const PRESETS: Readonly<Record<string, Readonly<Record<string, string>>>> = {
  large: {
    "layers": "12",
    "width": "1024",
    "heads": "16",
    "experts": "16",
    "top-k": "2",
    "hidden": "2816",
    "vocab": "32000",
    "seq": "1024",
    "batch": "16",
    "lr": "0.0006",
    "warmup": "100",
  },
};

/** The flags, read. */
export interface TrainOptions {
  /** Sizes, for the tokenizer's ids and the element type that suits the device; without it, one that suits all else that was given. */
  readonly model: (vocab: number, dtype?: "f32" | "bf16") => ModelConfig;
  /** Which device was asked for; undefined leaves it to the launcher. */
  readonly device: "auto" | "cpu" | "cuda" | undefined;
  /** What is computed again in the backward pass. */
  readonly recompute: Recompute;
  /** Decides when gradients are reduced. */
  readonly scheduler: CollectiveScheduler;
  /** How that scheduler was asked for. */
  readonly schedule: { readonly name: SchedulerName } & SchedulerOptions;
  /** Times as many experts on each rank as without packing; `auto` measures. */
  readonly packing: number | "auto";
  /** Experts of a layer and rank whose moments lie in the host's memory; `auto`, as many as packing needs. */
  readonly offload: number | "auto";
  /** How tokens go to other ranks. */
  readonly exchange: typeof EXCHANGES[number];
  /** A flag's text, if it was given or has a default. */
  readonly text: (name: string) => string | undefined;
  /** A flag's number. */
  readonly number: (name: string) => number;
  /** Whether a switch was given. */
  readonly has: (name: string) => boolean;
}

/**
 * Reads the command line.
 *
 * @param args Its words.
 * @returns The options.
 * @throws {TypeError} If a flag is unknown, lacks its value or has a wrong one.
 */
export function parseTrainOptions(args: readonly string[]): TrainOptions {
  const { values } = parseArgs({
    args: [...args],
    strict: true,
    allowPositionals: false,
    options: Object.fromEntries([
      ...FLAGS.map(([name]) => [name, { type: "string" as const }]),
      ...SWITCHES.map(([name]) => [name, { type: "boolean" as const }]),
    ]),
  });
  const given = values as Record<string, string | boolean | undefined>;
  const preset = oneOf<string>("preset", given.preset, Object.keys(PRESETS));
  const changed = preset === undefined ? {} : PRESETS[preset];
  const text = (name: string) => {
    const value = given[name] ?? (given.demo ? DEMO[name] : undefined) ?? changed[name];
    return value === undefined ? FLAGS.find((flag) => flag[0] === name)![2] : String(value);
  };
  const number = (name: string) => {
    const flag = FLAGS.find((flag) => flag[0] === name)!;
    const value = Number(text(name) ?? NaN);
    const fits = flag[1] === "N" ? Number.isSafeInteger(value) : Number.isFinite(value);
    if (!fits || value < 0 || text(name)!.trim() === "") {
      const what = flag[1] === "N" ? "a whole number >= 0" : "a number >= 0";
      throw new TypeError(
        `Cannot train as --${name} must be ${what}: current value is ${text(name)}`,
      );
    }
    return value;
  };
  const optional = (name: string) => text(name) === undefined ? undefined : number(name);
  for (const [name, kind, standard] of FLAGS) {
    if (kind !== "N" && kind !== "X" && kind !== "S") continue;
    if (standard !== undefined || text(name) !== undefined) number(name);
  }
  for (const name of ["steps", "seq", "batch", "accumulate"]) {
    if (number(name) < 1) {
      throw new TypeError(
        `Cannot train as --${name} must be at least 1: current value is ${text(name)}`,
      );
    }
  }
  if (given.resume && text("run") === undefined) {
    throw new TypeError("Cannot resume as --run must name a run: current value is unset");
  }
  const dtype = oneOf("dtype", given.dtype, ["f32", "bf16"] as const);
  const gradientDtype = oneOf("gradient-dtype", text("gradient-dtype"), ["f32", "bf16"] as const)!;
  const device = oneOf("device", given.device, ["auto", "cpu", "cuda"] as const);
  const recompute = oneOf(
    "recompute",
    text("recompute"),
    ["none", "activation", "block"] as const,
  )!;
  oneOf("router", text("router"), ROUTERS);
  oneOf("drop", text("drop"), DROPS);
  const model = (vocab: number, standard = gradientDtype) => {
    if (gradientDtype === "bf16" && (dtype ?? standard) === "f32") {
      throw new RangeError(
        "Cannot train as --gradient-dtype must be f32 for weights in f32 (--dtype; a CPU has no other): current value is bf16",
      );
    }
    return modelConfig({
      vocab: Math.max(vocab, optional("vocab") ?? 0),
      dtype: dtype ?? standard,
      gradientDtype,
      width: number("width"),
      layers: number("layers"),
      heads: number("heads"),
      kvHeads: optional("kv-heads") ?? number("heads"),
      hidden: optional("hidden") ?? 4 * number("width"),
      experts: number("experts"),
      router: routerOf(text, number, optional),
      sharedExperts: number("shared-experts"),
      denseLayers: number("dense-layers"),
      activation: text("activation") as ModelConfig["activation"],
      tied: given.tied === true,
    });
  };
  const schedule = scheduleOf(
    oneOf("schedule", text("schedule"), SCHEDULER_NAMES)!,
    optional,
  );
  const packing = packingOf(text("pack")!, number("replicas"));
  const offload = offloadOf(text("offload-experts")!, packing);
  const exchange = oneOf("all-to-all", text("all-to-all"), EXCHANGES)!;
  if (given.demo && given.run === undefined) given.overwrite = true;
  return {
    model,
    device,
    recompute,
    scheduler: createScheduler(schedule.name, schedule),
    schedule,
    packing,
    offload,
    exchange,
    text,
    number,
    has: (name) => given[name] === true,
  };
}

/** A flag's value, which must be one of some words. */
function oneOf<T extends string>(
  name: string,
  value: string | boolean | undefined,
  words: readonly T[],
): T | undefined {
  if (value === undefined || words.includes(value as T)) return value as T | undefined;
  throw new TypeError(
    `Cannot train as --${name} must be ${
      words.join(", ").replace(/, ([^,]*)$/, " or $1")
    }: current value is ${value}`,
  );
}

/** A schedule's name and sizes; a size that it would not look at is refused. */
function scheduleOf(
  name: SchedulerName,
  optional: (name: string) => number | undefined,
): TrainOptions["schedule"] {
  const [microOp_MB, link_Mbit, chunks] = ["micro-op-mb", "link-mbit", "chunks"].map(optional);
  const lina = name.startsWith("lina"), pipelined = name.endsWith("+pipeline");
  const needs = (flag: string, value: number | undefined, fits: boolean, what: string) => {
    if (value === undefined || fits) return;
    throw new TypeError(
      `Cannot train as --${flag} must go with --schedule ${what}: current value is ${name}`,
    );
  };
  needs("micro-op-mb", microOp_MB, lina, "lina");
  needs("link-mbit", link_Mbit, lina, "lina");
  needs("chunks", chunks, pipelined, "lina+pipeline or planned+pipeline");
  if (chunks === 0) {
    throw new TypeError("Cannot train as --chunks must be at least 1: current value is 0");
  }
  if (microOp_MB !== undefined && link_Mbit !== undefined) {
    throw new TypeError(
      `Cannot train as --link-mbit must be left out where --micro-op-mb is given: current value is ${link_Mbit}`,
    );
  }
  return {
    name,
    ...(microOp_MB !== undefined && { microOpBytes: Math.round(microOp_MB * 1e6) }),
    ...(link_Mbit !== undefined && { linkBytesPerSecond: link_Mbit * 1e6 / 8 }),
    ...(chunks !== undefined && { chunks }),
  };
}

function offloadOf(offload: string, packing: number | "auto"): number | "auto" {
  if (offload === "auto" && packing === "auto") return offload;
  if (/^\d+$/.test(offload)) return Number(offload);
  throw new TypeError(
    `Cannot train as --offload-experts must be a whole number >= 0, or auto beside --pack auto: current value is ${offload}`,
  );
}

function packingOf(pack: string, replicas: number): TrainOptions["packing"] {
  if (pack === "auto" || /^[1-9]\d*$/.test(pack)) {
    if (pack === "1") return replicas;
    if (replicas === 1) return pack === "auto" ? pack : Number(pack);
    throw new TypeError(
      `Cannot train as --replicas must be left out where --pack is given, which makes them: current value is ${replicas}`,
    );
  }
  throw new TypeError(
    `Cannot train as --pack must be auto or a whole number >= 1: current value is ${pack}`,
  );
}

function routerOf(
  text: TrainOptions["text"],
  number: TrainOptions["number"],
  optional: (name: string) => number | undefined,
): RouterOptions {
  const kind = text("router")!.replace("expert-choice", "expertChoice") as RouterOptions["kind"];
  const common = {
    auxLoss: number("aux-loss"),
    zLoss: number("z-loss"),
    jitter: number("jitter"),
    capacityFactor: optional("capacity-factor") ?? null,
    drop: text("drop") as typeof DROPS[number],
  } as const;
  switch (kind) {
    case "expertChoice":
      return {
        kind,
        zLoss: common.zLoss,
        jitter: common.jitter,
        capacityFactor: optional("capacity-factor") ?? number("top-k"),
      };
    case "softmax":
    case "sigmoid":
      return { kind, topK: number("top-k"), ...common };
    default:
      return { kind, ...common };
  }
}

/**
 * The text of `--help`.
 *
 * @returns Usage and flags.
 */
export function trainHelp(): string {
  const lines = FLAGS.map(([name, value, standard, help]) => [
    `--${name} ${value}`,
    standard === undefined
      ? help
      : `${help} (default: ${JSON.stringify(standard).replaceAll('"', "")})`,
  ]);
  const all = [...SWITCHES.map(([name, help]) => [`--${name}`, help]), ...lines];
  const width = Math.max(...all.map(([left]) => left.length)) + 2;
  return [
    "Trains a Mixture-of-Experts language model on text, on all ranks together.",
    "",
    "  deno run -A launch.ts -n 4 examples/train.ts [flags]",
    "",
    ...all.map(([left, right]) => `  ${left.padEnd(width)}${right}`),
  ].join("\n");
}
