"""Training with Trainer, compared with the base: losses, parameter groups, and resuming a killed run."""

import os
import signal
import warnings

import pytest
import torch
from helpers import FAMILIES, attnres_of, tiny_base
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from modeling_attnres import ATTN_RES_MODULES, attn_res_parameter_groups
from modeling_attnres.callback import DepthAttentionCallback
from modeling_attnres.conversion import retrofit


@pytest.fixture
def data():
    rows = torch.randint(1, 99, (8, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, **fields):
    return TrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **fields)


def adamw(model, **rates):
    return torch.optim.AdamW(attn_res_parameter_groups(model, **rates), eps=1e-12)


@pytest.mark.parametrize("label_smoothing_factor", [0.0, 0.1])
def test_trainer_computes_the_base_s_loss(label_smoothing_factor, data, tmp_path):
    """Trainer smooths labels itself. It shifts them only for model classes that it recognizes."""
    args = arguments(tmp_path, label_smoothing_factor=label_smoothing_factor)
    base = tiny_base("llama")
    trainers = [Trainer(model, args, eval_dataset=data) for model in (base, attnres_of(base))]
    base_loss, loss = (trainer.evaluate()["eval_loss"] for trainer in trainers)
    assert loss == pytest.approx(base_loss, abs=1e-5)


def test_parameter_groups_hold_each_trained_parameter_once():
    model = attnres_of(tiny_base("llama"))
    model.model.embed_tokens.weight.requires_grad_(False)
    groups = attn_res_parameter_groups(model, 1e-3, 1e-4, weight_decay=0.1)
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    matrices, vectors, attn_res = ([trained[id(p)] for p in group["params"]] for group in groups)
    assert sorted([*matrices, *vectors, *attn_res]) == sorted(trained.values())
    assert set(attn_res) == {name for name in trained.values() if name.endswith(("_res.query", "_res.key_norm"))}
    assert set(matrices) == {name for name in trained.values() if name.endswith("_proj.weight")}
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-3, 0.0), (1e-4, 0.0)]

    model.requires_grad_(False)
    model.model.layers[-1].output_res.requires_grad_(True)
    (group,) = attn_res_parameter_groups(model, 1e-3)
    assert group["params"] == list(model.model.layers[-1].output_res.parameters()) and group["lr"] == 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_without_weight_decay_in_trainer_have_none_in_our_groups(family, tmp_path):
    """Trainer recognizes norms by class and name. Our groups also leave out other vectors."""
    model = attnres_of(tiny_base(family))
    groups = attn_res_parameter_groups(model, 1e-3, weight_decay=0.1)
    ours = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    decayed = {name for name, parameter in model.named_parameters() if id(parameter) in ours}
    of_trainer = set(Trainer(model, arguments(tmp_path)).get_decay_parameter_names(model))
    of_trainer &= dict(model.named_parameters()).keys()  # without tied parameters
    assert decayed <= of_trainer
    vectors = ("_res.query", "A_log", "sinks", "lightning_attn", "recurrent_param")
    assert all(name.endswith(vectors) for name in of_trainer - decayed)


@pytest.mark.parametrize("width", [32, 64, 256])
def test_the_max_change_of_the_logits_in_a_step_is_the_same_at_every_width(width, data, tmp_path):
    """A step changes a logit of a retrofit by at most 128 times the learning rate, with Trainer's own optimizer."""
    tiny_base("llama", hidden_size=width).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(retrofit(tmp_path / "base", tmp_path / "attnres"))
    args = arguments(tmp_path, max_steps=1, learning_rate=2e-4, lr_scheduler_type="constant")
    Trainer(model, args, train_dataset=data).train()
    # The keys have unit RMS, so the largest logit is that of the key with the query's signs
    query = model.model.layers[-1].output_res.query.detach()
    assert query.abs().sum().item() / model.config.attn_res_temperature == pytest.approx(128 * 2e-4, rel=1e-2)


def test_a_large_learning_rate_gives_a_warning():
    model = attnres_of(tiny_base("llama"), attn_res_temperature=0.5)
    with pytest.warns(UserWarning, match="`attn_res_learning_rate` is 0.01.*up to 0.64.*0.0078 or less"):
        attn_res_parameter_groups(model, 5e-5, 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn_res_parameter_groups(model, 5e-5, 5e-3)


def test_a_model_in_bfloat16_trains_its_depth_attention(data, tmp_path):
    """In bfloat16, steps of 5e-5 round to nothing at the key norms, whose first value is 1."""
    attnres_of(tiny_base("llama")).save_pretrained(tmp_path / "attnres")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "attnres", dtype=torch.bfloat16)
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    args = arguments(tmp_path, max_steps=2, learning_rate=5e-5, lr_scheduler_type="constant")
    Trainer(model, args, train_dataset=data).train()
    model.save_pretrained(tmp_path / "trained")
    saved = load_file(tmp_path / "trained" / "model.safetensors")
    for name, start in (("query", 0), ("key_norm", 1)):
        tensors = [tensor for key, tensor in saved.items() if key.endswith(f"_res.{name}")]
        assert len(tensors) == 10
        assert all(tensor.dtype == torch.float32 and (tensor != start).any() for tensor in tensors)


def test_queries_in_half_precision_give_a_warning():
    model = attnres_of(tiny_base("llama")).to(torch.bfloat16)
    for warn in (lambda: attn_res_parameter_groups(model, 5e-5), lambda: DepthAttentionCallback(Trainer(model))):
        with pytest.warns(UserWarning, match="Queries and key norms are torch.bfloat16.*float32"):
            warn()


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("step, adapter", [(4, False), (5, True)])
def test_a_killed_run_resumes(step, adapter, data, tmp_path):
    """The losses after resuming are those of an uninterrupted run, also with dropout."""

    def run(folder, callbacks=None, resume=False):
        torch.manual_seed(0)
        model = attnres_of(tiny_base("llama", attention_dropout=0.2))
        if adapter:
            lora = LoraConfig(target_modules="all-linear", modules_to_save=ATTN_RES_MODULES, lora_dropout=0.2)
            model = get_peft_model(model, lora)
        args = arguments(folder, max_steps=8, save_steps=2, logging_steps=1, per_device_train_batch_size=2)
        optimizer = (lambda: adamw, {"learning_rate": 1e-2, "attn_res_learning_rate": 3e-3, "weight_decay": 0.1})
        trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks, optimizer_cls_and_kwargs=optimizer)
        trainer.train(resume_from_checkpoint=resume)
        return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}

    expected = run(tmp_path / "whole")
    child = os.fork()
    if child == 0:
        run(tmp_path / "killed", [KillAt(step)])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "killed").iterdir())[-1] == f"checkpoint-{(step - 1) // 2 * 2}"
    assert run(tmp_path / "killed", resume=True) == pytest.approx(expected, abs=1e-6)
