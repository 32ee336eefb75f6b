// bench/schedule.ts from its command line to its files, on four small ranks over shared memory; and its ranks on an emulated GPU.

import assert from "node:assert/strict";
import type { LinksReply, Request, TurnReply } from "../bench/_schedule_messages.ts";
import type { Row } from "../bench/_schedule_rows.ts";
import type { ScheduleResults } from "../bench/report/results.ts";
import { SCHEDULER_NAMES } from "../lina/training/schedulers.ts";
import { gpuRanksEnv } from "./_gpu_env.ts";
import { runRanks } from "./_ranks.ts";

const BENCHMARK = new URL("../bench/schedule.ts", import.meta.url).pathname;

async function benchmark(...args: string[]) {
  const command = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", BENCHMARK, ...args],
    env: { NO_COLOR: "1" },
    signal: AbortSignal.timeout(60_000),
  });
  const { code, stdout, stderr } = await command.output();
  const decoder = new TextDecoder();
  return { code, out: decoder.decode(stdout), errors: decoder.decode(stderr) };
}

Deno.test("bench:schedule: every policy learns the same, and every row is whole", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const files = ["json", "report", "trace"].flatMap((name) => [
      `--${name}`,
      `${folder}/${name}`,
    ]);
    const { code, out, errors } = await benchmark(
      ...["--ranks", "4", "--mbit", "0", "--shapes", "tiny", "--experts-per-device", "1,2"],
      ...["--micro-op-mb", "0.01", "--rounds", "1", "--steps", "2", "--warm", "1", "--settle", "2"],
      ...files,
    );
    assert.equal(code, 0, errors);
    const results = JSON.parse(await Deno.readTextFile(`${folder}/json`)) as ScheduleResults;
    const rows = results.rows as Row[];
    const plain = rows.filter((row) => row.experts_per_device === 1);
    assert.deepEqual(plain.map(({ policy }) => policy).sort(), [...SCHEDULER_NAMES, "lina"].sort());
    assert.ok(rows.some((row) => row.experts_per_device === 2));
    const [{ loss }] = plain.filter(({ policy }) => policy === "fifo");
    for (const row of rows) {
      const whole = row.chunks === 1 && row.experts_per_device === 1;
      // Slices and replicas group the sums of weight gradients anew.
      assert.ok(
        whole ? row.loss === loss : Math.abs(row.loss! - loss!) < 1e-5 * loss!,
        `${row.policy}: ${row.loss}, not ${loss}`,
      );
      const { step_ms, a2a_fwd_ms, a2a_bwd_ms, a2a_share, overlap, bound_ms, floor_ms, bytes } =
        row;
      const numbers = [step_ms, a2a_fwd_ms, a2a_bwd_ms, a2a_share, overlap, bound_ms, floor_ms];
      assert.ok([...numbers, bytes].every((value) => value! >= 0), JSON.stringify(row));
      assert.ok(floor_ms! <= bound_ms! && bytes! > 0 && row.micro_ops > 0);
      assert.ok(out.includes(row.policy));
    }
    assert.ok(results.timelines!.length >= SCHEDULER_NAMES.length);
    const { traceEvents } = JSON.parse(await Deno.readTextFile(`${folder}/trace`));
    const named = (text: string) =>
      traceEvents.filter(({ name }: { name?: string }) => name?.includes(text));
    assert.ok(named("backward combine").length >= 4 * rows.length / 2);
    assert.match(await Deno.readTextFile(`${folder}/report`), /<svg/);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("bench:schedule: wrong options are one line", async () => {
  const { code, errors } = await benchmark("--shapes", "round");
  assert.equal(code, 1);
  assert.equal(
    errors.trim(),
    "error: Cannot compare schedules as --shapes must be among txl, gpt2, bert2gpt2, tiny: current value is round",
  );
});

Deno.test("bench:schedule: ranks on a GPU, real or emulated", async () => {
  const env = await gpuRanksEnv();
  if (env === null) return;
  const turn = (name: string, more: Partial<Request> = {}) => ({
    ...{ kind: "turn", policy: { name, experts: 1 }, warm: 0, steps: 1 },
    ...{ profile: false, spans: false, ...more },
  });
  const requests = [
    { kind: "shape", shape: "tiny", settle: 1 },
    { kind: "links", mbit: 0 },
    turn("outside", { profile: true }),
    ...SCHEDULER_NAMES.map((name) => turn(name)),
    { kind: "free" },
  ];
  const program = new URL("./_bench_schedule_ranks.ts", import.meta.url);
  const streams = { LINA_EMULATOR_STREAMS: "asynchronous", LINA_EMULATOR_FENCE: "0" };
  const options = { args: requests, env: { ...env, ...streams }, timeout_ms: 90_000 };
  const ranks = await runRanks<unknown[]>(program, 2, options);
  const [links, others] = ranks.map(({ result }) => result![1] as LinksReply);
  assert.deepEqual([links.allToAll, links.reduction], [others.allToAll, others.reduction]);
  for (const { alpha_us, bytes_per_us } of [links.allToAll, links.reduction]) {
    assert.ok(alpha_us >= 0 && bytes_per_us > 0);
  }
  assert.ok(links.allToAllBeside_us > 0 && links.allReduce_us > 0);
  for (const { result } of ranks) {
    const turns = (result as TurnReply[]).slice(3, -1);
    const [first] = turns;
    for (const { plan, steps: [step] } of turns) {
      assert.ok(Math.abs(step.loss / first.steps[0].loss - 1) < 1e-4);
      assert.ok(plan.bounds!.bound_us >= plan.bounds!.floor_us);
      assert.equal(step.allToAlls.length, 8 * plan.chunks);
      assert.equal(step.microOps.length, plan.microOps);
      for (const [start, end, bytes] of step.microOps) assert.ok(end > start && bytes > 0);
    }
  }
});
