"""Other reads, as an experiment: an input-dependent query, and a separate read for the values of attention.

Both are exact at step 0: the input-dependent part is zero, and the separate read has the same zero query.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from modeling_attnres.depth_attention import DepthAttention, depth_attention
from modeling_attnres.modeling_attnres import decoder_layers


class InputDependentDepthAttention(DepthAttention):
    """Depth attention with the query `q + B · A · RMSNorm(Σᵢ vᵢ) / rank`, separately at each position."""

    def __init__(self, config, rank: int):
        super().__init__(config)
        self.down = nn.Linear(config.hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, config.hidden_size, bias=False)
        nn.init.normal_(self.down.weight, std=config.hidden_size**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, *sources: torch.Tensor) -> torch.Tensor:
        stream = torch.stack(sources).sum(0)
        # Divided by the rank: a step of Adam then changes the logits as much as that of a static query does
        query = self.query + self.up(self.down(F.rms_norm(stream, self.query.shape))) / self.up.in_features
        return depth_attention(query / self.temperature, self.key_norm, sources, self.scale, self.eps)


def add_input_dependent_queries(model: nn.Module, rank: int) -> None:
    for layer in decoder_layers(model.model):
        for name in (*layer.read_names, "output_res"):
            if getattr(layer, name) is not None:
                setattr(layer, name, InputDependentDepthAttention(model.config, rank))


def add_value_reads(model: nn.Module) -> None:
    """In a Llama, the input of `v_proj` becomes a read of its own, `value_res`."""
    for layer in decoder_layers(model.model):
        # The first layer has a single source
        if "self_attention_res" in layer.read_names:
            layer.value_res = DepthAttention(model.config)
            seen = {}
            layer.self_attention_res.register_forward_pre_hook(partial(remember, seen))
            layer.self_attn.v_proj.register_forward_pre_hook(partial(read_values, layer, seen))


def remember(seen: dict, module: nn.Module, sources: tuple[torch.Tensor, ...]) -> None:
    seen["sources"] = sources


def read_values(layer: nn.Module, seen: dict, module: nn.Module, args: tuple) -> torch.Tensor:
    return layer.input_layernorm(layer.value_res(*seen.pop("sources")))


def add_reads(model: nn.Module, kind: str) -> None:
    """`kind` is "values", or "query" and a rank, for instance "query16"."""
    if kind == "values":
        add_value_reads(model)
    else:
        add_input_dependent_queries(model, int(kind.removeprefix("query")))
