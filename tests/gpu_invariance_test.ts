// Loss and gradients of a whole model do not depend on how many ranks its experts are spread over, nor on who has which tokens: on ranks
// that share a GPU and talk by NCCL, or on the emulators of both. Against one rank on the same device; cuda_model_test.ts has the CPU.

import assert from "node:assert/strict";
import type { ModelOptions } from "../moe/config.ts";
import { gpuRanksEnv, hasGpu, Mps } from "./_gpu_env.ts";
import { runRanks } from "./_ranks.ts";
import type { TrainArgs, TrainResult } from "./_train_ranks.ts";
import type { InvarianceCase, InvarianceResult } from "./gpu_invariance_ranks.ts";

const PROGRAM = new URL("./gpu_invariance_ranks.ts", import.meta.url);
const TRAIN = new URL("./_train_ranks.ts", import.meta.url);
const env = await gpuRanksEnv();
const onGpu = await hasGpu();

/** Six experts: 4 ranks have 1, 2, 1 and 2 of them. */
const MODEL: ModelOptions = {
  vocab: 96,
  width: onGpu ? 128 : 32,
  layers: 2,
  heads: 2,
  kvHeads: 1,
  headDim: onGpu ? 64 : 16,
  hidden: onGpu ? 160 : 24,
  experts: 6,
  initStd: 0.1,
  router: { kind: "softmax", topK: 2, auxLoss: 0.05, zLoss: 0.01 },
};
const LENGTHS = onGpu ? [65, 1, 128, 40, 33, 77, 100, 9] : [6, 1, 5, 4, 3, 7, 2, 4];
const EVEN = { 2: [4, 4], 4: [2, 2, 2, 2] }, UNEVEN = { 2: [0, 8], 4: [0, 5, 1, 2] };

interface Setting extends Pick<InvarianceCase, "name" | "seats" | "recompute"> {
  readonly shares: typeof EVEN;
  readonly change?: Partial<ModelOptions>;
}

const SETTINGS: readonly Setting[] = [
  { name: "softmax, top-2", shares: EVEN },
  { name: "a rank without tokens", shares: UNEVEN },
  {
    name: "capacity, decided by the host",
    shares: UNEVEN,
    change: { router: { kind: "switch", capacityFactor: 1, auxLoss: 0.05, zLoss: 0.01 } },
  },
  {
    name: "two replicas, shared expert",
    shares: UNEVEN,
    seats: 2,
    change: { sharedExperts: 1, router: { kind: "sigmoid", topK: 2, auxLoss: 0.05 } },
  },
  { name: "one expert everywhere, the others on one rank", shares: EVEN, seats: "lopsided" },
  {
    name: "blocks computed again, gelu",
    shares: EVEN,
    recompute: "block",
    change: { activation: "gelu" },
  },
];

/**
 * |a − b| / |b| of a parameter's gradient, how far losses may be apart, relatively, and which share of the tokens may have other experts: scores that
 * are equal but for rounding may fall either way. One rank weighs hidden rows, several weigh outputs (MOE_LAYER.md), which bf16 rounds differently.
 */
const TOLERANCE = {
  f32: { grad: 1e-5, loss: 1e-6, moved: 0 },
  bf16: { grad: 0.05, loss: 2e-3, moved: 0.04 },
} as const;

async function run(dtype: "f32" | "bf16", ranks: 1 | 2 | 4) {
  const cases = SETTINGS.map(({ shares, change, seats, ...same }): InvarianceCase => ({
    ...same,
    model: { ...MODEL, ...change, dtype },
    lengths: LENGTHS,
    shares: ranks === 1 ? [LENGTHS.length] : shares[ranks],
    seats: ranks === 1 ? 1 : seats,
  }));
  await using mps = await Mps.start();
  const results = await runRanks<Record<string, InvarianceResult>>(PROGRAM, ranks, {
    args: cases,
    env: { ...env, ...mps.env },
    timeout_ms: 120_000,
  });
  return results.map(({ result }) => result!);
}

function decode(text: string): Float32Array {
  return new Float32Array(Uint8Array.fromBase64(text).buffer);
}

function distance(a: Float32Array, b: Float32Array): number {
  let apart = 0, norm = 0;
  for (let i = 0; i < b.length; i++) {
    apart += (a[i] - b[i]) ** 2;
    norm += b[i] ** 2;
  }
  return Math.sqrt(apart / Math.max(norm, 1e-20));
}

/** What the choices of a batch have in common on different ranks. */
interface Moved {
  /** Share of the tokens, over all layers, that have other experts. */
  readonly tokens: number;
  /** Share of an expert's rows that it has on one side only, by layer and expert. */
  readonly rows: readonly (readonly number[])[];
}

function movedChoices(alone: InvarianceResult, all: readonly InvarianceResult[]): Moved {
  const tokens = LENGTHS.reduce((a, b) => a + b), experts = MODEL.experts!;
  let otherwise = 0;
  const rows = alone.chosen.map((want, layer) => {
    const got = all.flatMap(({ chosen }) => chosen[layer]), K = want.length / tokens;
    assert.equal(got.length, want.length);
    const moved = new Array<number>(experts).fill(0), had = new Array<number>(experts).fill(1);
    for (let n = 0; n < tokens; n++) {
      const one = want.slice(n * K, (n + 1) * K), other = got.slice(n * K, (n + 1) * K);
      for (const e of one) had[e]++;
      const apart = [
        ...one.filter((e) => !other.includes(e)),
        ...other.filter((e) => !one.includes(e)),
      ];
      for (const e of apart) moved[e]++;
      if (apart.length > 0) otherwise++;
    }
    return moved.map((n, e) => n / had[e]);
  });
  return { tokens: otherwise / (tokens * rows.length), rows };
}

for (const dtype of ["f32", "bf16"] as const) {
  Deno.test({
    name: `invariance: 2 and 4 ranks have the loss and the gradients of one, ${dtype}`,
    ignore: !env,
    async fn(t) {
      const { grad: nearGrad, loss: nearLoss } = TOLERANCE[dtype];
      const [alone] = await run(dtype, 1);
      for (const ranks of [2, 4] as const) {
        const all = await run(dtype, ranks);
        for (const { name, seats } of SETTINGS) {
          await t.step(`${name}, ${ranks} ranks`, () => {
            const want = alone[name];
            const moved = movedChoices(want, all.map((result) => result[name]));
            assert(moved.tokens <= TOLERANCE[dtype].moved, `${moved.tokens} of the tokens moved`);
            let loss = 0, worst = 0, where = "";
            for (const [rank, result] of all.entries()) {
              for (const key of ["loss", "auxLoss"] as const) {
                const apart = Math.abs(result[name][key] - want[key]) / Math.abs(want[key]);
                loss = Math.max(loss, apart);
                assert(apart <= nearLoss, `${key} of rank ${rank} is ${apart} apart`);
              }
            }
            for (const [parameter, text] of Object.entries(want.grads)) {
              const held = all.flatMap((result) => result[name].grads[parameter] ?? []);
              const copies = !parameter.includes(".experts.")
                ? 1
                : seats === 2
                ? 2
                : seats === "lopsided" && parameter.includes(".experts.0.")
                ? ranks
                : 1;
              assert.equal(held.length, copies, `ranks that hold ${parameter}`);
              for (const copy of held) assert.equal(copy, held[0], `copies of ${parameter}`);
              const apart = distance(decode(held[0]), decode(text));
              const place = /layers\.(\d+)\..*experts\.(\d+)\./.exec(parameter);
              const rows = place ? moved.rows[Number(place[1])][Number(place[2])] : 0;
              // A gradient is a sum over rows of any direction: a share of them that moved is its root apart.
              const near = nearGrad + Math.sqrt(moved.tokens) + Math.sqrt(rows);
              if (!(apart / near <= worst)) worst = apart / near, where = parameter;
            }
            console.log(
              `loss ${loss.toExponential(1)}, ${where} at ${
                worst.toFixed(3)
              } of what is allowed, ` +
                `${(100 * moved.tokens).toFixed(1)} % of the tokens moved`,
            );
            assert(worst <= 1, `the gradient of ${where} is ${worst} times too far apart`);
          });
        }
      }
    },
  });
}

Deno.test({
  // On the emulator cuda_train_ranks_test.ts does that.
  name: "invariance: steps of training have the losses of one rank, sharded or not",
  ignore: !env || !onGpu,
  async fn(t) {
    await using mps = await Mps.start();
    for (const dtype of ["f32", "bf16"] as const) {
      const common: TrainArgs = { steps: 4, batch: 8, clip: 0, model: { dtype, experts: 6 } };
      const train = async (ranks: number, args: TrainArgs) => {
        const options = { args, env: { ...env, ...mps.env }, timeout_ms: 60_000 };
        return (await runRanks<TrainResult>(TRAIN, ranks, options)).map(({ result }) => result!);
      };
      const [alone] = await train(1, common);
      for (const [ranks, shardOptimizer] of [[2, false], [4, false], [4, true]] as const) {
        await t.step(`${dtype}, ${ranks} ranks${shardOptimizer ? ", sharded" : ""}`, async () => {
          const tolerance = dtype === "f32" ? 1e-4 : 0.02;
          let worst = 0;
          for (const result of await train(ranks, { ...common, shardOptimizer })) {
            for (const key of ["loss", "gradNorm", "auxLoss"] as const) {
              for (const [i, x] of result[key].entries()) {
                const apart = Math.abs(x - alone[key][i]) / Math.abs(alone[key][i]);
                worst = Math.max(worst, apart);
                assert(apart <= tolerance, `${key}[${i}]: ${x}, not ${alone[key][i]}`);
              }
            }
          }
          console.log(`at most ${worst.toExponential(1)} apart`);
        });
      }
    }
  },
});
