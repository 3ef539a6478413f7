"""The supported families: what the tests give each, and the README's table.

python tests/families.py
"""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
# DeepSeek's router picks groups of experts, then experts; the first layer is dense
GROUPED = {**EXPERTS, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR = ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"]
MULTIPLIERS = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 3.0,
}
# What makes each family more than a Llama with another name
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "phi3": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layer_interval": 2},
    "ernie4_5": {"head_dim": 8, "use_bias": True},
    "granite": MULTIPLIERS,
    "helium": {"head_dim": 8},
    "nemotron": {"norm_eps": 1e-5},
    "olmo": {"clip_qkv": 2.0},
    "starcoder2": {"sliding_window": 8},
    "cohere": {},
    "deepseek_v3": {**GROUPED, **LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    "dots1": {**GROUPED, "first_k_dense_replace": 1, "sliding_window": 6, "max_window_layers": 2},
    "glm4_moe": {**GROUPED, "head_dim": 8, "first_k_dense_replace": 1, "use_qk_norm": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6},
    "granitemoe": {**MULTIPLIERS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [1]},
    "kimi_linear": {
        **{**EXPERTS, **LATENT, "q_lora_rank": None, "num_local_experts": 4, "num_key_value_heads": 4},
        **{"layer_types": LINEAR, "linear_head_dim": 8, "linear_num_heads": 4},
    },
    "qwen3_next": {
        **{**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24, "head_dim": 8, "layer_types": LINEAR},
        **{
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    },
}
# Checkpoints of that family, and what is tested beside the common shape
DESCRIPTIONS = {
    "deepseek_v3": ("DeepSeek-V3, Kimi K2", "latent attention, grouped experts, a shared one"),
    "dots1": ("dots.llm1", "experts, sliding window in some layers"),
    "ernie4_5": ("ERNIE 4.5", "biases"),
    "glm4_moe": ("GLM-4.5", "experts, query and key norms"),
    "gpt_oss": ("gpt-oss", "experts with biases, attention sinks, sliding window in some layers"),
    "granite": ("Granite 3", "multipliers of embedding, residual, attention and logits"),
    "granitemoe": ("Granite 3 MoE", "the same multipliers, experts"),
    "helium": ("Helium", "interleaved rope"),
    "kimi_linear": ("Kimi Linear", "linear attention (KDA), latent attention without rope, experts"),
    "llama": ("Llama 3, SmolLM2", "llama3 rope, biases, tied embeddings"),
    "mistral": ("Mistral 7B", "sliding window"),
    "mixtral": ("Mixtral", "experts, sliding window"),
    "nemotron": ("Nemotron", "LayerNorm plus one, squared ReLU"),
    "olmo": ("OLMo", "LayerNorm without weights, clipped projections"),
    "olmoe": ("OLMoE", "experts, query and key norms"),
    "phi3": ("Phi-3, Phi-4", "fused projections, dropout, long rope"),
    "qwen2": ("Qwen2.5", "sliding window in some layers"),
    "qwen2_moe": ("Qwen1.5-MoE", "experts, a shared one, dense layers between"),
    "qwen3": ("Qwen3", "query and key norms"),
    "qwen3_moe": ("Qwen3-MoE", "experts, dense layers between"),
    "qwen3_next": ("Qwen3-Next", "linear attention (gated DeltaNet), gated attention, experts"),
    "seed_oss": ("Seed-OSS", "biases"),
    "smollm3": ("SmolLM3", "layers without rope"),
    "starcoder2": ("StarCoder2", "LayerNorm, biases, sliding window, dropout of embeddings"),
}


def table() -> str:
    rows = [f"| `{family}` | {models} | {special} |" for family, (models, special) in DESCRIPTIONS.items()]
    return "\n".join(["| `base_model_type` | for instance | tested beside the common shape |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
