"""The code in a checkpoint meets releases of transformers that are newer than itself: it works or raises."""

import inspect
import re
import sys
import types

import pytest
import torch
import transformers
from helpers import attnres_of, tiny_base
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, LlamaConfig
from transformers.models.llama import modeling_llama

from modeling_attnres import modeling_attnres


def llama_of_another_release(monkeypatch, *edits):
    """transformers' Llama with its source edited, as the base of the tests."""
    source = inspect.getsource(modeling_llama)
    for pattern, replacement in edits:
        source, count = re.subn(pattern, replacement, source, flags=re.S)
        assert count > 0, pattern
    module = types.ModuleType("transformers.models.llama.another_release")
    module.__package__, module.__file__ = "transformers.models.llama", modeling_llama.__file__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, modeling_llama.__file__, "exec"), vars(module))
    monkeypatch.setitem(MODEL_MAPPING._extra_content, LlamaConfig, module.LlamaModel)
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, LlamaConfig, module.LlamaForCausalLM)
    return module


def test_an_argument_of_the_layers_may_be_renamed(tokens, monkeypatch):
    """transformers 5.24 renamed the cache's argument. Earlier versions of our code generated wrong tokens then."""
    expected = tiny_base("llama").generate(**tokens, max_new_tokens=8, do_sample=False)
    name = "cache" if "cache" in inspect.signature(modeling_llama.LlamaModel.forward).parameters else "past_key_values"
    rename = lambda match: re.sub(rf"\b{name}\b", "renamed", match.group())  # noqa: E731
    # Only some releases accept the old name too
    decorator = [(r" *@deprecate_kwarg\([^)]*\)\n", "")] if hasattr(modeling_llama, "deprecate_kwarg") else []
    llama_of_another_release(
        monkeypatch,
        *decorator,
        (r"class LlamaAttention.*?\n@auto_docstring", rename),
        (
            rf"\b{name}={name},(\n\s+(?:use_cache|\*\*kwargs))(?=[^)]*\)\n\n?\s+hidden_states = self.norm)",
            rf"renamed={name},\1",
        ),
    )
    model = attnres_of(tiny_base("llama"), attn_res_block_size=2)
    assert "another_release" in type(model).__bases__[1].__module__
    assert torch.equal(model.generate(**tokens, max_new_tokens=8, do_sample=False), expected)


def test_a_layer_that_normalizes_the_stream_in_place_is_refused(monkeypatch):
    llama_of_another_release(monkeypatch, (r"residual = hidden_states\n", "residual = hidden_states.float()\n"))
    with pytest.raises(ValueError, match="base_model_type.*'llama'.*LlamaDecoderLayer.*not `float`"):
        attnres_of(tiny_base("llama"))


def test_a_layer_that_changes_the_input_of_attention_has_no_read_for_the_values(tokens, monkeypatch):
    norm = r"(hidden_states = self.input_layernorm\(hidden_states\))"
    llama_of_another_release(monkeypatch, (norm, r"\1 * 1.0"))
    attnres_of(tiny_base("llama"))(**tokens)
    with pytest.raises(TypeError, match="`attn_res_value_read` is True, but `LlamaDecoderLayer` changes.*to False"):
        attnres_of(tiny_base("llama"), attn_res_value_read=True)(**tokens)


def test_a_layer_with_hidden_arguments_is_refused(monkeypatch):
    layer_class = llama_of_another_release(monkeypatch).LlamaDecoderLayer
    monkeypatch.setattr(layer_class, "forward", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match=f"transformers {transformers.__version__}.*LlamaDecoderLayer.forward"):
        attnres_of(tiny_base("llama"))


@pytest.mark.parametrize("name", ["OutputRecorder", "register_checkpoint_conversion_mapping"])
def test_a_changed_interface_is_named(name, monkeypatch):
    def changed():
        pass

    llama_of_another_release(monkeypatch)
    monkeypatch.setattr(modeling_attnres, "get_checkpoint_conversion_mapping", lambda model_type: [])
    monkeypatch.setattr(modeling_attnres, name, changed)
    with pytest.raises(RuntimeError, match=f"transformers {transformers.__version__}.*changed"):
        attnres_of(tiny_base("llama"))
