// Type of reduce_wasm.js.

/** The compiled functions; they import `env.memory`. */
declare const module: WebAssembly.Module;
export default module;
