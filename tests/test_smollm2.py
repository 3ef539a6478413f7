"""A real pretrained Llama, SmolLM2-135M-Instruct, on 1,024 tokens of real text."""

import pytest
import quickstart
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_attnres.conversion import retrofit


@pytest.fixture(scope="module")
def input_ids(smollm2_folder, real_text):
    return AutoTokenizer.from_pretrained(smollm2_folder)(real_text, return_tensors="pt").input_ids[:, :1024]


@pytest.fixture(scope="module", params=["block", "full"])
def attnres_folder(request, smollm2_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "attnres"
    return retrofit(smollm2_folder, folder, attn_res_type=request.param, link=True)


def logits(folder, input_ids, dtype):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(input_ids).logits.float()


@pytest.fixture(scope="module")
def base_logits(smollm2_folder, input_ids):
    return logits(smollm2_folder, input_ids, torch.float32)


def test_float32_logits_are_the_base_s(attnres_folder, base_logits, input_ids):
    difference = (logits(attnres_folder, input_ids, torch.float32) - base_logits).abs().max()
    assert base_logits.shape[1] == 1024 and base_logits.abs().max() > 20
    assert difference < 1e-5 * base_logits.abs().max()


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_half_precision_is_as_near_as_the_base(autocast, attnres_folder, smollm2_folder, base_logits, input_ids):
    """With weights in bfloat16, and with products in bfloat16, as Trainer's `bf16=True` computes."""
    dtype = torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = [logits(folder, input_ids, dtype) for folder in (attnres_folder, smollm2_folder)]
    error, base_error = ((result - base_logits).abs().mean() for result in results)
    assert error <= 1.1 * base_error


def test_it_answers_as_the_base_does(attnres_folder, smollm2_folder):
    tokenizer = AutoTokenizer.from_pretrained(attnres_folder)
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (smollm2_folder, attnres_folder)]
    answers = [quickstart.answer(model, tokenizer) for model in models]
    assert answers[0] == answers[1] and "Paris" in answers[0]
