// The compiled functions of reduce.c as a module that is not yet bound to a memory. JavaScript, because TypeScript cannot parse a
// source phase import; its type is in reduce_wasm.d.ts.

import source module from "./reduce.wasm";

export default module;
