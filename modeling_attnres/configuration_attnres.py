# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""AttnRes configuration: the fields of a base's configuration, and those of Attention Residuals."""

from math import ceil, inf
from typing import TYPE_CHECKING, Any, Literal

import transformers
from packaging.version import Version


if Version(transformers.__version__) < Version("5.16"):
    raise ImportError(f"AttnRes models need transformers 5.16 or newer, found {transformers.__version__}.")

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers import CONFIG_MAPPING, PreTrainedConfig  # noqa: E402


if TYPE_CHECKING:
    # Tools that copy this file for a configuration (mergekit) also copy the files that it imports. Older releases of
    # transformers copy no others, and fail before the check above if one is missing
    from .depth_attention import DepthAttention  # noqa: F401
    from .modeling_attnres import AttnResModel  # noqa: F401
    from .residual_stream import ResidualStream  # noqa: F401


# Where the Auto classes find the code in a checkpoint's folder (`trust_remote_code=True`)
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
    "attn_res_value_read",
)

# The default temperature of a retrofit is its width divided by this constant. With one learning rate, the logits then
# change equally fast at all widths
WIDTH_AT_TEMPERATURE_1 = 128

# `attn_res_implementation` is not saved
OWN_FIELDS = (*ATTN_RES_FIELDS, "attn_res_implementation")

# Attributes of a configuration class that describe its models
BASE_CLASS_ATTRIBUTES = (
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

    It is flat: the fields of the base's configuration, with the base's defaults, validation and alternative names, are
    fields of this one.

    Args:
        base_model_type (`str`, *optional*, defaults to `"llama"`):
            The `model_type` of the base: a causal language model in transformers whose decoder layers add their
            sublayers' outputs to a residual stream.
        attn_res_type (`str`, *optional*, defaults to `"block"`):
            The sources of the depth attention. `"block"` (Block AttnRes): the token embedding, the sum of each finished
            block's sublayer outputs, and the running sum of the current block. `"full"` (Full AttnRes): the token
            embedding and the output of every earlier sublayer.
        attn_res_block_size (`int`, *optional*):
            The number of decoder layers in a block. The last block may have fewer. The default gives about 8 blocks.
            Full AttnRes does not use it.
        attn_res_scale (`str`, *optional*, defaults to `"sum"`):
            The factor of the weighted mean. `"sum"`: the number of sources, so that zero queries give the standard
            residual stream. `"mean"`: 1, the paper's form.
        attn_res_norm_eps (`float`, *optional*, defaults to 1e-6):
            The epsilon of the keys' RMSNorm.
        attn_res_temperature (`float`, *optional*, defaults to 1.0):
            The divisor of the logits `q · RMSNorm(v)`. With Adam, a step moves the logits by up to learning rate ×
            `hidden_size` / temperature. The paper has no temperature, which equals 1.0. For a retrofit, the default is
            `hidden_size` / 128.
        attn_res_value_read (`bool`, *optional*, defaults to `False`):
            Whether attention computes its values from a second read of the same sources, with a query of its own. Not
            in the paper. The base's attention must have a projection `v_proj`.
        attn_res_implementation (`str`, *optional*, defaults to `"auto"`):
            The implementation of the depth attention, which is not saved. `"eager"`: the definition, on a stack of the
            sources. `"streaming"`: the sources are read one by one. `"compiled"`: the same compiled by PyTorch, which
            needs a C++ compiler on a CPU. `"fla"`: the kernel of flash-linear-attention on a CUDA device. `"auto"`:
            `"fla"` if available and the model is not compiled, else `"streaming"` for many tokens, `"eager"` for few.
        kwargs:
            The fields of the base.

    Raises:
        `ValueError`: transformers has no such base, or a field is out of range.

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
    attn_res_value_read: bool = False
    attn_res_implementation: Literal["auto", "eager", "streaming", "compiled", "fla"] = "auto"

    def __init__(self, base_model_type: str = "llama", **kwargs):
        if base_model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"`base_model_type` is {base_model_type!r}, but transformers {transformers.__version__} has no such "
                "model: check the spelling, or update transformers."
            )
        own = {name: kwargs.pop(name, getattr(AttnResConfig, name)) for name in OWN_FIELDS}
        kwargs.pop("model_type", None)
        base = CONFIG_MAPPING[base_model_type](**kwargs)
        if base.get_text_config() is not base:
            raise ValueError(
                f"`base_model_type` is {base_model_type!r}, a model with a text model of type "
                f"{base.get_text_config().model_type!r} inside. Extract the text model and convert that."
            )
        self.__dict__.update(base.__dict__)
        # On the instance, since each base has its own; `_base_view` keeps them out of config.json
        self.__dict__.update({name: getattr(base, name) for name in BASE_CLASS_ATTRIBUTES if hasattr(base, name)})
        for name, value in {**own, "base_model_type": base_model_type}.items():
            setattr(self, name, value)
        if self.attn_res_block_size is None:
            at_most_8 = max(ceil(self.num_hidden_layers / 8), 1)
            sizes = (max(at_most_8 - 1, 1), at_most_8)
            self.attn_res_block_size = min(sizes, key=lambda size: abs(ceil(self.num_hidden_layers / size) - 8))

    def __getattr__(self, name: str) -> Any:
        # Properties and class attributes of the base's configuration
        base_class = CONFIG_MAPPING[vars(self)["base_model_type"]] if "base_model_type" in vars(self) else None
        if hasattr(base_class, vars(self).get("attribute_map", {}).get(name, name)) and not name.startswith("__"):
            return getattr(self._base_view(), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
        The configuration in `config_dict`, which can also be that of a base.

        Args:
            config_dict (`dict[str, Any]`): the fields as in [`~AttnResConfig.to_dict`], or those of a base.
            kwargs: fields that are to differ.

        Raises:
            `ValueError`: as in [`AttnResConfig`]. The values in `kwargs` are validated too.
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
        own = (*BASE_CLASS_ATTRIBUTES, *OWN_FIELDS)
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
        # The class of a decoder is named after its base, but AUTO_MAP names one for all
        if any(name.startswith("AttnRes") and name.endswith("Model") for name in diff.get("architectures") or ()):
            diff["architectures"] = ["AttnResModel"]
        return {**diff, **self._own_items(), "auto_map": {**(diff.get("auto_map") or {}), **AUTO_MAP}}

    def _own_items(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in ATTN_RES_FIELDS}, "model_type": self.model_type}

    def validate_base_fields(self):
        """Part of `@strict`-powered validation: what the base's configuration class checks."""
        self._base_view().validate()

    def validate_attn_res(self):
        """Part of `@strict`-powered validation: AttnRes fields that depend on others."""
        if self.attn_res_block_size is None or self.attn_res_block_size < 1:
            raise ValueError(f"`attn_res_block_size` is {self.attn_res_block_size}, but a block has at least 1 layer.")
        for name in ("attn_res_norm_eps", "attn_res_temperature"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but it has to be between 0 and infinity.")
