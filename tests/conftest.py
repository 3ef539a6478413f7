import contextlib
import importlib
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
for family in ("kimi_linear", "qwen3_next"):
    with contextlib.suppress(ModuleNotFoundError):  # an older transformers
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
del sys.modules["fla"]

import families
import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

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
# An older transformers lacks the newest
OTHERS = [family for family in families.OTHERS if family in CONFIG_MAPPING]
FAMILIES = {family: fields for family, fields in families.FAMILIES.items() if family in CONFIG_MAPPING}
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
    config_class = CONFIG_MAPPING[base_model_type]
    if base_model_type in families.OTHERS:
        return config_class(**{**families.other_fields(config_class().to_dict()), **fields})
    return config_class(**{**TINY, **FAMILIES[base_model_type], **fields})


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


def randomize_depth_attention(model, scale=0.3, seed=1):
    """Queries and key norms as after training: at zero queries wrong wiring would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DepthAttention):
                module.query.copy_(torch.randn(module.query.shape, generator=generator) * scale)
                module.key_norm.copy_(1 + torch.randn(module.query.shape, generator=generator) * 0.3)
    return model


def save_word_tokenizer(folder, words):
    """A tokenizer of these words, parted by blanks."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


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
