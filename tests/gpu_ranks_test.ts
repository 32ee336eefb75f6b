// The NCCL transport on a GPU that four ranks share (MPS gives each a part of it; NCCL takes them for four hosts and connects them by
// sockets). Not run where there is no GPU; the same programs run on the emulator in nccl_test.ts.

import assert from "node:assert/strict";
import { likeOneRank, type RankOutcome } from "./_moe_case.ts";
import { type RunOptions, runRanks } from "./_ranks.ts";

const program = new URL("./_collectives_ranks.ts", import.meta.url);
const moeProgram = new URL("./moe_program.ts", import.meta.url);
const ignore = !await hasGpu();
if (ignore) console.warn("skipped: Cannot test NCCL on a GPU as there must be one");

async function hasGpu(): Promise<boolean> {
  try {
    await Deno.stat("/dev/nvidiactl");
    return Deno.env.get("LINA_EMULATOR") !== "1";
  } catch {
    return false;
  }
}

/** A daemon by which the ranks run on the GPU at the same time; without it they take turns, slowly. */
class Mps implements AsyncDisposable {
  readonly env: Record<string, string> = {};
  #folder = "";

  static async start(): Promise<Mps> {
    const mps = new Mps();
    if (Deno.env.get("CUDA_MPS_PIPE_DIRECTORY")) return mps; // whoever has set it runs one
    mps.#folder = await Deno.makeTempDir({ prefix: "lina-mps-" });
    const env = {
      CUDA_MPS_PIPE_DIRECTORY: mps.#folder,
      CUDA_MPS_LOG_DIRECTORY: mps.#folder,
      CUDA_DEVICE_MAX_CONNECTIONS: "8", // the default lets streams wait for each other falsely
    };
    try {
      await new Deno.Command("nvidia-cuda-mps-control", { args: ["-d"], env }).output();
      Object.assign(mps.env, env);
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
    return mps;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#folder === "") return;
    if (this.env.CUDA_MPS_PIPE_DIRECTORY) {
      const { env } = this;
      const child = new Deno.Command("nvidia-cuda-mps-control", { env, stdin: "piped" }).spawn();
      const writer = child.stdin.getWriter();
      await writer.write(new TextEncoder().encode("quit\n"));
      await writer.close();
      await child.status;
    }
    await Deno.remove(this.#folder, { recursive: true });
  }
}

const ENV = { LINA_TEST_BACKEND: "nccl", NCCL_SOCKET_IFNAME: "lo", NCCL_DEBUG: "WARN" };

async function run<T>(name: string, size: number, options: RunOptions & { args?: object } = {}) {
  await using mps = await Mps.start();
  const env = { ...ENV, ...mps.env, ...options.env };
  const args = { program: name, ...options.args };
  return await runRanks<T>(program, size, { ...options, env, args });
}

Deno.test({
  name: "gpu: collectives give what they must on four ranks, for arrays and tensors",
  ignore,
  fn: async () => {
    const args = { lengths: [0, 1, 63, 4097, 65_537] };
    for (const { result } of await run<number>("operations", 4, { args })) {
      assert(result! > 600, `${result} cases`);
    }
  },
});

Deno.test({
  name: "gpu: wrong arguments throw at the call",
  ignore,
  fn: async () => {
    for (const { result } of await run<string[]>("errors", 4)) assert(result!.length >= 22);
  },
});

Deno.test({
  name: "gpu: a rank's block of the other buffer may be source or destination",
  ignore,
  fn: async () => void await run("inPlace", 4),
});

Deno.test({
  name: "gpu: random operations on two communicators with random delays end and are right",
  ignore,
  fn: async () => {
    for (const seed of [1, 2]) await run("random", 4, { args: { seed, steps: 150 } });
  },
});

Deno.test({
  name: "gpu: split and dup make independent communicators",
  ignore,
  fn: async () => {
    const results = await run<{ name: string; rank: number; sum: number }>("groups", 4);
    assert.deepEqual(results.map((r) => r.result), [
      { name: "world/split1.0", rank: 1, sum: 2 },
      { name: "world/split1.1", rank: 1, sum: 4 },
      { name: "world/split1.0", rank: 0, sum: 2 },
      { name: "world/split1.1", rank: 0, sum: 4 },
    ]);
  },
});

Deno.test({
  name: "gpu: in debug mode ranks that call different operations are named",
  ignore,
  fn: async () => {
    const env = { LINA_DEBUG: "1" };
    for (const { result } of await run<{ message: string }>("order", 4, { env })) {
      assert.match(result!.message, /rank 1 called broadcast\(f32, 8 elements, root 0\)/);
    }
  },
});

Deno.test({
  name: "gpu: the watchdog names the operation and the ranks that have not arrived",
  ignore,
  fn: async () => {
    const env = { LINA_TIMEOUT_MS: "3000" };
    const results = await run<{ message: string; ms: number; ticks: number }>("hang", 4, { env });
    for (const { result } of results.slice(0, 3)) {
      assert.match(result!.message, /allReduce 1 of world on rank \d.*not arrived: rank 3$/);
      assert(result!.ms < 8000 && result!.ticks > 10, `${result!.ms} ms, ${result!.ticks} ticks`);
    }
  },
});

Deno.test({
  name: "gpu: a MoE layer on four ranks has the loss and the gradients of one",
  ignore,
  fn: async () => {
    await using mps = await Mps.start();
    const env = { ...ENV, ...mps.env };
    // Making the communicators of replicas takes a while on a shared GPU.
    const routers = ["softmax", "switch, capacity by position", "expert choice"];
    const args = { splits: [[10, 10, 10, 10], [0, 27, 1, 12]], seed: 3, routers };
    const ranks = await runRanks<Record<string, RankOutcome>>(moeProgram, 4, { args, env });
    await likeOneRank(ranks.map(({ result }) => result!), args.splits, args.seed, 1e-4);
  },
});

for (const waiting of ["host", "stream"]) {
  Deno.test({
    name: `gpu: a killed rank is named by all others within ten seconds (${waiting} waits)`,
    ignore,
    fn: async () => {
      const lost = 2, ranks = 4;
      const port = 20_000 + Math.floor(Math.random() * 20_000);
      const script = new URL("./_gpu_kill_rank.ts", import.meta.url).href;
      const processes = Array.from(
        { length: ranks },
        (_, rank) =>
          new Deno.Command(Deno.execPath(), {
            args: ["run", "-A", "--no-check", script, waiting],
            env: {
              RANK: `${rank}`,
              WORLD_SIZE: `${ranks}`,
              LOCAL_RANK: `${rank}`,
              LOCAL_WORLD_SIZE: `${ranks}`,
              MASTER_ADDR: "127.0.0.1",
              MASTER_PORT: `${port}`,
              LINA_SHARE_GPU: "1", // without MPS: a client of that daemon may take others with it
              NCCL_SOCKET_IFNAME: "lo",
              NO_COLOR: "1",
            },
            stdin: "null",
            stdout: "piped",
            stderr: "piped",
          }).spawn(),
      );
      const limit = setTimeout(() => processes.forEach((child) => kill(child)), 60_000);
      const started = processes.map(() => Promise.withResolvers<void>());
      const outputs = processes.map(async (child, rank) => {
        let text = "";
        const take = async (stream: ReadableStream<Uint8Array>) => {
          for await (const part of stream.pipeThrough(new TextDecoderStream())) {
            text += part;
            if (text.includes(" runs\n")) started[rank].resolve();
          }
        };
        await Promise.all([take(child.stdout), take(child.stderr)]);
        started[rank].resolve();
        return text;
      });
      await Promise.all(started.map(({ promise }) => promise));
      const start = performance.now();
      kill(processes[lost]);
      const ends = await Promise.all(processes.map(async (child) => {
        const { code } = await child.status;
        return { code, ms: performance.now() - start };
      }));
      clearTimeout(limit);
      const texts = await Promise.all(outputs);
      ends.forEach(({ code, ms }, rank) => {
        if (rank === lost) return;
        assert(
          code !== 0 && ms < 10_000,
          `rank ${rank}: code ${code} after ${ms} ms\n${texts[rank]}`,
        );
        assert.match(texts[rank], /must take part: current value is that rank 2 has ended/);
      });
      console.log(ends.map(({ ms }) => `${ms.toFixed(0)} ms`).join(", "));
    },
  });
}

function kill(child: Deno.ChildProcess): void {
  try {
    child.kill("SIGKILL");
  } catch { /* it has ended */ }
}
