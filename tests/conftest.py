import os
import sys
from pathlib import Path


# Nothing here may reach for a hub
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# The tests run in parallel
os.environ.setdefault("OMP_NUM_THREADS", "1")

# fla is here for its reference operator. Linear-attention models would take its CUDA kernels too, on a CPU, so they
# are imported as if it were not installed, and take their own PyTorch path.
sys.modules["fla"] = None
import transformers.models.kimi_linear.modeling_kimi_linear  # noqa: F401
import transformers.models.qwen3_next.modeling_qwen3_next  # noqa: F401


del sys.modules["fla"]

import pytest
import torch
from filelock import FileLock
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from modeling_attnres import AttnResConfig, DepthAttention


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
# An older transformers lacks the newest
FAMILIES = {family: fields for family, fields in FAMILIES.items() if family in CONFIG_MAPPING}
MIXTURES = [family for family, fields in FAMILIES.items() if "num_experts_per_tok" in fields]


AUTO_CLASSES = {
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
}


def tiny_base_config(base_model_type, **fields):
    return CONFIG_MAPPING[base_model_type](**{**TINY, **FAMILIES[base_model_type], **fields})


def tiny_base(base_model_type, **fields):
    """
    A base with random weights, norms too: an untrained norm hides a missing one. Routers are decided, or a difference
    in rounding would send a token to another expert.
    """
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_base_config(base_model_type, **fields)).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            scale = 0.3 if "norm" in name else 0.5 if name.endswith((".gate.weight", ".router.weight")) else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
    return base


def attnres_of(base, **attn_res):
    """The base's weights in an AttnRes model, without any of the conversion code."""
    config = AttnResConfig.from_base_config(base.config, **attn_res)
    model = AutoModelForCausalLM.from_config(config, dtype=base.dtype).eval()
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(("_res.query", "_res.key_norm")) for name in missing)
    return model


def randomise_depth_attention(model, scale=0.3, seed=1):
    """Queries and key norms as after training: at zero queries wrong wiring would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DepthAttention):
                module.query.copy_(torch.randn(module.query.shape, generator=generator) * scale)
                module.key_norm.copy_(1 + torch.randn(module.query.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def tokens():
    """Token ids and mask of a left-padded batch."""
    input_ids = torch.randint(1, TINY["vocab_size"], (3, 17), generator=torch.Generator().manual_seed(2))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :5] = 0
    attention_mask[1, :11] = 0
    return {"input_ids": input_ids.masked_fill(attention_mask == 0, 0), "attention_mask": attention_mask}


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory):
    """SmolLM2-135M-Instruct as a checkpoint folder, once for all workers."""
    from smollm2 import smollm2

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "smollm2.lock"):
        return smollm2(shared / "smollm2")


@pytest.fixture(scope="session")
def real_text():
    """A text that no model was trained to continue by rote alone."""
    return Path(sys.modules["argparse"].__file__).read_text(encoding="utf-8")
