// The `config.json` that lets Hugging Face's Transformers load a checkpoint of ours as a Mixtral. Models that Mixtral cannot express get
// none: their weights keep names of the same scheme, but no loader of Mixtral would compute the same.

import type { ModelConfig } from "./config.ts";

/**
 * A model's sizes as Mixtral's `config.json` has them.
 *
 * @param config The model.
 * @param sequence Longest sequence it was trained on.
 * @returns The contents of the file; null if a part of the model is not Mixtral's: dense layers, shared experts, another activation
 * than SwiGLU, or another router than the renormalised softmax.
 */
export function mixtralConfig(
  config: ModelConfig,
  sequence: number,
): Readonly<Record<string, unknown>> | null {
  const { router } = config;
  const isMixtral = config.experts > 0 && config.denseLayers === 0 && config.sharedExperts === 0 &&
    config.activation === "swiglu" && router.kind === "softmax" && router.renormalise !== false;
  if (!isMixtral) return null;
  const types = { f32: "float32", f64: "float64", bf16: "bfloat16", f16: "float16" } as const;
  return {
    architectures: ["MixtralForCausalLM"],
    model_type: "mixtral",
    vocab_size: config.vocab,
    hidden_size: config.width,
    intermediate_size: config.hidden,
    num_hidden_layers: config.layers,
    num_attention_heads: config.heads,
    num_key_value_heads: config.kvHeads,
    head_dim: config.headDim,
    hidden_act: "silu",
    num_local_experts: config.experts,
    num_experts_per_tok: router.topK,
    router_aux_loss_coef: router.auxLoss ?? 0,
    output_router_logits: false,
    max_position_embeddings: sequence,
    sliding_window: null,
    rope_theta: config.ropeTheta,
    rms_norm_eps: config.normEps,
    initializer_range: config.initStd,
    tie_word_embeddings: config.tied,
    attention_dropout: 0,
    use_cache: true,
    bos_token_id: null,
    eos_token_id: null,
    torch_dtype: types[config.dtype as keyof typeof types],
  };
}
