// How long a job takes from the launcher's start to the end of its first barrier: what a user waits before anything happens.
//
//   deno task bench:launch [--ranks N] [--runs K] [--json FILE]
//
// A run starts the launcher as a user does; its ranks import `init` from mod.ts, pass one barrier and write the time. Clocks are
// those of the host (all processes share them); the time is taken from just before the launcher's process is made until the last
// rank has passed the barrier. The median of the runs is reported.

import { parseArgs } from "node:util";

const { values } = parseArgs({
  args: Deno.args,
  options: {
    ranks: { type: "string", default: "8" },
    runs: { type: "string", default: "9" },
    json: { type: "string" },
  },
});
const ranks = Number(values.ranks);
const runs = Number(values.runs);
const launcher = new URL("../launch.ts", import.meta.url).href;
const program = new URL("launch_rank.ts", import.meta.url).href;

const times: number[] = [];
for (let run = 0; run <= runs; run++) {
  const start = performance.timeOrigin + performance.now();
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", launcher, "-n", String(ranks), program],
    stdin: "null",
  }).output();
  const text = new TextDecoder().decode(stdout);
  const ends = [...text.matchAll(/^\[\d+\] passed (\d+\.\d+)$/gm)].map((m) => Number(m[1]));
  if (code !== 0 || ends.length !== ranks) {
    throw new Error(
      `The job failed with exit code ${code}:\n${text}${new TextDecoder().decode(stderr)}`,
    );
  }
  if (run > 0) times.push(Math.max(...ends) - start); // the first run fills caches
}
times.sort((a, b) => a - b);
const first_barrier_ms = Math.round(times[times.length >> 1] * 10) / 10;
console.log(
  `${ranks} ranks from launch to first barrier: median ${first_barrier_ms} ms, ` +
    `${times[0].toFixed(1)} to ${times.at(-1)!.toFixed(1)} ms in ${runs} runs`,
);
if (values.json !== undefined) {
  const row = {
    ranks,
    first_barrier_ms,
    best_ms: Math.round(times[0] * 10) / 10,
    runs,
    date: new Date().toISOString(),
    machine:
      `${navigator.hardwareConcurrency} cores, ${Deno.build.os} ${Deno.build.arch}, Deno ${Deno.version.deno}`,
    command: `deno task bench:launch --ranks ${ranks} --runs ${runs}`,
  };
  await Deno.writeTextFile(values.json, JSON.stringify([row], null, 2) + "\n");
}
