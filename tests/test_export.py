"""A decoding step as a program of its own: by `torch.export`, and in ONNX by transformers' exporter."""

import inspect

import pytest
import torch
from helpers import BLOCK, FULL, VALUE_READ, tiny_base, trained, trained_retrofit
from transformers import AutoModelForCausalLM, DynamicCache, LlamaModel
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache


TOKENS = torch.randint(1, 99, (1, 9), generator=torch.Generator().manual_seed(0))
CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


@pytest.fixture(params=["block", "full", "value read", "SmolLM2"])
def model(request, tmp_path):
    if request.param == "SmolLM2":
        folder = trained_retrofit(request.getfixturevalue("smollm2_folder"), tmp_path, scale=0.002)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return trained(tiny_base("llama"), **{"block": BLOCK, "full": FULL, "value read": VALUE_READ}[request.param])


def assert_same_logits(actual, expected, model):
    """Within 1e-5; of SmolLM2, whose logits are ten times as large, within 1e-5 of the largest."""
    largest = expected.abs().max().item() if model.config.hidden_size == 576 else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * largest)


def test_an_exported_decoding_step_gives_the_same_logits(model):
    with torch.no_grad():
        expected = model(TOKENS).logits[0]
    model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    step = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=16)
    example = {"input_ids": TOKENS[:, :1], "cache_position": torch.tensor([0])}
    with torch.no_grad():
        exported = torch.export.export(step, args=(), kwargs=example, strict=False).module()
        for position in range(TOKENS.shape[1]):
            token = TOKENS[:, position : position + 1]
            logits = exported(input_ids=token, cache_position=torch.tensor([position]))
            assert_same_logits(logits[0, 0], expected[position], model)


@pytest.mark.parametrize("model", ["block", "value read", "SmolLM2"], indirect=True)
def test_a_decoding_step_in_onnx_gives_the_same_logits(model, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime", "transformers.exporters"):
        pytest.importorskip(package)
    from onnxruntime import InferenceSession
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(TOKENS).logits[:, -1:]
        model(TOKENS[:, :-1], **{CACHE_NAME: cache}, use_cache=True)
        inputs = {"input_ids": TOKENS[:, -1:], CACHE_NAME: cache, "use_cache": True}
        OnnxExporter().export(model, inputs, config=OnnxConfig()).save_pretrained(tmp_path)
    session = InferenceSession(tmp_path / "model.onnx")
    states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
    names = [value.name for value in session.get_inputs()]
    logits = session.run(["logits"], {n: t.numpy() for n, t in zip(names, [TOKENS[:, -1:], *states], strict=True)})[0]
    assert_same_logits(torch.from_numpy(logits), expected, model)
