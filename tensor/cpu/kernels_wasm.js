// The compiled kernels as a module that is not yet bound to a memory. JavaScript, because TypeScript cannot parse a source
// phase import; its type is in kernels_wasm.d.ts.

import source module from "./kernels.wasm";

export default module;
