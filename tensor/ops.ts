// The operations on tensors: free functions with the names of `Kernels`, which check shapes, dtypes, devices and lifetimes, run
// the device's kernel and record a span. Gradients are functions of their own; there is no autograd.

export * from "./ops/elementwise.ts";
export * from "./ops/matrix.ts";
export * from "./ops/norms.ts";
export * from "./ops/rows.ts";
