// The public API of Lina for Deno: re-exports, nothing else. `import { init } from "<url>/mod.ts"`.

// The job: ranks, communicators, backends.
export { init, type InitOptions, type World } from "./collectives/world.ts";
export type { BackendChoice } from "./collectives/rendezvous/environment.ts";
export type { Store } from "./collectives/transport.ts";
export type {
  AllReduceOptions,
  Backend,
  Communicator,
  Counts,
  Data,
  OperationTraffic,
  ReduceOp,
  Traffic,
  Work,
} from "./collectives/types.ts";

// Arrays on a device.
export { empty, fromArray, hostLike, type Shape, sizeOf, Tensor, zeros } from "./tensor/tensor.ts";
export { bytesOf, type DType, dtypeOf, DTYPES, type TypedArray } from "./tensor/dtype.ts";
export type {
  Activation,
  AdamWOptions,
  AttentionShape,
  Device,
  GemmOptions,
  Kernels,
  MemoryStats,
  Stream,
  StreamEvent,
} from "./tensor/device.ts";

// Mixture-of-Experts models: layers, training, generation, checkpoints.
export { type ModelConfig, modelConfig, type ModelOptions } from "./moe/config.ts";
export { MoeLayer } from "./moe/moe_layer.ts";
export { Transformer, type TransformerOptions } from "./moe/transformer.ts";
export { Trainer, type TrainerOptions } from "./moe/trainer.ts";
export { plainStep, type Step } from "./moe/step.ts";
export { normal, random } from "./moe/init.ts";
export { generate, type GenerateOptions } from "./moe/generate.ts";
export { loadCheckpoint, newestCheckpoint, saveCheckpoint } from "./moe/checkpoint.ts";
export { byteTokenizer, type Tokenizer } from "./moe/tokenizer.ts";
export { Batches, loadText, type TokenData } from "./moe/data.ts";
export { RoutingRecorder, RoutingReplay } from "./moe/routing_record.ts";
export type { CollectiveScheduler, ExpertPlacement, StepGraph } from "./moe/hooks.ts";

// What happened when: a file for Perfetto.
export { writeTrace } from "./trace/perfetto.ts";
