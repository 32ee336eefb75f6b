// Generates text with a model that train.ts has saved, on any number of ranks.
//   deno run -A launch.ts -n 2 examples/generate.ts runs/demo --prompt "It was " --tokens 400

import { existsSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { init } from "../collectives/world.ts";
import { loadCheckpoint, newestCheckpoint } from "../moe/checkpoint.ts";
import { modelConfig, type ModelOptions } from "../moe/config.ts";
import { generate } from "../moe/generate.ts";
import { CHECKPOINTS } from "../moe/run.ts";
import { byteTokenizer, StreamDecoder } from "../moe/tokenizer.ts";
import { Transformer } from "../moe/transformer.ts";
import { parameterTensors } from "../moe/weights.ts";
import type { Device } from "../tensor/device.ts";
import { runProgram } from "./lib/program.ts";
import { tokenizerOf } from "./lib/tokenizer.ts";

const HELP = `Generates text with a model that train.ts has saved, on any number of ranks.

  deno run -A launch.ts -n 2 examples/generate.ts DIR [flags]

  DIR               a run's folder, its folder of checkpoints, or one checkpoint
  --prompt TEXT     beginning of the text (default: "It was ")
  --tokens N        tokens to add (default: 400)
  --temperature X   0 takes the likeliest token (default: 0.8)
  --top-p X         likeliest tokens that are kept (default: 0.95)
  --context N       tokens that the model looks back on (default: as it was trained)
  --seed N          seed of the choices (default: 0)
  --tokenizer FILE  the tokenizer.json that the model was trained with (default: bytes)
  --device NAME     auto, cpu or cuda (default: the launcher's --device, or auto)`;

interface Options {
  readonly path: string;
  readonly prompt: string;
  readonly tokens: number;
  readonly temperature: number;
  readonly topP: number;
  readonly context?: number;
  readonly seed: number;
  readonly tokenizer?: string;
  readonly device?: "auto" | "cpu" | "cuda";
}

function parse(args: readonly string[]): Options {
  const text = { type: "string" } as const;
  const { values, positionals } = parseArgs({
    args: [...args],
    strict: true,
    allowPositionals: true,
    options: {
      prompt: text,
      tokens: text,
      temperature: text,
      "top-p": text,
      context: text,
      seed: text,
      tokenizer: text,
      device: text,
    },
  });
  if (positionals.length !== 1) {
    throw new TypeError(
      `Cannot generate as one folder must be named: current value is ${positionals.length} of them`,
    );
  }
  if (values.device !== undefined && !["auto", "cpu", "cuda"].includes(values.device)) {
    throw new TypeError(
      `Cannot generate as --device must be auto, cpu or cuda: current value is ${values.device}`,
    );
  }
  const number = (name: "tokens" | "temperature" | "top-p" | "context" | "seed", least: number) => {
    const given = values[name];
    if (given === undefined) return undefined;
    const value = given.trim() === "" ? NaN : Number(given);
    const whole = name !== "temperature" && name !== "top-p";
    if (!(value >= least) || (whole && !Number.isSafeInteger(value))) {
      throw new TypeError(
        `Cannot generate as --${name} must be a ${
          whole ? "whole " : ""
        }number >= ${least}: current value is ${given}`,
      );
    }
    return value;
  };
  return {
    path: positionals[0],
    prompt: values.prompt ?? "It was ",
    tokens: number("tokens", 1) ?? 400,
    temperature: number("temperature", 0) ?? 0.8,
    topP: number("top-p", 0) ?? 0.95,
    context: number("context", 1),
    seed: number("seed", 0) ?? 0,
    tokenizer: values.tokenizer,
    device: values.device as Options["device"],
  };
}

/** A model as a device computes it: the CPU has no bf16, a GPU no f64. */
function suited(model: ModelOptions, { kind }: Device): ModelOptions {
  const own = kind === "cuda" ? "bf16" : "f64";
  return { ...model, dtype: model.dtype === own ? own : "f32" };
}

async function main(options: Options, begun: () => void): Promise<void> {
  await using world = await init({ device: options.device });
  const inner = join(options.path, CHECKPOINTS);
  const found = existsSync(join(options.path, "manifest.json"))
    ? await loadCheckpoint(options.path, { model: [], comm: world })
    : await newestCheckpoint(existsSync(inner) ? inner : options.path, { comm: world });
  if (!found) {
    throw new Error(
      `Cannot generate as ${options.path} must hold a checkpoint: current value has none`,
    );
  }
  const tokenizer = options.tokenizer ? await tokenizerOf(options.tokenizer) : byteTokenizer;
  const state = found.state as { tokenizer?: string; sequence?: number };
  if (state.tokenizer !== undefined && state.tokenizer !== tokenizer.name) {
    throw new Error(
      `Cannot generate as the tokenizer must be "${state.tokenizer}", as in training: current value is "${tokenizer.name}"`,
    );
  }
  const config = modelConfig(suited(found.config as unknown as ModelOptions, world.device));
  using model = new Transformer({ device: world.device, comm: world, config, seed: 0 });
  await loadCheckpoint(found, {
    model: [...parameterTensors(model.parameters), ...model.buffers],
    comm: world,
  });

  const { tokens, temperature, topP, seed, prompt } = options;
  const context = options.context ?? state.sequence ?? 128;
  const ids = tokenizer.encode(prompt);
  if (ids.length === 0) {
    throw new Error("Cannot generate as --prompt must hold a token: current value has none");
  }
  begun();
  const text = new StreamDecoder(tokenizer);
  const show = async (piece: string) => {
    if (world.rank === 0) await Deno.stdout.write(new TextEncoder().encode(piece));
  };
  await show(prompt);
  const added = generate(model, world.device, ids, { tokens, context, temperature, topP, seed });
  for await (const token of added) await show(text.push(token));
  await show(text.flush() + "\n");
}

await runProgram({
  help: () => HELP,
  parse,
  main,
  lessMemory: "Less memory: a shorter --context, or more ranks.",
});
