"""The numbers that the callback logs during training, read from TensorBoard's files."""

import pytest
import torch
from helpers import BLOCK, attnres_of, tiny_base, trained
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


def train(model, folder, callback=True, eval_dataset=None, **arguments):
    """Trains, and returns the trainer."""
    torch.manual_seed(0)
    fields = {"max_steps": 6, "logging_steps": 2, "learning_rate": 5e-2, "save_strategy": "no", "report_to": "none"}
    fields |= {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, **arguments}
    datasets = {"train_dataset": data(), "eval_dataset": eval_dataset or data(4)}
    trainer = Trainer(model, TrainingArguments(folder, **fields), **datasets)
    if callback:
        trainer.add_callback(DepthAttentionCallback(trainer, per_sublayer=True))
    trainer.train()
    return trainer


def logged(trainer, name="depth_attention/1-entropy"):
    """Step and value of each row that has a number of this name."""
    return [(row["step"], row[name]) for row in trainer.state.log_history if name in row]


def test_tensorboard_shows_the_depth_attention(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    model = attnres_of(tiny_base("llama"), **BLOCK)
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
        actual = series[f"train/depth_attention_1-entropy/{name.replace(' ', '_')}"][-1][1]
        assert actual == pytest.approx(value, rel=1e-4)
    assert series["train/depth_attention/max_1-entropy"][-1][1] == pytest.approx(max(expected.values()), rel=1e-4)


def test_the_training_is_the_same_without_it(tmp_path):
    """The same losses and the same weights, also with dropout."""
    models = [attnres_of(tiny_base("llama", attention_dropout=0.2), **BLOCK) for _ in range(2)]
    losses = [logged(train(models[i], tmp_path, callback=i == 1), "loss") for i in range(2)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    torch.testing.assert_close(*(model.state_dict() for model in models), rtol=0, atol=0)


def test_padding_is_ignored(tmp_path):
    values = []
    for padding in (0, 5):
        rows = [{"input_ids": row["input_ids"], "attention_mask": torch.ones(12, dtype=torch.long)} for row in data(4)]
        rows = [{name: torch.nn.functional.pad(row[name], (padding, 0)) for name in row} for row in rows]
        trainer = train(trained(tiny_base("llama"), **BLOCK), tmp_path, eval_dataset=rows, max_steps=1)
        values.append(logged(trainer)[0][1])
    assert values[1] == pytest.approx(values[0], rel=1e-3) and values[0] > 0.01


def test_a_model_of_remote_code(tmp_path):
    """The classes of a checkpoint's own code are not those of the package."""
    attnres_of(tiny_base("llama")).save_pretrained(tmp_path / "model")
    remote_class = get_class_from_dynamic_module("modeling_attnres.AttnResForCausalLM", tmp_path / "model")
    model = remote_class.from_pretrained(tmp_path / "model")
    assert not isinstance(model, AttnResForCausalLM)
    norms = [norm for _, norm in logged(train(model, tmp_path), "depth_attention/query_norm")]
    assert len(norms) == 4 and norms[0] == 0 and min(norms[1:]) > 0


def test_with_peft(tmp_path):
    """The norms are those of the trained queries: PEFT keeps the frozen ones too."""
    lora = LoraConfig(target_modules="all-linear", modules_to_save=ATTN_RES_MODULES)
    model = get_peft_model(attnres_of(tiny_base("llama")), lora)
    trainer = train(model, tmp_path, logging_strategy="epoch")
    assert [step for step, _ in logged(trainer)] == [0, 4, 6]
    norms = [p.norm().item() for name, p in model.named_parameters() if name.endswith("query") and p.requires_grad]
    means, largest = (logged(trainer, f"depth_attention/{name}") for name in ("query_norm", "max_query_norm"))
    assert len(norms) == 10 and (means[-1][1], largest[-1][1]) == pytest.approx((sum(norms) / 10, max(norms)))


def test_with_virtual_tokens_before_those_of_the_batch(tmp_path):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = train(get_peft_model(attnres_of(tiny_base("llama")), prompt), tmp_path)
    assert [value for _, value in logged(trainer)] == pytest.approx([0] * 4, abs=1e-6)
