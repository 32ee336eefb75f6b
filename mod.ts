// The public API of Lina for Deno: re-exports, nothing else. `import { init } from "<url>/mod.ts"`.

export { init, type InitOptions, type World } from "./collectives/world.ts";
