/**
 * The public API of Lina for Deno: re-exports, nothing else. Importing it opens no library; what a GPU needs is loaded by {@linkcode init},
 * and only where every rank gets one.
 *
 * @example The sum over all ranks, started by `deno run -A launch.ts -n 4 script.ts`
 * ```ts
 * import assert from "node:assert/strict";
 * import { init } from "./mod.ts";
 *
 * await using world = await init(); // this process is one of world.size ranks
 * const x = Float32Array.of(world.rank);
 * await world.allReduce(x);
 * assert.equal(x[0], world.size * (world.size - 1) / 2);
 * ```
 *
 * @module
 */

// The job: ranks, communicators, backends.
export { init, type InitOptions, type World } from "./collectives/world.ts";
export type { BackendChoice, DeviceChoice } from "./collectives/rendezvous/environment.ts";
export type { Store } from "./collectives/transport.ts";
export type {
  AllReduceOptions,
  Backend,
  Communicator,
  Counts,
  Data,
  Label,
  OperationOptions,
  OperationTraffic,
  ReduceOp,
  ReduceScatterOptions,
  Traffic,
  Work,
} from "./collectives/types.ts";

// All-to-alls inside hosts, then between them, and when they win.
export {
  type ChooseWay,
  type ExchangeWay,
  TwoLevel,
  type TwoLevelOptions,
  type TwoLevels,
  type TwoLevelTraffic,
} from "./collectives/two_level.ts";
export type { HostLayout } from "./collectives/two_level_plan.ts";
export type { Levels } from "./collectives/two_level_flight.ts";
export {
  chooseExchange,
  chooser,
  type ExchangeChoice,
  type ExchangeTimes,
  exchangeTimes,
  type LevelLinks,
  type ModelCorrection,
} from "./lina/training/levels.ts";
export {
  type LevelFits,
  type LevelSample,
  measureLevels,
  type MeasureLevelsOptions,
} from "./lina/training/measure_levels.ts";

// Arrays on a device.
export {
  empty,
  fromArray,
  hostLike,
  type Shape,
  sizeOf,
  Tensor,
  TensorScope,
  zeros,
} from "./tensor/tensor.ts";
export { bytesOf, type DType, dtypeOf, DTYPES, type TypedArray } from "./tensor/dtype.ts";
export type {
  Activation,
  ActivationBackwardOptions,
  AdamWOptions,
  AdamWUpdate,
  AttentionShape,
  Device,
  GemmOptions,
  HostMemory,
  Kernels,
  MemoryStats,
  RowGroups,
  Stream,
  StreamEvent,
} from "./tensor/device.ts";
export { OutOfMemoryError } from "./tensor/memory_error.ts";
export type { RandomKey } from "./tensor/random.ts";
export type {
  RouteBackwardOptions,
  RouteOptions,
  RoutingKernels,
} from "./tensor/routing_kernels.ts";

// What `world.device` is where its `kind` is "cuda". Types only: `init` loads the code, or `tensor/cuda/device.ts` for kernels of one's own.
export type { CudaDevice, CudaDeviceOptions } from "./tensor/cuda/device.ts";
export type {
  CudaContext,
  CudaKernel,
  CudaProperties,
  ModuleSource,
  ParameterType,
} from "./tensor/cuda/context.ts";
export type { CudaEvent, CudaStream } from "./tensor/cuda/streams.ts";
export type { PinnedMemory } from "./tensor/cuda/pinned.ts";
export type { CudaEventHandle, CudaStreamHandle } from "./ffi/cudart.ts";
export type { CudaHandle } from "./ffi/cuda_library.ts";

// One Mixture-of-Experts layer and its parts.
export { MoeLayer } from "./moe/moe_layer.ts";
export { dropShown, readShown } from "./moe/shown.ts";
export type {
  MoeLayerOptions,
  MoeResult,
  MoeSaved,
  MoeShown,
  MoeStats,
  RoutingTap,
  RowExchange,
  Shown,
} from "./moe/moe_types.ts";
export type { PendingShown } from "./moe/shown.ts";
export type { Routed } from "./moe/router_host.ts";
export { type AllToAllPlace, plainStep, type Step } from "./moe/step.ts";
export { normal, type Random, random } from "./moe/init.ts";
export type { Moments, Parameter } from "./moe/parameter.ts";
export type {
  ExpertMemory,
  ExpertMemoryOptions,
  ExpertMoments,
  HostedMoments,
  MomentKind,
  MomentLayout,
  ResidentMoments,
} from "./moe/expert_memory.ts";
export type { ExpertStore } from "./moe/expert_store.ts";
export type { ExpertLists, ExpertMatrices, ExpertsSaved } from "./moe/experts.ts";
export type { FeedForwardSaved } from "./moe/feed_forward.ts";
export type {
  CommonRouterOptions,
  ExpertChoiceOptions,
  GShardOptions,
  Router,
  RouterOptions,
  Routing,
  SigmoidOptions,
  SoftmaxOptions,
  SwitchOptions,
} from "./moe/router.ts";
export type { ExpertChoices } from "./moe/router_expert_choice.ts";
export type { GlobalRouting } from "./moe/router_exchange.ts";
export type { NoiseKey } from "./moe/router_noise.ts";
export type { RouterSums } from "./moe/router_losses.ts";
export type { SecondExpert } from "./moe/router_softmax.ts";
export type { PlanOutline, RoutingPlan } from "./moe/plan.ts";
export type { PlacedPlan } from "./moe/dispatch.ts";
export {
  type RoutingBlock,
  type RoutingRecord,
  RoutingRecorder,
  RoutingReplay,
} from "./moe/routing_record.ts";

// The language model: configuration, training, generation, checkpoints.
export { type ModelConfig, modelConfig, type ModelOptions } from "./moe/config.ts";
export {
  type Batch,
  type PassOptions,
  type PassSummary,
  summaryOf,
  Transformer,
  type TransformerOptions,
} from "./moe/transformer.ts";
export type {
  Block,
  BlockInner,
  BlockSaved,
  FeedForwardOutput,
  FeedForwardPart,
  Recompute,
} from "./moe/block.ts";
export type { Attention, AttentionSaved } from "./moe/attention.ts";
export type { Rows } from "./moe/rows.ts";
export type { Norm, Normed } from "./moe/norm.ts";
export { type StepMetrics, Trainer, type TrainerOptions } from "./moe/trainer.ts";
export type { AdamW, AdamWSettings, LearningRateOptions } from "./moe/optimizer.ts";
export { loadText, type TextOptions, type TokenData, type Tokens } from "./moe/data.ts";
export { type TrainingData, trainingData, type TrainingDataOptions } from "./moe/training_data.ts";
export { byteTokenizer, type Tokenizer } from "./moe/tokenizer.ts";
export { generate, type GenerateOptions } from "./moe/generate.ts";
export type { SamplingOptions } from "./moe/sampling.ts";
export {
  type Checkpoint,
  type CheckpointContents,
  type CheckpointTensor,
  loadCheckpoint,
  type LoadOptions,
  newestCheckpoint,
  type NewestOptions,
  saveCheckpoint,
  type SaveOptions,
} from "./moe/checkpoint.ts";
export type { Json, ManifestFile } from "./moe/manifest.ts";
export type { OutputFile, TensorSource } from "./moe/safetensors.ts";
export type { NamedTensor } from "./moe/weights.ts";

// Where schedules and placements plug in.
export type {
  AllToAllNode,
  Boundary,
  CollectiveScheduler,
  ComputeNode,
  ExpertPlacement,
  GradientNode,
  LaunchState,
  MicroOp,
  MicroOpPart,
  NodeId,
  PlacementContext,
  PlacementPlan,
  Schedule,
  StepGraph,
  StepNode,
} from "./moe/hooks.ts";
export { Fifo, type FifoOptions } from "./moe/fifo.ts";
export { replicatedPlacement, staticPlacement } from "./moe/placement.ts";
export type { GradientOutline, LayerOutline, StepOutline } from "./moe/graph.ts";

// Schedulers of training: when gradients are reduced, beside the all-to-alls.
export {
  createScheduler,
  SCHEDULER_NAMES,
  type SchedulerName,
  type SchedulerOptions,
} from "./lina/training/schedulers.ts";
export { Outside } from "./lina/training/outside.ts";
export { Priority } from "./lina/training/priority.ts";
export { Lina, type LinaOptions } from "./lina/training/lina.ts";
export { Planned, type PlannedOptions } from "./lina/training/planned.ts";
export {
  type ControllerState,
  type Decision,
  TrainingController,
  type TrainingControllerOptions,
} from "./lina/training/controller.ts";

// What a step costs: links, bounds, a virtual clock, and what was measured.
export {
  type CollectiveCost,
  collectiveCost,
  type CollectiveKind,
  fitCollective,
  fitLink,
  type Link,
  type LinkFit,
  type LinkSample,
  type StepCosts,
  stepCosts,
  timeAlone,
} from "./lina/training/links.ts";
export {
  type MeasuredLinks,
  measureLinks,
  type MeasureLinksOptions,
} from "./lina/training/measure_links.ts";
export { type BoundOptions, type StepBounds, stepBounds } from "./lina/training/bounds.ts";
export {
  type Timeline,
  timeline,
  type TimelineBoundary,
  type TimelineLane,
  type TimelineOptions,
  type TimelineSpan,
} from "./lina/training/timeline.ts";
export {
  agreeProfile,
  decodeProfile,
  encodeProfile,
  type ProfileData,
  type ProfiledTimes,
  profiledTimes,
  readProfile,
  type StepProfile,
} from "./lina/training/profile.ts";
export type { Mark } from "./moe/reduction.ts";

// What happened when: spans of this rank, and a file for Perfetto.
export { type Category, type Recorder, recorder, type Span, type SpanArgs } from "./trace/mod.ts";
export { type TraceOptions, writeTrace } from "./trace/perfetto.ts";
export type { Ranks } from "./trace/clock.ts";
