# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Attention Residuals for transformers. Importing this registers the classes with the Auto classes."""

import transformers
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from . import modeling_attnres
from .configuration_attnres import AUTO_MAP, AttnResConfig
from .depth_attention import DepthAttention
from .modeling_attnres import (
    AttnResForCausalLM,
    AttnResForQuestionAnswering,
    AttnResForSequenceClassification,
    AttnResForTokenClassification,
    AttnResModel,
    AttnResPreTrainedModel,
)
from .training import ATTN_RES_MODULES, attn_res_parameter_groups, with_base_targets


transformers.AutoConfig.register("attnres", AttnResConfig)
for auto_class, path in AUTO_MAP.items():
    if auto_class != "AutoConfig":
        getattr(transformers, auto_class).register(AttnResConfig, getattr(modeling_attnres, path.split(".")[1]))

# PEFT converts adapters of transformers 4 only for a `model_type` that is registered. The mapping of each base is
# registered with its decoder
register_checkpoint_conversion_mapping("attnres", [], overwrite=True)

__all__ = [
    "ATTN_RES_MODULES",
    "AttnResConfig",
    "AttnResForCausalLM",
    "AttnResForQuestionAnswering",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
    "AttnResModel",
    "AttnResPreTrainedModel",
    "DepthAttention",
    "attn_res_parameter_groups",
    "with_base_targets",
]
