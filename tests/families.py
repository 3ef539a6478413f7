"""
The tested model types. `FAMILIES` get every test of test_families.py, with the fields that make each more than a Llama
with another name. `OTHERS` are compared with their base.
"""

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    # Longest generation for every prompt
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 64},
    **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
# DeepSeek's router picks groups of experts, then experts; the first layer is dense
GROUPED = {**EXPERTS, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
# Three layers with linear attention, two with full attention. The names of the sizes are Kimi's and Qwen's
LINEAR = {
    **EXPERTS,
    "layer_types": [f"{kind}_attention" for kind in ("linear", "full", "linear", "linear", "full")],
    **{"linear_head_dim": 8, "linear_num_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
}
MULTIPLIERS = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 3.0,
}
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
    # Parallel sublayers; norms before and after; norms after; recurrent blocks
    "cohere": {"logit_scale": 0.5},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "head_dim": 8},
    "deepseek_v3": {**GROUPED, **LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    "dots1": {**GROUPED, "first_k_dense_replace": 1, "sliding_window": 6, "max_window_layers": 2},
    "glm4_moe": {**GROUPED, "head_dim": 8, "first_k_dense_replace": 1, "use_qk_norm": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6},
    "granitemoe": {**MULTIPLIERS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [1]},
    "kimi_linear": {**LINEAR, **LATENT, "q_lora_rank": None, "num_local_experts": 4, "num_key_value_heads": 4},
    "qwen3_next": {**LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 24, "head_dim": 8},
}
# Without a row of their own: a small configuration follows from `OTHER_FIELDS`
OTHERS = """
afmoe apertus arcee aria_text biogpt cohere2 cohere2_moe cwm diffllama ernie4_5_moe exaone exaone4 exaone_moe
falcon flex_olmo flint gemma gemma3_text gemma4_text glm glm4 gpt2 gpt_bigcode gpt_neox granite_swa granitemoe_swa
granitemoeshared hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax inkling_text internlm3 iquestcoder jais2 jetmoe
kolibri1 laguna lfm2 lfm3 llama4_text mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral ministral3
modernbert-decoder moshi nanochat olmo3 persimmon phi phimoe stablelm vaultgemma xglm
""".split()
OTHER_FIELDS = {
    **TINY,
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 64},
    **{"head_dim": 16, "sliding_window": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
}


def other_fields(defaults: dict) -> dict:
    """The fields of `OTHER_FIELDS` that a configuration has, and layer types that all occur in four layers."""
    everywhere = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    fields = {name: value for name, value in OTHER_FIELDS.items() if name in defaults or name in everywhere}
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(defaults.get(name), list):
            kinds = list(dict.fromkeys(defaults[name]))
            fields[name] = [kinds[i % len(kinds)] for i in range(4)]
    return fields
