"""Classifiers and question answering: the base's numbers at zero queries, by the Auto classes and by remote code."""

import pytest
import torch
from helpers import BLOCK, INPUT_IDS, TINY, attnres_of, run_isolated, tensor_hashes, there_and_back, tiny_base
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modeling_attnres import AttnResConfig
from modeling_attnres.conversion import revert


# The Auto class of each head, and labels for the three rows of `tokens`
HEADS = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}
LABELS = {
    "ForSequenceClassification": {"labels": torch.tensor([0, 2, 1])},
    "ForTokenClassification": {"labels": torch.arange(3 * 17).view(3, 17) % 3},
    "ForQuestionAnswering": {"start_positions": torch.tensor([12] * 3), "end_positions": torch.tensor([14] * 3)},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_outputs_and_gradients_are_the_base_s(head, family, tokens):
    base = tiny_base(family, HEADS[head], num_labels=3)
    model = HEADS[head].from_config(AttnResConfig.from_base_config(base.config, **BLOCK)).eval()
    assert type(model).__name__ == f"AttnRes{head}"
    # The base's question answering calls its decoder `transformer`
    weights = {name.replace("transformer.", "model."): tensor for name, tensor in base.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith((".query", ".key_norm")) for name in missing)

    expected, actual = (each(**tokens, **LABELS[head]) for each in (base, model))
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-5)
    rows = slice(None) if head == "ForSequenceClassification" else tokens["attention_mask"].bool()
    for name in expected.keys() & {"logits", "start_logits", "end_logits"}:
        torch.testing.assert_close(actual[name][rows], expected[name][rows], rtol=0, atol=1e-5)
    actual.loss.backward()
    assert all(layer.mlp_res.query.grad.norm() > 0 for layer in model.model.layers)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_classifiers_can_be_retrofitted_and_loaded_without_the_package(head, tmp_path):
    base = tiny_base("llama", HEADS[head], num_labels=3)
    base.save_pretrained(tmp_path / "base")
    output = there_and_back(tmp_path / "base", tmp_path, **BLOCK)
    script = f"""
from transformers import AutoModel{head}
model = AutoModel{head}.from_pretrained(name, trust_remote_code=True)
assert "transformers_modules" in type(model).__module__ and type(model).__name__ == "AttnRes{head}"
with torch.no_grad():
    save_file({{"logits": model(input_ids).logits}}, work + "/out.safetensors")
"""
    result = run_isolated(script, output, tmp_path)
    torch.testing.assert_close(result["logits"], base(INPUT_IDS).logits, rtol=0, atol=1e-5)

    model = HEADS[head].from_pretrained(output)
    assert type(model).__name__ == f"AttnRes{head}" and model.config.num_labels == 3
    model.save_pretrained(tmp_path / "saved")
    revert(tmp_path / "saved", tmp_path / "of saved")
    assert tensor_hashes(tmp_path / "of saved") == tensor_hashes(tmp_path / "base")
    assert type(HEADS[head].from_pretrained(tmp_path / "of saved")) is type(base)


def test_a_language_model_becomes_a_reward_model_with_a_new_head(tmp_path):
    attnres_of(tiny_base("llama"), **BLOCK).save_pretrained(tmp_path)
    reward, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert reward.score.weight.shape == (1, TINY["hidden_size"]) and 0 < reward.score.weight.std() < 0.05
