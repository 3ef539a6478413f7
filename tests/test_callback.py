"""The numbers that the callback logs during training, read from TensorBoard's files."""

import pytest
import torch
from conftest import attnres_of, tiny_base
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_attnres import ATTN_RES_MODULES, AttnResForCausalLM
from modeling_attnres.callback import DepthAttentionCallback
from modeling_attnres.probing import recorded_weights


def data(rows=16):
    ids = torch.randint(1, 99, (rows, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model, folder, callback=True, steps=6, **arguments):
    """Trains, and returns the trainer."""
    torch.manual_seed(0)
    args = TrainingArguments(
        folder,
        max_steps=steps,
        logging_steps=2,
        learning_rate=5e-2,
        per_device_train_batch_size=4,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **{"report_to": "none", **arguments},
    )
    trainer = Trainer(model, args, train_dataset=data(), eval_dataset=data(4))
    if callback:
        trainer.add_callback(DepthAttentionCallback(trainer, per_sublayer=True))
    trainer.train()
    return trainer


def test_tensorboard_shows_the_depth_attention(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    model = attnres_of(tiny_base("llama"), attn_res_block_size=2)
    trainer = train(model, tmp_path, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    series = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    selectivity, norm = series["train/depth_attention/1-entropy"], series["train/depth_attention/query_norm"]
    assert [step for step, _ in selectivity] == [0, 2, 4, 6] and [step for step, _ in series["train/loss"]] == [2, 4, 6]
    assert selectivity[0][1] == pytest.approx(0, abs=1e-6) and norm[0][1] == 0
    assert norm[-1][1] > norm[1][1] > 0 and selectivity[-1][1] > 0.001

    # The last values, computed from the trained model
    queries = {name: module.query for name, module in model.named_modules() if name.endswith("_res")}
    largest = max(query.norm().item() for query in queries.values())
    assert series["train/depth_attention/max_query_norm"][-1][1] == pytest.approx(largest, rel=1e-5)
    ids = torch.stack([row["input_ids"] for row in data(4)])
    with torch.no_grad(), recorded_weights(trainer.model.eval()) as weights:
        trainer.model(ids)
    expected = {
        name: 1 - (w.double().xlogy(w.double()).sum(-1) / -torch.tensor(float(w.shape[-1])).log()).mean().item()
        for name, (w,) in weights.items()
    }
    assert selectivity[-1][1] == pytest.approx(sum(expected.values()) / len(expected), rel=1e-4)
    for name, value in expected.items():
        logged = series[f"train/depth_attention_1-entropy/{name.replace(' ', '_')}"][-1][1]
        assert logged == pytest.approx(value, rel=1e-4)
    assert series["train/depth_attention/max_1-entropy"][-1][1] == pytest.approx(max(expected.values()), rel=1e-4)


def test_the_training_is_the_same_without_it(tmp_path):
    """The same losses and the same weights, also with dropout."""
    models = [attnres_of(tiny_base("llama", attention_dropout=0.2), attn_res_block_size=2) for _ in range(2)]
    trainers = [train(model, tmp_path, callback) for model, callback in zip(models, (False, True))]
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in trainers]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    for ours, theirs in zip(models[1].parameters(), models[0].parameters()):
        assert torch.equal(ours, theirs)


def test_padding_is_ignored(tmp_path):
    model = attnres_of(tiny_base("llama"), attn_res_block_size=2)
    trainer = train(model, tmp_path, steps=2)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, DepthAttentionCallback))
    expected, _ = callback.measure()
    ids = torch.nn.functional.pad(callback.inputs["input_ids"], (5, 0))
    mask = torch.nn.functional.pad(torch.ones_like(callback.inputs["input_ids"]), (5, 0))
    callback.inputs = {"input_ids": ids, "attention_mask": mask}
    assert callback.measure()[0] == pytest.approx(expected, rel=1e-3)


def test_a_model_of_remote_code(tmp_path):
    """The classes of a checkpoint's own code are not those of the package."""
    attnres_of(tiny_base("llama")).save_pretrained(tmp_path / "model")
    remote_class = get_class_from_dynamic_module("modeling_attnres.AttnResForCausalLM", tmp_path / "model")
    model = remote_class.from_pretrained(tmp_path / "model")
    assert not isinstance(model, AttnResForCausalLM)
    logged = train(model, tmp_path).state.log_history
    assert len([row for row in logged if row.get("depth_attention/query_norm")]) == 3


def test_a_model_without_depth_attention_is_refused(tmp_path):
    trainer = Trainer(tiny_base("llama"), TrainingArguments(tmp_path, report_to="none", use_cpu=True))
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, which has no depth attention"):
        DepthAttentionCallback(trainer)


def test_the_norms_are_those_of_the_trained_queries(tmp_path):
    """PEFT keeps the frozen queries too. With prompt tuning, virtual tokens come before those of the batch."""
    lora = LoraConfig(target_modules="all-linear", modules_to_save=ATTN_RES_MODULES)
    model = get_peft_model(attnres_of(tiny_base("llama")), lora)
    trainer = train(model, tmp_path, logging_strategy="epoch")
    assert [row["step"] for row in trainer.state.log_history if "depth_attention/1-entropy" in row] == [0, 4, 6]
    selectivity, norms = next(
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, DepthAttentionCallback)
    ).measure()
    trained = [p.norm().item() for name, p in model.named_parameters() if name.endswith("query") and p.requires_grad]
    assert len(selectivity) == len(norms) == 10 and list(norms.values()) == pytest.approx(trained)

    prompt = get_peft_model(
        attnres_of(tiny_base("llama")), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    logged = train(prompt, tmp_path).state.log_history
    assert [row["depth_attention/1-entropy"] for row in logged if "depth_attention/1-entropy" in row] == pytest.approx(
        [0] * 4, abs=1e-6
    )
