// Type of kernels_wasm.js.

/** The compiled kernels; they import `env.memory` and `env.log`. */
declare const module: WebAssembly.Module;
export default module;
