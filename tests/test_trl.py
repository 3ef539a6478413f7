"""TRL's trainers: AttnRes starts at the loss of the base, and its queries are trained."""

from math import log

import pytest
import torch
from datasets import Dataset
from helpers import save, tiny_base, trained_retrofit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from modeling_attnres import ATTN_RES_MODULES, attn_res_parameter_groups
from modeling_attnres.callback import DepthAttentionCallback


@pytest.fixture
def models(tokenizer, tmp_path):
    """From folders, since DPO loads its reference model from the folder of the policy."""
    base = tiny_base("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    trained_retrofit(save(tmp_path / "base", base, tokenizer), tmp_path, scale=0.3)
    return {name: AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "attnres", "trained")}


def train(trainer_class, config_class, model, folder, **options):
    """The row of the first loss, which has TRL's own metrics too, and the trained queries."""
    args = {"max_steps": 3, "max_length": 64, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "bf16": False}
    args |= {"logging_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = trainer_class(model, args=config_class(str(folder / "output"), **args), **options)
    if any(name.endswith("query") for name, _ in model.named_parameters()):
        trainer.add_callback(DepthAttentionCallback(trainer))
    trainer.train()
    queries = [p for name, p in trainer.model.named_parameters() if name.endswith("query") and p.requires_grad]
    return next(row for row in trainer.state.log_history if "loss" in row), queries


def assert_all_are_trained(queries):
    assert len(queries) == 10 and all((query != 0).any() for query in queries)


each_way = pytest.mark.parametrize("adapter", [False, True], ids=["in full", "LoRA"])


def lora(name):
    modules = None if name == "base" else ATTN_RES_MODULES
    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=modules)


@each_way
def test_sft(adapter, models, tokenizer, tmp_path):
    texts = Dataset.from_dict({"text": [f"{a} and {a + 1} make {2 * a + 1}" for a in range(8)]})
    logs = {}
    for name in ("base", "attnres"):
        options = {"processing_class": tokenizer, "peft_config": lora(name) if adapter else None}
        logs[name], queries = train(SFTTrainer, SFTConfig, models[name], tmp_path, train_dataset=texts, **options)
    assert logs["attnres"].keys() == logs["base"].keys() >= {"mean_token_accuracy"}
    assert logs["attnres"]["loss"] == pytest.approx(logs["base"]["loss"], abs=1e-4)
    assert_all_are_trained(queries)


@pytest.fixture
def pairs():
    answers = [f" {2 * a + 1}, which is an odd number" for a in range(8)]
    prompts = [f"{a} and {a + 1} make" for a in range(8)]
    return Dataset.from_dict({"prompt": prompts, "chosen": answers, "rejected": [" nothing"] * 8})


@each_way
def test_dpo(adapter, models, pairs, tokenizer, tmp_path):
    logs = {}
    for name, model in models.items():
        options = {"processing_class": tokenizer, "peft_config": lora(name) if adapter else None}
        logs[name], queries = train(DPOTrainer, DPOConfig, model, tmp_path, train_dataset=pairs, **options)
        # At first the policy equals the reference, also in its queries
        assert logs[name]["loss"] == pytest.approx(log(2), abs=1e-4)
    base, attnres, trained = ([logs[name][f"logps/{kind}"] for kind in ("chosen", "rejected")] for name in models)
    assert attnres == pytest.approx(base, abs=1e-3) and trained != pytest.approx(base, abs=0.1)
    assert_all_are_trained(queries)


def test_dpo_with_a_learning_rate_for_the_queries(models, pairs, tokenizer, tmp_path):
    """DPOTrainer accepts an optimizer, but no function that creates one. So the adapter is added first."""
    model = get_peft_model(models["attnres"], lora("attnres"))
    optimizer = torch.optim.AdamW(attn_res_parameter_groups(model, 1e-3, 1e-4))
    options = {"processing_class": tokenizer, "optimizers": (optimizer, None)}
    _, queries = train(DPOTrainer, DPOConfig, model, tmp_path, train_dataset=pairs, **options)
    # Three steps: at the learning rate, two thirds and one third of it
    assert 1e-4 < max(query.abs().max() for query in queries) < 2.1e-4
    loras = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert 1e-3 < max(parameter.abs().max() for parameter in loras) < 2.1e-3
