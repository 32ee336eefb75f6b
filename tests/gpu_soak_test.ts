// Training for long on a GPU (on its emulator for some steps) takes no more memory and no more time than it did at first: device memory,
// JavaScript's heap, CUDA events, host waits.

import assert from "node:assert/strict";
import type { ModelOptions } from "../moe/config.ts";
import { gpuRanksEnv, hasGpu, Mps } from "./_gpu_env.ts";
import { runRanks } from "./_ranks.ts";
import type { SoakArgs, SoakResult } from "./gpu_soak_ranks.ts";

const PROGRAM = new URL("./gpu_soak_ranks.ts", import.meta.url);
const env = await gpuRanksEnv();
const onGpu = await hasGpu();
const MIB = 2 ** 20;

/** Bytes that JavaScript may allocate in a step. */
const GARBAGE = MIB;
/** Bytes by which its heap, or its array buffers, may grow from the second mark on: until then V8 optimises most. */
const HEAP_GROWTH = MIB / 4;
/** The same where V8 optimises nothing, so that all that grows is what the program holds. */
const HELD_GROWTH = MIB / 32;
/** V8 neither compiles nor forgets code, and collects its feedback from the start. */
const INTERPRETED =
  "--no-opt,--no-maglev,--no-sparkplug,--no-flush-bytecode,--no-lazy-feedback-allocation";
/** CUDA events that may be made once all is warm: as many as were in flight at once are kept. */
const EVENTS = 64;
/** Collectives that may be in flight between steps. */
const WORKS = 64;
/** Bytes by which the process, and what is taken of the GPU, may be larger at the end. */
const PROCESS_GROWTH = 64 * MIB;

const SMALL: ModelOptions = {
  vocab: 64,
  width: 32,
  layers: 2,
  heads: 2,
  headDim: 16,
  hidden: 32,
  experts: 4,
  initStd: 0.1,
  dtype: "bf16",
  router: { kind: "softmax", topK: 2, auxLoss: 0.01, zLoss: 0.001 },
};
/** As many kernels as a real model; sizes of no weight. */
const DEEP: ModelOptions = {
  ...SMALL,
  width: 128,
  layers: 12,
  headDim: 64,
  hidden: 128,
  experts: 8,
};

const COMMON: SoakArgs = onGpu
  ? { model: DEEP, sequence: 64, batch: 8, marks: [50, 600, 1000] }
  : { model: SMALL, sequence: 16, batch: 4, marks: [10, 20, 30] };

interface Soak {
  readonly name: string;
  readonly ranks?: number;
  /** Whether V8 only interprets. */
  readonly interpreted?: boolean;
  readonly args: Partial<SoakArgs>;
}

const SOAKS: readonly Soak[] = [
  {
    name: "a checkpoint saved on the way",
    args: { saveAt: onGpu ? [25, 300, 700] : [5, 15, 25] },
  },
  {
    name: "blocks computed again, two passes a step",
    args: { recompute: "block", accumulate: 2, model: { ...COMMON.model, layers: onGpu ? 4 : 2 } },
  },
  {
    name: "two ranks, optimizer sharded",
    ranks: 2,
    interpreted: true, // with NCCL, V8 has more to compile, and later
    args: {
      marks: onGpu ? [50, 200, 400] : COMMON.marks,
      shardOptimizer: true,
      recompute: "activation",
      model: { ...COMMON.model, layers: 2 },
    },
  },
];

for (const { name, ranks = 1, interpreted = false, args } of SOAKS) {
  Deno.test({
    name: `soak: memory stays as it is (${name})`,
    ignore: !env,
    async fn() {
      await using mps = await Mps.start();
      const directory = await Deno.makeTempDir({ prefix: "lina-soak-" });
      try {
        const results = await runRanks<SoakResult>(PROGRAM, ranks, {
          args: { ...COMMON, ...args, directory },
          // A young generation of so many MiB is not collected between two of the program's own collections.
          env: {
            ...env,
            ...mps.env,
            DENO_V8_FLAGS: "--expose-gc,--min-semi-space-size=64,--max-semi-space-size=64" +
              (interpreted ? `,${INTERPRETED}` : ""),
          },
          timeout_ms: 180_000,
        });
        // One wait to read what the step has shown; among ranks, one a layer for the counts of its rows.
        const { layers } = { ...COMMON, ...args }.model;
        const waits = ranks === 1 ? 1 : 1 + layers!;
        for (const { result } of results) {
          check(result!, waits, interpreted ? HELD_GROWTH : HEAP_GROWTH);
        }
      } finally {
        await Deno.remove(directory, { recursive: true });
      }
    },
  });
}

function check(result: SoakResult, wanted: number, mayGrow: number): void {
  const { held, waits, garbage_bytes, buffers_bytes, peak_bytes, loss, step_ms } = result;
  const [warm, half, end] = held;
  const kib = (bytes: number) => `${(bytes / 1024).toFixed(1)} KiB`;
  console.log(
    `${end.step} steps of ${step_ms.toFixed(2)} ms, loss ${loss.map((x) => x.toFixed(3))}; ` +
      `device ${kib(end.used_bytes)} of ${
        kib(end.reserved_bytes)
      }, ${end.events} events, ${end.works} works, ` +
      `GPU ${kib(end.gpu_bytes - warm.gpu_bytes)} more; ` +
      `heap ${held.map((at) => kib(at.heap_bytes)).join(", ")}, ` +
      `buffers ${held.map((at) => kib(at.external_bytes)).join(", ")}, ` +
      `process ${kib(end.rss_bytes - warm.rss_bytes)} more; ` +
      `a step allocates ${kib(garbage_bytes)} and ${kib(buffers_bytes)} of buffers`,
  );
  assert(loss[1] < loss[0], `loss ${loss[0]} has become ${loss[1]}`);
  assert.deepEqual(waits, [wanted, wanted], "host waits of a step, fewest and most");
  for (const key of ["used_bytes", "reserved_bytes"] as const) {
    assert.equal(end[key], warm[key], `${key} after step ${end.step} as after step ${warm.step}`);
  }
  assert(end.events <= warm.events + EVENTS, `${warm.events} events have become ${end.events}`);
  assert(end.works <= WORKS, `${end.works} collectives are in flight`);
  // Among ranks it follows the rows that each one's experts get.
  const peak = wanted === 1 ? 1 : 1.25;
  assert(
    peak_bytes[1] <= peak * peak_bytes[0],
    `peak ${peak_bytes[0]} has become ${peak_bytes[1]}`,
  );
  const grown = end.heap_bytes - half.heap_bytes;
  assert(grown <= mayGrow, `the heap has grown by ${grown} bytes`);
  const buffers = end.external_bytes - half.external_bytes;
  assert(buffers <= HEAP_GROWTH, `array buffers have grown by ${buffers} bytes`);
  const gpu = end.gpu_bytes - warm.gpu_bytes;
  assert(gpu <= PROCESS_GROWTH, `the memory that is taken on the GPU has grown by ${gpu} bytes`);
  const process = end.rss_bytes - warm.rss_bytes;
  assert(process <= PROCESS_GROWTH, `the process has grown by ${process} bytes`);
  const garbage = garbage_bytes + buffers_bytes;
  assert(garbage <= GARBAGE, `a step allocates ${garbage} bytes`);
}
