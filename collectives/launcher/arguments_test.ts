import assert from "node:assert/strict";
import fc from "fast-check";
import { type LaunchOptions, parseArguments, USAGE, UsageError } from "./arguments.ts";

const SCRIPT = "https://example.org/script.ts";

Deno.test("parseArguments() takes every flag, with a space or an equals sign", () => {
  const expected: LaunchOptions = {
    ranks: 4,
    nodes: 2,
    nodeRank: 1,
    rendezvous: { hostname: "node0", port: 4000 },
    backend: "shm",
    device: "cpu",
    shareGpu: true,
    maxRestarts: 3,
    logDir: "logs",
    script: SCRIPT,
    args: ["-n", "7", "--unknown"],
  };
  const flags =
    "--nnodes 2 --node-rank 1 --rdzv node0:4000 --backend shm --device cpu --max-restarts 3 --log-dir logs";
  const tail = [SCRIPT, "-n", "7", "--unknown"];
  assert.deepEqual(
    parseArguments(["-n", "4", "--share-gpu", ...flags.split(" "), ...tail]),
    expected,
  );
  const joined = flags.replace(/(--[a-z-]+) /g, "$1=").split(" ");
  assert.deepEqual(parseArguments(["-n", "4", ...joined, "--share-gpu", ...tail]), expected);
});

Deno.test("parseArguments() has defaults", () => {
  assert.deepEqual(parseArguments(["-n", "1", SCRIPT]), {
    ranks: 1,
    nodes: 1,
    nodeRank: 0,
    rendezvous: null,
    backend: "auto",
    device: "auto",
    shareGpu: false,
    maxRestarts: 0,
    logDir: null,
    script: SCRIPT,
    args: [],
  });
  assert.equal(parseArguments(["-n", "1", "--", SCRIPT, "--"])?.args[0], "--");
});

Deno.test("parseArguments() gives null for help, whatever follows", () => {
  assert.equal(parseArguments(["--help"]), null);
  assert.equal(parseArguments(["-n", "2", "-h", "--nonsense"]), null);
});

Deno.test.each([
  ["", /-n N, the number of ranks, must be given/],
  [SCRIPT, /-n N, the number of ranks, must be given/],
  [`-n 0 ${SCRIPT}`, /-n must be a whole number in 1\.\.1024: current value is 0/],
  [`-n -1 ${SCRIPT}`, /current value is -1/],
  [`-n 1.5 ${SCRIPT}`, /current value is 1\.5/],
  [`-n 1025 ${SCRIPT}`, /in 1\.\.1024/],
  [`-n two ${SCRIPT}`, /current value is two/],
  ["-n", /-n must have a value/],
  ["-n 2", /a script must be named/],
  [`-n 2 -n 3 ${SCRIPT}`, /-n must be given once/],
  [`-n 2 --ranks 3 ${SCRIPT}`, /flags must be known: current value is --ranks/],
  [`-n 2 --no-such=3 ${SCRIPT}`, /flags must be known: current value is --no-such/],
  [
    "-n 2 ./no/such/file.ts",
    /the script \.\/no\/such\/file\.ts must be a file: current value is missing/,
  ],
  ["-n 2 /", /the script \/ must be a file: current value is a folder/],
  [
    `-n 2 --backend tcp ${SCRIPT}`,
    /--backend must be one of auto, shm, mpi, nccl: current value is tcp/,
  ],
  [`-n 2 --nnodes 2 ${SCRIPT}`, /--node-rank I and --rdzv HOST:PORT must be given/],
  [
    `-n 2 --nnodes 2 --node-rank 2 --rdzv a:1 ${SCRIPT}`,
    /--node-rank must be a whole number in 0\.\.1/,
  ],
  [`-n 2 --rdzv a ${SCRIPT}`, /--rdzv must be HOST:PORT/],
  [`-n 2 --max-restarts -1 ${SCRIPT}`, /--max-restarts must be a whole number/],
  [`-n 2 --nnodes 2 --node-rank 0 --rdzv a:1 --backend mpi ${SCRIPT}`, /must leave them to mpirun/],
] as [string, RegExp][])("parseArguments() refuses: %s", (line, message) => {
  const parse = () => parseArguments(line === "" ? [] : line.split(" "));
  assert.throws(parse, message);
  assert.throws(parse, UsageError);
});

Deno.test("parseArguments() answers anything with options, null or a UsageError", () => {
  const word = fc.oneof(
    fc.constantFrom("-n", "--rdzv", "--backend", "--nnodes=2", "--", "4", "shm", SCRIPT, "-h"),
    fc.string(),
  );
  fc.assert(fc.property(fc.array(word), (args) => {
    try {
      const options = parseArguments(args);
      assert.ok(options === null || options.ranks >= 1);
    } catch (error) {
      if (!(error instanceof UsageError)) throw error;
    }
  }));
});

Deno.test("the usage fits a terminal and names every flag", () => {
  assert.ok(USAGE.split("\n").every((line) => line.length <= 80));
  for (
    const flag of [
      "-n N",
      "--nnodes",
      "--node-rank",
      "--rdzv",
      "--backend",
      "--max-restarts",
      "--log-dir",
    ]
  ) {
    assert.ok(USAGE.includes(flag), flag);
  }
});
