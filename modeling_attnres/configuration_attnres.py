# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""AttnRes configuration: any supported base's own fields, and six more."""

from math import ceil, inf
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, PreTrainedConfig


# Bases whose decoder layer has two pre-norm sublayers, each added to the residual stream.
SUPPORTED_BASE_MODEL_TYPES = (
    "deepseek_v3",
    "dots1",
    "ernie4_5",
    "glm4_moe",
    "gpt_oss",
    "granite",
    "granitemoe",
    "helium",
    "kimi_linear",
    "llama",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "starcoder2",
)

# Where the Auto classes find the code that travels with a checkpoint (`trust_remote_code=True`).
AUTO_MAP = {
    "AutoConfig": "configuration_attnres.AttnResConfig",
    "AutoModel": "modeling_attnres.AttnResModel",
    "AutoModelForCausalLM": "modeling_attnres.AttnResForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_attnres.AttnResForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_attnres.AttnResForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_attnres.AttnResForTokenClassification",
}

ATTN_RES_FIELDS = (
    "base_model_type",
    "attn_res_type",
    "attn_res_block_size",
    "attn_res_scale",
    "attn_res_norm_eps",
    "attn_res_temperature",
)

# What a configuration class says about its models, beside its fields.
_BASE_CLASS_ATTRIBUTES = (
    "attribute_map",
    "keys_to_ignore_at_inference",
    "base_model_tp_plan",
    "base_model_ep_plan",
    "base_model_fsdp_plan",
)


@strict
class AttnResConfig(PreTrainedConfig):
    r"""
    Configuration of an [`AttnResModel`]: a decoder whose residual connections are Attention Residuals
    ([arXiv 2603.15031](https://arxiv.org/abs/2603.15031)).

    It is flat. Every field of the base's configuration is a field of this one, with the base's default, validation and
    alternative names; the fields below come on top.

    Args:
        base_model_type (`str`, *optional*, defaults to `"llama"`):
            The `model_type` of the base, one of `SUPPORTED_BASE_MODEL_TYPES`.
        attn_res_type (`str`, *optional*, defaults to `"block"`):
            The sources that a sublayer attends over. `"block"` (Block AttnRes): the token embedding, the sum of each
            finished block's sublayer outputs, the running sum of the current block. `"full"` (Full AttnRes): the token
            embedding and each earlier sublayer's output.
        attn_res_block_size (`int`, *optional*):
            Decoder layers in a block, between 1 and `num_hidden_layers`. Defaults to the size that comes nearest to 8
            blocks. Full AttnRes does not use it.
        attn_res_scale (`str`, *optional*, defaults to `"sum"`):
            What the weighted mean of the sources is multiplied by. `"sum"`: the number of sources, so that zero queries
            give the standard residual stream. `"mean"`: 1, the paper's form.
        attn_res_norm_eps (`float`, *optional*, defaults to 1e-6):
            The epsilon of the RMSNorm that turns sources into keys.
        attn_res_temperature (`float`, *optional*, defaults to 1.0):
            What the logits `q · RMSNorm(v)` are divided by. An optimizer with normalised steps, like Adam, moves them
            by up to learning rate × `hidden_size` / temperature a step. The paper has none, that is 1.0.
        attn_res_implementation (`str`, *optional*, defaults to `"auto"`):
            What computes the depth attention. `"eager"`: the definition, on a stack of the sources. `"streaming"`: one
            source after the other. `"compiled"`: the same compiled by PyTorch, which on a CPU needs a C++ compiler.
            `"fla"`: the kernel of the package flash-linear-attention, on a CUDA device. `"auto"`: `"fla"` where it is
            at hand and the model is not compiled, else `"streaming"` for many tokens and `"eager"` for few. As with
            `attn_implementation`, it is not saved.
        kwargs:
            The base's own fields.

    Raises:
        `ValueError`: the base is not supported, or a field has an impossible value.

    ```python
    >>> from modeling_attnres import AttnResConfig, AttnResForCausalLM

    >>> config = AttnResConfig(base_model_type="qwen3", num_hidden_layers=4, attn_res_block_size=2)
    >>> model = AttnResForCausalLM(config)
    ```"""

    model_type = "attnres"
    _auto_class = "AutoConfig"

    base_model_type: str = "llama"
    attn_res_type: Literal["block", "full"] = "block"
    attn_res_block_size: int | None = None
    attn_res_scale: Literal["sum", "mean"] = "sum"
    attn_res_norm_eps: float = 1e-6
    attn_res_temperature: float = 1.0
    attn_res_implementation: Literal["auto", "eager", "streaming", "compiled", "fla"] = "auto"

    def __init__(
        self,
        base_model_type: str = "llama",
        attn_res_type: str = "block",
        attn_res_block_size: int | None = None,
        attn_res_scale: str = "sum",
        attn_res_norm_eps: float = 1e-6,
        attn_res_temperature: float = 1.0,
        attn_res_implementation: str = "auto",
        **kwargs,
    ):
        if base_model_type not in SUPPORTED_BASE_MODEL_TYPES or base_model_type not in CONFIG_MAPPING:
            raise ValueError(_unsupported_base_message(base_model_type))
        kwargs.pop("model_type", None)
        base = CONFIG_MAPPING[base_model_type](**kwargs)
        self.__dict__.update(base.__dict__)
        # On the instance, since each base has its own; `_base_view` keeps them out of config.json
        self.__dict__.update({name: getattr(base, name) for name in _BASE_CLASS_ATTRIBUTES if hasattr(base, name)})

        self.base_model_type = base_model_type
        self.attn_res_type = attn_res_type
        self.attn_res_scale = attn_res_scale
        self.attn_res_norm_eps = attn_res_norm_eps
        self.attn_res_temperature = attn_res_temperature
        self.attn_res_implementation = attn_res_implementation
        if attn_res_block_size is None:
            at_most_8 = max(ceil(self.num_hidden_layers / 8), 1)
            sizes = (max(at_most_8 - 1, 1), at_most_8)
            attn_res_block_size = min(sizes, key=lambda size: abs(ceil(self.num_hidden_layers / size) - 8))
        self.attn_res_block_size = attn_res_block_size

    @classmethod
    def from_base_config(cls, base_config: PreTrainedConfig, **attn_res) -> "AttnResConfig":
        r"""
        The AttnRes configuration of a base's configuration.

        Args:
            base_config ([`PreTrainedConfig`]): for instance a `LlamaConfig`.
            attn_res: the `attn_res_*` fields that are to differ from their defaults.
        """
        return cls.from_dict({**base_config.to_dict(), **attn_res})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        r"""
        The configuration in `config_dict`, which may be a base's as well.

        Args:
            config_dict (`dict[str, Any]`): fields as [`~AttnResConfig.to_dict`] gives them, or as a base's does.
            kwargs: fields that are to differ.

        Raises:
            `ValueError`: as when the configuration is made, also for what `kwargs` make of it.
        """
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            config_dict = {"base_model_type": config_dict["model_type"], **config_dict}
        config = super().from_dict(config_dict, **kwargs)
        (config[0] if kwargs.get("return_unused_kwargs") else config).validate()
        return config

    def _base_view(self) -> PreTrainedConfig:
        """The same values as a configuration of the base's class, which knows how to validate and save them."""
        base_class = CONFIG_MAPPING[self.base_model_type]
        view = base_class.__new__(base_class)
        own = {*_BASE_CLASS_ATTRIBUTES, *ATTN_RES_FIELDS, "attn_res_implementation"}
        view.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        return view

    def to_dict(self) -> dict[str, Any]:
        return {**self._base_view().to_dict(), **self._own_items()}

    def to_diff_dict(self) -> dict[str, Any]:
        view = self._base_view()
        diff = view.to_diff_dict()
        # The base leaves out what equals `PreTrainedConfig`'s default, and would read its own default back
        defaults = type(view)().to_dict()
        diff.update({name: value for name, value in view.to_dict().items() if value != defaults.get(name, value)})
        diff.pop("_name_or_path", None)
        return {**diff, **self._own_items(), "auto_map": {**(diff.get("auto_map") or {}), **AUTO_MAP}}

    @property
    def depth_attention_names(self) -> list[str]:
        """The depth attentions in order, by the sublayer that each feeds. The first sublayer has none."""
        sublayers = [f"layer {i} {kind}" for i in range(self.num_hidden_layers) for kind in ("attention", "MLP")]
        return [*sublayers[1:], "output"]

    @property
    def depth_source_names(self) -> list[str]:
        """The sources in order. A depth attention has the first of them, as many as `depth_attention_sources` says."""
        layers, size = self.num_hidden_layers, self.attn_res_block_size
        if self.attn_res_type == "full":
            return ["embedding", *(f"layer {i} {kind}" for i in range(layers) for kind in ("attention", "MLP"))]
        blocks = [(first, min(first + size, layers) - 1) for first in range(0, layers, size)]
        return ["embedding", *(f"layers {a}-{b}" if a < b else f"layer {a}" for a, b in blocks)]

    @property
    def depth_attention_sources(self) -> list[int]:
        """How many sources each depth attention has, in the order of `depth_attention_names`."""
        layers, size = self.num_hidden_layers, self.attn_res_block_size
        if self.attn_res_type == "full":
            return list(range(2, 2 * layers + 2))
        # A block's first attention sees the finished blocks only, every other sublayer the running one too
        attention = [1 + ceil(i / size) for i in range(layers)]
        mlp = [2 + i // size for i in range(layers)]
        return [*(count for pair in zip(attention, mlp) for count in pair), len(self.depth_source_names)][1:]

    def _own_items(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in ATTN_RES_FIELDS}, "model_type": self.model_type}

    def validate_base_fields(self):
        """Part of `@strict`-powered validation: what the base's configuration class checks."""
        self._base_view().validate()

    def validate_attn_res(self):
        """Part of `@strict`-powered validation: AttnRes fields that depend on others."""
        if self.attn_res_block_size is None or not 1 <= self.attn_res_block_size <= max(self.num_hidden_layers, 1):
            raise ValueError(
                f"`attn_res_block_size` is {self.attn_res_block_size}, but a block has between 1 and "
                f"`num_hidden_layers` = {self.num_hidden_layers} decoder layers."
            )
        for name in ("attn_res_norm_eps", "attn_res_temperature"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but it has to be between 0 and infinity.")


def _unsupported_base_message(base_model_type: str) -> str:
    supported = f"Supported: {', '.join(SUPPORTED_BASE_MODEL_TYPES)}."
    if base_model_type not in CONFIG_MAPPING:
        return (
            f"`base_model_type` is {base_model_type!r}, but this version of transformers has no such model. {supported}"
        )
    message = f"`base_model_type` is {base_model_type!r}, which AttnRes does not support. {supported}"
    try:
        differences = _decoder_layer_differences(base_model_type)
    except Exception as error:  # noqa: BLE001  some models cannot be built from their defaults; the refusal stands
        return f"{message} Its decoder could not be inspected: {error}"
    if not differences:
        return f"{message} Its decoder layer has the parts of Llama's, but is not known to compute the same."
    return f"{message} Its decoder layer differs from Llama's: {'; '.join(differences)}."


def _decoder_layer_differences(base_model_type: str) -> list[str]:
    """The parts in which the last decoder layer of a model differs from Llama's."""
    llama, parts = _decoder_layer_parts("llama"), _decoder_layer_parts(base_model_type)
    if not parts:
        return ["the model has no `layers`"]
    differences = [f"no `{name}`" for name in llama if name not in parts]
    return differences + [f"a `{name}` ({kind})" for name, kind in parts.items() if name not in llama]


def _decoder_layer_parts(model_type: str) -> dict[str, str]:
    """The names of the last decoder layer's modules and of their classes."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(CONFIG_MAPPING[model_type]())
    if not hasattr(model, "layers"):
        return {}
    return {name: type(part).__name__ for name, part in model.layers[-1].named_children()}
