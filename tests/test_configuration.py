import copy
import pickle
import re

import pytest
import torch
from helpers import AUTO_CLASSES, FAMILIES, tiny_base_config
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig, PreTrainedConfig

from modeling_attnres import AttnResConfig, AttnResForCausalLM


def round_trips(config, folder):
    config.save_pretrained(folder)
    yield AutoConfig.from_pretrained(folder)
    yield AttnResConfig.from_dict(config.to_dict())
    yield copy.deepcopy(config)
    yield pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_and_other_names_are_the_base_s(family):
    base = CONFIG_MAPPING[family]()
    config = AttnResConfig(base_model_type=family)
    ours, theirs = config.to_dict(), base.to_dict()
    added = {"type", "block_size", "scale", "norm_eps", "temperature", "value_read"}
    assert ours.keys() - theirs.keys() == {"base_model_type", *(f"attn_res_{name}" for name in added)}
    assert {name for name in theirs if ours[name] != theirs[name]} == {"model_type"}
    assert config.attribute_map == base.attribute_map
    assert config.base_model_tp_plan == base.base_model_tp_plan
    assert config.base_model_ep_plan == base.base_model_ep_plan
    assert config.base_model_pp_plan is None
    assert config.get_text_config() is config


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_of_a_base_field_is_lost(family, tmp_path):
    """Each field in turn takes a value that is not the base's default."""
    base_class = CONFIG_MAPPING[family]
    defaults = base_class().to_dict()
    changed = {}
    for name, value in defaults.items():
        if name.endswith("_token_id"):
            changed[name] = 7
        elif name == "tie_word_embeddings" or isinstance(value, bool):
            changed[name] = not value
        elif isinstance(value, float):
            changed[name] = value / 2 + 0.01
    # `use_sliding_window` decides over other fields
    changed.pop("use_sliding_window", None)
    config = AttnResConfig(base_model_type=family, attn_res_type="full", **changed)
    for other in round_trips(config, tmp_path):
        assert {name: getattr(other, name) for name in changed} == changed
        ours, theirs = ({**each.to_dict(), "auto_map": None, "_name_or_path": None} for each in (config, other))
        assert ours == theirs
        assert (other.attn_res_type, other.base_model_type) == ("full", family)


def test_a_default_of_transformers_that_is_not_the_base_s_survives(tmp_path, monkeypatch):
    """`PreTrainedConfig` leaves out of config.json what equals its own default, and the base reads its own back."""

    class OtherDefaultsConfig(CONFIG_MAPPING["llama"]):
        return_dict: bool | None = None
        chunk_size_feed_forward: int = 3

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "llama", OtherDefaultsConfig)
    config = AttnResConfig(return_dict=True, chunk_size_feed_forward=0)
    for other in round_trips(config, tmp_path):
        assert (other.return_dict, other.chunk_size_feed_forward) == (True, 0)
    assert (PreTrainedConfig().return_dict, AttnResConfig().return_dict) == (True, None)


def test_other_fields_and_types_survive(tmp_path):
    my_field = {"a": [1, 2.5, None]}
    config = AttnResConfig(num_labels=3, dtype="bfloat16", my_field=my_field, name_or_path="there", torch_dtype=None)
    config.vocab_size = 1234
    for other in (config, *round_trips(config, tmp_path)):
        assert (other.dtype, other.num_labels, other.vocab_size) == (torch.bfloat16, 3, 1234)
        assert other.my_field == my_field


def test_legacy_names_of_the_base_are_understood():
    fields = {"rope_theta": 12345.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    config, expected = (config_class(**copy.deepcopy(fields)) for config_class in (AttnResConfig, LlamaConfig))
    assert config.rope_parameters == expected.rope_parameters
    assert config.rope_parameters["rope_theta"] == 12345.0


def test_config_json_is_the_base_s_and_seven_fields(tmp_path):
    base_config = tiny_base_config("qwen2")
    AttnResConfig.from_base_config(base_config).save_pretrained(tmp_path / "attnres")
    base_config.save_pretrained(tmp_path / "base")
    ours, theirs = (PreTrainedConfig.get_config_dict(tmp_path / name)[0] for name in ("attnres", "base"))
    assert ours.pop("auto_map").keys() == AUTO_CLASSES
    assert ours.pop("model_type") == "attnres" and ours.pop("base_model_type") == theirs.pop("model_type")
    assert {name: ours.pop(name) for name in list(ours) if name.startswith("attn_res_")} == {
        "attn_res_type": "block",
        "attn_res_block_size": 1,
        "attn_res_scale": "sum",
        "attn_res_norm_eps": 1e-6,
        "attn_res_temperature": 1.0,
        "attn_res_value_read": False,
    }
    assert ours == theirs


def test_default_block_size_gives_about_eight_blocks():
    sizes = {1: 1, 4: 1, 8: 1, 12: 2, 16: 2, 24: 3, 28: 4, 30: 4, 32: 4, 80: 10}
    assert {layers: AttnResConfig(num_hidden_layers=layers).attn_res_block_size for layers in sizes} == sizes


IMPOSSIBLE = [
    ({"attn_res_block_size": 0}, ["attn_res_block_size", "0", "at least 1 layer"]),
    ({"attn_res_block_size": "2"}, ["attn_res_block_size", "int", "str"]),
    ({"attn_res_type": "blocks"}, ["attn_res_type", "'block', 'full'", "blocks"]),
    ({"attn_res_scale": "max"}, ["attn_res_scale", "'sum', 'mean'", "max"]),
    ({"attn_res_norm_eps": 0.0}, ["attn_res_norm_eps", "0.0", "between 0 and"]),
    ({"attn_res_norm_eps": float("nan")}, ["attn_res_norm_eps", "nan", "between 0 and"]),
    ({"attn_res_temperature": float("inf")}, ["attn_res_temperature", "inf", "between 0 and"]),
    ({"attn_res_implementation": "flash"}, ["attn_res_implementation", "'fla'", "flash"]),
    ({"hidden_size": 30}, ["hidden size", "30"]),
    ({"hidden_size": "wide"}, ["hidden_size", "int", "wide"]),
    ({"base_model_type": "no_such_model"}, ["base_model_type", "no_such_model", "no such model"]),
]


@pytest.mark.parametrize("fields, words", IMPOSSIBLE, ids=str)
def test_impossible_values_are_refused_by_name(fields, words):
    with pytest.raises(Exception, match="(?s)" + ".*".join(map(re.escape, words))):
        AttnResConfig(**fields)


def test_impossible_values_are_refused_when_loaded_set_or_saved(tmp_path):
    config = AttnResConfig(num_hidden_layers=4)
    config.save_pretrained(tmp_path)
    for fields, message in (
        ({"attn_res_block_size": -1}, "attn_res_block_size.*-1"),
        ({"hidden_size": 30}, "hidden size.*30"),
    ):
        with pytest.raises(Exception, match=message):
            AutoConfig.from_pretrained(tmp_path, **fields)
    with pytest.raises(Exception, match="attn_res_type.*nothing"):
        config.attn_res_type = "nothing"
    config.attn_res_block_size = 0
    with pytest.raises(Exception, match="attn_res_block_size.*0"):
        config.save_pretrained(tmp_path / "config")
    assert not (tmp_path / "config" / "config.json").exists()


def test_a_multimodal_base_is_refused_by_the_name_of_its_text_model():
    with pytest.raises(ValueError, match="base_model_type.*'gemma3'.*'gemma3_text'"):
        AttnResConfig(base_model_type="gemma3")


REFUSED = {
    "bloom": "BloomBlock.*not the residual stream",
    "minimax": "MiniMaxDecoderLayer",
    "bert": "no list of decoder layers",
    "t5": "no causal language model",
}


@pytest.mark.parametrize("family, reason", REFUSED.items(), ids=REFUSED)
def test_bases_that_do_something_else_with_the_stream_are_refused_with_the_reason(family, reason):
    with pytest.raises(ValueError, match=f"base_model_type.*{family}.*{reason}"), torch.device("meta"):
        AttnResForCausalLM(AttnResConfig(base_model_type=family))


def test_the_implementation_is_chosen_at_load_and_not_saved(tmp_path):
    config = AttnResConfig(attn_res_implementation="eager")
    config.save_pretrained(tmp_path)
    assert "attn_res_implementation" not in config.to_dict()
    assert AutoConfig.from_pretrained(tmp_path).attn_res_implementation == "auto"
    assert AutoConfig.from_pretrained(tmp_path, attn_res_implementation="fla").attn_res_implementation == "fla"
    assert copy.deepcopy(config).attn_res_implementation == "eager"
