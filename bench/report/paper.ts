// What the paper reports (Li et al., "Accelerating Distributed MoE Training and Inference with Lina", USENIX ATC 2023), as far as it is in its
// text and tables, to stand beside our numbers. Values that are only in its plots are not here.

/** Table 1, training: 16 A100 at most, experts of a layer as many as GPUs, the baseline. */
export const TABLE_1: readonly {
  readonly gpus: number;
  readonly model: string;
  readonly a2a_ms: number;
  readonly share: number;
}[] = [
  { gpus: 4, model: "12 layers, 117 M", a2a_ms: 259, share: 0.367 },
  { gpus: 4, model: "24 layers, 233 M", a2a_ms: 589, share: 0.354 },
  { gpus: 4, model: "36 layers, 349 M", a2a_ms: 979, share: 0.382 },
  { gpus: 16, model: "12 layers, 419 M", a2a_ms: 333, share: 0.395 },
  { gpus: 16, model: "24 layers, 838 M", a2a_ms: 715, share: 0.376 },
  { gpus: 16, model: "36 layers, 1.2 B", a2a_ms: 1145, share: 0.368 },
];

/** Table 3: part of the compute stream that is not idle during all-to-alls, 16 experts, before and after packing. */
export const TABLE_3: readonly {
  readonly model: string;
  readonly without: number;
  readonly packed: number;
  readonly experts: number;
}[] = [
  { model: "Transformer-XL", without: 0.33, packed: 0.86, experts: 4 },
  { model: "GPT-2", without: 0.36, packed: 0.85, experts: 2 },
  { model: "BERT2GPT2", without: 0.34, packed: 0.79, experts: 2 },
];

/** Table 4: utilisation of the GPU and peak memory, 16 experts, baseline and Lina. */
export const TABLE_4: readonly {
  readonly model: string;
  readonly utilisation: readonly [baseline: number, lina: number];
  readonly memory: readonly [baseline: number, lina: number];
}[] = [
  { model: "Transformer-XL", utilisation: [0.662, 0.834], memory: [0.721, 1] },
  { model: "GPT-2", utilisation: [0.623, 0.782], memory: [0.838, 1] },
  { model: "BERT2GPT2", utilisation: [0.635, 0.825], memory: [0.743, 0.942] },
];

/** Figure 3: slowdown of backward all-to-alls beside allreduce, 1500 of them. */
export const FIGURE_3 = { median: 1.83, worst: 4.14 } as const;

/** Figure 7: when one layer's gradients are done, 419 M model. */
export const FIGURE_7: readonly {
  readonly scheme: string;
  readonly policy: string;
  readonly ms: number;
}[] = [
  { scheme: "baseline", policy: "fifo", ms: 29.0 },
  { scheme: "naive strict priority", policy: "priority", ms: 30.9 },
  { scheme: "allreduce after the second all-to-all", policy: "outside", ms: 24.6 },
];

/** Figure 14: speedup of tensor partitioning over the baseline, one expert per device, by experts. */
export const FIGURE_14: ReadonlyMap<number, number> = new Map([
  [2, 1.36],
  [4, 1.36],
  [8, 1.41],
  [16, 1.42],
]);

/** Mean speedup of priority alone in Figure 14. */
export const PRIORITY_GAIN = 1.24;

/** What differs between the paper's measurements and ours, whatever is measured. */
export const DIFFERENCES: readonly string[] = [
  "The paper has 4 nodes of 4 A100-40GB, hierarchical all-to-all and 100 Gbit/s InfiniBand; here every rank has a part of one GPU (or of a processor) and a link of its own, limited by the kernel's traffic shaping to the rate in the table. Rate and arithmetic are scaled alike, so that all-to-alls have the part of the step that they have there.",
  "Its models are Transformer-XL, GPT-2 and BERT2GPT2 with sizes that it does not give (width, batch, sequence); here shapes are named after them and listed above. Compare ratios, not milliseconds.",
  "Its baseline is DeepSpeed on PyTorch 1.10 with DDP's buckets; ours is fifo with buckets of the same 25 MB on the same engine as all other policies, so nothing but the schedule differs.",
  "The paper's headline (1.37 to 1.73x, mean 1.57x) is with 2 or 4 experts on a device; what scheduling alone gains is 1.36 to 1.42x. Here the two are in rows of their own.",
];

/** Sizes of micro-ops in Figure 15 as time on the paper's link of 100 Gbit/s, in ms: 5, 10, 30, 50 and 100 MB. */
export const FIGURE_15_MS: readonly number[] = [0.4, 0.8, 2.4, 4, 8];
