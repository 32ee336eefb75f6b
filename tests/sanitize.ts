// Runs the tests of the CUDA kernels under NVIDIA's compute-sanitizer, at small sizes and with every allocation bounded by itself, and
// fails on any error or hazard. Needs an NVIDIA GPU. Not a test of results: test:gpu is.
//
//   deno task test:sanitize [--tool memcheck,racecheck,synccheck,initcheck] [--jobs 4] [--limit-s 100] [FILE ...]

/** The kernels' rooms, slowest first. */
const ROOMS = [
  "tensor/cuda/attention_test.ts",
  "tensor/cuda/grouped_test.ts",
  "moe/moe_layer_device_test.ts",
  "moe/gate_device_test.ts",
  "moe/router_device_test.ts",
  "tensor/cuda/optimizer_test.ts",
  "tensor/cuda/elementwise_test.ts",
  "tensor/cuda/rows_test.ts",
  "tensor/cuda/norms_test.ts",
  "tensor/cuda/loss_test.ts",
];
const TOOLS = ["memcheck", "racecheck"];
/** What each tool's last line says when it has found nothing. */
const CLEAN: Readonly<Record<string, RegExp>> = {
  memcheck: /^=+ ERROR SUMMARY: 0 errors/m,
  synccheck: /^=+ ERROR SUMMARY: 0 errors/m,
  initcheck: /^=+ ERROR SUMMARY: 0 errors/m,
  racecheck: /^=+ RACECHECK SUMMARY: 0 hazards/m,
};
/** The sanitizer's exit code when it has found something. */
const FOUND = 86;
/** Lines of a failure that are shown. */
const SHOWN = 60;

interface Options {
  readonly tools: readonly string[];
  readonly files: readonly string[];
  readonly jobs: number;
  readonly limit_s: number;
}

interface Outcome {
  readonly tool: string;
  readonly file: string;
  /** Half a sentence; null if all is well. */
  readonly wrong: string | null;
  readonly passed: number;
  readonly seconds: number;
  readonly output: string;
}

function optionsOf(args: readonly string[]): Options {
  const given = { tools: TOOLS as readonly string[], files: [] as string[], jobs: 4, limit_s: 100 };
  const rest = [...args];
  for (let arg = rest.shift(); arg !== undefined; arg = rest.shift()) {
    if (arg === "--tool") given.tools = (rest.shift() ?? "").split(",");
    else if (arg === "--jobs") given.jobs = Number(rest.shift());
    else if (arg === "--limit-s") given.limit_s = Number(rest.shift());
    else given.files.push(arg);
  }
  const strange = given.tools.find((tool) => !Object.hasOwn(CLEAN, tool));
  if (strange !== undefined) {
    const tools = Object.keys(CLEAN).join(", ");
    throw new RangeError(
      `Cannot check kernels as "--tool" must be of ${tools}: current value is ${strange}`,
    );
  }
  for (const name of ["jobs", "limit_s"] as const) {
    if (!(given[name] > 0)) {
      throw new RangeError(
        `Cannot check kernels as "--${name.replace("_", "-")}" must be > 0: current value is ${
          given[name]
        }`,
      );
    }
  }
  return { ...given, files: given.files.length > 0 ? given.files : ROOMS };
}

/** The sanitizer's path and version. */
async function findSanitizer(): Promise<{ readonly path: string; readonly version: string }> {
  const home = Deno.env.get("CUDA_HOME");
  const tried = [
    "compute-sanitizer",
    ...(home ? [`${home}/bin/compute-sanitizer`] : []),
    "/usr/local/cuda/bin/compute-sanitizer",
  ];
  for (const path of tried) {
    try {
      const { success, stdout } = await new Deno.Command(path, { args: ["--version"] }).output();
      const version = new TextDecoder().decode(stdout).match(/Version \S+/i)?.[0] ?? "";
      if (success) return { path, version };
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
  }
  throw new Error(
    `Cannot check kernels as compute-sanitizer, a part of the CUDA toolkit, must be installed: tried ${
      tried.join(", ")
    }; CUDA_HOME names its folder`,
  );
}

/** Compiles the kernels into the cache on disk, so that not every run does it under the sanitizer; also finds that there is a GPU. */
async function compile(): Promise<void> {
  const module = new URL("../tensor/cuda/device.ts", import.meta.url).href;
  const code = `const { cudaDevice } = await import(${JSON.stringify(module)});
    const device = await cudaDevice();
    console.log(device.name);`;
  const start = performance.now();
  const { success, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["eval", "--no-check", code],
    stderr: "piped",
  }).output();
  const text = new TextDecoder().decode(success ? stdout : stderr).trim();
  if (!success) throw new Error(`Cannot check kernels as there must be a GPU for them:\n${text}`);
  console.log(`${text}, kernels compiled in ${seconds(start)}`);
}

function seconds(start: number): string {
  return `${((performance.now() - start) / 1000).toFixed(1)} s`;
}

async function check(
  sanitizer: string,
  tool: string,
  file: string,
  limit_s: number,
): Promise<Outcome> {
  const start = performance.now();
  const child = new Deno.Command(sanitizer, {
    args: [
      ...["--tool", tool, "--error-exitcode", `${FOUND}`, "--print-limit", "5"],
      ...["--target-processes", "application-only"],
      ...(tool === "memcheck" ? ["--padding", "256"] : []),
      ...[Deno.execPath(), "test", "-A", "--no-check", file],
    ],
    env: { LINA_EMULATOR: "0", LINA_TEST_SMALL: "1", LINA_TEST_FENCE: "1", NO_COLOR: "1" },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
    detached: true,
  }).spawn();
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    Deno.kill(-child.pid, "SIGKILL"); // the sanitizer and what it runs
  }, limit_s * 1000);
  const { code, stdout, stderr } = await child.output();
  clearTimeout(timer);
  const decoder = new TextDecoder();
  const output = decoder.decode(stdout) + decoder.decode(stderr);
  const passed = Number(output.match(/(\d+) passed/)?.[1] ?? 0);
  const wrong = late
    ? `has not ended within ${limit_s} s`
    : code === FOUND || !CLEAN[tool].test(output)
    ? output.match(/(?:ERROR|RACECHECK) SUMMARY: .*/)?.[0] ?? `ended with ${code}, no summary`
    : code !== 0
    ? `tests failed (${code})`
    : passed === 0
    ? "no test has run"
    : null;
  return { tool, file, wrong, passed, seconds: (performance.now() - start) / 1000, output };
}

function show({ tool, file, wrong, passed, seconds, output }: Outcome): void {
  const time = `${seconds.toFixed(1)} s`;
  console.log(`${tool} ${file}: ${wrong ?? "clean"}, ${passed} tests, ${time}`);
  if (wrong === null) return;
  // Tests that went well, and the host's stack of native code, say nothing.
  const lines = output.split("\n").filter((line) =>
    line.trim() !== "" && !/ \.\.\. ok |Host Frame|Saved host backtrace/.test(line)
  );
  const found = lines.filter((line) => line.startsWith("=====")).slice(0, SHOWN);
  const others = lines.filter((line) => !line.startsWith("=====")).slice(0, SHOWN);
  console.log([...found, ...others].map((line) => `    ${line}`).join("\n"));
}

async function main(): Promise<number> {
  const { tools, files, jobs, limit_s } = optionsOf(Deno.args);
  const sanitizer = await findSanitizer();
  console.log(`${sanitizer.path} ${sanitizer.version}: ${tools.join(", ")}`);
  await compile();
  const waiting = tools.flatMap((tool) => files.map((file) => ({ tool, file })));
  const outcomes: Outcome[] = [];
  const work = async () => {
    for (let next = waiting.shift(); next !== undefined; next = waiting.shift()) {
      const outcome = await check(sanitizer.path, next.tool, next.file, limit_s);
      outcomes.push(outcome);
      show(outcome);
    }
  };
  await Promise.all(Array.from({ length: jobs }, work));
  const bad = outcomes.filter(({ wrong }) => wrong !== null);
  console.log(
    bad.length === 0
      ? `${outcomes.length} runs are clean`
      : `${bad.length} of ${outcomes.length} runs are not clean: ${
        bad.map(({ tool, file }) => `${tool} ${file}`).join(", ")
      }`,
  );
  return bad.length === 0 ? 0 : 1;
}

try {
  Deno.exit(await main());
} catch (error) {
  console.error(error instanceof Error ? error.message : error);
  Deno.exit(2);
}
