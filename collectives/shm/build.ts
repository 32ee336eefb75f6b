// Compiles reduce.c to WebAssembly and writes it as base64 into wasm.ts, so that the library is plain TypeScript files that
// import by URL. Needed only after a change of reduce.c:  deno run -A collectives/shm/build.ts   (clang and wasm-ld, 14 or later)

const folder = new URL(".", import.meta.url).pathname;
const object = await Deno.makeTempFile({ suffix: ".wasm" });
const clang = Deno.env.get("CLANG") ?? "clang";
const { success } = await new Deno.Command(clang, {
  args: [
    "--target=wasm32",
    "-O2",
    "-fno-unroll-loops",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-msimd128",
    "-mbulk-memory",
    "-matomics",
    "-ffp-contract=off",
    "-fno-builtin",
    "-nostdlib",
    "-Wall",
    "-Werror",
    "-Wframe-larger-than=0", // the C stack must stay unused
    "-Wl,--no-entry",
    "-Wl,--import-memory",
    "-Wl,--strip-all",
    "-o",
    object,
    `${folder}reduce.c`,
  ],
}).spawn().status;
if (!success) Deno.exit(1);

const bytes = await Deno.readFile(object);
await Deno.remove(object);
for (let at = 8; at < bytes.length;) {
  const id = bytes[at++];
  let size = 0;
  for (let shift = 0, more = true; more; shift += 7) {
    size |= (bytes[at] & 127) << shift;
    more = bytes[at++] > 127;
  }
  if (id === 11) {
    console.error("Cannot use the module as it must have no static data: a data section is there");
    Deno.exit(1);
  }
  at += size;
}
const lines = bytes.toBase64().match(/.{1,90}/g)!.map((line) => `  "${line}",`);
await Deno.writeTextFile(
  `${folder}wasm.ts`,
  `// Made by build.ts from reduce.c; do not edit.

/** The module's bytes in base64, in pieces. */
export const WASM_BASE64: readonly string[] = [
${lines.join("\n")}
];
`,
);
console.log(`${bytes.length} bytes of WebAssembly in wasm.ts`);
