# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""
AttnRes models in vLLM: a plugin, which vLLM loads by itself where this package is installed.

The models are those of vLLM's Transformers backend, with three additions. A pipeline stage sends all its sources to the
next one. vLLM recognizes latent attention and mixtures of experts, which it finds by the `model_type` of the base. The
depth attention has operators for inference: the fused kernel of flash-linear-attention in compiled graphs, and matrix
products for few tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.distributed.utils import get_pp_indices
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer, make_empty_intermediate_tensors_factory
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from .depth_attention import ATTN_RES_IMPLEMENTATIONS, STREAMING_SIZE, auto_depth_attention, fla_kernel
from .modeling_attnres import decoder_layers
from .residual_stream import ResidualStream
from .training import ATTN_RES_MODULES


class Receive(PPMissingLayer):
    """Stands before the first layer of a pipeline stage, whose input is the sources side by side."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> ResidualStream:
        return ResidualStream(hidden_states.split(self.hidden_size, dim=-1))


# The compiler does not look into this operation. With `torch.cat`, compiled stages gave wrong values in torch 2.13 on a
# CPU, probably because block sums were added up before vLLM's matrix products had written their outputs
@torch.library.custom_op("attnres::side_by_side", mutates_args=())
def side_by_side(sources: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(sources, dim=-1)


@side_by_side.register_fake
def _(sources):
    return torch.cat(sources, dim=-1)


class Send(PPMissingLayer):
    """Stands after the last layer of a pipeline stage."""

    def forward(self, stream: ResidualStream, *args, **kwargs) -> torch.Tensor:
        return side_by_side(stream.sources)


def materialize_finished_block(layer: torch.nn.Module, sources: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """For the first layer of a block. Otherwise, the compiler adds up a finished block again in each read."""
    return (*sources[:-1], side_by_side(sources[-1:])) if torch.compiler.is_compiling() else sources


# The compiler cannot trace the kernel, so `auto` does not use it in a compiled graph. The compiler does not trace this
# operation, which has no gradient
@torch.library.custom_op("attnres::depth_attention", mutates_args=())
def depth_attention_op(
    query: torch.Tensor, key_norm: torch.Tensor, sources: list[torch.Tensor], scale: str, eps: float
) -> torch.Tensor:
    return auto_depth_attention(query, key_norm, sources, scale, eps)


@depth_attention_op.register_fake
def _(query, key_norm, sources, scale, eps):
    return torch.empty_like(sources[0])


def depth_attention_with_kernel(query, key_norm, sources, scale, eps) -> torch.Tensor:
    attend = depth_attention_op if torch.compiler.is_compiling() else auto_depth_attention
    return attend(query, key_norm, list(sources), scale, eps)


def depth_attention_without_kernel(query, key_norm, sources, scale, eps) -> torch.Tensor:
    is_small = not torch.compiler.is_compiling() and len(sources) * sources[0].numel() <= STREAMING_SIZE
    attend = batched_depth_attention if is_small else auto_depth_attention
    return attend(query, key_norm, sources, scale, eps)


def batched_depth_attention(query, key_norm, sources, scale, eps) -> torch.Tensor:
    """Depth attention by matrix products: fewer calls, but autocast would round them, and their gradients."""
    values = torch.stack(sources, dim=-2)
    if values.dtype.itemsize < 4:
        values = values.float()
    scaled_query = query.to(values.dtype) * key_norm.to(values.dtype)
    mean_squares = torch.linalg.vector_norm(values, dim=-1).square() / query.shape[-1]
    weights = (values @ scaled_query / (mean_squares + eps).sqrt()).softmax(dim=-1)
    if scale == "sum":
        weights = weights * len(sources)
    return (weights.unsqueeze(-2) @ values).squeeze(-2).to(sources[0].dtype)


class AttnResMixin:
    """For the classes of vLLM's Transformers backend."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        has_kernel = self.device_config.device_type == "cuda" and fla_kernel() is not None
        ATTN_RES_IMPLEMENTATIONS["auto"] = depth_attention_with_kernel if has_kernel else depth_attention_without_kernel
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], self.num_sources * self.text_config.hidden_size
        )
        for layer in decoder_layers(self.model):
            if getattr(layer, "is_block_boundary", False) and not layer.is_full:
                layer.register_forward_pre_hook(materialize_finished_block)

    def _patch_config(self):
        super()._patch_config()
        # vLLM takes the activation of experts from the name of the class
        self.config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.config.base_model_type]]

    def pipeline_parallel(self):
        layers = decoder_layers(self.model)
        start, end = get_pp_indices(len(layers), self.pp_group.rank_in_group, self.pp_group.world_size)
        # The embedding, and those that the earlier stages' layers open
        opened = [layer.num_outputs if layer.is_full else layer.is_block_boundary for layer in layers[:start]]
        self.num_sources = 1 + sum(opened)
        super().pipeline_parallel()
        if start > 0:
            layers[start - 1] = Receive(self.text_config.hidden_size)
            self.check_input_reaches(layers[start - 1])
        if end < len(layers):
            layers[end] = Send()

    def check_input_reaches(self, first: Receive):
        """Some decoders scale the embedding before the first layer, and would scale the sources in each stage again."""
        received = []

        def receive(module, args):
            received.extend(args)
            raise StopIteration

        hook = first.register_forward_pre_hook(receive)
        sent = torch.arange(2.0 * self.num_sources * first.hidden_size).view(1, 2, -1)
        with suppress(Exception):
            self.model.forward(inputs_embeds=sent, position_ids=torch.arange(2)[None], use_cache=False)
        hook.remove()
        if not received or not torch.equal(received[0], sent):
            raise ValueError(
                f"`pipeline_parallel_size` is {self.pp_group.world_size}, but the decoder of "
                f"{self.config.base_model_type!r} changes the embedding before its first layer, and would change the "
                "sources in each stage. Use tensor parallelism instead: `--tensor-parallel-size N`."
            )


class AttnResForCausalLM(AttnResMixin, TransformersForCausalLM):
    pass


class AttnResMoEForCausalLM(AttnResMixin, TransformersMoEForCausalLM):
    pass


def arch_config_convertor(hf_config, hf_text_config, **kwargs) -> ModelArchConfigConvertorBase:
    """vLLM looks up by `model_type` how to read a configuration. An AttnRes one is read as its base's."""
    base_config = hf_config._base_view()
    convertor_class = MODEL_ARCH_CONFIG_CONVERTORS.get(hf_config.base_model_type, ModelArchConfigConvertorBase)
    convertor = convertor_class(base_config, base_config, **kwargs)
    if convertor.get_num_experts() and hf_config.architectures == ["AttnResForCausalLM"]:
        # The first is for the checks before loading, the second names the class that is loaded
        base_config.architectures = hf_config.architectures = ["AttnResMoEForCausalLM"]
    return convertor


def refusing_depth_attention(validate_legal: Callable) -> Callable:
    """vLLM loads only LoRA weights for a request, and no other modules."""

    @wraps(validate_legal)
    def validate(self: PEFTHelper, lora_config) -> None:
        trained = [name for name in self.modules_to_save or () if name in ATTN_RES_MODULES]
        if trained:
            raise ValueError(
                f"The adapter also trains the depth attention (`modules_to_save` is {trained}), which vLLM cannot load "
                "as an adapter. Merge it into its model first, and serve the merged one: `attnres merge ADAPTER MERGED`"
            )
        validate_legal(self, lora_config)

    return validate


def register():
    """The entry point of the group `vllm.general_plugins`."""
    MODEL_ARCH_CONFIG_CONVERTORS["attnres"] = arch_config_convertor
    for model_class in (AttnResForCausalLM, AttnResMoEForCausalLM):
        ModelRegistry.register_model(model_class.__name__, model_class)
    PEFTHelper.validate_legal = refusing_depth_attention(PEFTHelper.validate_legal)
